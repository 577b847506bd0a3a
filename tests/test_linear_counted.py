"""linear_kd_loss where the host does not know how many rows count: in order, by products that are told on the device.

On the CPU; NaN stands for memory that such a product leaves as it was, and is in all rows that are ignored.
"""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import pytest
import torch
from counted_products import rows_counted_on_device
from inputs import BF16, FP32, IGNORE
from linear_cases import Case, Outcome, Problem, assert_right, make_problem, run
from reference import DIVERGENCES
from torch import Tensor

import fastkd
from fastkd import counted, linear_kd_loss
from fastkd.linear_chunks import Call, _Chunks
from fastkd.linear_rows import Selection, _in_order
from fastkd.ops import scalars_of
from fastkd.options import Options

CASE = Case(rows=45, hidden=16, teacher_hidden=24, vocab=301, dtype=BF16, ignored=0.6, bias=False)


def _case(**changed: Any) -> Case:
    return dataclasses.replace(CASE, **changed)


COMMON = {"temperature": 2.0, "ce_weight": 0.5}
SOFT = {"temperature": torch.linspace(0.5, 3, 45), "token_weights": torch.linspace(2, 0.25, 45)}
UPSTREAM = torch.linspace(-1, 2, 45)


def _spoiled(problem: Problem) -> Problem:
    """The same with NaN in what is ignored."""
    ignored = (problem.labels == IGNORE).unsqueeze(1)
    spoil = lambda x: x.detach().masked_fill(ignored, torch.nan)  # noqa: E731
    (hidden, *head), (teacher, *teacher_head) = problem.student, problem.teacher
    return problem._replace(student=(spoil(hidden).requires_grad_(), *head), teacher=(spoil(teacher), *teacher_head))


def _counted(problem: Problem, upstream: Tensor | None = None, **options: Any) -> Outcome:
    """The outcome, the gradient of ignored rows being exactly 0, and no row computed without need."""
    with rows_counted_on_device() as products:
        outcome = run(_spoiled(problem), upstream, **options)
    assert (outcome.gradients[0][problem.labels == IGNORE] == 0).all()
    live, rows = int((problem.labels != IGNORE).sum()), problem.labels.shape[0]
    step, least = options.get("chunk_size", rows), counted.LEAST_ROWS
    sizes = [(start, min(step, rows - start)) for start in range(0, rows, step)]
    expected = [(min(max(live - start, min(least, size)), size), size) for start, size in sizes]
    times = len(products.rows) // len(expected)
    assert sorted(products.rows) == sorted(expected * times), "rows of each product"
    return outcome


