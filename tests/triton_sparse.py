"""Run in Triton's interpreter by test_triton_sparse.py (with triton_plugin): sparse teachers over the table in small,
wrong rows, the student's elements moved and the bytes of them that reach the memory."""

from __future__ import annotations

import pytest
import torch
from inputs import BF16, FP16, FP32, LAYOUTS, Case
from sparse_cases import SPARSE_CASES, SparseCase
from test_sparse import COMBINATIONS, Problem, problem_of
from triton_cache import bytes_moved, recording
from triton_interpreted import counting

import fastkd
from fastkd import TopKTeacher
from fastkd.triton import launch, sparse, sparse_plan
from fastkd.triton.launch import Block

WIDEST = 5000
# Every case with two of the thirteen combinations, each combination with six cases or more; the options alternate.
TABLE = [
    (index, *combination, place % 2 == 1)
    for index, case in enumerate(SPARSE_CASES)
    for place, combination in enumerate(COMBINATIONS)
    if case.case.vocab < WIDEST and (3 * index + place) % 13 < 2
]
WAYS = ("as shipped", "whole", "split")  # as shipped, rows as narrow as these stay in registers


def take(way: str, patch: pytest.MonkeyPatch, plan=sparse_plan) -> None:
    """Rows whole, two at a time, or split; in several blocks. plan: sparse_plan.py or a copy."""
    if way == "as shipped":
        return
    small = {8: Block(128, 8, 32), 4: Block(128, 4, 32), 1: Block(128, 4, 32)}
    patch.setattr(plan, "MOST_RESIDENT", 0)
    patch.setattr(plan, "ROW_BLOCKS", small)
    patch.setattr(plan, "SPLIT_BLOCKS", small)
    patch.setattr(plan, "rows_at_once", lambda rows, *_: min(rows, 2) if way == "whole" else 0)


