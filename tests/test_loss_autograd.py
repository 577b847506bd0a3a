"""The loss under autograd: handed-over gradients, upstream factors, retained graphs, accumulation, memory."""

from __future__ import annotations

import pytest
import torch
from inputs import BF16, CHUNK, FP16, FP32, FP64, Case, make_inputs, reference_of, run_backend
from reference import DIVERGENCES
from tolerances import assert_close_to_reference

import fastkd

BACKENDS = ("native", "eager")
OPTIONS = {"ce_weight": 0.5, "label_smoothing": 0.1, "z_loss": 1e-3, "temperature": 2.0}


def _rows(lead=(6,), vocab=50, dtype=FP32, seed=0):
    g = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(*lead, vocab, generator=g) for _ in range(2))
    return student.to(dtype), teacher.to(dtype), torch.randint(vocab, lead, generator=g)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck_of_the_eager_backend(divergence: str, softcap: float | None) -> None:
    student, teacher, labels = _rows((4,), 6, FP64)
    labels[2] = -100

    def loss(s: torch.Tensor) -> torch.Tensor:
        return fastkd.kd_loss(
            s, teacher, labels, divergence=divergence, beta=0.3, student_softcap=softcap, reduction="none",
            backend="eager", **OPTIONS,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, (student.requires_grad_(),))
    if divergence != "total_variation":
        assert torch.autograd.gradgradcheck(loss, (student,))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("factor", [1.0, -3.0, 0.0, 1024.0])
def test_upstream_factor(factor: float, dtype: torch.dtype, inplace: bool, backend: str, native: str) -> None:
    """(factor * loss).backward() is factor times the gradient."""
    inputs = make_inputs(Case("factor", lead=(5,), vocab=CHUNK + 9, student_dtype=dtype, teacher_dtype=dtype))
    options = {"labels": inputs.labels, "backend": backend, "inplace": inplace, **OPTIONS}
    upstream = torch.tensor(factor)
    expected = reference_of(inputs, options, upstream)
    eager = run_backend(inputs, {**options, "backend": "eager", "inplace": False}, upstream=upstream, in_fp32=True)
    outcome = run_backend(inputs, options, upstream=upstream)
    assert_close_to_reference(outcome, expected, eager, roundings=2, step_factor=abs(factor))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_small_fp16_gradients_survive_a_loss_scale(dtype: torch.dtype, backend: str, native: str) -> None:
    """(q - p) / N of 4096 rows underflows in fp16; with a GradScaler's 65536 it must come out, not 0."""
    rows, scale = 4096, 65536.0
    g = torch.Generator().manual_seed(0)
    student = (torch.randn(rows, 64, generator=g)).to(dtype)
    teacher = (student.float() + 0.05 * torch.randn(rows, 64, generator=g)).to(dtype)
    leaf = student.requires_grad_()
    (scale * fastkd.kd_loss(leaf, teacher, backend=backend)).backward()
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    expected = scale * (q - p) / rows
    stored_twice = 2 * {FP32: 2.0**-24, BF16: 2.0**-8, FP16: 2.0**-11}[dtype]
    step = scale / rows * (2.0**-24 if dtype == FP16 else 0)
    bound = stored_twice * expected.abs() + 1e-6 * scale / rows * (p + q) + step
    assert ((leaf.grad.double() - expected).abs() <= bound).all()
    assert (leaf.grad != 0).float().mean() > 0.99


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_backward_twice_with_a_retained_graph(dtype: torch.dtype, inplace: bool, native: str) -> None:
    """Each backward gives the gradient for its own upstream; the first must not scale what the second reads."""
    student, teacher, labels = _rows((5,), CHUNK + 7, dtype)
    leaf = student.requires_grad_()
    loss = fastkd.kd_loss(
        leaf.clone() if inplace else leaf, teacher, labels, backend=native, inplace=inplace, **OPTIONS
    )
    factors = (2.0, 3.0, 1.0)
    gradients = [
        torch.autograd.grad(loss, leaf, torch.tensor(f), retain_graph=f != factors[-1])[0].clone() for f in factors
    ]
    once = gradients[2].double()
    tolerance = {"rtol": 2e-7, "atol": 1e-30} if dtype == FP32 else {"rtol": 2e-3, "atol": 2.0**-22}
    torch.testing.assert_close(gradients[0].double(), 2 * once, **tolerance)
    torch.testing.assert_close(gradients[1].double(), 3 * once, **tolerance)
    with pytest.raises(RuntimeError, match=r"second time|already been freed"):
        loss.backward()


