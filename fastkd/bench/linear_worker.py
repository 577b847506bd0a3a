"""The measuring process of the linear loss: one job as JSON on the command line, one JSON object a line out."""

from __future__ import annotations

import json
import sys
import time

import torch

from .check import MAX_ERROR, WrongResult
from .linear_providers import CE_WEIGHT, PROVIDERS, LinearProblem, LinearProvider
from .measure import peak_extra_bytes, percentiles, return_freed_memory
from .providers import kd_loss
from .worker import say

CHECKED_ROWS = 64


def reference(problem: LinearProblem) -> list[torch.Tensor]:
    """fp64 loss and gradients of hidden states and weight, by fastkd's eager loss of all logits."""
    student = [x.detach().double().requires_grad_() for x in problem.student]
    logits, teacher = student[0] @ student[1].t(), problem.teacher[0].double() @ problem.teacher[1].double().t()
    options = {"temperature": problem.temperature, "ce_weight": CE_WEIGHT}
    loss = kd_loss(logits, teacher, problem.labels, backend="eager", **options)
    return [loss.detach(), *torch.autograd.grad(loss, student)]


def check(provider: LinearProvider, problem: LinearProblem, expected: list[torch.Tensor]) -> float:
    """Largest relative L2 error of loss and gradients on some rows. Raises WrongResult."""
    provider.prepare(problem)
    problem.forget()
    loss = provider.run(problem)
    got = [loss, *(leaf.grad for leaf in problem.student)]
    if any(x is None for x in got):
        raise WrongResult(f"{provider.name}: a gradient is missing")
    errors = [float((x.double() - e).norm() / e.norm()) for x, e in zip(got, expected) if x is not None]
    worst = max(errors) if all(error == error for error in errors) else float("inf")
    if not worst <= MAX_ERROR[problem.dtype]:
        raise WrongResult(f"{provider.name}: error {worst:.2g} against fp64, at most {MAX_ERROR[problem.dtype]:g}")
    problem.forget()
    return worst


def _usable(names: list[str], problem: LinearProblem) -> list[LinearProvider]:
    """The providers that can run and are right; says why of the others, and the error of these."""
    usable, part = [], problem.part(min(CHECKED_ROWS, problem.rows))
    say(tick="fp64 reference")
    expected = reference(part)
    for provider in (PROVIDERS[name] for name in names):
        missing = provider.missing(problem)
        if missing:
            say(provider=provider.name, missing=missing)
            continue
        try:
            if provider.checked:
                say(provider=provider.name, error=check(provider, part, expected))
        except WrongResult as wrong:
            say(provider=provider.name, wrong=str(wrong))
            continue
        usable.append(provider)
    return usable


def _seconds(provider: LinearProvider, problem: LinearProblem) -> float:
    problem.forget()
    provider.prepare(problem)
    start = time.perf_counter()
    provider.run(problem)
    return time.perf_counter() - start


def _time(job: dict, problem: LinearProblem) -> None:
    """In turns, so that noise hits all alike; the first round is not counted."""
    usable = _usable(job["providers"], problem)
    seconds: dict[str, list[float]] = {provider.name: [] for provider in usable}
    for number in range(job["rounds"] + 1):
        for provider in usable:
            elapsed = _seconds(provider, problem)
            say(tick=provider.name)
            if number > 0:
                seconds[provider.name].append(elapsed)
    for name, values in seconds.items():
        say(provider=name, **percentiles(values))


def _memory(job: dict, problem: LinearProblem) -> None:
    """Peak above the inputs, and what of it is not the gradients that the task returns."""
    (name,) = job["providers"]
    provider, gradients = PROVIDERS[name], sum(x.numel() * x.element_size() for x in problem.student)
    part = problem.part(min(CHECKED_ROWS, problem.rows))
    provider.prepare(part)
    provider.run(part)  # libraries, thread pools, scratch
    del part
    provider.prepare(problem)
    return_freed_memory()
    peak = peak_extra_bytes(lambda: provider.run(problem))
    say(provider=name, peak=peak, extra=peak - gradients)


def main(argv: list[str]) -> int:
    """Run one job: the fields of linear_jobs.LinearJob, and kind: "time" or "memory"."""
    job = json.loads(argv[0])
    torch.set_num_threads(job["threads"])
    sizes = (job["rows"], job["hidden"], job["teacher_hidden"], job["vocab"])
    problem = LinearProblem(*sizes, getattr(torch, job["dtype"]), job["temperature"])
    if job["kind"] == "memory":
        _memory(job, problem)
    else:
        _time(job, problem)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
