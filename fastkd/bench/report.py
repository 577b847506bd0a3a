"""What surrounds the results: rates, the machine, the CSV."""

from __future__ import annotations

import csv
import datetime
import functools
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import fastkd
from fastkd.ops import cpu_isa

WIDTH = 100
Result = dict[str, Any]
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def cpu_model() -> str:
    """The processor's own name; the architecture where the system does not tell."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def _commit() -> str:
    """Of the checkout that this file is tracked in, "-dirty" where it has changes; blank for an installed package."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        return git("describe", "--always", "--dirty") if git("ls-files", Path(__file__).name) else ""
    except OSError:  # no git
        return ""


@functools.cache
def machine() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "isa": cpu_isa(),
        "torch": torch.__version__,
        "fastkd": fastkd.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


# results that agree in these belong to one table and were measured one after the other
GROUP = ("preset", "rows", "vocab", "dtype", "divergence", "threads")


def add_rates(results: Sequence[Result]) -> None:
    """GB/s for the bytes that the task must move, its share of the copy's rate and its ratio to naive, of one group;
    the peak in units of one N x V tensor of the logits' dtype."""
    timed = [result for result in results if "p50" in result and "moves" in result]
    for result in timed:
        unit = result["rows"] * result["vocab"] * BYTES[result["dtype"]]
        result["bytes"] = result["moves"] * unit
        result["gb_per_s"] = result["bytes"] / result["p50"] / 1e9
        if "peak" in result:
            result["peak_nv"] = result["peak"] / unit
    for result in timed:
        group = {key: result[key] for key in (*GROUP, "k") if key in result}
        copy, naive = find(timed, provider="copy", **group), find(timed, provider="naive", **group)
        if copy:
            result["share_of_copy"] = result["gb_per_s"] / copy["gb_per_s"]
        if naive and result["moves"] == 3:  # the same task: loss and gradient
            result["times_naive"] = naive["p50"] / result["p50"]


def find(results: Sequence[Result], **fields: Any) -> Result | None:
    """The timed result with these fields, if there is one."""
    for result in results:
        if "p50" in result and all(result[key] == value for key, value in fields.items()):
            return result
    return None


def console() -> Console:
    """Never wider than 100 columns, also where the terminal is."""
    plain = Console()
    return Console(width=min(WIDTH, plain.width)) if plain.is_terminal else Console(width=WIDTH)


COLUMNS = (
    "preset", "provider", "rows", "hidden", "teacher_hidden", "vocab", "k", "dtype", "divergence", "temperature",
    "threads", "allocator", "cold", "rounds", "repeats", "p20", "p50", "p80", "times_naive", "bytes", "gb_per_s",
    "share_of_copy",
    "peak", "peak_nv", "extra", "error", "first_run_seconds", "missing", "wrong", "date", "cpu", "cores", "isa",
    "torch", "fastkd", "python", "commit",
)  # fmt: skip


def write_csv(results: Sequence[Result], path: Path) -> None:
    """Every result with the machine; times in seconds, sizes in bytes."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows({**result, **machine()} for result in results)
