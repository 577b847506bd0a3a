"""What the loss promises beyond its numbers: rows left out, empty input, bounds, symmetry, bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from inputs import BF16, CHUNK, FP16, FP32, FP64, IGNORE, Case, make_inputs, run_backend
from reference import DIVERGENCES

import fastkd

BACKENDS = ("native", "eager")
ALL_OPTIONS = {"ce_weight": 0.5, "label_smoothing": 0.1, "z_loss": 1e-3, "temperature": 2.0}
NAN = float("nan")


def _rows(lead: tuple[int, ...] = (6,), vocab: int = 50, dtype: torch.dtype = FP32, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(*lead, vocab, generator=g) for _ in range(2))
    return student.to(dtype), teacher.to(dtype), torch.randint(vocab, lead, generator=g)


def _solve(student, teacher, labels=None, upstream=None, **options):
    leaf = student.detach().requires_grad_()
    loss = fastkd.kd_loss(leaf.clone() if options.get("inplace") else leaf, teacher, labels, **options)
    (gradient,) = torch.autograd.grad(loss, leaf, upstream)
    return loss.detach(), gradient


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("poison", [NAN, float("inf"), float("-inf")])
def test_ignored_rows_are_not_read(
    poison: float, dtype: torch.dtype, divergence: str, backend: str, inplace: bool, native: str
) -> None:
    """NaN in an ignored row, in its weight and temperature: same bits elsewhere, gradient exactly 0 there."""
    student, teacher, labels = _rows(dtype=dtype)
    labels[1] = labels[4] = IGNORE
    ignored = labels == IGNORE
    weights, temperature = torch.linspace(0.5, 2, 6), torch.linspace(1, 3, 6)
    options = {**ALL_OPTIONS, "divergence": divergence, "backend": backend, "inplace": inplace}
    clean = _solve(student, teacher, labels, **options | {"token_weights": weights, "temperature": temperature})
    bad = [x.clone() for x in (student, teacher, weights, temperature)]
    for x in bad:
        x[ignored] = poison
    poisoned = _solve(bad[0], bad[1], labels, **options | {"token_weights": bad[2], "temperature": bad[3]})
    assert torch.equal(clean[0], poisoned[0])
    assert torch.equal(clean[1], poisoned[1])
    assert (poisoned[1][ignored] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("inplace", [False, True])
def test_all_rows_ignored(reduction: str, backend: str, inplace: bool, native: str) -> None:
    student, teacher, labels = _rows()
    student[:], labels[:] = NAN, IGNORE
    leaf = student.requires_grad_()
    student = leaf.clone() if inplace else leaf
    loss, stats = fastkd.kd_loss(
        student,
        teacher,
        labels,
        reduction=reduction,
        backend=backend,
        inplace=inplace,
        return_stats=True,
        **ALL_OPTIONS,
    )
    assert loss.requires_grad
    assert (loss == 0).all()
    loss.sum().backward()
    assert (leaf.grad == 0).all()
    assert all((row == 0).all() for row in stats)


@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("inplace", [False, True])
def test_no_rows(
    inplace: bool, reduction: str, lead: tuple[int, ...], backend: str, with_labels: bool, native: str
) -> None:
    leaf = torch.zeros(*lead, 7, requires_grad=True)
    student = leaf.clone() if inplace else leaf
    labels = torch.zeros(lead, dtype=torch.int64) if with_labels else None
    options = {
        "reduction": reduction,
        "backend": backend,
        "inplace": inplace,
        "ce_weight": float(with_labels),
    }
    loss = fastkd.kd_loss(student, torch.zeros(*lead, 7), labels, **options)
    assert loss.shape == (lead if reduction == "none" else ())
    assert loss.requires_grad
    assert (loss == 0).all()
    loss.sum().backward()
    assert leaf.grad.shape == leaf.shape


def test_no_rows_divided_by_items(native: str) -> None:
    """An empty micro-batch of an accumulation contributes 0, not 0/0."""
    student = torch.zeros(0, 7, requires_grad=True)
    assert fastkd.kd_loss(student, torch.zeros(0, 7), num_items_in_batch=torch.tensor(12), backend=native) == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_dtypes_and_shapes_of_the_results(reduction: str, dtype: torch.dtype, backend: str, native: str) -> None:
    """The loss is fp32 for every dtype of the logits; gradients have the logits' own."""
    student, teacher, labels = _rows((2, 3), dtype=dtype)
    leaf = student.requires_grad_()
    loss, stats = fastkd.kd_loss(
        leaf, teacher, labels, reduction=reduction, return_stats=True, backend=backend, **ALL_OPTIONS
    )
    assert loss.dtype == FP32
    assert loss.shape == ((2, 3) if reduction == "none" else ())
    assert isinstance(stats, fastkd.KDStats)
    for row in stats:
        assert row.dtype == FP32 and row.shape == (2, 3) and not row.requires_grad
    loss.sum().backward()
    assert leaf.grad.dtype == dtype and leaf.grad.shape == leaf.shape


