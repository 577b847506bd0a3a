"""linear_kd_loss against the fp64 reference: divergences, dtypes, chunkings, options."""

from __future__ import annotations

import pytest
import torch
from inputs import BF16, FP16, FP32, FP64, IGNORE
from linear_cases import Case, assert_right, make_problem, run
from reference import DIVERGENCES

import fastkd
from fastkd import linear_kd_loss

COMMON = {"temperature": 2.0, "ce_weight": 0.5}


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences(divergence: str, dtype: torch.dtype) -> None:
    problem = make_problem(Case(dtype=dtype))
    options = {**COMMON, "divergence": divergence, "beta": 0.3}
    assert_right(problem, run(problem, chunk_size=7, **options), **options)


@pytest.mark.parametrize("backend", ["native", "eager"])
@pytest.mark.parametrize("chunk_size", [1, 2, 7, 16, 22, 23, 24, 1000, "auto"])
def test_chunks_of_any_size(chunk_size: int | str, backend: str, native: str) -> None:
    """Dividing the rows that count or not, one row, more rows than there are."""
    problem = make_problem(Case())
    assert_right(problem, run(problem, chunk_size=chunk_size, backend=backend, **COMMON), **COMMON)


@pytest.mark.parametrize("budget", [1, 12 * 301 * 8, 1 << 30])
def test_memory_budget(budget: int) -> None:
    problem = make_problem(Case())
    assert_right(problem, run(problem, memory_budget=budget, **COMMON), **COMMON)


OPTIONS = {
    "defaults": {},
    "sum": {"reduction": "sum", "ce_weight": 0.3},
    "items": {"num_items_in_batch": 50},
    "items as a tensor": {"num_items_in_batch": torch.tensor(50)},
    "hard": {"ce_weight": 0.7, "label_smoothing": 0.1, "z_loss": 0.01, "kd_weight": 0.3, "temperature": 3.0},
    "softcaps": {"student_softcap": 5.0, "teacher_softcap": 8.0, "ce_weight": 0.5},
    "no square": {"scale_by_t2": False, "temperature": 4.0},
    "hard alone": {"kd_weight": 0.0, "ce_weight": 1.0},
    "weights": {"token_weights": torch.linspace(0.1, 3, 23)},
    "weights, some 0": {"token_weights": torch.arange(23) % 3.0, "ce_weight": 1.0},
    "temperatures": {"temperature": torch.linspace(0.5, 4, 23), "token_weights": torch.linspace(2, 0.5, 23)},
}


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, dtype: torch.dtype) -> None:
    problem = make_problem(Case(dtype=dtype))
    assert_right(problem, run(problem, chunk_size=8, **OPTIONS[name]), **OPTIONS[name])


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("name", ["hard", "weights", "temperatures"])
def test_upstream_of_each_row(name: str, dtype: torch.dtype) -> None:
    """reduction="none": backward computes the chunks again with the upstream as the weight of each row."""
    problem = make_problem(Case(dtype=dtype))
    options = {**OPTIONS[name], "reduction": "none"}
    upstream = torch.linspace(-2, 3, 23)
    assert_right(problem, run(problem, upstream, chunk_size=8, **options), upstream, **options)


@pytest.mark.parametrize(
    "case",
    [
        Case(rows=1, vocab=1, hidden=1, teacher_hidden=1, ignored=0),
        Case(rows=40, vocab=2048 + 5, bias=False),
        Case(rows=40, vocab=2 * 2048, dtype=BF16),
        Case(rows=9, vocab=77, teacher_vocab=64),
        Case(rows=9, vocab=64, teacher_vocab=2100, dtype=BF16, bias=False),
        Case(rows=9, vocab=2100, teacher_vocab=64, dtype=FP16),
        Case(dtype=FP32, teacher_dtype=BF16),
        Case(dtype=BF16, teacher_dtype=FP32, bias=False),
        Case(dtype=FP16, teacher_dtype=BF16),
        Case(ignored=0.0, dtype=BF16),
        Case(ignored=0.9),
    ],
    ids=str,
)
def test_shapes_and_dtypes(case: Case) -> None:
    problem = make_problem(case)
    options = {**COMMON, "vocab": "truncate"} if case.teacher_vocab else COMMON
    assert_right(problem, run(problem, chunk_size=6, **options), **options)


