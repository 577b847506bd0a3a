"""Inputs of the linear loss, its reference in fp64, and the yardstick: PyTorch's own matrix products and all logits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from inputs import FP32, IGNORE, to_numpy
from reference import reference
from tolerances import assert_close
from torch import Tensor

import fastkd

NAMES = ("hidden", "weight", "bias")


@dataclass(frozen=True)
class Case:
    """Sizes and dtypes; the options are those of linear_kd_loss."""

    rows: int = 23
    hidden: int = 12
    teacher_hidden: int = 20
    vocab: int = 301
    dtype: torch.dtype = FP32
    teacher_dtype: torch.dtype | None = None  # None: the student's
    teacher_vocab: int | None = None  # None: the student's
    ignored: float = 0.3  # share of the labels
    bias: bool = True
    options: dict = field(default_factory=dict)


class Problem(NamedTuple):
    """student: hidden, weight and bias, leaves that require grad; teacher: the same without."""

    student: tuple[Tensor, Tensor, Tensor | None]
    teacher: tuple[Tensor, Tensor, Tensor | None]
    labels: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in self.student if x is not None]


def make_problem(case: Case, seed: int = 0) -> Problem:
    """Logits of standard deviation 3; the labels of about ``case.ignored`` of the rows are ignored."""
    g = torch.Generator().manual_seed(seed)

    def model(width: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        hidden = torch.randn(case.rows, width, generator=g)
        weight = 3 * torch.randn(vocab, width, generator=g) / width**0.5
        bias = torch.randn(vocab, generator=g).to(dtype) if case.bias else None
        return hidden.to(dtype), weight.to(dtype), bias

    student = model(case.hidden, case.vocab, case.dtype)
    teacher_vocab = case.teacher_vocab or case.vocab
    teacher = model(case.teacher_hidden, teacher_vocab, case.teacher_dtype or case.dtype)
    labels = torch.randint(min(case.vocab, teacher_vocab), (case.rows,), generator=g)
    labels[torch.rand(case.rows, generator=g) < case.ignored] = IGNORE
    return Problem(tuple(None if x is None else x.requires_grad_() for x in student), teacher, labels)


class Outcome(NamedTuple):
    """Loss, gradients of hidden, weight and (if there is one) bias, and stats."""

    loss: Tensor
    gradients: tuple[Tensor, ...]
    stats: fastkd.KDStats | None


def _outcome(result, problem: Problem, upstream: Tensor | None) -> Outcome:
    loss, stats = result if isinstance(result, tuple) else (result, None)
    return Outcome(loss.detach(), torch.autograd.grad(loss, problem.leaves, upstream), stats)


def run(problem: Problem, upstream: Tensor | None = None, **options) -> Outcome:
    """By ``fastkd.linear_kd_loss``."""
    hidden, weight, bias = problem.student
    teacher_hidden, teacher_weight, teacher_bias = problem.teacher
    options = {"student_bias": bias, "teacher_bias": teacher_bias, **options}
    result = fastkd.linear_kd_loss(hidden, weight, teacher_hidden, teacher_weight, problem.labels, **options)
    return _outcome(result, problem, upstream)


def run_naive(problem: Problem, upstream: Tensor | None = None, **options) -> Outcome:
    """By PyTorch's products in the tensors' own dtype, and fastkd's eager loss of all logits."""
    options = {k: v for k, v in options.items() if k not in ("chunk_size", "memory_budget", "logits_dtype", "backend")}
    student, teacher = F.linear(*problem.student), F.linear(*problem.teacher)
    result = fastkd.kd_loss(student, teacher, problem.labels, backend="eager", **options)
    return _outcome(result, problem, upstream)


class Expected(NamedTuple):
    """fp64 results and the magnitudes of the gradients."""

    loss: np.ndarray
    loss_magnitude: np.ndarray
    gradients: tuple[np.ndarray, ...]
    magnitudes: tuple[np.ndarray, ...]
    kd: np.ndarray
    ce: np.ndarray


def expected_of(problem: Problem, upstream: Tensor | None = None, **options) -> Expected:
    """The reference of tests/reference.py on fp64 logits, its gradient taken through the head by hand."""
    skipped = ("chunk_size", "memory_budget", "logits_dtype", "backend", "vocab", "return_stats")
    keywords = {k: to_numpy(v) if isinstance(v, Tensor) else v for k, v in options.items() if k not in skipped}

    def logits(model) -> np.ndarray:
        hidden, weight, bias = (None if x is None else to_numpy(x) for x in model)
        return hidden @ weight.T + (0 if bias is None else bias)

    labels = to_numpy(problem.labels)
    up = 1.0 if upstream is None else to_numpy(upstream)
    r = reference(logits(problem.student), logits(problem.teacher), labels, upstream=up, **keywords)
    hidden, weight = (to_numpy(x) for x in problem.student[:2])

    def through(g: np.ndarray, h: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, ...]:
        return (g @ w, g.T @ h, g.sum(0))[: len(problem.leaves)]

    magnitudes = through(r.gradient_magnitude + r.gradient_slack, np.abs(hidden), np.abs(weight))
    return Expected(r.loss, r.loss_magnitude, through(r.gradient, hidden, weight), magnitudes, r.kd, r.ce)


def assert_right(problem: Problem, outcome: Outcome, upstream: Tensor | None = None, **options) -> None:
    """Loss and gradients within a multiple of what PyTorch's own computation in the same dtype loses."""
    expected = expected_of(problem, upstream, **options)
    naive = run_naive(problem, upstream, **options)
    assert_close("loss", outcome.loss, expected.loss, expected.loss_magnitude, naive.loss)
    assert len(outcome.gradients) == len(problem.leaves)
    rows = zip(NAMES, problem.leaves, outcome.gradients, expected.gradients, expected.magnitudes, naive.gradients)
    for name, leaf, gradient, value, magnitude, yardstick in rows:
        assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape, name
        assert_close(f"gradient of {name}", gradient, value, magnitude, yardstick)