def test_fp64_loss_is_fp64() -> None:
    student, teacher, _ = _rows(dtype=FP64)
    assert fastkd.kd_loss(student, teacher).dtype == FP64


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_inputs_are_left_alone(divergence: str, backend: str, native: str) -> None:
    student, teacher, labels = _rows()
    before = [x.clone() for x in (student, teacher, labels)]
    _solve(student, teacher, labels, divergence=divergence, backend=backend, **ALL_OPTIONS)
    assert all(torch.equal(x, y) for x, y in zip(before, (student, teacher, labels)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("regime", ["near", "identical", "ordinary", "peaked", "disagreeing", "huge"])
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16), (FP32, BF16)])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_bounds(divergence: str, dtypes: tuple, regime: str, backend: str, native: str) -> None:
    """No divergence is negative beyond rounding; jsd is at most log 2, total variation at most 1."""
    case = Case("bounds", lead=(8,), vocab=CHUNK + 50, regime=regime, student_dtype=dtypes[0], teacher_dtype=dtypes[1])
    inputs = make_inputs(case)
    kd = fastkd.kd_loss(inputs.student, inputs.teacher, reduction="none", divergence=divergence, backend=backend)
    assert (kd >= -1e-5).all()
    if divergence == "jsd":
        assert (kd <= 0.693148).all()
    if divergence == "total_variation":
        assert (kd <= 1.000001).all()
    if regime == "identical" and dtypes[0] == dtypes[1]:
        assert (kd.abs() <= 1e-6).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("regime", ["ordinary", "disagreeing", "exact_zeros"])
def test_jsd_is_symmetric_at_one_half(regime: str, backend: str, native: str) -> None:
    inputs = make_inputs(Case("symmetry", lead=(8,), vocab=300, regime=regime))
    forth = fastkd.kd_loss(inputs.student, inputs.teacher, divergence="jsd", reduction="none", backend=backend)
    back = fastkd.kd_loss(inputs.teacher, inputs.student, divergence="jsd", reduction="none", backend=backend)
    torch.testing.assert_close(forth, back, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_equal_rows_have_no_gradient(divergence: str, dtype: torch.dtype, native: str) -> None:
    """Student = teacher is a minimum of every divergence; forward_kl and total_variation reach 0 exactly."""
    student, _, _ = _rows(vocab=CHUNK + 30, dtype=dtype)
    loss, gradient = _solve(student, student.clone(), divergence=divergence, backend=native, temperature=2.0)
    scale = (student.float() / 2).softmax(-1)
    assert (gradient.float().abs() <= 2e-6 * scale + 1e-37).all() if dtype != FP16 else True
    assert gradient.abs().max() <= 1e-6
    if divergence == "total_variation":
        assert loss == 0 and (gradient == 0).all()


@pytest.mark.parametrize("lead,vocab", [((6,), 50), ((2,), 3 * CHUNK + 5), ((1,), 40000)])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_value_alone_has_the_bits_of_value_with_gradient(
    divergence: str, dtype: torch.dtype, lead: tuple, vocab: int, native: str
) -> None:
    student, teacher, labels = _rows(lead, vocab, dtype)
    options = {
        **ALL_OPTIONS,
        "divergence": divergence,
        "backend": native,
        "return_stats": True,
        "reduction": "none",
    }
    value, value_stats = fastkd.kd_loss(student, teacher, labels, **options)
    both, both_stats = fastkd.kd_loss(student.requires_grad_(), teacher, labels, **options)
    inplace, inplace_stats = fastkd.kd_loss(student.clone(), teacher, labels, inplace=True, **options)
    assert torch.equal(value, both) and torch.equal(value, inplace)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(value_stats, both_stats, inplace_stats))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_inplace_has_the_bits_of_a_fresh_gradient(divergence: str, dtype: torch.dtype, native: str) -> None:
    student, teacher, labels = _rows((5,), 2 * CHUNK + 31, dtype)
    options = {**ALL_OPTIONS, "divergence": divergence, "backend": native}
    fresh = _solve(student, teacher, labels, **options)
    inplace = _solve(student, teacher, labels, inplace=True, **options)
    assert torch.equal(fresh[0], inplace[0]) and torch.equal(fresh[1], inplace[1])


def test_rows_do_not_depend_on_each_other(native: str) -> None:
    """Each row of a batch has the bits that it has alone, whatever the layout of its batch."""
    student, teacher, labels = _rows((7,), CHUNK + 9)
    whole = _solve(student, teacher, labels, torch.ones(7), reduction="none", backend=native, **ALL_OPTIONS)
    for n in range(7):
        one = (student[n : n + 1], teacher[n : n + 1], labels[n : n + 1])
        alone = _solve(*one, torch.ones(1), reduction="none", backend=native, **ALL_OPTIONS)
        assert torch.equal(alone[0][0], whole[0][n]) and torch.equal(alone[1][0], whole[1][n])


