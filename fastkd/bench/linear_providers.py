"""Who is benchmarked on the linear loss: hidden states in, loss and gradients of hidden states and head out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import linear_kd_loss
from fastkd.linear_chunks import chunk_rows, default_budget

from .providers import CE_WEIGHT, naive_loss

IGNORED = 0.7  # share of the rows that fastkd-ignored leaves out
NAIVE_TENSORS = 9  # N x V tensors that the naive loss holds at its peak, and one to spare


@dataclass
class LinearProblem:
    """Inputs of one measurement: student_hidden and student_weight are leaves; logits have standard deviation 3."""

    rows: int
    hidden: int
    teacher_hidden: int
    vocab: int
    dtype: torch.dtype
    temperature: float = 2.0
    chunk_size: int | str = "auto"
    student: tuple[Tensor, Tensor] = field(init=False)
    teacher: tuple[Tensor, Tensor] = field(init=False)
    labels: Tensor = field(init=False)
    some_labels: Tensor = field(init=False)
    buffers: list[Tensor] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(0)

        def model(width: int) -> tuple[Tensor, Tensor]:
            hidden = torch.randn(self.rows, width, generator=g).to(self.dtype)
            return hidden, torch.randn(self.vocab, width, generator=g).mul_(3 / width**0.5).to(self.dtype)

        student_hidden, student_weight = model(self.hidden)
        self.student = (student_hidden.requires_grad_(), student_weight.requires_grad_())
        self.teacher = model(self.teacher_hidden)
        self.labels = torch.randint(self.vocab, (self.rows,), generator=g)
        ignored = torch.rand(self.rows, generator=g) < IGNORED
        self.some_labels = self.labels.masked_fill(ignored, -100)

    def forget(self) -> None:
        """Free the gradients of the last run."""
        for leaf in self.student:
            leaf.grad = None

    def part(self, rows: int) -> LinearProblem:
        """The first rows, in chunks that do not divide them."""
        new = object.__new__(LinearProblem)
        new.__dict__.update(self.__dict__, rows=rows, chunk_size=max(1, rows * 3 // 8), buffers=[])
        (hidden, weight), (teacher_hidden, teacher_weight) = self.student, self.teacher
        new.student = hidden.detach()[:rows].requires_grad_(), weight.detach().requires_grad_()
        new.teacher = teacher_hidden[:rows], teacher_weight
        new.labels, new.some_labels = self.labels[:rows], self.some_labels[:rows]
        return new


@dataclass(frozen=True)
class LinearProvider:
    """run(problem) -> loss, its gradients left in the problem's leaves; prepare(problem) is not timed."""

    name: str
    run: Callable[[LinearProblem], Tensor | None]
    prepare: Callable[[LinearProblem], None] = lambda problem: None
    missing: Callable[[LinearProblem], str] = lambda problem: ""
    checked: bool = True


def _naive(problem: LinearProblem) -> Tensor:
    student, teacher = F.linear(*problem.student), F.linear(*problem.teacher)
    loss = naive_loss(student, teacher, problem.labels, problem.temperature)
    del student, teacher
    loss.backward()
    return loss.detach()


def _too_large(problem: LinearProblem) -> str:
    """Why the naive loss must not be tried: a machine that runs out of memory kills whom it likes."""
    needed = NAIVE_TENSORS * problem.rows * problem.vocab * problem.dtype.itemsize
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), needed)
    return "" if needed < 0.8 * free else f"needs some {needed / 1e9:.0f} GB of {free / 1e9:.0f}; take fewer --tokens"


def _run_fastkd(problem: LinearProblem, labels: Tensor) -> Tensor:
    loss = linear_kd_loss(
        *problem.student, *problem.teacher, labels, temperature=problem.temperature, ce_weight=CE_WEIGHT,
        chunk_size=problem.chunk_size,
    )  # fmt: skip
    assert isinstance(loss, Tensor)
    loss.backward()
    return loss.detach()


def _prepare_products(problem: LinearProblem) -> None:
    """Everything that the bare products write to, touched: logits of a chunk as fastkd's, and both gradients."""
    if problem.buffers:
        return
    dtypes, weight = (problem.dtype,) * 2, problem.student[1]
    accumulator = 2 * weight.numel() if problem.dtype.itemsize == 2 else 0
    budget = default_budget(problem.rows, problem.vocab, dtypes, accumulator)
    rows = chunk_rows(problem.rows, problem.vocab, dtypes, budget)
    logits = torch.randn(rows, problem.vocab).to(problem.dtype)
    problem.buffers += [logits, *(torch.zeros_like(x, requires_grad=False) for x in problem.student)]


@torch.no_grad()
def _products(problem: LinearProblem) -> None:
    """The four matrix products alone, in fastkd's chunks, each one call; nothing rounded twice, nothing in fp32."""
    logits, hidden_gradient, weight_gradient = problem.buffers
    (hidden, weight), (teacher_hidden, teacher_weight) = problem.student, problem.teacher
    for start in range(0, problem.rows, logits.shape[0]):
        rows = slice(start, min(start + logits.shape[0], problem.rows))
        part = logits[: rows.stop - start]
        torch.mm(teacher_hidden[rows], teacher_weight.t(), out=part)
        torch.mm(hidden[rows], weight.t(), out=part)
        torch.mm(part, weight, out=hidden_gradient[rows])
        weight_gradient.addmm_(part.t(), hidden[rows], beta=0 if start == 0 else 1)


PROVIDERS = {
    provider.name: provider
    for provider in (
        LinearProvider("products", _products, prepare=_prepare_products, checked=False),
        LinearProvider("naive", _naive, missing=_too_large),
        LinearProvider("fastkd", lambda problem: _run_fastkd(problem, problem.labels)),
        LinearProvider("fastkd-ignored", lambda problem: _run_fastkd(problem, problem.some_labels), checked=False),
    )
}