def test_columns_beyond_the_common_vocabulary_have_gradient_zero() -> None:
    problem = make_problem(Case(vocab=80, teacher_vocab=64))
    _, weight, bias = run(problem, vocab="truncate", **COMMON).gradients
    assert (weight[64:] == 0).all() and (bias[64:] == 0).all() and (weight[:64] != 0).any()


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_logits_in_fp32_are_exact_products(dtype: torch.dtype) -> None:
    """With fp32 logits a 16-bit head loses nothing but the rounding of its gradients."""
    problem = make_problem(Case(dtype=dtype))
    outcome = run(problem, chunk_size=8, logits_dtype=FP32, **COMMON)
    wide = make_problem(Case(dtype=dtype))._replace(
        student=tuple(x.detach().float().requires_grad_() for x in problem.student),
        teacher=tuple(x.float() for x in problem.teacher),
    )
    same = run(wide, chunk_size=8, **COMMON)
    torch.testing.assert_close(outcome.loss, same.loss, rtol=1e-6, atol=0)
    for ours, exact in zip(outcome.gradients, same.gradients):
        torch.testing.assert_close(ours, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_fp16_logits_if_asked_for() -> None:
    problem = make_problem(Case(dtype=FP16))
    assert_right(problem, run(problem, chunk_size=8, logits_dtype=FP16, **COMMON), **COMMON)


def test_fp16_gradients_of_a_mean_over_many_rows_do_not_vanish() -> None:
    """(q - p) / N of 2000 rows and 3000 columns is below the smallest fp16 number: kept as fp32 until it is scaled."""
    problem = make_problem(Case(rows=2000, vocab=3000, hidden=8, teacher_hidden=8, dtype=FP16, bias=True))
    upstream = torch.tensor(65536.0)
    assert_right(problem, run(problem, upstream, chunk_size=512), upstream)


def test_fp64_by_the_eager_backend() -> None:
    problem = make_problem(Case(dtype=FP64))
    outcome = run(problem, chunk_size=5, **COMMON)
    assert outcome.loss.dtype == FP64
    assert_right(problem, outcome, **COMMON)


def test_teacher_as_logits() -> None:
    """The same as from its hidden states; strided rows, ignored rows and a wider vocabulary included."""
    problem = make_problem(Case())
    hidden, weight, bias = problem.teacher
    logits = torch.full((23, 310), float("nan"))
    logits[:, :301] = torch.nn.functional.linear(hidden, weight, bias)
    student_hidden, student_weight, student_bias = problem.student
    arguments = {"labels": problem.labels, "student_bias": student_bias, "chunk_size": 7, **COMMON}
    for teacher, vocab in ((logits[:, :301], "error"), (logits, "truncate")):
        loss = linear_kd_loss(student_hidden, student_weight, teacher_logits=teacher, vocab=vocab, **arguments)
        gradients = torch.autograd.grad(loss, problem.leaves)
        same = run(problem, chunk_size=7, **COMMON)
        torch.testing.assert_close((loss.detach(), *gradients), (same.loss, *same.gradients), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_leading_dimensions_and_stats(backend: str, native: str) -> None:
    """(B, S, H) hidden states; statistics and a loss a token keep (B, S), and are those of kd_loss."""
    problem = make_problem(Case(rows=24))
    lead = lambda x: x.view(4, 6, *x.shape[1:])  # noqa: E731
    hidden, weight, bias = problem.student
    teacher_hidden, teacher_weight, teacher_bias = problem.teacher
    options = {"reduction": "none", "return_stats": True, **COMMON}
    loss, stats = linear_kd_loss(
        lead(hidden), weight, lead(teacher_hidden), teacher_weight, lead(problem.labels), student_bias=bias,
        teacher_bias=teacher_bias, chunk_size=7, backend=backend, **options,
    )  # fmt: skip
    linear = torch.nn.functional.linear
    logits, teacher_logits = lead(linear(*problem.student)), lead(linear(*problem.teacher))
    same, same_stats = fastkd.kd_loss(logits, teacher_logits, lead(problem.labels), backend=backend, **options)
    torch.testing.assert_close(loss, same, rtol=1e-5, atol=1e-6)
    for name in stats._fields:
        ours, theirs = getattr(stats, name), getattr(same_stats, name)
        assert not ours.requires_grad
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", ["native", "eager"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_row_counts(reduction: str, dtype: torch.dtype, backend: str, native: str) -> None:
    """Every label ignored, or no row at all: loss 0 with a graph, gradients exactly 0."""
    for rows in (5, 0):
        problem = make_problem(Case(rows=rows, dtype=dtype, ignored=1.1))
        upstream = torch.ones(rows) if reduction == "none" else None
        outcome = run(problem, upstream, backend=backend, reduction=reduction, **COMMON)
        assert (outcome.loss == 0).all() and outcome.loss.shape == ((rows,) if reduction == "none" else ())
        assert all((g == 0).all() and g.shape == x.shape for g, x in zip(outcome.gradients, problem.leaves))


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_ignored_rows_may_hold_nan(backend: str, native: str) -> None:
    problem = make_problem(Case())
    clean = run(problem, chunk_size=5, backend=backend, **COMMON)
    ignored = problem.labels == IGNORE
    with torch.no_grad():
        problem.student[0][ignored] = float("nan")
        problem.teacher[0][ignored] = float("nan")
    outcome = run(problem, chunk_size=5, backend=backend, **COMMON)
    torch.testing.assert_close(outcome.gradients, clean.gradients)
    assert (outcome.gradients[0][ignored] == 0).all() and torch.equal(outcome.loss, clean.loss)


def test_the_bits_do_not_depend_on_ignored_rows_or_the_run() -> None:
    problem = make_problem(Case(rows=64, vocab=5000, dtype=BF16))
    first, second = (run(problem, chunk_size=16, **COMMON) for _ in range(2))
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(a, b) for a, b in zip(first.gradients, second.gradients))


def test_module_is_the_function() -> None:
    problem = make_problem(Case())
    module = fastkd.LinearKDLoss(chunk_size=7, divergence="jsd", **COMMON)
    hidden, weight, bias = problem.student
    teacher_hidden, teacher_weight, teacher_bias = problem.teacher
    loss = module(
        hidden, weight, teacher_hidden, teacher_weight, problem.labels, student_bias=bias, teacher_bias=teacher_bias,
        temperature=3.0, num_items_in_batch=11,
    )  # fmt: skip
    same = run(problem, chunk_size=7, divergence="jsd", ce_weight=0.5, temperature=3.0, num_items_in_batch=11)
    assert torch.equal(loss.detach(), same.loss)
    assert repr(module) == "LinearKDLoss(chunk_size=7, divergence='jsd', temperature=2.0, ce_weight=0.5)"
    assert not list(module.parameters())


@pytest.mark.parametrize("name", ["loss", "hidden", "weight", "bias"])
def test_the_comparison_sees_one_row_too_few(name: str) -> None:
    """What a chunk that is dropped, or counted twice, changes is far above the tolerance, in bf16 too."""
    problem = make_problem(Case(dtype=BF16, ignored=0.0))
    outcome = run(problem, **COMMON)
    assert_right(problem, outcome, **COMMON)
    fewer = problem.labels.clone()
    fewer[-1] = IGNORE
    wrong = run(problem._replace(labels=fewer), num_items_in_batch=23, **COMMON)
    gradients = list(outcome.gradients)
    if name == "loss":
        outcome = outcome._replace(loss=wrong.loss)
    else:
        place = ("hidden", "weight", "bias").index(name)
        gradients[place] = wrong.gradients[place]
    with pytest.raises(AssertionError, match=name):
        assert_right(problem, outcome._replace(gradients=tuple(gradients)), **COMMON)