@pytest.mark.parametrize("inplace", [False, True])
def test_gradients_that_the_user_keeps_are_not_overwritten(inplace: bool, native: str) -> None:
    """leaf.grad of one step must survive the accumulation and the rescaling of the next."""
    student, teacher, _ = _rows((4,), 100)
    leaf = student.requires_grad_()
    loss = fastkd.kd_loss(leaf.clone() if inplace else leaf, teacher, backend=native, inplace=inplace)
    (first,) = torch.autograd.grad(loss, leaf, torch.tensor(1.0), retain_graph=True)
    kept = first.clone()
    torch.autograd.grad(loss, leaf, torch.tensor(5.0), retain_graph=True)
    torch.autograd.grad(loss, leaf, torch.tensor(7.0))
    assert torch.equal(first, kept)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_accumulated_micro_batches_sum_to_the_batch(as_tensor: bool, inplace: bool, backend: str, native: str) -> None:
    """With num_items_in_batch, four unequal micro-batches (one all ignored) give the batch's loss and gradient."""
    student, teacher, labels = _rows((12,), 300)
    labels[[2, 7, 8]] = -100
    labels[9:] = -100
    leaf = student.clone().requires_grad_()
    whole = fastkd.kd_loss(leaf, teacher, labels, backend=backend, **OPTIONS)
    whole.backward()
    items = int((labels != -100).sum())
    parts, total = student.clone().requires_grad_(), 0.0
    for piece in (slice(0, 3), slice(3, 4), slice(4, 9), slice(9, 12)):
        view = parts[piece].clone() if inplace else parts[piece]
        loss = fastkd.kd_loss(
            view, teacher[piece], labels[piece], num_items_in_batch=torch.tensor(items) if as_tensor else items,
            backend=backend, inplace=inplace, **OPTIONS,
        )  # fmt: skip
        loss.backward()
        total += float(loss)
    assert total == pytest.approx(float(whole), rel=1e-6)
    torch.testing.assert_close(parts.grad, leaf.grad, rtol=1e-6, atol=1e-9)


def test_gradient_is_handed_over_not_copied(native: str) -> None:
    """In place the gradient is the memory of the logits; fresh, backward allocates no second N x V."""
    student, teacher, _ = _rows((8,), 5000)
    leaf = student.requires_grad_()
    logits = leaf.clone()
    loss = fastkd.kd_loss(logits, teacher, backend=native, inplace=True)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.data_ptr() == logits.data_ptr()

    loss = fastkd.kd_loss(leaf, teacher, backend=native)
    assert _peak_of(lambda: loss.backward()) < leaf.numel() * 4 / 2
    loss = fastkd.kd_loss(leaf, teacher, backend=native)
    assert _peak_of(lambda: torch.autograd.grad(3 * loss, leaf)) < leaf.numel() * 4 / 2, "rescaling copies"


def _peak_of(call) -> int:
    """Bytes that torch's allocator held at most beyond the start of the call."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        call()
    held = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_the_memory_meter_sees_allocations() -> None:
    assert _peak_of(lambda: torch.zeros(1000, 1000)) >= 4_000_000


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_memory_of_loss_and_gradient(dtype: torch.dtype, native: str) -> None:
    """1 N V in the logits' dtype for a fresh gradient, nothing in place, nothing for the value alone."""
    student, teacher, labels = _rows((8,), 4000, dtype)  # torch does not see memory that lingers, from 128 KiB on
    leaf = student.requires_grad_()
    gradient_bytes = leaf.numel() * leaf.element_size()
    few = 16384  # bytes: numbers of the rows, of which Triton has 64 bytes a piece
    options = {"backend": native, **OPTIONS}

    fresh = _peak_of(lambda: fastkd.kd_loss(leaf, teacher, labels, **options).backward())
    assert gradient_bytes <= fresh <= gradient_bytes + few
    logits = leaf * 1
    inplace = _peak_of(
        lambda: torch.autograd.grad(fastkd.kd_loss(logits, teacher, labels, inplace=True, **options), logits)
    )
    assert inplace <= few
    frozen = student.detach()
    assert _peak_of(lambda: fastkd.kd_loss(frozen, teacher, labels, **options)) <= few
    with torch.no_grad():
        assert _peak_of(lambda: fastkd.kd_loss(leaf, teacher, labels, **options)) <= few


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_students_and_no_grad_have_no_graph(backend: str, native: str) -> None:
    student, teacher, _ = _rows()
    assert not fastkd.kd_loss(student, teacher, backend=backend).requires_grad
    with torch.no_grad():
        assert not fastkd.kd_loss(student.requires_grad_(), teacher, backend=backend).requires_grad
    with torch.inference_mode():
        assert torch.isfinite(fastkd.kd_loss(student, teacher, backend=backend))


