"""Checks a provider, then measures its time and the memory it adds."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from .providers import Problem, Provider, kd_loss

CHECK_ROWS = 8
# largest gradient error over the largest gradient, and relative error of the loss: naive in bf16 reaches 1e-2
MAX_ERROR = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
FLUSH_BYTES = 64 << 20  # touched between runs, so that no provider finds its inputs in the cache


class WrongResult(RuntimeError):
    """A provider's loss or gradient is not that of the fp64 reference."""


def check(provider: Provider, problem: Problem) -> float:
    """Largest relative error of loss and gradient against fp64 eager on a few rows. Raises WrongResult."""
    small = replace(problem, rows=min(CHECK_ROWS, problem.rows))
    student = small.student_logits.detach().double().requires_grad_()
    expected = kd_loss(student, small.teacher_logits.double(), small.labels, backend="eager", **small.options())
    expected.backward()
    provider.prepare(small)
    loss, gradient = provider.run(small)
    error = float((loss.double() - expected).detach().abs() / expected.detach().abs())
    if gradient is not None:
        assert student.grad is not None
        error = max(error, float((gradient.double() - student.grad).abs().max() / student.grad.abs().max()))
    if not error <= MAX_ERROR[problem.dtype]:
        raise WrongResult(f"{provider.name}: error {error:.2g} against fp64, at most {MAX_ERROR[problem.dtype]:g}")
    return error


def _synchronise(problem: Problem) -> None:
    if problem.student_logits.is_cuda:
        torch.cuda.synchronize()


def run_once(provider: Provider, problem: Problem, flush: torch.Tensor | None, repeats: int) -> float:
    """Seconds of one run (mean of ``repeats``). Gradients are freed, untimed, before it."""
    problem.student_logits.grad = None
    provider.prepare(problem)
    if flush is not None:
        flush.add_(1)
    _synchronise(problem)
    start = time.perf_counter()
    for _ in range(repeats):
        problem.student_logits.grad = None
        provider.run(problem)
    _synchronise(problem)
    return (time.perf_counter() - start) / repeats


def time_in_turns(
    providers: Sequence[Provider], problem: Problem, rounds: int, cold: bool, repeats: int = 1
) -> Iterator[tuple[str, float]]:
    """(provider, seconds) of every run: providers take turns in each round, so that noise hits all alike."""
    flush = torch.zeros(FLUSH_BYTES // 4) if cold else None
    for provider in providers:  # warm-up, and compilation
        run_once(provider, problem, flush, repeats)
    for _ in range(rounds):
        for provider in providers:
            yield provider.name, run_once(provider, problem, flush, repeats)


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80."""
    ordered = sorted(seconds)
    at = lambda share: ordered[min(len(ordered) - 1, int(share * len(ordered)))]  # noqa: E731
    return {"p20": at(0.2), "p50": median(ordered), "p80": at(0.8)}


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def peak_extra_bytes(run: Callable[[], object], device: str = "cpu") -> int:
    """Bytes that ``run`` needs at its peak above what was allocated before it: the process's resident memory on the
    CPU (its high-water mark, reset before the run), the allocator's on CUDA."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def provider_memory(provider: Provider, problem: Problem) -> int:
    """Peak bytes of one run above its inputs. Call it in a process that has run nothing else."""
    small = replace(problem, rows=2)
    provider.prepare(small)
    provider.run(small)  # libraries, thread pools and scratch that stay
    provider.prepare(problem)
    return peak_extra_bytes(lambda: provider.run(problem), problem.student_logits.device.type)