@pytest.mark.parametrize("options", [{"reduction": "mean"}, {"reduction": "sum", **SOFT}], ids=["mean", "sum, each"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences(divergence: str, options: dict) -> None:
    options = {**COMMON, **options, "divergence": divergence, "beta": 0.3}
    problem = make_problem(CASE)
    assert_right(problem, _counted(problem, chunk_size=16, **options), **options)


OPTIONS = {
    "items": {"num_items_in_batch": 50, "label_smoothing": 0.1, "z_loss": 0.01},
    "softcaps": {"student_softcap": 5.0, "teacher_softcap": 8.0, **SOFT},
    "a loss each": {"reduction": "none", **SOFT},
    "hard alone": {"kd_weight": 0.0, "ce_weight": 1.0},
}


@pytest.mark.parametrize("chunk_size", [1, 7, 45])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_and_chunks(name: str, chunk_size: int) -> None:
    options, problem = {**COMMON, **OPTIONS[name]}, make_problem(CASE)
    upstream = UPSTREAM if options.get("reduction") == "none" else None
    assert_right(problem, _counted(problem, upstream, chunk_size=chunk_size, **options), upstream, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("live", [0, 1, 16, 17, 44, 45])
def test_any_number_of_rows(live: int, reduction: str) -> None:
    """None, one, a chunk exactly, one more, all but one, all; they lie anywhere among the others."""
    problem = make_problem(_case(ignored=0.0))
    order = torch.randperm(45, generator=torch.Generator().manual_seed(live))
    problem.labels[order[live:]] = IGNORE
    upstream = UPSTREAM if reduction == "none" else None
    outcome = _counted(problem, upstream, chunk_size=16, reduction=reduction, **COMMON)
    assert_right(problem, outcome, upstream, reduction=reduction, **COMMON)
    if live == 0:
        assert (outcome.loss == 0).all() and all((g == 0).all() for g in outcome.gradients)


@pytest.mark.parametrize(
    "case,student,teacher",
    [
        (_case(teacher_hidden=20), True, False),  # 20 is no multiple of 8
        (_case(hidden=12), False, False),
        (_case(teacher_dtype=FP32), True, False),
        (_case(dtype=FP32), False, False),
        (_case(bias=True), False, False),
        (_case(rows=9, vocab=77, teacher_vocab=64), True, True),
        (_case(rows=9, vocab=64, teacher_vocab=2100), True, True),
        (_case(rows=40, vocab=2 * 2048 + 5), True, True),
        (_case(rows=3, vocab=1), True, True),
    ],
    ids=str,
)
def test_heads_that_can_and_heads_that_cannot(case: Case, student: bool, teacher: bool) -> None:
    """Products that cannot be told the number compute all rows beside those that can."""
    options = {**COMMON, "vocab": "truncate"} if case.teacher_vocab else COMMON
    problem = make_problem(case)
    with rows_counted_on_device() as products:
        outcome = run(_spoiled(problem), chunk_size=6, **options)
    pieces = -(-case.vocab // 4096)  # of the weight's gradient, on the CPU
    assert len(products.rows) == -(-case.rows // 6) * ((2 + pieces) * student + teacher)
    assert_right(problem, outcome, **options)


def test_products_that_are_not_told_compute_all_rows() -> None:
    """Any other accelerator: rows stay where they are, and the kernels skip what is ignored."""
    problem = make_problem(CASE)
    with rows_counted_on_device(everywhere=False) as products:
        outcome = run(_spoiled(problem), chunk_size=16, **COMMON)
    assert not products.rows
    assert_right(problem, outcome, **COMMON)


@pytest.mark.parametrize("frozen", [False, True])
def test_teacher_as_logits_statistics_and_frozen_heads(frozen: bool) -> None:
    problem = _spoiled(make_problem(CASE))
    hidden, weight, _ = problem.student
    logits = torch.nn.functional.linear(*problem.teacher)  # NaN where ignored
    weight = weight.detach() if frozen else weight

    def call() -> list[Tensor]:
        loss, stats = linear_kd_loss(
            hidden, weight, labels=problem.labels, teacher_logits=logits, chunk_size=16, return_stats=True, **COMMON
        )
        return [loss.detach(), *stats, *torch.autograd.grad(loss, [hidden] if frozen else [hidden, weight])]

    with rows_counted_on_device() as products:
        got = call()
    assert len(products.rows) == 3 * (2 if frozen else 3)
    for ours, same in zip(got, call()):
        torch.testing.assert_close(ours, same, rtol=2e-2, atol=2e-3)


def test_value_alone() -> None:
    problem = _spoiled(make_problem(CASE))
    with torch.no_grad(), rows_counted_on_device() as products:
        hidden, weight, _ = problem.student
        loss = linear_kd_loss(hidden, weight, *problem.teacher[:2], problem.labels, chunk_size=16, **COMMON)
        assert len(products.rows) == 6
    torch.testing.assert_close(loss, linear_kd_loss(hidden, weight, *problem.teacher[:2], problem.labels, **COMMON))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_sparse_teacher(reduction: str, native: str) -> None:
    problem = make_problem(CASE)
    logits = torch.nn.functional.linear(*problem.teacher).float()
    logprobs, ids = logits.log_softmax(-1).topk(5)
    ignored = problem.labels == IGNORE
    teacher = fastkd.TopKTeacher(ids, logprobs.masked_fill(ignored[:, None], torch.nan))
    (hidden, weight, _), up = _spoiled(problem).student, UPSTREAM if reduction == "none" else None

    def call() -> list[Tensor]:
        loss = fastkd.linear_sparse_kd_loss(
            hidden, weight, teacher, problem.labels, chunk_size=16, ce_weight=0.5, reduction=reduction,
            divergence="jsd", backend=native,
        )  # fmt: skip
        return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight), up)]

    with rows_counted_on_device() as products:
        got = call()
    assert sum(rows for rows, _ in products.rows) < sum(rows for _, rows in products.rows)
    for ours, same in zip(got, call()):
        torch.testing.assert_close(ours, same, rtol=2e-2, atol=2e-3)


def test_compiled_without_a_graph_break(native: str) -> None:
    problem = _spoiled(make_problem(CASE))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return linear_kd_loss(hidden, weight, *problem.teacher[:2], labels, chunk_size=16, backend=native, **COMMON)

    hidden, weight, _ = problem.student
    with rows_counted_on_device() as products:
        gradients = torch.autograd.grad(step(hidden, weight, problem.labels), (hidden, weight))
    assert products.rows
    loss = linear_kd_loss(hidden, weight, *problem.teacher[:2], problem.labels, chunk_size=16, **COMMON)
    for ours, same in zip(gradients, torch.autograd.grad(loss, (hidden, weight))):
        torch.testing.assert_close(ours, same, rtol=2e-2, atol=2e-3)


# --- nothing is waited for -------------------------------------------------------------------------------------------


def _meta_call(dtype: torch.dtype, reduction: str, sparse: bool, native: str) -> Call:
    """Tensors without values: what asked for one would raise."""
    empty = lambda *shape, dtype=dtype: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
    options = Options(ce_weight=0.5, reduction=reduction, return_stats=True)
    teacher = (None,) * 4 if sparse else (empty(45, 24), empty(304, 24), None, None)
    given = {"ids": empty(45, 3, dtype=torch.int64), "logprobs": empty(45, 3, dtype=FP32), "tail": "bucket"}
    call = Call(
        empty(45, 16), empty(304, 16), None, *teacher, empty(45, dtype=torch.int64), empty(45, dtype=FP32),
        None if sparse else empty(45, dtype=FP32), None, scalars_of(options, last=1.0) if sparse else
        scalars_of(options), "jsd", True, IGNORE, reduction, True, native, None, dtype, 16, 0, [True] * 3,
    )  # fmt: skip
    return call._replace(**given) if sparse else call


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_value_is_asked_for(reduction: str, sparse: bool, in_order: bool, native: str) -> None:
    """The whole loop on tensors without values; torch refuses .item() and what else would have to know one."""
    told = mock.Mock(return_value=in_order)
    with mock.patch.object(counted, "DEVICE_TYPE", "meta"), mock.patch.object(counted, "on_device", told):
        loss, *gradients, _, stats = _Chunks(_meta_call(BF16, reduction, sparse, native)).run()
    assert told.called and loss.shape == ((45,) if reduction == "none" else ()) and stats.shape == (5, 45)
    shapes = [(45, 16), (304, 16), (0,)] if reduction != "none" else [(0,)] * 3
    assert [tuple(g.shape) for g in gradients] == shapes


def test_a_value_that_is_asked_for_is_seen(native: str) -> None:
    """What the test above relies on."""
    asks = lambda self, rows: self.live.clamp(int(self.live))  # noqa: E731
    with (
        mock.patch.object(counted, "DEVICE_TYPE", "meta"), mock.patch.object(counted, "on_device", lambda device: True),
        mock.patch.object(Selection, "live_of", asks), pytest.raises((RuntimeError, NotImplementedError)),
    ):  # fmt: skip
        _Chunks(_meta_call(BF16, "mean", False, native)).run()


# --- parts -----------------------------------------------------------------------------------------------------------


def test_order() -> None:
    """Rows that count first, in the order in which they came; the ignored ones, in theirs, behind."""
    for seed in range(20):
        ignored = torch.rand(37, generator=torch.Generator().manual_seed(seed)) < seed / 19
        selection = _in_order(ignored, 37)
        rows = torch.arange(37)
        assert selection.index.tolist() == [*rows[~ignored].tolist(), *rows[ignored].tolist()]
        assert int(selection.live) == int((~ignored).sum()) and torch.equal(selection.ignored, ignored[selection.index])
        x, back = torch.randn(37, 2), torch.zeros(37, 2)
        for chunk in (slice(0, 30), slice(30, 37)):
            selection.put(back, chunk, selection.take(x, chunk))
            live = min(max(int((~ignored).sum()) - chunk.start, min(counted.LEAST_ROWS, 7)), chunk.stop - chunk.start)
            assert chunk.start or int(selection.live_of(chunk)) == max(live, counted.LEAST_ROWS)
        assert torch.equal(x, back)


@pytest.mark.parametrize(
    "capability,version,hip,expected",
    [
        ((9, 0), "2.10.0+cu128", None, True),
        ((10, 0), "2.13.0+cu130", None, True),
        ((10, 3), "2.14.1", None, True),
        ((10, 0), "2.10.0", None, False),  # has no kernels for it
        ((8, 9), "2.13.0", None, False),  # copies the number to the host
        ((12, 0), "2.13.0", None, False),
        ((9, 4), "2.13.0", "7.0", False),
    ],
)
def test_where_the_number_is_read_on_the_device(capability, version: str, hip: str | None, expected: bool) -> None:
    with (
        mock.patch.object(torch.cuda, "get_device_capability", lambda device: capability),
        mock.patch.object(torch, "__version__", version), mock.patch.object(torch.version, "hip", hip),
    ):  # fmt: skip
        assert counted.on_device(torch.device("cuda")) == expected
    assert not counted.on_device(torch.device("cpu")) and not counted.on_device(torch.device("xpu"))


def test_weights_whose_memory_does_not_fit() -> None:
    """Rows of the weight begin at multiples of 16 bytes, in memory that does."""
    with rows_counted_on_device():
        whole = torch.zeros(10, 24, dtype=BF16)
        assert counted.serves(whole, BF16) and counted.serves(whole[:, 8:], BF16)
        assert not counted.serves(whole[:, 4:20], BF16) and not counted.serves(whole.t()[:16].t(), FP32)
        assert not counted.serves(torch.zeros(24, 16, dtype=BF16).t(), BF16)
        assert not counted.serves(whole[:0], BF16) and not counted.serves(whole.float(), FP32)
        assert not counted.serves(torch.zeros(10, 25, dtype=BF16)[:, :24], BF16)


PLANTED = {
    "a row too few": lambda real: lambda self, rows: (real(self, rows) - 1).clamp(min=1),
    "ignored rows of a chunk too": lambda real: lambda self, rows: torch.full_like(real(self, rows), 9),
    "chunks counted from the first": lambda real: lambda self, rows: real(self, slice(0, rows.stop - rows.start)),
}


@pytest.mark.parametrize("name", PLANTED)
def test_the_comparison_sees_a_wrong_number(name: str) -> None:
    problem = make_problem(CASE)
    with mock.patch.object(Selection, "live_of", PLANTED[name](Selection.live_of)), pytest.raises(AssertionError):
        assert_right(problem, _counted(problem, chunk_size=16, **COMMON), **COMMON)


def test_the_comparison_sees_rows_that_no_product_wrote() -> None:
    """What is beyond the number must not reach the gradient of the hidden states."""
    problem = make_problem(CASE)
    put = Selection.put

    def unmasked(self: Selection, into: Tensor, rows: slice, values: Tensor, dim: int = 0) -> None:
        count = self.live_of(rows)
        if values.dim() == 2 and dim == 0 and count is not None:
            values[int(count) :] = torch.nan
        put(self, into, rows, values, dim)

    with mock.patch.object(Selection, "put", unmasked), pytest.raises(AssertionError):
        _counted(problem, chunk_size=16, **COMMON)
