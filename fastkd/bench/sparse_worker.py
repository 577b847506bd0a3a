"""The measuring process of the preset ``sparse``: providers that turn the student's logits and a teacher of K columns a
token into the loss and the gradient, beside the dense loss on the logits that the teacher was taken from."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd

from .check import Reference, reference
from .providers import CE_WEIGHT, PROVIDERS, Problem, Provider, _backward, _Head, _refill
from .worker import Kind, main


@dataclass
class SparseProblem(Problem):
    """A problem whose teacher is also given by its K most probable columns, at the temperature of the loss."""

    k: int = 64
    teacher: fastkd.TopKTeacher = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        lp = torch.log_softmax(self.teacher_logits.float() / self.temperature, -1)
        top = lp.topk(self.k)
        self.teacher = fastkd.TopKTeacher(top.indices, top.values, temperature=self.temperature)


def sparse_kd_loss(*arguments: Any, **options: Any) -> Tensor:
    """fastkd's loss without statistics: a tensor."""
    loss = fastkd.sparse_kd_loss(*arguments, **options)
    assert isinstance(loss, Tensor)
    return loss


def naive_topk_loss(student: Tensor, teacher: fastkd.TopKTeacher, labels: Tensor, temperature: float) -> Tensor:
    """The textbook loss in PyTorch: the K columns and the rest as one outcome."""
    lq = F.log_softmax(student.float() / temperature, -1)
    named = lq.gather(-1, teacher.ids)
    p = teacher.logprobs.exp()
    p_rest, q_rest = 1 - p.sum(-1), 1 - named.exp().sum(-1)
    kd = (p * (teacher.logprobs - named)).sum(-1) + p_rest * (p_rest.log() - q_rest.log())
    return temperature**2 * kd.mean() + CE_WEIGHT * F.cross_entropy(student, labels)


def _problem(problem: Problem) -> SparseProblem:
    assert isinstance(problem, SparseProblem)
    return problem


def _naive(problem: Problem) -> tuple[Tensor, Tensor | None]:
    teacher = _problem(problem).teacher
    return _backward(problem, naive_topk_loss(problem.student_logits, teacher, problem.labels, problem.temperature))


def _sparse(problem: Problem) -> tuple[Tensor, Tensor | None]:
    teacher = _problem(problem).teacher
    return _backward(problem, sparse_kd_loss(problem.student_logits, teacher, problem.labels, **problem.options()))


def _inplace(problem: Problem) -> tuple[Tensor, Tensor | None]:
    trigger = torch.zeros((), requires_grad=True)
    logits = _Head.apply(trigger, problem.scratch["logits"])
    teacher = _problem(problem).teacher
    loss = sparse_kd_loss(logits, teacher, problem.labels, inplace=True, **problem.options())
    loss.backward()
    return loss.detach(), problem.scratch["logits"]


@torch.no_grad()
def _value(problem: Problem) -> tuple[Tensor, Tensor | None]:
    teacher = _problem(problem).teacher
    return sparse_kd_loss(problem.student_logits, teacher, problem.labels, **problem.options()), None


def _only_forward_kl(problem: Problem) -> str:
    return "" if problem.divergence == "forward_kl" else f"computes forward_kl, not {problem.divergence}"


SPARSE_PROVIDERS = {
    "copy": PROVIDERS["copy"],
    "dense": Provider("dense", PROVIDERS["fastkd"].run, 3),
    **{
        provider.name: provider
        for provider in (
            Provider("naive", _naive, 2, missing=_only_forward_kl),
            Provider("fastkd", _sparse, 2),
            Provider("fastkd-inplace", _inplace, 2, prepare=_refill),
            Provider("fastkd-value", _value, 1),
        )
    },
}


def _sum_of_losses(student: Tensor, problem: Problem, rows: Tensor | slice) -> Tensor:
    teacher = _problem(problem).teacher.map(lambda x: x[rows])
    return sparse_kd_loss(student, teacher, problem.labels[rows], backend="eager", reduction="sum", **problem.options())


def references(problem: Problem) -> Callable[[Provider], Reference]:
    """The dense loss is checked against its own."""
    dense, sparse = reference(problem), reference(problem, _sum_of_losses)
    return lambda provider: dense if provider.name == "dense" else sparse


def problem_of(job: Mapping[str, Any], seed: int) -> SparseProblem:
    dtype = getattr(torch, job["dtype"])
    return SparseProblem(job["rows"], job["vocab"], dtype, job["temperature"], job["divergence"], seed, k=job["k"])


SPARSE = Kind(SPARSE_PROVIDERS, problem_of, references)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], SPARSE))
