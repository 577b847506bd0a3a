"""Planted bugs in the Triton kernels with a sparse teacher and their host side, run in Triton's interpreter by
test_triton_sparse.py (with triton_plugin): one change at a time, and a handful of problems must notice."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton
import triton.language as tl
from inputs import BF16, Case
from mutants import Mutant
from sparse_cases import SparseCase
from test_sparse import Problem
from triton_sparse import take

import fastkd
from fastkd import TopKTeacher
from fastkd.triton import sparse

HOME = Path(sparse.__file__).parent
SOURCES = ("sparse.py", "sparse_kernels.py", "sparse_named.py", "sparse_plan.py", "sparse_row.py")


MUTANTS = {  # "host": sparse.py of fastkd/triton; others: sparse_*.py
    # masks
    "the mask of a load is one column wide of the row": Mutant(
        "kernels", "mask=columns < student.width, other=float(\"-inf\"))\n        s =",
        "mask=columns <= student.width, other=float(\"-inf\"))\n        s =",
    ),
    "columns beyond the row count as logits of 0": Mutant(
        "kernels", "mask=columns < student.width, other=float(\"-inf\"))\n        s =",
        "mask=columns < student.width, other=0.0)\n        s =",
    ),
    "the padding counts in label smoothing": Mutant(
        "row", "tl.where(columns < width, (s - reference) * soft.slope, 0.0)",
        "tl.where(columns < width, (s - reference) * soft.slope, 1.0)",
    ),
    "0 times infinity counts": Mutant("row", "tl.sum(weigh(e, y), axis=1)", "tl.sum(e * y, axis=1)"),
    "the last entry is not gathered": Mutant("named", "mask=i < named.count, other=NO_COLUMN",
                                             "mask=i < named.count - 1, other=NO_COLUMN"),
    # rescaling
    "the sum is not rebased": Mutant("row", "p.sum * scale, sum_hard", "p.sum, sum_hard"),
    "the entropy is not rebased": Mutant("row", "p.sum * shift)", "p.sum * 0.0)"),
    "the hard sum is rebased by the tempered factor": Mutant(
        "row", "sum_hard * tl.exp2(soft.temperature * shift)", "sum_hard * scale"
    ),
    "the rest is joined relative to its own largest logit": Mutant("row", "rest.sum * tl.exp2(shift)", "rest.sum"),
    "the named columns are left out of the peak": Mutant(
        "named", "tl.maximum(rest.largest, tl.max(peaks, axis=0))", "rest.largest + 0.0 * tl.max(peaks, axis=0)"
    ),
    # blocks, pieces, programs
    "the last piece of a row is not merged": Mutant("kernels", "lane < count,", "lane < count - 1,"),
    "the first block of the gradient is dropped": Mutant("kernels", "first + last - 1 - i", "first + last - i"),
    "a program takes the next row": Mutant("kernels", "n += tl.num_programs(0)", "n += 1"),
    # entries
    "the last entry of a block is lost": Mutant("kernels", "for i in range(first, last):\n        column",
                                                "for i in range(first, last - 1):\n        column"),
    "an entry at a block's beginning is the block's before": Mutant(
        "host", "starts, out_int32=True", "starts, out_int32=True, right=True"
    ),
    "an entry masks its neighbour": Mutant("kernels", "1 << within, 0", "2 << within, 0"),
    "the loops over K are short by a step": Mutant("named", "range(0, named.count, ENTRIES)",
                                                   "range(0, named.count - ENTRIES, ENTRIES)", 4),
    "the gradients of the last entries are not stored": Mutant("kernels", "range(first, last, ENTRIES)",
                                                               "range(first, last - ENTRIES, ENTRIES)"),
    "a column drawn twice counts once": Mutant("host", "torch.where(head, total, 0.0)", "torch.where(head, w, 0.0)"),
    # the rest
    "the rest's term is dropped": Mutant("named", "(outcomes.value + value)", "outcomes.value"),
    "the rest's mass is dropped": Mutant("named", "mass = tl.load", "mass = 0.0 * tl.load"),
    "the rest's own gradient is dropped": Mutant("named", "of_dlogq * dlogq_rest / ", "0.0 * dlogq_rest / "),
    "a mass that rounding left counts": Mutant("row", "& (mass <= resolution)", "& (mass < 0)"),
    # rows
    "ignored rows count": Mutant("kernels", "(label == ignore_index)", "(label == ignore_index + 1)", 3),
    "ignored rows get a gradient": Mutant("kernels", "zeros = tl.zeros(", "zeros = 1 + tl.zeros("),
    "32-bit offsets": Mutant("kernels", "(n // inner).to(tl.int64) * outer", "(n // inner) * outer"),
    "the outer stride is left out": Mutant("kernels", "(n // inner).to(tl.int64) * outer +", "0 * outer +"),
    "rows begin at 16 bytes": Mutant("kernels", "at += start", "at += 0 * start"),
    "strides count elements": Mutant("kernels", "(n % inner).to(tl.int64) * stride) * UNIT",
                                     "(n % inner).to(tl.int64) * stride)"),
    # options
    "the temperature of a row is ignored": Mutant("named", "(flags & TEMPERATURES) != 0", "(flags & TEMPERATURES) < 0"),
    "the weight of a token is ignored": Mutant("named", "(flags & WEIGHTS) != 0", "(flags & WEIGHTS) < 0"),
    "T for T squared": Mutant("named", "soft.temperature * soft.temperature", "soft.temperature"),
    "renormalised at the temperature of the teacher": Mutant("host", "teacher.temperature / temperature", "1.0"),
    "the directions change places": Mutant("host", "{\"forward_kl\": (1.0, 0.0), \"reverse_kl\": (0.0, 1.0)}",
                                           "{\"forward_kl\": (0.0, 1.0), \"reverse_kl\": (1.0, 0.0)}"),
    "the label's column is missed": Mutant("kernels", "columns == label, g", "columns == label - 1, g"),
    "a named label is missed": Mutant("named", "column == label, gradient", "column == label - 1, gradient"),
    "the chain rule of the softcap": Mutant("kernels", "1.0, 1.0 - u * u)", "1.0, 1.0 - u)"),
    "... of a named column": Mutant("named", "1.0, 1.0 - u * u)", "1.0, 1.0 - u)"),
    "the entropies change places": Mutant("named", "(of_rest + named.student_entropy)",
                                          "(rest_entropy + named.teacher_entropy)"),
    "the top of a later lane wins a tie": Mutant(
        "row", "tl.min(tl.where(p.peak == peak, p.top, NO_COLUMN), axis=0)",
        "tl.max(tl.where(p.peak == peak, p.top, -1), axis=0)",
    ),
}  # fmt: skip

_V = 2 * 512 + 9  # three blocks, the last of them nearly empty
PROBLEMS = [
    ("whole", Case("tail", lead=(2,), vocab=_V, regime="late_top", temperature=3.0), 40, "bucket", "jsd"),
    ("split", Case("two strides", lead=(2, 2), vocab=_V, layout="shifted", options={"student_softcap": 4.0}), 140,
     "bucket", "symmetric_kl"),
    ("as shipped", Case("masks", lead=(3,), vocab=200, regime="masked_both"), 190, "sampled", "forward_kl"),
    ("split", Case("16 bytes", lead=(3,), vocab=_V + 7, student_dtype=BF16, layout="padded"), 40, "renormalize",
     "skew_forward_kl"),
    ("whole", Case("16 bytes", lead=(3,), vocab=_V - 1, regime="ascending"), 30, "bucket", "forward_kl"),
    ("as shipped", Case("all named", lead=(8,), vocab=40, temperature=1.0), 40, "bucket", "symmetric_kl"),
    ("as shipped", Case("ties", lead=(2,), vocab=40, regime="flat"), 40, "bucket", "reverse_kl"),
]  # fmt: skip


@triton.jit
def _offset_kernel(out, n, outer, ROW_AT: tl.constexpr):
    tl.store(out, ROW_AT(0, tl.load(n), 0, 1, outer, 0, 1))


def _check_rows(per_row: torch.Tensor) -> None:
    """A temperature of each row, an ignored row of NaN, in place: against eager."""
    student = torch.randn(4, _V, generator=torch.Generator().manual_seed(1))
    student[1] = float("nan")
    top = torch.log_softmax(student.flip(-1).nan_to_num() / per_row[:, None], -1).topk(20)
    teacher = TopKTeacher(top.indices, top.values, temperature=None)
    labels = torch.tensor([3, -100, int(top.indices[2, 0]), _V - 1])
    found = []
    for backend in ("eager", "triton"):
        leaf = student.clone().requires_grad_()
        logits = leaf * 1.0
        loss = fastkd.sparse_kd_loss(logits, teacher, labels, ce_weight=0.5, temperature=per_row, backend=backend,
                                     inplace=backend == "triton")  # fmt: skip
        found.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-7)


def _check_all(problems: list[tuple[str, Problem]], kernels: ModuleType, planned: ModuleType) -> None:
    out = torch.zeros(1, dtype=torch.int64)
    _offset_kernel[(1,)](out, torch.tensor([20000], dtype=torch.int32), 128256, kernels.row_at)
    assert int(out) == 20000 * 128256
    for way, problem in problems:
        with pytest.MonkeyPatch.context() as patch:
            take(way, patch, planned)
            problem.check(problem.run(backend="triton"))
    for way in ("whole", "split"):
        with pytest.MonkeyPatch.context() as patch:
            take(way, patch, planned)
            _check_rows(torch.tensor([1.0, 2.0, 3.0, 0.5]))


@pytest.fixture(scope="module")
def problems() -> list[tuple[str, Problem]]:
    return [(way, Problem(SparseCase(case, k), *which, True)) for way, case, k, *which in PROBLEMS]


def _planted(change, folder: Path, name: str) -> ModuleType:
    """A package of its own name with copies of the sources, changed by change(file, text). Everything else is the
    original's; nothing is registered again."""
    package = folder / name
    package.mkdir()
    (package / "__init__.py").touch()
    for source in SOURCES:
        text = change(source, (HOME / source).read_text())
        text = re.sub(r"from \.\.(\w*) ?import", r"from fastkd.\1 import", text).replace(
            "from fastkd. import", "from fastkd import"
        )
        text = re.sub(r"from \.(launch|ops|pieces|row) import", r"from fastkd.triton.\1 import", text)
        text = text.replace("from . import launch\n", "from fastkd.triton import launch\n")
        text = text.replace("from . import launch, ", "from fastkd.triton import launch\nfrom . import ")
        (package / source).write_text(text.replace("\n\n\n_register()\n", "\n"))
    return importlib.import_module(f"{name}.sparse")


