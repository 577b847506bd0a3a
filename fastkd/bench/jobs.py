"""What is measured: presets as lists of jobs, and the processes that run them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from fastkd.divergence import SPECS

WARM_BYTES = 4 << 30  # glibc keeps freed blocks up to this size, instead of returning them to the system
WARM_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(WARM_BYTES),
    "MALLOC_TOP_PAD_": str(WARM_BYTES),
    "MALLOC_TRIM_THRESHOLD_": str(WARM_BYTES),
}
MAIN = ["copy", "naive", "compile", "liger", "fastkd", "fastkd-inplace", "fastkd-value"]
OURS = ["copy", "fastkd", "fastkd-inplace", "fastkd-value"]


@dataclass(frozen=True)
class Job:
    """One shape, dtype and divergence with the providers that take turns on it."""

    rows: int
    vocab: int
    dtype: str
    providers: list[str]
    threads: int
    rounds: int
    temperature: float = 2.0
    divergence: str = "forward_kl"
    cold: bool = True  # touch 64 MiB between runs
    repeats: int = 1  # runs that one timing averages
    memory: bool = True
    extra_environment: dict[str, str] = field(default_factory=dict)


def default_jobs(arguments: Any) -> list[Job]:
    jobs = []
    for dtype in arguments.dtype:
        common = {"threads": arguments.threads, "rounds": arguments.rounds, "temperature": arguments.temperature}
        shape = (arguments.rows, arguments.vocab, dtype)
        providers = arguments.providers or MAIN
        jobs.append(Job(*shape, providers, divergence=arguments.divergence, **common))
        if arguments.providers is None and arguments.divergence == "forward_kl":
            jobs.append(Job(*shape, ["naive-warm"], extra_environment=WARM_ALLOCATOR, memory=False, **common))
    return jobs


def divergence_jobs(arguments: Any) -> list[Job]:
    return [
        Job(arguments.rows, arguments.vocab, dtype, OURS, arguments.threads, arguments.rounds,
            arguments.temperature, divergence, memory=False)
        for dtype in arguments.dtype
        for divergence in SPECS
    ]  # fmt: skip


def vocab_jobs(arguments: Any) -> list[Job]:
    """Equal numbers of elements at growing V, then one row of 2^20 columns on one thread and on all."""
    elements = arguments.rows * arguments.vocab
    jobs = []
    for dtype in arguments.dtype:
        for vocab in (32000, 128256, 262144, 1 << 20):
            rows = max(1, elements // vocab)
            jobs.append(Job(rows, vocab, dtype, OURS, arguments.threads, arguments.rounds, arguments.temperature,
                            memory=False))  # fmt: skip
        jobs += [
            Job(1, 1 << 20, dtype, OURS, threads, 3 * arguments.rounds, arguments.temperature, memory=False)
            for threads in (1, arguments.threads)
        ]
    return jobs


def grid_jobs(arguments: Any) -> list[Job]:
    """Small shapes, warm: what a call costs beside the kernels."""
    jobs = []
    for rows in (1, 32, 4096):
        for vocab in (10, 1000, 32000):
            small = rows * vocab < 1 << 20
            jobs.append(Job(rows, vocab, "float32", ["naive", "fastkd"], arguments.threads,
                            3 * arguments.rounds if small else 3, arguments.temperature, cold=False,
                            repeats=50 if small else 1, memory=False))  # fmt: skip
    return jobs


PRESETS: dict[str, Callable[[Any], list[Job]]] = {
    "default": default_jobs,
    "divergences": divergence_jobs,
    "vocab": vocab_jobs,
    "grid": grid_jobs,
}


def _messages(job: Job, kind: str, providers: list[str]) -> Iterable[dict[str, Any]]:
    request = {**asdict(job), "kind": kind, "providers": providers}
    environment = {**os.environ, **job.extra_environment, "OMP_NUM_THREADS": str(job.threads)}
    process = subprocess.Popen(
        [sys.executable, "-m", "fastkd.bench.worker", json.dumps(request)],
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            yield json.loads(line)
    if process.wait() != 0:
        raise RuntimeError(f"the measuring process of {job.rows} x {job.vocab} {job.dtype} failed; its error is above")


def run_job(job: Job, tick: Callable[[str], None]) -> list[dict[str, Any]]:
    """One result a provider: the job's fields, and p20/p50/p80 in seconds, error, peak bytes, or why there are none."""
    results: dict[str, dict[str, Any]] = {name: {"provider": name} for name in job.providers}
    for message in _messages(job, "time", job.providers):
        if "tick" in message:
            tick(message["tick"])
        else:
            results[message["provider"]].update(message)
    if job.memory:
        for name, result in results.items():
            if "p50" in result and name != "copy":
                tick(f"{name} memory")
                for message in _messages(job, "memory", [name]):
                    result.update(message)
    fields = {key: value for key, value in asdict(job).items() if key not in ("providers", "extra_environment")}
    note = "warm allocator" if job.extra_environment else "allocator as it comes"
    return [{**fields, "allocator": note, **result} for result in results.values()]
