"""Results as tables of at most 100 columns: one a shape, or one a preset with the ratios that it is about."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.table import Table

from .report import GROUP, Result, find

Groups = dict[tuple, list[Result]]


def _grouped(results: Sequence[Result], keys: Sequence[str]) -> Groups:
    groups: Groups = {}
    for result in results:
        groups.setdefault(tuple(result[key] for key in keys), []).append(result)
    return groups


def _table(title: str, first: str, others: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _cell(result: Result | None, key: str, pattern: str, scale: float = 1.0) -> str:
    return pattern.format(result[key] * scale) if result and result.get(key) is not None else ""


def _figure(value: float) -> str:
    """Three figures or more, never an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _median(result: Result | None, scale: float) -> str:
    return _figure(result["p50"] * scale) if result else ""


def _spread(result: Result | None, scale: float) -> str:
    return f"{_figure(result['p20'] * scale)} – {_figure(result['p80'] * scale)}" if result else ""


def _reason(result: Result) -> str:
    return result.get("wrong") or result.get("missing") or "not run"


def _full(results: Sequence[Result]) -> list[Table]:
    """A table a shape with everything that was measured of each provider; below it, why some were not."""
    tables = []
    for (_, rows, vocab, dtype, divergence, threads), group in _grouped(results, GROUP).items():
        title = f"{rows} × {vocab} {dtype}, {divergence}, {threads} threads"
        names = ("p50 ms", "p20 – p80", "× naive", "peak MB", "N·V", "GB/s", "of copy", "error")
        table = _table(title, "provider", names)
        notes = []
        for result in group:
            if "p50" not in result:
                notes.append(f"{result['provider']}: {_reason(result)}")
            elif result["provider"] == "compile":
                notes.append(f"compile: {result['first_run_seconds']:.1f} s for its first run, compiling included")
            timed = result if "p50" in result else None
            table.add_row(
                result["provider"], _median(timed, 1e3), _spread(timed, 1e3),
                _cell(result, "times_naive", "{:.1f}×"), _cell(result, "peak", "{:.0f}", 1e-6),
                _cell(result, "peak_nv", "{:.2f}"), _cell(result, "gb_per_s", "{:.1f}"),
                _cell(result, "share_of_copy", "{:.0%}"), _cell(result, "error", "{:.0e}"),
            )  # fmt: skip
        table.caption = "\n".join(notes)
        tables.append(table)
    return tables


OURS = ("fastkd", "fastkd-inplace", "fastkd-value")


def _divergences(results: Sequence[Result]) -> list[Table]:
    """Milliseconds of each divergence, and times those of forward_kl."""
    tables = []
    for (rows, vocab, dtype), group in _grouped(results, ("rows", "vocab", "dtype")).items():
        title = f"{rows} × {vocab} {dtype}: p50 in ms, and over that of forward_kl"
        table = _table(title, "divergence", [name for provider in OURS for name in (provider, "×")])
        for (divergence,) in _grouped(group, ("divergence",)):
            cells = []
            for provider in OURS:
                result = find(group, provider=provider, divergence=divergence)
                base = find(group, provider=provider, divergence="forward_kl")
                ratio = f"{result['p50'] / base['p50']:.2f}" if result and base else ""
                cells += [_median(result, 1e3), ratio]
            table.add_row(divergence, *cells)
        tables.append(table)
    return tables


def _vocab(results: Sequence[Result]) -> list[Table]:
    """Picoseconds per element as V grows."""
    tables = []
    for (dtype,), group in _grouped(results, ("dtype",)).items():
        table = _table(f"{dtype}: p50 in ps per element", "N × V", ["threads", "copy", *OURS])
        for rows, vocab, threads in _grouped(group, ("rows", "vocab", "threads")):
            shape = {"rows": rows, "vocab": vocab, "threads": threads}
            cells = [
                _cell(find(group, provider=provider, **shape), "p50", "{:.0f}", 1e12 / (rows * vocab))
                for provider in ("copy", *OURS)
            ]
            table.add_row(f"{rows} × {vocab}", str(threads), *cells)
        tables.append(table)
    return tables


def _row(results: Sequence[Result]) -> list[Table]:
    """The same for one row whose logits alone are cold."""
    tables = _vocab(results)
    for table in tables:
        table.title = f"{table.title}; one row, logits taken in turn from many, the program in the caches"
    return tables


def _grid(results: Sequence[Result]) -> list[Table]:
    """Microseconds of a warm call beside eager PyTorch."""
    names = ["naive", "p20 – p80", "fastkd", "p20 – p80", "× naive"]
    table = _table("small shapes, float32, warm: p50 in µs", "N × V", names)
    for (rows, vocab), group in _grouped(results, ("rows", "vocab")).items():
        cells = []
        for provider in ("naive", "fastkd"):
            result = find(group, provider=provider)
            cells += [_median(result, 1e6), _spread(result, 1e6)]
        table.add_row(f"{rows} × {vocab}", *cells, _cell(find(group, provider="fastkd"), "times_naive", "{:.2f}×"))
    return [table]


LAYOUTS: dict[str, Callable[[Sequence[Result]], list[Table]]] = {
    "default": _full,
    "divergences": _divergences,
    "vocab": _vocab,
    "row": _row,
    "grid": _grid,
}


def _none(results: Sequence[Result]) -> list[Table]:
    """Of a preset that brings its own tables."""
    return []


def all_tables(results: Sequence[Result]) -> list[Table]:
    """The tables of each preset in the results."""
    tables = []
    for (preset,), group in _grouped(results, ("preset",)).items():
        tables += LAYOUTS.get(preset, _none)(group)
    return tables
