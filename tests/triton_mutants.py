"""Planted bugs, run in Triton's interpreter by test_triton.py (with triton_plugin --small-blocks): one change at a time
to the kernels' sources, and a handful of problems must notice. A mutant that survives is a hole in the problems."""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from inputs import BF16, CHUNK, FP16, Case, make_inputs, reference_of, run_backend
from test_loss import Problem
from tolerances import assert_close_to_reference
from triton_plugin import sweep_in_small_blocks

import fastkd
from fastkd.triton import launch, ops

SOURCES = ("row.py", "pieces.py", "kernels.py", "ends.py", "launch.py")


class Mutant(NamedTuple):
    """Replace `old`, which must occur in fastkd/triton/`file` exactly `times`, by `new`."""

    file: str
    old: str
    new: str
    times: int = 1


MUTANTS = {
    # masks
    "the mask of a load is one column wide of the row": Mutant(
        "kernels.py", "mask=columns < width, other=float(\"-inf\")", "mask=columns <= width, other=float(\"-inf\")"
    ),
    "columns beyond the row count as logits of 0": Mutant(
        "kernels.py", "mask=columns < width, other=float(\"-inf\")", "mask=columns < width, other=0.0"
    ),
    "the padding counts in label smoothing": Mutant(
        "row.py", "return tl.minimum(tl.maximum(left, 0), VECTOR)", "return tl.maximum(left * 0, VECTOR)"
    ),
    "0 times infinity counts": Mutant("row.py", "tl.where(weight > 0, weight * value, 0.0)", "weight * value"),
    "columns beyond the shared vocabulary get a gradient": Mutant(
        "kernels.py", "tl.where(columns < columns_shared, d, 0.0)", "d + 0.0 * columns_shared"
    ),
    # rescaling
    "sums are not rebased": Mutant(
        "row.py", "sum_s, sum_t = p.sum_s * scale_s, p.sum_t * scale_t", "sum_s, sum_t = p.sum_s, p.sum_t"
    ),
    "the dot product is not rebased": Mutant("row.py", "p.sum_t * (shift_t - shift_s)", "p.sum_t * 0.0"),
    "the hard sum is rebased by the tempered factor": Mutant(
        "row.py", "sum_hard *= tl.exp2(soft.temperature * shift_s)", "sum_hard *= scale_s"
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
    "32-bit offsets": Mutant("kernels.py", "(n // inner).to(tl.int64) * outer_stride", "(n // inner) * outer_stride"),
    "the outer stride is left out": Mutant(
        "kernels.py", "(n // inner).to(tl.int64) * outer_stride + ", "0 * outer_stride + "
    ),
    # the rest of a row
    "ignored rows get a gradient": Mutant(
        "kernels.py", "tl.store(gradient + columns, zeros", "tl.store(gradient + columns, zeros + 1"
    ),
    "ignored rows count in the mean": Mutant("ends.py", "tl.where(counts, weight, 0.0)", "weight"),
    "the label's column is missed": Mutant("row.py", "columns == label, c.label", "columns == label - 1, c.label"),
    "T for T squared": Mutant("kernels.py", "soft.temperature * soft.temperature", "soft.temperature"),
    "fp16 gradients are divided twice": Mutant("ends.py", "1.0 if NORMALISED else scale", "scale"),
    "upstream of the first row for all": Mutant("ends.py", "n.to(tl.int64) * upstream_stride", "0 * n"),
    "the tie of total_variation takes a side": Mutant("row.py", "tl.where(tie, 0.0, dlogq)", "dlogq"),
    "the top of a later lane wins a tie": Mutant(
        "row.py", "tl.min(tl.where(p.largest_s == largest_s, p.top_s, NO_COLUMN), axis=0)",
        "tl.max(tl.where(p.largest_s == largest_s, p.top_s, -1), axis=0)",
    ),
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
    _offset_kernel[(1,)](out, torch.tensor([20000], dtype=torch.int32), 128256, host.kernels.row_offset)
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
    text = path.read_text()
    assert text.count(mutant.old) == mutant.times, f"{mutant.file} has {text.count(mutant.old)} times: {mutant.old}"
    path.write_text(text.replace(mutant.old, mutant.new))
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
