"""Checks a provider against fp64 on the inputs that are then timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .providers import Problem, Provider, kd_loss

GRADIENT_ROWS = 8  # rows whose gradient is compared, first and last among them; the loss is that of all rows
CHUNK_ELEMENTS = 1 << 20
# What the naive loss may lose, several times over: its log-probabilities in bf16 are 3 % off by themselves.
MAX_ERROR = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class WrongResult(RuntimeError):
    """A provider's loss or gradient is not that of the fp64 reference."""


@dataclass(frozen=True)
class Reference:
    """fp64 loss of all rows, and the gradient (R, V) of some, by fastkd's eager backend."""

    loss: float
    rows: Tensor
    gradient: Tensor
    labels: Tensor


def _sum_of_losses(student: Tensor, problem: Problem, rows: Tensor | slice) -> Tensor:
    return kd_loss(
        student, problem.teacher_logits[rows].double(), problem.labels[rows],
        backend="eager", reduction="sum", **problem.options(),
    )  # fmt: skip


Sum = Callable[[Tensor, Problem, Tensor | slice], Tensor]  # of the losses of some rows, from the student's in fp64


def reference(problem: Problem, sum_of_losses: Sum = _sum_of_losses) -> Reference:
    """Computed in chunks of rows: fp64 copies of a large problem would not fit beside it."""
    student = problem.student_logits.detach()
    step = max(1, CHUNK_ELEMENTS // problem.vocab)
    total = 0.0
    for start in range(0, problem.rows, step):
        rows = slice(start, start + step)
        total += float(sum_of_losses(student[rows].double(), problem, rows))
    some = torch.linspace(0, problem.rows - 1, min(GRADIENT_ROWS, problem.rows)).round().long()
    leaf = student[some].double().requires_grad_()
    (gradient,) = torch.autograd.grad(sum_of_losses(leaf, problem, some), leaf)
    return Reference(total / problem.rows, some, gradient / problem.rows, problem.labels[some])


def _gradient_error(gradient: Tensor, expected: Reference) -> float:
    """The larger of two relative L2 errors, worst row: of the labels' columns, and of all others.

    Cross-entropy's column is a thousand times the others; one norm over both would see nothing else.
    """
    label = torch.zeros_like(expected.gradient, dtype=torch.bool)
    label[torch.arange(len(expected.rows)), expected.labels] = True
    difference = gradient.double() - expected.gradient
    worst = 0.0
    for columns in (label, ~label):
        error = (difference * columns).norm(dim=-1) / (expected.gradient * columns).norm(dim=-1)
        worst = max(worst, *error.tolist()) if error.isfinite().all() else float("inf")
    return worst


def check(provider: Provider, problem: Problem, expected: Reference, loss: Tensor, gradient: Tensor | None) -> float:
    """Largest relative error of a provider's loss (all rows) and gradient (some rows). Raises WrongResult."""
    error = abs(float(loss) - expected.loss) / abs(expected.loss)
    if gradient is not None:
        if gradient.shape != problem.student_logits.shape:
            raise WrongResult(f"{provider.name}: gradient of shape {tuple(gradient.shape)}")
        error = max(error, _gradient_error(gradient[expected.rows], expected))
    if not error <= MAX_ERROR[problem.dtype]:
        raise WrongResult(f"{provider.name}: error {error:.2g} against fp64, at most {MAX_ERROR[problem.dtype]:g}")
    return error
