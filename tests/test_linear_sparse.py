"""linear_sparse_kd_loss: sparse_kd_loss of the logits that are never all there, chunk by chunk."""

from __future__ import annotations

import inspect

import pytest
import torch
from sparse_cases import TAILS
from test_sparse_api import both, teacher_of
from torch import Tensor

import fastkd
from fastkd import LinearSparseKDLoss, TopKTeacher, linear_sparse_kd_loss, sparse_kd_loss
from fastkd.linear_chunks import Call, linear_kd
from fastkd.ops import scalars_of
from fastkd.options import Options

ROWS, HIDDEN, VOCAB = 13, 8, 60


def models(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight and bias of the student, logits of the teacher."""
    g = torch.Generator().manual_seed(4)
    shapes = ((ROWS, HIDDEN), (VOCAB, HIDDEN), (VOCAB,))
    hidden, weight, bias = (torch.randn(*shape, generator=g).to(dtype) for shape in shapes)
    return hidden, weight, bias, 3 * torch.randn(ROWS, VOCAB, generator=g)


def with_gradients(loss_of, *tensors: Tensor, upstream: Tensor | None = None) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in tensors]
    loss = loss_of(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]


def everything(temperature: float = 2.0) -> dict:
    labels = torch.arange(ROWS) * 3
    labels[[2, 3, 12]] = -100
    return {
        "labels": labels,
        "token_weights": torch.linspace(0.5, 2, ROWS),
        "temperature": temperature,
        "ce_weight": 0.4,
        "label_smoothing": 0.1,
        "z_loss": 1e-3,
        "student_softcap": 20.0,
    }


@both
@pytest.mark.parametrize("chunk_size", [1, 5, 13, 100])
@pytest.mark.parametrize("tail,divergence", [(t, d) for t, ds in TAILS.items() for d in ds])
def test_equals_the_loss_of_all_logits(tail: str, divergence: str, chunk_size: int, backend: str) -> None:
    hidden, weight, bias, logits = models()
    teacher = teacher_of(logits, tail=tail, temperature=2.0)
    if tail == "sampled":
        teacher = TopKTeacher(teacher.ids, teacher.logprobs, tail, torch.full(teacher.ids.shape, 0.2), temperature=2.0)
    options = {**everything(), "divergence": divergence, "backend": backend}
    whole = with_gradients(lambda h, w, b: sparse_kd_loss(h @ w.T + b, teacher, **options), hidden, weight, bias)
    parts = with_gradients(
        lambda h, w, b: linear_sparse_kd_loss(h, w, teacher, student_bias=b, chunk_size=chunk_size, **options),
        hidden, weight, bias,
    )  # fmt: skip
    for got, expected in zip(parts, whole):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-6)
    assert (parts[1][[2, 3, 12]] == 0).all()


@both
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_reductions_stats_and_leading_shape(reduction: str, backend: str) -> None:
    hidden, weight, _, logits = models()
    shape = lambda x: x[:12].reshape(3, 4, *x.shape[1:])  # noqa: E731
    teacher = teacher_of(logits, temperature=2.0).map(shape)
    options = {name: shape(x) if isinstance(x, Tensor) else x for name, x in everything().items()}
    options |= {"reduction": reduction, "return_stats": True, "backend": backend}
    upstream = torch.linspace(-1, 2, 12).view(3, 4) if reduction == "none" else None
    seen = []

    def part(h: Tensor, w: Tensor) -> Tensor:
        loss, stats = linear_sparse_kd_loss(h, w, teacher, chunk_size=5, **options)
        seen.append(stats)
        return loss

    def all_logits(h: Tensor, w: Tensor) -> Tensor:
        loss, stats = sparse_kd_loss(h @ w.T, teacher, **options)
        seen.append(stats)
        return loss

    got = with_gradients(part, shape(hidden), weight, upstream=upstream)
    expected = with_gradients(all_logits, shape(hidden), weight, upstream=upstream)
    for a, b in zip(got + list(seen[0]), expected + list(seen[1])):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def test_bf16(native: str) -> None:
    hidden, weight, _, logits = models(torch.bfloat16)
    teacher = teacher_of(logits)
    part = lambda h, w: linear_sparse_kd_loss(h, w, teacher, chunk_size=4, backend=native)  # noqa: E731
    got = with_gradients(part, hidden, weight)
    wide = with_gradients(lambda h, w: sparse_kd_loss(h @ w.T, teacher), hidden.double(), weight.double())
    for a, b in zip(got, wide):
        torch.testing.assert_close(a.double(), b, rtol=0.05, atol=0.02 * float(b.abs().max()))


def test_only_a_chunk_of_logits_exists(native: str) -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(512, 16, generator=g), torch.randn(4000, 16, generator=g)
    teacher = teacher_of(torch.randn(512, 4000, generator=g), 8)
    budget = 1 << 20
    leaf = hidden.clone().requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        linear_sparse_kd_loss(leaf, weight, teacher, memory_budget=budget, backend=native).backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest <= budget < 512 * 4000 * 4 / 7


def test_fullgraph_compile(native: str) -> None:
    hidden, weight, _, logits = models()
    sparse = teacher_of(logits)

    def step(h: Tensor, w: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
        return linear_sparse_kd_loss(h, w, TopKTeacher(ids, logprobs), chunk_size=5, backend=native)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)
    got = with_gradients(lambda h, w: compiled(h, w, sparse.ids, sparse.logprobs), hidden, weight)
    expected = with_gradients(lambda h, w: step(h, w, sparse.ids, sparse.logprobs), hidden, weight)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)


@both
def test_errors(backend: str) -> None:
    hidden, weight, _, logits = models()
    teacher = teacher_of(logits)
    with pytest.raises(ValueError, match=r"student_hidden and the teacher's ids .* got \(4, 8\) and \(13, 6\)"):
        linear_sparse_kd_loss(hidden[:4], weight, teacher, backend=backend)
    with pytest.raises(ValueError, match=r"ids\[\d+, \d+\] of the teacher: \d+ is outside \[0, 30\)"):
        linear_sparse_kd_loss(hidden, weight[:30], teacher, backend=backend)
    with pytest.raises(ValueError, match="cannot temper them"):
        linear_sparse_kd_loss(hidden, weight, teacher, temperature=2.0, backend=backend)
    with pytest.raises(TypeError, match="chunk_size"):
        linear_sparse_kd_loss(hidden, weight, teacher, chunk_size=2.5, backend=backend)  # type: ignore[arg-type]


@pytest.mark.parametrize("needs", [[True, True, True], [False, True, False]], ids=str)
@pytest.mark.parametrize("tail,reduction", [("bucket", "mean"), ("sampled", "none")])
def test_opcheck(tail: str, reduction: str, needs: list[bool], native: str) -> None:
    hidden, weight, bias, logits = models()
    teacher = teacher_of(logits, tail=tail)
    drawn = torch.full(teacher.ids.shape, 1 / 6) if tail == "sampled" else None
    student = (x.requires_grad_(need) for x, need in zip((hidden, weight, bias), needs))
    options = Options(ce_weight=0.5, reduction=reduction, return_stats=True)
    call = Call(
        *student, None, None, None, None, everything()["labels"], torch.rand(ROWS), None, None,
        scalars_of(options, last=teacher.temperature or 0.0), "forward_kl", True, -100, reduction, True, native, None,
        None, 4, 0, needs, teacher.ids, teacher.logprobs, drawn, tail,
    )  # fmt: skip
    torch.library.opcheck(linear_kd, call)


@both
def test_module_is_the_function(backend: str) -> None:
    hidden, weight, bias, logits = models()
    teacher = teacher_of(logits, tail="renormalize")
    module = LinearSparseKDLoss(chunk_size=5, temperature=2.0, ce_weight=0.5, return_stats=True, backend=backend)
    words = f"chunk_size=5, temperature=2.0, ce_weight=0.5, return_stats=True, backend='{backend}'"
    assert repr(module) == f"LinearSparseKDLoss({words})" and not list(module.parameters())
    assert repr(LinearSparseKDLoss()) == "LinearSparseKDLoss()"
    labels, weights = everything()["labels"], everything()["token_weights"]
    tensors = {"student_bias": bias, "token_weights": weights, "num_items_in_batch": 11}
    for temperature in (None, 3.0, torch.linspace(1, 2, ROWS)):
        loss, stats = module(hidden, weight, teacher, labels, temperature=temperature, **tensors)
        same, same_stats = linear_sparse_kd_loss(
            hidden, weight, teacher, labels, temperature=2.0 if temperature is None else temperature, chunk_size=5,
            ce_weight=0.5, return_stats=True, backend=backend, **tensors,
        )  # fmt: skip
        assert torch.equal(loss, same) and all(torch.equal(a, b) for a, b in zip(stats, same_stats))


def test_the_module_takes_every_option_of_the_function_and_no_other() -> None:
    per_call = {"student_hidden", "student_weight", "teacher", "labels", "student_bias", "token_weights"}
    per_call.add("num_items_in_batch")
    for name, parameter in inspect.signature(linear_sparse_kd_loss).parameters.items():
        if name not in per_call:
            LinearSparseKDLoss(**{name: parameter.default})
    for wrong in ({"inplace": True}, {"teacher_softcap": 3.0}, {"vocab": "error"}, {"vocab_shard": None}, {"alpha": 1}):
        with pytest.raises(TypeError, match=rf"unknown options \['{next(iter(wrong))}'\]; allowed: divergence"):
            LinearSparseKDLoss(**wrong)
    with pytest.raises(ValueError, match="chunk_size must be"):
        LinearSparseKDLoss(chunk_size=0)
    with pytest.raises(ValueError, match="temperature must be"):
        LinearSparseKDLoss(temperature=-1.0)
    assert "LinearSparseKDLoss" in fastkd.__all__