@pytest.mark.parametrize("chosen", TABLE, ids=lambda c: f"{c[0]}-{SPARSE_CASES[c[0]].name}-{c[1]}-{c[2]}")
def test_table(chosen: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, place = problem_of(*chosen), TABLE.index(chosen)
    take(WAYS[place // 2 % 3], monkeypatch)
    inplace = place % 2 == 0 and LAYOUTS[problem.case.layout].inplace
    problem.check(problem.run(backend="triton", inplace=inplace))


@pytest.mark.parametrize("dtype,way", [*zip((FP32, BF16, FP16), WAYS), *zip((BF16, FP16, FP32), WAYS)], ids=str)
def test_every_option(dtype: torch.dtype, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A softcap, which no case of the table has, and more entries than a program takes at a time."""
    take(way, monkeypatch)
    case = Case("options", lead=(2, 2), vocab=3001, student_dtype=dtype, layout="shifted",
                options={"student_softcap": 5.0})  # fmt: skip
    inplace = dtype == BF16
    tail, divergence = ("bucket", "symmetric_kl") if inplace else ("sampled", "forward_kl")
    problem = Problem(SparseCase(case, 300), tail, divergence, True)
    problem.check(problem.run(backend="triton", inplace=inplace))


def _top(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    top = torch.log_softmax(logits, -1).topk(k)
    return top.indices, top.values


def _loss(rows: int, vocab: int, inplace: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and gradient after a step."""
    student = torch.randn(rows, vocab, dtype=BF16).requires_grad_()
    teacher = TopKTeacher(*_top(torch.randn(rows, vocab), 20))
    logits = student.clone() if inplace else student
    fastkd.sparse_kd_loss(logits, teacher, divergence="jsd", inplace=inplace, backend="triton").backward()
    assert student.grad is not None
    return logits.detach(), student.grad


@pytest.mark.parametrize("way,reads", [("as shipped", 1), ("whole", 2), ("split", 2)])
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
def test_elements_moved(inplace: bool, way: str, reads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a program and the cache: rows in registers are read once, others twice; value alone: once."""
    take(way, monkeypatch)
    rows, vocab = 3, 6000
    with counting() as count:
        _loss(rows, vocab, inplace)
    assert (count.loaded, count.stored) == (reads * rows * vocab, rows * vocab)
    student, teacher = torch.randn(rows, vocab, dtype=BF16), TopKTeacher(*_top(torch.randn(rows, vocab), 20))
    with counting() as count, torch.no_grad():
        fastkd.sparse_kd_loss(student, teacher, backend="triton")
    assert (count.loaded, count.stored) == (rows * vocab, 0)


class TestMemory:
    """In units of N V elements of the student and its gradient, with a model of the cache (triton_cache.py)."""

    PROCESSORS, VOCAB = 4, 17000
    CACHE = int(PROCESSORS * 2 * VOCAB / sparse_plan.CACHE_SHARE) + 128  # four rows of bf16 take the share

    def _moved(self, patch: pytest.MonkeyPatch, rows: int, vocab: int, cache: int, inplace: bool, at_once: int,
               apart: int = 0) -> float:  # fmt: skip
        patch.setattr(launch, "processors_of", lambda device: self.PROCESSORS)
        patch.setattr(sparse, "cache_of", lambda device: cache)
        with recording() as recorder:
            tensors = _loss(rows, vocab, inplace)
        ranges = [(x.data_ptr(), x.data_ptr() + x.nbytes) for x in tensors]
        return bytes_moved(recorder.launches, cache, at_once, ranges, apart) / (2 * rows * vocab)

    @pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
    @pytest.mark.parametrize("apart", [0, 1])
    def test_whole_rows(self, inplace: bool, apart: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """As many at a time as fit: in step with each other, or not."""
        assert self._moved(monkeypatch, 10, self.VOCAB, self.CACHE, inplace, self.PROCESSORS, apart) <= 2.1

    def test_all_at_once_does_not_fit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sparse_plan, "rows_at_once", lambda rows, *_: rows)
        assert self._moved(monkeypatch, 14, self.VOCAB, self.CACHE, False, 14) > 2.6

    def test_split_rows_that_do_not_fit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sparse_plan, "rows_at_once", lambda *_: 0)
        assert self._moved(monkeypatch, 14, self.VOCAB, self.CACHE, False, 3 * self.PROCESSORS) > 2.6

    def test_few_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Split over programs; all fit the cache."""
        assert self._moved(monkeypatch, 4, self.VOCAB, self.CACHE, False, 3 * self.PROCESSORS) <= 2.1

    def test_rows_in_registers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self._moved(monkeypatch, 20, 6000, 16 * 2 * 6000, False, self.PROCESSORS) <= 2.1


class TestPlan:
    """How rows are launched is a pure function of numbers."""

    H100, A100, B200, MI300X = (132, 50 << 20), (108, 40 << 20), (148, 126 << 20), (304, 256 << 20)

    @pytest.mark.parametrize(
        "device,rows,vocab,size,programs",
        [
            (H100, 4096, 128256, 2, 128), (H100, 4096, 151936, 2, 128), (H100, 4096, 262144, 2, 86),
            (H100, 4096, 32000, 2, 128), (H100, 4096, 128256, 4, 88),
            (A100, 4096, 128256, 2, 108), (B200, 4096, 262144, 4, 108), (MI300X, 4096, 128256, 2, 293),
            (H100, 4096, 262144, 4, 0),  # 43 rows fit: fewer than half of the processors would work
            (H100, 178, 128256, 2, 0), (H100, 1, 262144, 4, 0),  # all rows fit
            (H100, 200, 128256, 2, 100), (H100, 134, 262144, 2, 67),
            (H100, 265, 128256, 2, 89), (H100, 90, 262144, 2, 0),  # the last round: two thirds full, half full
        ],
    )  # fmt: skip
    def test_rows_at_once(self, device: tuple[int, int], rows: int, vocab: int, size: int, programs: int) -> None:
        assert sparse_plan.rows_at_once(rows, vocab, size, *device) == programs

    @pytest.mark.parametrize("device", [H100, A100, B200, MI300X, (1, 1 << 20), (82, 6 << 20)])
    def test_rows_under_way_fit_and_keep_the_device_at_work(self, device: tuple[int, int]) -> None:
        processors, cache = device
        found = set()
        for rows in (1, 2, 50, 131, 133, 300, 1000, 4096, 65536):
            for vocab in (8200, 32000, 128256, 262144, 1 << 20):
                for size in (2, 4):
                    programs = sparse_plan.rows_at_once(rows, vocab, size, processors, cache)
                    found.add(programs > 0)
                    if programs:
                        rounds = -(-rows // programs)
                        assert programs <= processors and programs * vocab * size <= 7 / 8 * cache
                        assert rounds * min(processors, int(7 / 8 * cache) // (vocab * size)) <= 1.5 * rows
        assert found == {False, True}

    def test_rows_that_a_block_holds_stay_in_it(self) -> None:
        for unit, widest in ((8, 8192), (4, 4096), (1, 2048)):
            for vocab in (1, 2048, 2049, 4096, 4097, 8192, 8193):
                plan = sparse_plan.plan_of(100, vocab, 2, unit, True, self.H100)
                assert plan.resident == (vocab <= widest)
                assert not plan.resident or (plan.programs == 100 and plan.block.columns >= vocab)

    def test_a_value_alone_is_read_once_by_split_rows(self) -> None:
        assert sparse_plan.plan_of(4096, 128256, 2, 8, False, self.H100).programs == 0

    @pytest.mark.parametrize("offset,width,unit", [(0, 64, 8), (0, 60, 1), (8, 64, 8), (4, 64, 1)])
    def test_unit(self, offset: int, width: int, unit: int) -> None:
        """16 bytes where width, strides and address are multiples of them."""
        rows = launch.rows_or_copy(torch.zeros(3, 80, dtype=BF16)[:, offset : offset + width])
        aligned = launch.rows_or_copy(torch.zeros(3, width, dtype=BF16))
        assert sparse_plan.unit_of(rows, None, width) == sparse_plan.unit_of(aligned, rows, width) == unit


@pytest.mark.parametrize("way,reads", [("as shipped", 1), ("whole", 2), ("split", 2)])
def test_ignored_rows_are_written_and_not_read(way: str, reads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    take(way, monkeypatch)
    student, teacher = torch.randn(4, 3000), TopKTeacher(*_top(torch.randn(4, 3000), 20))
    labels = torch.tensor([5, -100, -100, 7])
    student[1] = float("nan")
    leaf = student.requires_grad_()
    with counting() as count:
        fastkd.sparse_kd_loss(leaf, teacher, labels, ce_weight=0.5, backend="triton").backward()
    assert (count.loaded, count.stored) == (reads * student.numel() // 2, student.numel())
    assert leaf.grad is not None and leaf.grad[1:3].eq(0).all() and leaf.grad.isfinite().all()


def test_wrong_values_are_named_on_the_cpu() -> None:
    student = torch.randn(2, 50)
    ids = torch.tensor([[1, 2], [3, 50]])
    with pytest.raises(ValueError, match=r"ids\[1, 1\] of the teacher: 50 is outside"):
        fastkd.sparse_kd_loss(student, TopKTeacher(ids, torch.full((2, 2), -1.0)), backend="triton")


def test_explain_and_auto() -> None:
    student, teacher = torch.randn(2, 50), TopKTeacher(*_top(torch.randn(2, 50), 4))
    assert fastkd.explain(student, teacher, backend="triton").backend == "triton"
    assert launch.INTERPRETED
