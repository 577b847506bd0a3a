"""The preset ``linear``: its jobs, its table and its targets."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rich.table import Table

from .jobs import Job
from .report import Result, find
from .targets import Target

HEADS = {  # H of the student / H of the teacher x V
    "576/576x49152": (576, 576, 49152),
    "576/576x128256": (576, 576, 128256),
    "1024/2048x49152": (1024, 2048, 49152),
    "1024/2048x128256": (1024, 2048, 128256),
}
TOKENS = 4096
LINEAR = ["products", "naive", "fastkd", "fastkd-ignored"]
SHAPE = ("rows", "hidden", "teacher_hidden", "vocab", "dtype")


@dataclass(frozen=True)
class LinearJob(Job):
    """``rows`` tokens through two heads."""

    hidden: int = 0
    teacher_hidden: int = 0
    worker: str = "fastkd.bench.linear_worker"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("preset linear")
    group.add_argument("--tokens", type=int, default=TOKENS, help=f"rows (default: {TOKENS})")
    group.add_argument("--heads", nargs="+", choices=list(HEADS), default=list(HEADS), help="H/H' x V (default: all)")


def all_jobs(arguments: argparse.Namespace) -> list[Job]:
    """One job a head and dtype. Runs take seconds: five rounds where the others take ten."""
    jobs: list[Job] = []
    for dtype in arguments.dtype:
        for head in arguments.heads:
            hidden, teacher_hidden, vocab = HEADS[head]
            common = (arguments.threads, max(1, arguments.rounds // 2), arguments.temperature)
            job = LinearJob("linear", arguments.tokens, vocab, dtype, list(LINEAR), *common)
            jobs.append(replace(job, hidden=hidden, teacher_hidden=teacher_hidden))
    return jobs


def _group(results: Sequence[Result]) -> dict[tuple, list[Result]]:
    groups: dict[tuple, list[Result]] = {}
    for result in results:
        if result["preset"] == "linear":
            groups.setdefault(tuple(result[key] for key in SHAPE), []).append(result)
    return groups


def _ratio(a: Result | None, b: Result | None, key: str) -> float | None:
    return a[key] / b[key] if a and b and a.get(key) is not None and b.get(key) else None


def _megabytes(result: Result | None, key: str) -> float | None:
    return result[key] / 1e6 if result and key in result else None


def _cell(value: float | None, pattern: str) -> str:
    return "" if value is None else pattern.format(value)


def all_tables(results: Sequence[Result]) -> list[Table]:
    """A table a shape: time over that of the bare products, and naive's over it; memory beside the gradients."""
    tables = []
    for (rows, hidden, teacher_hidden, vocab, dtype), group in _group(results).items():
        title = f"{rows} tokens, H {hidden}/{teacher_hidden}, V {vocab}, {dtype}, {group[0]['threads']} threads"
        names = ("p50 s", "p20–p80", "of products", "× naive", "peak MB", "extra MB", "of naive's", "error")
        table = Table(title=title, title_justify="left", caption_justify="left")
        table.add_column("provider", no_wrap=True)
        for name in names:
            table.add_column(name, justify="right")
        products, naive = find(group, provider="products"), find(group, provider="naive")
        notes = []
        for result in group:
            if "p50" not in result:
                notes.append(f"{result['provider']}: {result.get('wrong') or result.get('missing') or 'not run'}")
                continue
            table.add_row(
                result["provider"], f"{result['p50']:.2f}", f"{result['p20']:.2f}–{result['p80']:.2f}",
                _cell(_ratio(result, products, "p50"), "{:.2f}"), _cell(_ratio(naive, result, "p50"), "{:.1f}×"),
                _cell(_megabytes(result, "peak"), "{:.0f}"), _cell(_megabytes(result, "extra"), "{:.0f}"),
                _cell(_ratio(result, naive, "extra"), "{:.1%}"), _cell(result.get("error"), "{:.0e}"),
            )  # fmt: skip
        table.caption = "\n".join(notes)
        tables.append(table)
    return tables


def _target(shape: tuple, what: str, bound: float, at_least: bool, of: Callable) -> Target:
    rows, hidden, teacher_hidden, vocab, dtype = shape
    fields = dict(zip(SHAPE, shape))

    def measure(results: Sequence[Result]) -> float | None:
        linear = [r for r in results if r["preset"] == "linear" and r["threads"] == 2 and r["temperature"] == 2.0]
        return of({name: find(linear, provider=name, **fields) for name in LINEAR})

    return Target(f"{rows} × {hidden}/{teacher_hidden} × {vocab} {dtype}: {what}", bound, at_least, measure)


def all_targets(results: Sequence[Result]) -> list[Target]:
    """The bounds of the linear loss for each shape in the results, on 2 threads."""
    targets = []
    for shape in _group(results):
        for what, bound, at_least, of in (
            ("over the products", 1.10, False, lambda r: _ratio(r["fastkd"], r["products"], "p50")),
            ("times naive", 2.0, True, lambda r: _ratio(r["naive"], r["fastkd"], "p50")),
            ("extra memory of naive's", 0.06, False, lambda r: _ratio(r["fastkd"], r["naive"], "extra")),
            ("extra MB", 256, False, lambda r: _megabytes(r["fastkd"], "extra")),
            ("70 % ignored", 0.4, False, lambda r: _ratio(r["fastkd-ignored"], r["fastkd"], "p50")),
        ):
            targets.append(_target(shape, what, bound, at_least, of))
    return targets
