"""The measuring process: takes one job as JSON on the command line, prints one JSON object a line.

A process of its own gives a provider its own allocator settings and a clean high-water mark of memory.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .check import Reference, WrongResult, check, reference
from .measure import percentiles, provider_memory, time_in_turns
from .providers import PROVIDERS, Problem, Provider


def problem_of(job: Mapping[str, Any], seed: int) -> Problem:
    dtype = getattr(torch, job["dtype"])
    return Problem(job["rows"], job["vocab"], dtype, job["temperature"], job["divergence"], seed)


@dataclass(frozen=True)
class Kind:
    """What a preset measures: its providers, its problems, and the reference of each provider."""

    providers: Mapping[str, Provider]
    problem_of: Callable[[Mapping[str, Any], int], Problem]
    references: Callable[[Problem], Callable[[Provider], Reference]]


def _one_reference(problem: Problem) -> Callable[[Provider], Reference]:
    expected = reference(problem)
    return lambda provider: expected


DENSE = Kind(PROVIDERS, problem_of, _one_reference)


def say(**message: Any) -> None:
    print(json.dumps(message), flush=True)


def _first_run(provider: Provider, problem: Problem) -> tuple[Any, float, str]:
    """(loss and gradient, seconds, why there are none). A provider that raises cannot run, except for ours: a bug."""
    provider.prepare(problem)
    start = time.perf_counter()
    try:
        result = provider.run(problem)
    except Exception as error:
        if provider.name.startswith("fastkd"):
            raise
        lines = str(error).strip().splitlines()
        return None, 0.0, f"{type(error).__name__}: {lines[0].strip() if lines else ''}"
    return result, time.perf_counter() - start, ""


def _usable(kind: Kind, names: list[str], problem: Problem) -> list[Provider]:
    """The providers that can run and are right; says why of the others, and the error of these."""
    usable = []
    say(tick="fp64 reference")
    expected = kind.references(problem) if any(kind.providers[name].checked for name in names) else None
    for name in names:
        provider = kind.providers[name]
        missing = provider.missing(problem)
        if not missing:
            say(tick=f"{name}, check")
            problem.student_logits.grad = None
            result, seconds, missing = _first_run(provider, problem)
        if missing:
            say(provider=name, missing=missing)
            continue
        try:
            error = check(provider, problem, expected(provider), *result) if provider.checked and expected else None
        except WrongResult as wrong:
            say(provider=name, wrong=str(wrong))
            continue
        say(provider=name, error=error, first_run_seconds=seconds)
        usable.append(provider)
    return usable


def _time(kind: Kind, job: dict[str, Any], problems: list[Problem]) -> None:
    seconds: dict[str, list[float]] = {}
    usable = _usable(kind, job["providers"], problems[0])
    for name, elapsed in time_in_turns(usable, problems, job["rounds"], job["cold"], job.get("repeats", 1)):
        seconds.setdefault(name, []).append(elapsed)
        say(tick=name)
    for name, values in seconds.items():
        say(provider=name, **percentiles(values), moves=kind.providers[name].moves)


def main(argv: list[str], kind: Kind = DENSE) -> int:
    """Run one job: the fields of jobs.Job, and kind: "time" or "memory"."""
    job = json.loads(argv[0])
    torch.set_num_threads(job["threads"])
    problems = [kind.problem_of(job, seed) for seed in range(job.get("problems", 1))]
    if job["kind"] == "memory":
        (name,) = job["providers"]
        say(provider=name, peak=provider_memory(kind.providers[name], problems[0]))
    else:
        _time(kind, job, problems)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
