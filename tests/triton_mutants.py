"""Planted bugs, run in Triton's interpreter by test_triton.py (with triton_plugin --small-blocks): one change at a time
to the kernels' sources, and a handful of problems must notice. A mutant that survives is a hole in the problems."""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from inputs import BF16, CHUNK, FP16, Case, make_inputs, reference_of, run_backend
from mutants import Mutant
from test_loss import Problem
from tolerances import assert_close_to_reference
from triton_plugin import sweep_in_small_blocks

import fastkd
from fastkd.triton import launch, ops

SOURCES = ("row.py", "pieces.py", "blocks.py", "kernels.py", "ends.py", "launch.py")


MUTANTS = {  # files of fastkd/triton
    # masks
    "the mask of a row that begins anywhere is one column wide of it": Mutant(
        "blocks.py", "[None, :] < left[:, None]", "[None, :] <= left[:, None]"
    ),
    "the mask of an aligned row is one vector wide of it": Mutant(
        "blocks.py", "< width // VECTOR * VECTOR  # a multiple", "< width // VECTOR * VECTOR + VECTOR  # a multiple"
    ),
    "columns beyond the row count as logits of 0": Mutant("blocks.py", "x = float(\"-inf\")", "x = 0.0"),
    "16-bit columns beyond the row count as logits of 0": Mutant(
        "blocks.py", "tl.where(fp16, -1024, -128)", "tl.where(fp16, 0, 0)"
    ),
    "a mask of fp16 beyond a row of bf16": Mutant(
        "blocks.py", "tl.where(fp16, -1024, -128)", "tl.where(fp16, -128, -1024)"
    ),
    "every row is taken as aligned": Mutant("launch.py", "row.WIDE: wide", "row.WIDE: True"),
    "fp16 is read as bf16": Mutant("launch.py", "row.STUDENT_FP16: fp16[0]", "row.STUDENT_FP16: False"),
    "the teacher is read as the student": Mutant("launch.py", "row.TEACHER_FP16: fp16[1]", "row.TEACHER_FP16: fp16[0]"),
    "the padding counts in label smoothing": Mutant(
        "row.py", "seen += tl.minimum(tl.maximum(left, 0), s.shape[1])", "seen += tl.maximum(left * 0, s.shape[1])"
    ),
    "0 times infinity counts": Mutant("row.py", "tl.where(weight > 0, weight * value, 0.0)", "weight * value"),
    "columns beyond the shared vocabulary get a gradient": Mutant(
        "kernels.py", "if shared_width < width:", "if shared_width > width:"
    ),
    # rescaling
    "sums of blocks are not rebased": Mutant("row.py", "p.sum_s * scale_s + tl.sum(e_s", "p.sum_s + tl.sum(e_s"),
    "sums of lanes are not rebased": Mutant("row.py", "tl.sum(p.sum_t * scale_t, axis=0)", "tl.sum(p.sum_t, axis=0)"),
    "the dot product is not rebased": Mutant("row.py", "total * shift)", "total * 0.0)"),
    "the hard sum is rebased by the tempered factor": Mutant(
        "row.py", "p.sum_hard * tl.exp2(soft.temperature * shift_s)", "p.sum_hard * tl.exp2(shift_s)"
    ),
    # tails and splits
    "the last block of a row is dropped": Mutant(
        "kernels.py", "tl.cdiv(width, LANES * VECTOR)", "width // (LANES * VECTOR)", 2
    ),
    "the last block of the gradient is dropped": Mutant(
        "kernels.py", "tl.cdiv(gradient_width, LANES * VECTOR)", "gradient_width // (LANES * VECTOR)"
    ),
    "the last piece of a row is not merged": Mutant("pieces.py", "lane < count,", "lane < count - 1,"),
    "the first piece stands for all": Mutant("pieces.py", "at + lane * FIELDS", "at + lane * 0"),
    # offsets
    "32-bit offsets": Mutant("blocks.py", "(n // inner).to(tl.int64) * outer_stride", "(n // inner) * outer_stride"),
    "the outer stride is left out": Mutant(
        "blocks.py", "(n // inner).to(tl.int64) * outer_stride + ", "0 * outer_stride + "
    ),
    # the rest of a row
    "ignored rows get a gradient": Mutant(
        "blocks.py", "tl.zeros([LANES, VECTOR], tl.float32)", "tl.zeros([LANES, VECTOR], tl.float32) + 1"
    ),
    "ignored rows count in the mean": Mutant("ends.py", "(n < rows) & (label != ignore_index)", "n < rows"),
    "the label's column is missed": Mutant("row.py", "label.to(tl.int32) - first", "label.to(tl.int32) - 1 - first"),
    "T for T squared": Mutant("kernels.py", "soft.temperature * soft.temperature", "soft.temperature"),
    "fp16 gradients are divided twice": Mutant("ends.py", "tl.where(normalised, 1.0, scale)", "scale"),
    "upstream of the first row for all": Mutant("ends.py", "n.to(tl.int64) * upstream_stride", "0 * n"),
    "the tie of total_variation takes a side": Mutant("row.py", "tl.where(tie, 0.0, dlogq)", "dlogq"),
    "the top of a later lane wins a tie": Mutant(
        "row.py", "tl.min(tl.where(p.largest_s == largest_s, p.top_s, NO_COLUMN), axis=0)",
        "tl.max(tl.where(p.largest_s == largest_s, p.top_s, -1), axis=0)",
    ),
    "weights are not asked for": Mutant("launch.py", "row.WEIGHTS: call.weights is not None", "row.WEIGHTS: False"),
    "a cross-entropy of weight 1": Mutant("kernels.py", "tl.where(o.ce_weight == 0, 0.0, o.ce_weight * ce)", "ce"),
    "the chain rule of the softcap": Mutant("kernels.py", "1.0, 1.0 - u * u)", "1.0, 1.0 - u)"),
}  # fmt: skip

