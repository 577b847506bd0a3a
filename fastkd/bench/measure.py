"""Times a provider, in turns with others, and measures the memory it adds."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median

import torch

from fastkd.ops import release_lingering_memory

from .providers import Problem, Provider

MIN_FLUSH_BYTES, MAX_FLUSH_BYTES = 64 << 20, 512 << 20


def flush_bytes() -> int:
    """Size of what is touched between cold runs, so that no run finds its inputs in a cache: that of the last level."""
    size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    last_level = int(size.read_text().rstrip("K\n")) << 10 if size.exists() else 0
    return min(MAX_FLUSH_BYTES, max(MIN_FLUSH_BYTES, last_level))


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
    seconds = (time.perf_counter() - start) / repeats
    problem.student_logits.grad = None  # of many problems, only the one that runs has a gradient
    return seconds


def time_in_turns(
    providers: Sequence[Provider], problems: Sequence[Problem], rounds: int, cold: bool, repeats: int = 1
) -> Iterator[tuple[str, float]]:
    """(provider, seconds) of every run: providers take turns in each round, so that noise hits all alike, and problems
    take turns from run to run."""
    flush = torch.zeros(flush_bytes() // 4) if cold else None
    for provider in providers:  # warm-up, and compilation
        run_once(provider, problems[0], flush, repeats)
    in_turn = itertools.cycle([*problems[1:], problems[0]])
    for _ in range(rounds):
        for provider in providers:
            yield provider.name, run_once(provider, next(in_turn), flush, repeats)


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


def return_freed_memory() -> None:
    """What an allocator keeps of earlier runs would hide the next run's needs."""
    gc.collect()
    release_lingering_memory()
    with contextlib.suppress(AttributeError):  # glibc's own
        ctypes.CDLL(None).malloc_trim(0)


def provider_memory(provider: Provider, problem: Problem) -> int:
    """Peak bytes of one run above its inputs. Call it in a process that runs nothing else."""
    provider.prepare(problem)
    provider.run(problem)  # libraries, compiled code, thread pools and scratch that stay
    problem.student_logits.grad = None
    provider.prepare(problem)
    return_freed_memory()
    return peak_extra_bytes(lambda: provider.run(problem), problem.student_logits.device.type)