# Prints a digest of losses, gradients and statistics over shapes that use each way of sharing work among threads.
_DIGEST = """
import hashlib, sys, torch
sys.path.insert(0, {tests!r})
from inputs import Case, make_inputs, run_backend
from reference import DIVERGENCES
torch.set_num_threads({threads})
digest = hashlib.sha256()
for lead, vocab in (((1,), 70001), ((3,), 40000), ((64,), 1000), ((257,), 33), ((5,), 9000), ((1,), 400001)):
    for dtype in (torch.float32, torch.bfloat16):
        for divergence in DIVERGENCES:
            for inplace in (False, True):
                inputs = make_inputs(Case("threads", lead=lead, vocab=vocab, student_dtype=dtype, teacher_dtype=dtype))
                options = dict(labels=inputs.labels, ce_weight=0.5, label_smoothing=0.1, temperature=3.0, beta=0.3,
                               divergence=divergence, inplace=inplace, return_stats=True, backend="native")
                out = run_backend(inputs, options)
                for x in (out.loss, out.gradient, *out.stats):
                    digest.update(x.float().contiguous().numpy().tobytes())
print(digest.hexdigest())
"""


def _digest(threads: int) -> str:
    code = _DIGEST.format(tests=str(Path(__file__).parent), threads=threads)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_bits_do_not_depend_on_the_run_or_the_number_of_threads(native: str) -> None:
    digests = {threads: _digest(threads) for threads in (1, 2, 4, 7)}
    assert len(set(digests.values())) == 1, digests
    assert _digest(4) == digests[4], "two runs with 4 threads differ"


def test_statistics_do_not_change_the_loss(native: str) -> None:
    inputs = make_inputs(Case("statistics", lead=(4,), vocab=CHUNK + 3))
    options = {"labels": inputs.labels, "backend": native, **ALL_OPTIONS}
    plain, with_stats = run_backend(inputs, options), run_backend(inputs, {**options, "return_stats": True})
    assert torch.equal(plain.loss, with_stats.loss) and torch.equal(plain.gradient, with_stats.gradient)


@pytest.mark.parametrize("backend", BACKENDS)
def test_top1_agreement_ranks_the_lowest_index_first(backend: str, native: str) -> None:
    """Ties within a vector, across vectors and across chunks."""
    for first, second in ((0, 1), (3, 40), (5, CHUNK + 5), (CHUNK - 1, CHUNK)):
        student, teacher = torch.zeros(2, 2 * CHUNK), torch.zeros(2, 2 * CHUNK)
        student[:, first] = student[:, second] = 4.0
        teacher[0, first], teacher[1, second] = 4.0, 4.0
        stats = fastkd.kd_loss(student, teacher, return_stats=True, backend=backend)[1]
        assert stats.top1_agreement.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocab", [5, 16, 48])
def test_total_variation_has_no_gradient_of_its_own_at_a_tie(vocab: int, backend: str, native: str) -> None:
    """Columns with p = q take part through the softmax alone; the field's kernels give them -1/2."""
    student, teacher = torch.zeros(1, vocab), torch.zeros(1, vocab)
    student[0, 0] = teacher[0, 1] = 1.0
    high = 2.718281828459045 / (2.718281828459045 + vocab - 1)
    low = (1 - high) / (vocab - 1)
    total = (high - low) / 2
    expected = torch.full((1, vocab), -low * total)
    expected[0, 0], expected[0, 1] = high / 2 - high * total, -low / 2 - low * total
    _, gradient = _solve(student, teacher, divergence="total_variation", backend=backend)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("value", [NAN, float("inf")])
@pytest.mark.parametrize("column", [0, 17, CHUNK + 4])
@pytest.mark.parametrize("model", ["student", "teacher"])
def test_what_is_not_a_number_is_never_hidden(
    model: str, column: int, value: float, divergence: str, backend: str, native: str
) -> None:
    """A NaN or +inf logit in a row that counts shows in that row's loss, and in no other's loss or gradient."""
    student, teacher, _ = _rows((3,), CHUNK + 5)
    (student if model == "student" else teacher)[1, column] = value
    loss, gradient = _solve(
        student, teacher, upstream=torch.ones(3), divergence=divergence, reduction="none", backend=backend
    )
    assert not loss[1].isfinite()
    assert loss[[0, 2]].isfinite().all() and gradient[[0, 2]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_row_without_any_column_left_is_not_a_number(divergence: str, backend: str, native: str) -> None:
    student, teacher, _ = _rows((2,), 30)
    student[0] = teacher[0] = float("-inf")
    loss = fastkd.kd_loss(student, teacher, divergence=divergence, reduction="none", backend=backend)
    assert not loss[0].isfinite() and loss[1].isfinite()
