"""Run in Triton's interpreter by test_triton_sparse.py (with triton_plugin): sparse teachers over the table in small,
wrong rows, and the student's elements moved."""

from __future__ import annotations

import pytest
import torch
from inputs import BF16, FP16, FP32, LAYOUTS, Case
from sparse_cases import SPARSE_CASES, SparseCase
from test_sparse import COMBINATIONS, Problem, problem_of
from triton_interpreted import counting

import fastkd
from fastkd import TopKTeacher
from fastkd.triton import launch

WIDEST = 5000
# Every case with two of the thirteen combinations, each combination with six cases or more; the options alternate.
TABLE = [
    (index, *combination, place % 2 == 1)
    for index, case in enumerate(SPARSE_CASES)
    for place, combination in enumerate(COMBINATIONS)
    if case.case.vocab < WIDEST and (3 * index + place) % 13 < 2
]


@pytest.mark.parametrize("chosen", TABLE, ids=lambda c: f"{c[0]}-{SPARSE_CASES[c[0]].name}-{c[1]}-{c[2]}")
def test_table(chosen: tuple) -> None:
    problem, place = problem_of(*chosen), TABLE.index(chosen)
    inplace = place % 2 == 0 and LAYOUTS[problem.case.layout].inplace
    problem.check(problem.run(backend="triton", inplace=inplace))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
def test_every_option(dtype: torch.dtype) -> None:
    """A softcap, which no case of the table has, and rows that are split over programs."""
    case = Case("options", lead=(2, 2), vocab=4700, student_dtype=dtype, layout="shifted",
                options={"student_softcap": 5.0})  # fmt: skip
    for tail, divergence in (("bucket", "symmetric_kl"), ("sampled", "forward_kl")):
        problem = Problem(SparseCase(case, 300), tail, divergence, True)
        problem.check(problem.run(backend="triton"))


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
def test_elements_moved(inplace: bool) -> None:
    """The student twice and its gradient once, in blocks; value alone: the student once."""
    rows, vocab, k = 3, 6000, 20
    student = torch.randn(rows, vocab, dtype=BF16).requires_grad_()
    teacher = TopKTeacher(*_top(torch.randn(rows, vocab), k))
    with counting() as count:
        logits = student.clone() if inplace else student
        fastkd.sparse_kd_loss(logits, teacher, divergence="jsd", inplace=inplace, backend="triton").backward()
    assert (count.loaded, count.stored) == (2 * rows * vocab, rows * vocab)
    with counting() as count, torch.no_grad():
        fastkd.sparse_kd_loss(student, teacher, backend="triton")
    assert (count.loaded, count.stored) == (rows * vocab, 0)


def _top(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    top = torch.log_softmax(logits, -1).topk(k)
    return top.indices, top.values


def test_wrong_values_are_named_on_the_cpu() -> None:
    student = torch.randn(2, 50)
    ids = torch.tensor([[1, 2], [3, 50]])
    with pytest.raises(ValueError, match=r"ids\[1, 1\] of the teacher: 50 is outside"):
        fastkd.sparse_kd_loss(student, TopKTeacher(ids, torch.full((2, 2), -1.0)), backend="triton")


def test_explain_and_auto() -> None:
    student, teacher = torch.randn(2, 50), TopKTeacher(*_top(torch.randn(2, 50), 4))
    assert fastkd.explain(student, teacher, backend="triton").backend == "triton"
    assert launch.INTERPRETED
