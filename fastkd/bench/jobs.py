"""What is measured: presets as lists of jobs, and the processes that run them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fastkd.divergence import SPECS

from .measure import flush_bytes

WARM_BYTES = 4 << 30  # glibc keeps freed blocks up to this size, instead of returning them to the system
WARM_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(WARM_BYTES),
    "MALLOC_TOP_PAD_": str(WARM_BYTES),
    "MALLOC_TRIM_THRESHOLD_": str(WARM_BYTES),
}
MAIN = [
    "copy", "naive", "naive-warm", "compile", "trl", "torchtune", "liger", "fastkd", "fastkd-first", "fastkd-inplace",
    "fastkd-value",
]  # fmt: skip
# the first run of a compiled provider shows what compiling costs, whatever was compiled before
ENVIRONMENT = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
BYTES = {"float32": 4, "bfloat16": 2}
OURS = ["copy", "fastkd", "fastkd-inplace", "fastkd-value"]


@dataclass(frozen=True)
class Job:
    """One shape, dtype and divergence with the providers that take turns on it."""

    preset: str
    rows: int
    vocab: int
    dtype: str
    providers: list[str]
    threads: int
    rounds: int
    temperature: float = 2.0
    divergence: str = "forward_kl"
    cold: bool = True  # evict the inputs from the caches between runs
    repeats: int = 1  # runs that one timing averages
    problems: int = 1  # problems that the runs take in turn: with many, the logits are cold and the program is not
    memory: bool = True
    extra_environment: dict[str, str] = field(default_factory=dict)
    worker: str = "fastkd.bench.worker"  # the module that measures it


def default_jobs(arguments: Any) -> list[Job]:
    """One shape; naive-warm in a process of its own, since the allocator's settings are the process's."""
    wanted = arguments.providers or MAIN
    jobs = []
    for dtype in arguments.dtype:
        job = Job(
            "default", arguments.rows, arguments.vocab, dtype, [name for name in wanted if name != "naive-warm"],
            arguments.threads, arguments.rounds, arguments.temperature, arguments.divergence,
        )  # fmt: skip
        if job.providers:
            jobs.append(job)
        if "naive-warm" in wanted:
            jobs.append(replace(job, providers=["naive-warm"], memory=False, extra_environment=WARM_ALLOCATOR))
    return jobs


def _ours(arguments: Any, preset: str, rows: int, vocab: int, dtype: str, **fields: Any) -> Job:
    common = {"threads": arguments.threads, "rounds": arguments.rounds, "temperature": arguments.temperature}
    return Job(preset, rows, vocab, dtype, **{"providers": OURS, "memory": False, **common, **fields})


def divergence_jobs(arguments: Any) -> list[Job]:
    return [
        _ours(arguments, "divergences", arguments.rows, arguments.vocab, dtype, divergence=divergence)
        for dtype in arguments.dtype
        for divergence in SPECS
    ]


def vocab_jobs(arguments: Any) -> list[Job]:
    """Equal numbers of elements at growing V, then one row of 2^20 columns on one thread and on all: after a flush,
    which evicts the interpreter too (that costs most of a millisecond, on one thread), and with cold logits alone."""
    elements, threads = arguments.rows * arguments.vocab, arguments.threads
    jobs = []
    for dtype in arguments.dtype:
        jobs += [
            # a multiple of the threads: none has a row more to do than another
            _ours(arguments, "vocab", max(1, elements // vocab // threads * threads), vocab, dtype)
            for vocab in (32000, 128256, 262144, 1 << 20)
        ]
        jobs += [
            _ours(arguments, "vocab", 1, 1 << 20, dtype, threads=count, rounds=3 * arguments.rounds)
            for count in (1, threads)
        ]
        many = -(-flush_bytes() // (2 * (1 << 20) * BYTES[dtype]))
        jobs += [
            _ours(arguments, "row", 1, 1 << 20, dtype, providers=["copy", "fastkd", "fastkd-value"], threads=count,
                  rounds=6 * arguments.rounds, cold=False, problems=many)
            for count in (1, threads)
        ]  # fmt: skip
    return jobs


def grid_jobs(arguments: Any) -> list[Job]:
    """Small shapes, warm: what a call costs beside the kernels."""
    jobs = []
    for rows in (1, 32, 4096):
        for vocab in (10, 1000, 32000):
            repeats = max(1, min(50, (1 << 19) // (rows * vocab)))
            rounds = 3 * arguments.rounds if rows * vocab < 1 << 21 else max(3, arguments.rounds // 3)
            jobs.append(_ours(arguments, "grid", rows, vocab, "float32", providers=["naive", "fastkd"], rounds=rounds,
                              cold=False, repeats=repeats))  # fmt: skip
    return jobs


PRESETS: dict[str, Callable[[Any], list[Job]]] = {
    "default": default_jobs,
    "divergences": divergence_jobs,
    "vocab": vocab_jobs,
    "grid": grid_jobs,
}


def _messages(job: Job, kind: str, providers: list[str]) -> Iterable[dict[str, Any]]:
    request = {**asdict(job), "kind": kind, "providers": providers}
    environment = {**os.environ, **ENVIRONMENT, **job.extra_environment, "OMP_NUM_THREADS": str(job.threads)}
    process = subprocess.Popen(
        [sys.executable, "-m", job.worker, json.dumps(request)],
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
        status = process.wait()
    finally:  # also where the reader stops early: an interrupt must not leave it running
        process.kill()
        process.wait()
    if status != 0:
        raise MeasuringFailed(f"its measuring process ended with status {status}; the error is above")


NOT_REPORTED = ("providers", "extra_environment", "worker")


class MeasuringFailed(RuntimeError):
    """The process that measures a job did not end well."""


def _measure_memory(job: Job, results: dict[str, dict[str, Any]], tick: Callable[[str], None]) -> None:
    """Adds the peak of every timed provider but the copy, each in a process of its own."""
    for name, result in results.items():
        if job.memory and "p50" in result and name != "copy":
            tick(f"{name}, memory")
            for message in _messages(job, "memory", [name]):
                result.update(message)


def run_job(job: Job, tick: Callable[[str], None]) -> list[dict[str, Any]]:
    """One result a provider: the job's fields, and p20/p50/p80 in seconds, error, peak bytes, or why there are none."""
    results: dict[str, dict[str, Any]] = {name: {"provider": name} for name in job.providers}
    try:
        for message in _messages(job, "time", job.providers):
            if "tick" in message:
                tick(message["tick"])
            else:
                results[message["provider"]].update(message)
        _measure_memory(job, results, tick)
    except MeasuringFailed as error:
        for result in results.values():
            if "p50" not in result and "missing" not in result:
                result.setdefault("wrong", f"{result['provider']}: {error}")
    fields = {key: value for key, value in asdict(job).items() if key not in NOT_REPORTED}
    note = "warm allocator" if job.extra_environment else "allocator as it comes"
    return [{**fields, "allocator": note, **result} for result in results.values()]
