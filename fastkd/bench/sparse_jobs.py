"""The preset ``sparse``: its jobs and its table."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from .jobs import Job
from .report import Result, find

PROVIDERS = ["copy", "naive", "dense", "fastkd", "fastkd-inplace", "fastkd-value"]
SHAPE = ("rows", "vocab", "k", "dtype", "divergence", "threads")


@dataclass(frozen=True)
class SparseJob(Job):
    """A teacher of ``k`` columns a token."""

    k: int = 64
    worker: str = "fastkd.bench.sparse_worker"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("preset sparse")
    group.add_argument("--k", type=int, nargs="+", default=[64], help="columns that the teacher names (default: 64)")


def all_jobs(arguments: argparse.Namespace) -> list[Job]:
    """One job a dtype and K."""
    return [
        SparseJob(
            "sparse", arguments.rows, arguments.vocab, dtype, list(PROVIDERS), arguments.threads, arguments.rounds,
            arguments.temperature, arguments.divergence, k=k,
        )
        for dtype in arguments.dtype
        for k in arguments.k
    ]  # fmt: skip


def _row(result: Result, group: Sequence[Result]) -> list[str]:
    naive, dense = find(group, provider="naive"), find(group, provider="dense")
    task = result["provider"] in ("naive", "dense", "fastkd", "fastkd-inplace")  # loss and gradient
    ratio = lambda base: f"{base['p50'] / result['p50']:.2f}×" if base and task else ""  # noqa: E731
    optional = lambda key, pattern: pattern.format(result[key]) if result.get(key) is not None else ""  # noqa: E731
    return [
        result["provider"], f"{result['p50'] * 1e3:.3g}", f"{result['p20'] * 1e3:.3g} – {result['p80'] * 1e3:.3g}",
        ratio(naive), ratio(dense), optional("peak_nv", "{:.2f}"), optional("gb_per_s", "{:.1f}"),
        optional("share_of_copy", "{:.0%}"), optional("error", "{:.0e}"),
    ]  # fmt: skip


def all_tables(results: Sequence[Result]) -> list[Table]:
    """A table a shape: time beside that of the naive top-k loss and of the dense one; why some were not measured."""
    groups: dict[tuple, list[Result]] = {}
    for result in results:
        if result["preset"] == "sparse":
            groups.setdefault(tuple(result[key] for key in SHAPE), []).append(result)
    tables = []
    for (rows, vocab, k, dtype, divergence, threads), group in groups.items():
        title = f"{rows} × {vocab} {dtype}, K = {k}, {divergence}, {threads} threads"
        table = Table(title=title, title_justify="left", caption_justify="left")
        table.add_column("provider", no_wrap=True)
        for name in ("p50 ms", "p20 – p80", "× naive", "× dense", "N·V", "GB/s", "of copy", "error"):
            table.add_column(name, justify="right")
        for result in group:
            if "p50" in result:
                table.add_row(*_row(result, group))
        missing = [r for r in group if "p50" not in r]
        table.caption = "\n".join(
            f"{r['provider']}: {r.get('wrong') or r.get('missing') or 'not run'}" for r in missing
        )
        tables.append(table)
    return tables
