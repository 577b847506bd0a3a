"""Who is benchmarked: every provider turns student and teacher logits into the loss and the gradient of the logits."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

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
    scratch: dict[str, Any] = field(init=False, default_factory=dict)  # what a provider keeps from run to run

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


def _compile(problem: Problem) -> tuple[Tensor, Tensor | None]:
    if "compiled" not in problem.scratch:
        problem.scratch["compiled"] = torch.compile(naive_loss, dynamic=False)
    compiled = problem.scratch["compiled"]
    loss = compiled(problem.student_logits, problem.teacher_logits, problem.labels, problem.temperature)
    return _backward(problem, loss)


def _fastkd(problem: Problem, backend: str = "auto") -> tuple[Tensor, Tensor | None]:
    tensors = (problem.student_logits, problem.teacher_logits, problem.labels)
    return _backward(problem, kd_loss(*tensors, backend=backend, **problem.options()))


def _triton(problem: Problem) -> tuple[Tensor, Tensor | None]:
    return _fastkd(problem, backend="triton")


def _without_triton(problem: Problem) -> str:
    answer = fastkd.explain(problem.student_logits, problem.teacher_logits, backend="triton")
    return "" if answer.backend == "triton" else answer.reasons["triton"]


def _release(problem: Problem) -> None:
    fastkd.ops.release_lingering_memory()


class _Head(torch.autograd.Function):
    """A head whose forward and backward cost nothing: its output is not a leaf, as in-place needs it."""

    @staticmethod
    def forward(ctx, trigger: Tensor, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return None, None


def _refill(problem: Problem) -> None:
    """In place, the logits of the previous run are gone: fill their memory again."""
    if "logits" not in problem.scratch:
        problem.scratch["logits"] = torch.empty_like(problem.student_logits, requires_grad=False)
    problem.scratch["logits"].copy_(problem.student_logits.detach())


def _run_inplace(problem: Problem) -> tuple[Tensor, Tensor | None]:
    trigger = torch.zeros((), requires_grad=True)
    logits = _Head.apply(trigger, problem.scratch["logits"])
    loss = kd_loss(logits, problem.teacher_logits, problem.labels, inplace=True, **problem.options())
    loss.backward()
    return loss.detach(), problem.scratch["logits"]


@torch.no_grad()
def _value(problem: Problem) -> tuple[Tensor, Tensor | None]:
    loss = kd_loss(problem.student_logits, problem.teacher_logits, problem.labels, **problem.options())
    return loss, None


def _prepare_copy(problem: Problem) -> None:
    if "copy" not in problem.scratch:
        problem.scratch["copy"] = torch.ones_like(problem.teacher_logits)  # written: its page faults are not timed


def _copy(problem: Problem) -> tuple[Tensor, Tensor | None]:
    return problem.scratch["copy"].copy_(problem.teacher_logits), None


def _cross_entropy(problem: Problem) -> Tensor:
    return CE_WEIGHT * F.cross_entropy(problem.student_logits, problem.labels)


def _liger(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """Liger's kernels take log-probabilities of the student; the softmax before them is part of the task."""
    from liger_kernel.transformers import LigerCrossEntropyLoss, LigerKLDIVLoss

    t = problem.temperature
    log_q = F.log_softmax(problem.student_logits / t, -1)
    kd = LigerKLDIVLoss(reduction="batchmean")(log_q, F.softmax(problem.teacher_logits / t, -1))
    ce = LigerCrossEntropyLoss()(problem.student_logits, problem.labels)
    return _backward(problem, t**2 * kd + CE_WEIGHT * ce)


# divergence -> beta of TRL's generalized_jsd_loss: the teacher's weight in the mixture, its ends the two KLs
TRL_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}


def _trl(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """TRL's loss has neither T² nor a hard part: both are added."""
    from trl.experimental.gkd import GKDTrainer

    t, beta = problem.temperature, TRL_BETA[problem.divergence]
    one_sequence = (problem.student_logits[None], problem.teacher_logits[None], problem.labels[None])
    kd = GKDTrainer.generalized_jsd_loss(*one_sequence, beta=beta, temperature=t)
    return _backward(problem, t**2 * kd + _cross_entropy(problem))


def _torchtune(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """torchtune's loss has no T and leaves out the teacher's entropy: both are added."""
    from torchtune.modules.loss import ForwardKLLoss

    t = problem.temperature
    teacher = problem.teacher_logits / t
    lp = F.log_softmax(teacher, -1, dtype=torch.float32)
    entropy = -(lp.exp() * lp).sum(-1).mean()
    kd = ForwardKLLoss()(problem.student_logits / t, teacher, problem.labels) - entropy
    return _backward(problem, t**2 * kd + _cross_entropy(problem))


def _only_forward_kl(problem: Problem) -> str:
    return "" if problem.divergence == "forward_kl" else f"computes forward_kl, not {problem.divergence}"


def _needs(module: str, divergences: Iterable[str] = ("forward_kl",), device: str = "") -> Callable[[Problem], str]:
    def missing(problem: Problem) -> str:
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
        if device not in ("", problem.student_logits.device.type):
            return f"its kernels need {device}"
        return "" if problem.divergence in divergences else f"has no {problem.divergence}"

    return missing


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("copy", _copy, 2, prepare=_prepare_copy, checked=False),  # of one N x V tensor: the bandwidth
        Provider("naive", _naive, 3, missing=_only_forward_kl),
        Provider("naive-warm", _naive, 3, missing=_only_forward_kl),  # in a process that keeps freed memory
        Provider("compile", _compile, 3, missing=_only_forward_kl),
        Provider("trl", _trl, 3, missing=_needs("trl", TRL_BETA)),
        Provider("torchtune", _torchtune, 3, missing=_needs("torchtune")),
        Provider("liger", _liger, 3, missing=_needs("liger_kernel", device="cuda")),
        Provider("fastkd", _fastkd, 3),  # a fresh gradient, in the lingering memory of the one freed before
        Provider("fastkd-first", _fastkd, 3, prepare=_release),  # a fresh gradient, in memory new from the system
        Provider("fastkd-triton", _triton, 3, missing=_without_triton),
        Provider("fastkd-inplace", _run_inplace, 3, prepare=_refill),  # the gradient over the logits
        Provider("fastkd-value", _value, 2),  # no gradient
    )
}
