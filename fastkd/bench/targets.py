"""What the project set out to reach, each with what was measured in this run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from fastkd.divergence import SPECS

from .report import Result, find


@dataclass(frozen=True)
class Target:
    """A bound on a measured ratio; measure returns None where the run does not hold what it needs."""

    what: str
    bound: float
    at_least: bool
    measure: Callable[[Sequence[Result]], float | None]

    def met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


def _ratio(a: Result | None, b: Result | None) -> float | None:
    return a["p50"] / b["p50"] if a and b else None


TASK: dict[str, Any] = {"temperature": 2.0, "threads": 2}  # what the bounds were set for


def _main(results: Sequence[Result], provider: str, dtype: str, **fields) -> Result | None:
    shape = {"preset": "default", "rows": 256, "vocab": 128256, "divergence": "forward_kl", **TASK}
    return find(results, provider=provider, dtype=dtype, **{**shape, **fields})


def _speedup(base: str, provider: str, dtype: str) -> Callable[[Sequence[Result]], float | None]:
    return lambda results: _ratio(_main(results, base, dtype), _main(results, provider, dtype))


def _share(dtype: str) -> Callable[[Sequence[Result]], float | None]:
    return lambda results: (_main(results, "fastkd-inplace", dtype) or {}).get("share_of_copy")


def _memory(provider: str, dtype: str) -> Callable[[Sequence[Result]], float | None]:
    def measure(results: Sequence[Result]) -> float | None:
        return (_main(results, provider, dtype) or {}).get("peak_nv")

    return measure


def _worst_divergence(provider: str, dtype: str) -> Callable[[Sequence[Result]], float | None]:
    def measure(results: Sequence[Result]) -> float | None:
        timed = [_main(results, provider, dtype, preset="divergences", divergence=d) for d in SPECS]
        base = _main(results, provider, dtype, preset="divergences")
        return max(r["p50"] for r in timed if r) / base["p50"] if base and all(timed) else None

    return measure


def _long_row(provider: str, dtype: str) -> Callable[[Sequence[Result]], float | None]:
    def per_element(results: Sequence[Result], vocab: int) -> float | None:
        rows = 256 * 128256 // vocab // TASK["threads"] * TASK["threads"]
        found = find(results, preset="vocab", provider=provider, dtype=dtype, rows=rows, vocab=vocab, **TASK)
        return found["p50"] / (rows * vocab) if found else None

    def measure(results: Sequence[Result]) -> float | None:
        long, usual = per_element(results, 1 << 20), per_element(results, 128256)
        return long / usual if long and usual else None

    return measure


def _two_threads(preset: str, provider: str, dtype: str) -> Callable[[Sequence[Result]], float | None]:
    def measure(results: Sequence[Result]) -> float | None:
        row = {"preset": preset, "provider": provider, "dtype": dtype, "rows": 1, "vocab": 1 << 20}
        two = {**row, **TASK}
        return _ratio(find(results, **{**two, "threads": 1}), find(results, **two))

    return measure


def _worst_of_grid(results: Sequence[Result]) -> float | None:
    warm = [r for r in results if "p50" in r and r["preset"] == "grid" and r["provider"] == "fastkd"]
    return min((r["times_naive"] for r in warm if "times_naive" in r), default=None)


def all_targets() -> list[Target]:
    """The targets of the CPU backend: 2 threads, 256 x 128256, T = 2, KD + CE, loss and gradient."""
    targets = []
    for dtype, fresh, inplace, share in (("float32", 25, 35, 0.6), ("bfloat16", 18, 22, 0.4)):
        targets += [
            Target(f"{dtype}: times naive, fresh gradient", fresh, True, _speedup("naive", "fastkd", dtype)),
            Target(f"{dtype}: times naive, in place", inplace, True, _speedup("naive", "fastkd-inplace", dtype)),
            Target(f"{dtype}: times torch.compile, fresh gradient", 9, True, _speedup("compile", "fastkd", dtype)),
            Target(f"{dtype}: share of copy bandwidth, in place", share, True, _share(dtype)),
            Target(f"{dtype}: extra memory, fresh gradient, in N·V", 1.05, False, _memory("fastkd", dtype)),
            Target(f"{dtype}: extra memory, in place, in N·V", 0.05, False, _memory("fastkd-inplace", dtype)),
            Target(f"{dtype}: value over value and gradient", 0.6, False, _speedup("fastkd-value", "fastkd", dtype)),
            Target(f"{dtype}: slowest divergence over forward_kl", 2, False, _worst_divergence("fastkd", dtype)),
            Target(f"{dtype}: the same, in place", 2, False, _worst_divergence("fastkd-inplace", dtype)),
            Target(f"{dtype}: per element, V = 1M over 128k", 1.3, False, _long_row("fastkd", dtype)),
            Target(f"{dtype}: the same, in place", 1.3, False, _long_row("fastkd-inplace", dtype)),
            Target(f"{dtype}: one row of 1M, 2 threads over 1", 1.6, True, _two_threads("row", "fastkd", dtype)),
            Target(f"{dtype}: the same, interpreter cold too", 1.6, True, _two_threads("vocab", "fastkd", dtype)),
            Target(f"{dtype}: the same of a plain copy", 1.6, True, _two_threads("vocab", "copy", dtype)),
        ]
    targets.append(Target("small shapes: worst times naive", 1, True, _worst_of_grid))
    return targets


def table_of_targets(results: Sequence[Result], more: Sequence[Target] = ()) -> Table | None:
    """Target, bound, measured, met; only those that this run measured."""
    table = Table(title="targets", title_justify="left")
    table.add_column("what", no_wrap=True)
    for name in ("bound", "measured", ""):
        table.add_column(name, justify="right")
    for target in [*all_targets(), *more]:
        value = target.measure(results)
        if value is not None:
            sign = "≥" if target.at_least else "≤"
            verdict = "[green]met[/green]" if target.met(value) else "[red]not met[/red]"
            table.add_row(target.what, f"{sign} {target.bound:g}", f"{value:.2f}", verdict)
    return table if table.row_count else None