def test_inplace_without_a_gradient_leaves_the_logits_alone(native: str) -> None:
    student, teacher, _ = _rows()
    before = student.clone()
    fastkd.kd_loss(student, teacher, inplace=True, backend=native)
    with torch.no_grad():
        fastkd.kd_loss(student.requires_grad_(), teacher, inplace=True, backend=native)
    assert torch.equal(student, before)


@pytest.mark.parametrize("inplace", [False, True])
def test_double_backward_raises(inplace: bool, native: str) -> None:
    student, teacher, _ = _rows()
    leaf = student.requires_grad_()
    loss = fastkd.kd_loss(leaf * 1, teacher, backend=native, inplace=inplace)
    with pytest.raises(RuntimeError, match=r"second derivative.*eager"):
        torch.autograd.grad(loss, leaf, create_graph=True)


def test_double_backward_of_the_eager_backend(native: str) -> None:
    student, teacher, _ = _rows(dtype=FP64)
    loss = fastkd.kd_loss(student.requires_grad_(), teacher, backend="eager")
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    (curvature,) = torch.autograd.grad(gradient.square().sum(), student)
    assert curvature.isfinite().all() and curvature.abs().max() > 0


def test_inplace_bumps_the_version(native: str) -> None:
    """Whatever else saved the logits must notice that they are gone."""
    student, teacher, _ = _rows()
    logits = student.requires_grad_() * 1
    other = logits.square().sum()  # saves the logits
    before = logits._version
    loss = fastkd.kd_loss(logits, teacher, inplace=True, backend=native)
    assert logits._version > before
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation"):
        (other + loss).backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_earlier_loss_on_the_same_logits_is_right(backend: str, native: str) -> None:
    """log_softmax saves its output, not the logits: a loss taken before stays right, and autograd adds both."""
    student, teacher, labels = _rows()
    leaf = student.requires_grad_()
    logits = leaf * 1
    hard = torch.nn.functional.cross_entropy(logits, labels)
    (hard + fastkd.kd_loss(logits, teacher, inplace=True, backend=backend)).backward()
    expected = student.detach().clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(expected, labels) + fastkd.kd_loss(expected, teacher, backend="eager")
    loss.backward()
    torch.testing.assert_close(leaf.grad, expected.grad, rtol=1e-5, atol=1e-8)


def test_two_losses_share_a_student(native: str) -> None:
    student, teacher, _ = _rows()
    leaf = student.requires_grad_()
    one = fastkd.kd_loss(leaf, teacher, backend=native)
    two = fastkd.kd_loss(leaf, teacher.flip(0), divergence="jsd", backend=native)
    separate = sum(torch.autograd.grad(x, leaf, retain_graph=True)[0].clone() for x in (one, two))
    (one + two).backward()
    torch.testing.assert_close(leaf.grad, separate, rtol=1e-6, atol=1e-9)


def test_student_as_its_own_teacher(native: str) -> None:
    """Self-distillation from the detached logits: one memory, two roles."""
    student, _, labels = _rows((5,), CHUNK + 5)
    leaf = student.requires_grad_()
    loss = fastkd.kd_loss(leaf, leaf.detach(), labels, backend=native, divergence="jsd", **OPTIONS)
    (gradient,) = torch.autograd.grad(loss, leaf)
    apart = fastkd.kd_loss(leaf, student.detach().clone(), labels, backend=native, divergence="jsd", **OPTIONS)
    assert torch.equal(loss, apart)
    assert torch.equal(gradient, torch.autograd.grad(apart, leaf)[0])