_V = CHUNK // 2 + 9  # two or three blocks, the last of them nearly empty
CASES = [
    (Case("tail and splits", lead=(3,), vocab=_V, regime="late_top", temperature=3.0), "forward_kl", True),
    (Case("masked columns", lead=(3,), vocab=_V, regime="masked_teacher"), "forward_kl", True),
    (Case("padding", lead=(3,), vocab=_V, layout="padded", student_dtype=BF16, teacher_dtype=BF16), "jsd", True),
    (Case("two strides", lead=(3, 4), vocab=33, layout="shifted"), "reverse_kl", True),
    (Case("ties", lead=(2,), vocab=300, regime="flat"), "total_variation", False),
    (Case("fp16 mean", lead=(4,), vocab=300, student_dtype=FP16, teacher_dtype=FP16), "forward_kl", False),
    (
        Case(
            "several blocks a program, two dtypes",
            lead=(8,),
            vocab=_V,
            regime="ascending",
            student_dtype=FP16,
            teacher_dtype=BF16,
        ),
        "symmetric_kl",
        True,
    ),
    (Case("truncated", lead=(2,), vocab=600, teacher_vocab=320, options={"vocab": "truncate"}), "symmetric_kl", True),
]


@triton.jit
def _offset_kernel(out, n, outer_stride, OFFSET: tl.constexpr):
    tl.store(out, OFFSET(tl.load(n), 1, outer_stride, 0))


def _check_ties() -> None:
    """Two columns change places, the others are ties; the tolerance of the table would excuse either side of a tie."""
    student = torch.randn(2, 300)
    teacher = student.clone()
    teacher[:, [0, 1]] = student[:, [1, 0]]
    leaf = student.clone().requires_grad_()
    options = {"divergence": "total_variation", "reduction": "sum", "backend": "triton"}
    (gradient,) = torch.autograd.grad(fastkd.kd_loss(leaf, teacher, **options), leaf)
    q = student.double().softmax(-1)
    dlogq = -0.5 * q * (teacher - student).sign()
    torch.testing.assert_close(gradient.double(), dlogq - q * dlogq.sum(-1, keepdim=True), rtol=1e-4, atol=1e-7)


def _check_all(problems: list[Problem], host=launch) -> None:
    out = torch.zeros(1, dtype=torch.int64)
    blocks = importlib.import_module(f"{host.__package__}.blocks")
    _offset_kernel[(1,)](out, torch.tensor([20000], dtype=torch.int32), 128256, blocks.row_offset)
    assert int(out) == 20000 * 128256
    _check_ties()
    for problem in problems:
        problem.check(problem.run(backend="triton"))
    inputs = make_inputs(Case("mean, softcap", lead=(6,), vocab=300))
    options = {"labels": inputs.labels, "ce_weight": 0.5, "student_softcap": 3.0, "backend": "triton"}
    eager = run_backend(inputs, {**options, "backend": "eager"}, in_fp32=True)
    assert_close_to_reference(run_backend(inputs, options), reference_of(inputs, options), eager)


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return [Problem(*row) for row in CASES]


def _planted(mutant: Mutant, folder: Path, name: str):
    """launch.py of a copy of the kernels with the change; a package of its own name."""
    package = folder / name
    package.mkdir()
    (package / "__init__.py").touch()
    home = Path(launch.__file__).parent
    for source in SOURCES:
        shutil.copy(home / source, package / source)
    path = package / mutant.file
    path.write_text(mutant.planted_in(path.read_text()))
    return importlib.import_module(f"{name}.launch")


def test_the_original_passes(problems: list[Problem]) -> None:
    _check_all(problems)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, problems: list[Problem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    planted = _planted(MUTANTS[name], tmp_path, f"mutant_{list(MUTANTS).index(name)}")
    sweep_in_small_blocks(planted)
    monkeypatch.setattr(ops, "run_loss", planted.run_loss)
    monkeypatch.setattr(ops, "run_rescale", planted.run_rescale)
    with pytest.raises((AssertionError, RuntimeError)):
        _check_all(problems, planted)
