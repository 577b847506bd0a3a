"""Who is benchmarked: every provider turns student and teacher logits into the loss and the gradient of the logits."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd

CE_WEIGHT = 1.0


@dataclass
class Problem:
    """Inputs of one measurement. student_logits is a leaf that requires grad; logits are peaked (std 3)."""

    rows: int
    vocab: int
    dtype: torch.dtype
    temperature: float = 2.0
    divergence: str = "forward_kl"
    seed: int = 0
    student_logits: Tensor = field(init=False)
    teacher_logits: Tensor = field(init=False)
    labels: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.rows, self.vocab)
        self.student_logits = (3 * torch.randn(shape, generator=generator)).to(self.dtype).requires_grad_()
        self.teacher_logits = (3 * torch.randn(shape, generator=generator)).to(self.dtype)
        self.labels = torch.randint(0, self.vocab, (self.rows,), generator=generator)

    def options(self) -> dict:
        return {"divergence": self.divergence, "temperature": self.temperature, "ce_weight": CE_WEIGHT}


@dataclass(frozen=True)
class Provider:
    """One way to compute. run(problem) -> (loss, gradient or None); prepare(problem) is not timed."""

    name: str
    run: Callable[[Problem], tuple[Tensor, Tensor | None]]
    moves: int  # N x V tensors that the task must move at least: 3 for loss and gradient, 2 for the value or a copy
    note: str
    prepare: Callable[[Problem], None] = lambda problem: None
    missing: Callable[[Problem], str] = lambda problem: ""  # why it cannot run; "" if it can
    checked: bool = True


def kd_loss(*tensors: Tensor, **options) -> Tensor:
    """fastkd's loss without statistics: a tensor."""
    loss = fastkd.kd_loss(*tensors, **options)
    assert isinstance(loss, Tensor)
    return loss


def naive_loss(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The textbook loss in PyTorch."""
    kd = F.kl_div(F.log_softmax(student / temperature, -1), F.softmax(teacher / temperature, -1), reduction="batchmean")
    return temperature**2 * kd + CE_WEIGHT * F.cross_entropy(student, labels)


def _backward(problem: Problem, loss: Tensor) -> tuple[Tensor, Tensor | None]:
    loss.backward()
    return loss.detach(), problem.student_logits.grad


def _naive(problem: Problem) -> tuple[Tensor, Tensor | None]:
    loss = naive_loss(problem.student_logits, problem.teacher_logits, problem.labels, problem.temperature)
    return _backward(problem, loss)


_compiled: dict[int, Callable] = {}


def _compile(problem: Problem) -> tuple[Tensor, Tensor | None]:
    compiled = _compiled.setdefault(id(problem), torch.compile(naive_loss, dynamic=False))
    loss = compiled(problem.student_logits, problem.teacher_logits, problem.labels, problem.temperature)
    return _backward(problem, loss)


def _fastkd(problem: Problem) -> tuple[Tensor, Tensor | None]:
    loss = kd_loss(problem.student_logits, problem.teacher_logits, problem.labels, **problem.options())
    return _backward(problem, loss)


class _Head(torch.autograd.Function):
    """A head whose forward and backward cost nothing: its output is not a leaf, as in-place needs it."""

    @staticmethod
    def forward(ctx, trigger: Tensor, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return None, None


_inplace_logits: dict[int, Tensor] = {}


def _refill(problem: Problem) -> None:
    """In place, the logits of the previous run are gone: fill their memory again."""
    buffer = _inplace_logits.get(id(problem))
    if buffer is None:
        buffer = _inplace_logits[id(problem)] = torch.empty_like(problem.student_logits, requires_grad=False)
    buffer.copy_(problem.student_logits.detach())


def _run_inplace(problem: Problem) -> tuple[Tensor, Tensor | None]:
    trigger = torch.zeros((), requires_grad=True)
    logits = _Head.apply(trigger, _inplace_logits[id(problem)])
    loss = kd_loss(logits, problem.teacher_logits, problem.labels, inplace=True, **problem.options())
    loss.backward()
    return loss.detach(), _inplace_logits[id(problem)]


@torch.no_grad()
def _value(problem: Problem) -> tuple[Tensor, Tensor | None]:
    loss = kd_loss(problem.student_logits, problem.teacher_logits, problem.labels, **problem.options())
    return loss, None


_copies: dict[int, Tensor] = {}


def _copy(problem: Problem) -> tuple[Tensor, Tensor | None]:
    target = _copies.get(id(problem))
    if target is None:
        target = _copies[id(problem)] = torch.empty_like(problem.teacher_logits)
    return target.copy_(problem.teacher_logits), None


def _only_forward_kl(problem: Problem) -> str:
    return "" if problem.divergence == "forward_kl" else f"the naive loss here is forward_kl, not {problem.divergence}"


def _needs(module: str, device: str) -> Callable[[Problem], str]:
    def missing(problem: Problem) -> str:
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
        if problem.student_logits.device.type != device:
            return f"its kernels need {device}"
        return _only_forward_kl(problem)

    return missing


def _liger(problem: Problem) -> tuple[Tensor, Tensor | None]:
    from liger_kernel.transformers import LigerCrossEntropyLoss, LigerKLDIVLoss

    t = problem.temperature
    log_q = F.log_softmax(problem.student_logits / t, -1)
    kd = LigerKLDIVLoss(reduction="batchmean")(log_q, F.softmax(problem.teacher_logits / t, -1))
    ce = LigerCrossEntropyLoss()(problem.student_logits, problem.labels)
    return _backward(problem, t**2 * kd + CE_WEIGHT * ce)


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("copy", _copy, 2, "one N x V tensor copied: the bandwidth", checked=False),
        Provider("naive", _naive, 3, "PyTorch, allocator as it comes", missing=_only_forward_kl),
        Provider("naive-warm", _naive, 3, "PyTorch, allocator kept warm", missing=_only_forward_kl),
        Provider("compile", _compile, 3, "torch.compile of naive", missing=_only_forward_kl),
        Provider("liger", _liger, 3, "Liger kernels", missing=_needs("liger_kernel", "cuda")),
        Provider("fastkd", _fastkd, 3, "fresh gradient"),
        Provider("fastkd-inplace", _run_inplace, 3, "gradient over the logits", prepare=_refill),
        Provider("fastkd-value", _value, 2, "value alone, no_grad"),
    )
}