def _check_planted(change, problems, folder: Path, name: str, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sys, "path", [str(folder), *sys.path])
    planted = _planted(change, folder, name)
    patch.setattr(sparse, "run_sparse", planted.run_sparse)
    _check_all(problems, planted.sparse_kernels, importlib.import_module(f"{name}.sparse_plan"))


def test_the_original_passes(problems, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _check_planted(lambda _, text: text, problems, tmp_path, "sparse_original", monkeypatch)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, problems, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = MUTANTS[name]
    file = "sparse.py" if mutant.file == "host" else f"sparse_{mutant.file}.py"

    def change(source: str, text: str) -> str:
        return mutant.planted_in(text) if source == file else text

    with pytest.raises((AssertionError, RuntimeError)):
        _check_planted(change, problems, tmp_path, f"sparse_mutant_{list(MUTANTS).index(name)}", monkeypatch)


@pytest.mark.parametrize("kernel", ["sparse_gradient_kernel", "sparse_row_kernel"])
def test_named_columns_stored_before_the_sweep_are_caught(
    kernel: str, problems, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(source: str, text: str) -> str:
        if source != "sparse_kernels.py":
            return text
        begin = text.index(f"def {kernel}")
        lines = text[begin:].split("\n")
        (named,) = [i for i, line in enumerate(lines) if "store_named(" in line][:1]
        sweep = next(i for i, line in enumerate(lines) if "store_gradients(" in line)
        indent = lines[named][: len(lines[named]) - len(lines[named].lstrip())]
        moved = lines.pop(named)
        if kernel == "sparse_gradient_kernel":
            rows, entries = lines.pop(named - 2), lines.pop(named - 2)
            lines[sweep:sweep] = [rows, entries, moved]
        else:
            barrier = next(i for i, line in enumerate(lines) if "tl.debug_barrier()" in line)
            lines.insert(barrier, indent + moved.strip())
        return text[:begin] + "\n".join(lines)

    with pytest.raises(AssertionError):
        _check_planted(change, problems, tmp_path, f"sparse_early_{kernel}", monkeypatch)
