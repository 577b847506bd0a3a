"""Results as tables of at most 100 columns, as CSV, and against the project's targets."""

from __future__ import annotations

import csv
import datetime
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

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
    try:
        root = Path(__file__).parent
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_model(),
        "isa": cpu_isa(),
        "torch": torch.__version__,
        "fastkd": fastkd.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def add_rates(results: Sequence[Result]) -> None:
    """GB/s for the bytes that the task must move, and the share of the copy's rate in the same job."""
    for result in results:
        if "p50" in result:
            result["bytes"] = result["moves"] * result["rows"] * result["vocab"] * BYTES[result["dtype"]]
            result["gb_per_s"] = result["bytes"] / result["p50"] / 1e9
    for result in results:
        copy = find(results, provider="copy", **{k: result[k] for k in _SAME})
        naive = find(results, provider="naive", **{k: result[k] for k in _SAME})
        if "p50" in result and copy:
            result["share_of_copy"] = result["gb_per_s"] / copy["gb_per_s"]
        if "p50" in result and naive:
            result["times_naive"] = naive["p50"] / result["p50"]


_SAME = ("rows", "vocab", "dtype", "divergence", "threads")


def find(results: Sequence[Result], **fields: Any) -> Result | None:
    """The timed result with these fields, if there is one."""
    for result in results:
        if "p50" in result and all(result[key] == value for key, value in fields.items()):
            return result
    return None


def _cell(result: Result, key: str, pattern: str) -> str:
    return pattern.format(result[key]) if result.get(key) is not None else ""


def _row(result: Result) -> list[str]:
    if "p50" not in result:
        return [result["provider"], f"[dim]{result.get('missing') or result.get('wrong') or 'not run'}[/dim]"]
    unit = result["rows"] * result["vocab"] * BYTES[result["dtype"]]
    peak = f"{result['peak'] / unit:.2f}" if "peak" in result else ""
    spread = f"{result['p20'] * 1e3:.3g} – {result['p80'] * 1e3:.3g}"
    return [
        result["provider"], f"{result['p50'] * 1e3:.4g}", spread, _cell(result, "times_naive", "{:.1f}×"), peak,
        _cell(result, "gb_per_s", "{:.1f}"), _cell(result, "share_of_copy", "{:.0%}"), _cell(result, "error", "{:.0e}"),
    ]  # fmt: skip


def tables(results: Sequence[Result]) -> list[Table]:
    """One table a job."""
    built = []
    groups: dict[tuple, list[Result]] = {}
    for result in results:
        groups.setdefault(tuple(result[key] for key in _SAME), []).append(result)
    for (rows, vocab, dtype, divergence, threads), group in groups.items():
        table = Table(title=f"{rows} × {vocab} {dtype}, {divergence}, {threads} threads", title_justify="left")
        table.add_column("provider", no_wrap=True)
        for name in ("p50 ms", "p20 – p80", "× naive", "peak N·V", "GB/s", "of copy", "error"):
            table.add_column(name, justify="right")
        for result in group:
            table.add_row(*_row(result))
        built.append(table)
    return built


def console() -> Console:
    """Never wider than 100 columns, also where the terminal is."""
    plain = Console()
    return Console(width=min(WIDTH, plain.width)) if plain.is_terminal else Console(width=WIDTH)


COLUMNS = (
    "provider", "rows", "vocab", "dtype", "divergence", "temperature", "threads", "allocator", "cold", "p20", "p50",
    "p80", "times_naive", "bytes", "gb_per_s", "share_of_copy", "peak", "error", "first_run_seconds", "rounds",
    "repeats", "missing", "wrong", "date", "cpu", "isa", "torch", "fastkd", "python", "commit",
)  # fmt: skip


def write_csv(results: Sequence[Result], path: Path) -> None:
    """Every result with the machine; times in seconds, sizes in bytes."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows({**result, **machine()} for result in results)
