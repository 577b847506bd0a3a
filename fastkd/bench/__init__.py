"""``fastkd bench``: time and memory of the loss against naive PyTorch, checked before they are measured."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fastkd.divergence import SPECS

from . import linear_jobs, sparse_jobs
from .jobs import PRESETS, Job, run_job
from .measure import flush_bytes
from .plot import draw
from .providers import PROVIDERS
from .report import Result, add_rates, console, machine, write_csv
from .tables import all_tables
from .targets import table_of_targets

EXTRA = {"linear": linear_jobs, "sparse": sparse_jobs}  # presets with jobs and tables of their own


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastkd bench", description=__doc__)
    parser.add_argument("--preset", choices=[*PRESETS, *EXTRA, "all"], default="default",
                        help="what to measure; all: everything but linear and sparse")  # fmt: skip
    parser.add_argument("--rows", type=int, default=256, help="N (default: 256)")
    parser.add_argument("--vocab", type=int, default=128256, help="V (default: 128256)")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--divergence", default="forward_kl", choices=list(SPECS))
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: all that torch uses")
    parser.add_argument("--rounds", type=int, default=10, help="timed runs of each provider (default: 10)")
    parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS), help="default: all that apply")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of bench.csv and bench.png")
    for preset in EXTRA.values():
        preset.add_arguments(parser)
    return parser


def _run(jobs: Sequence[Job]) -> list[Result]:
    """Runs the jobs one after the other, with a bar on a terminal and a line a job elsewhere."""
    results: list[Result] = []
    columns = (TextColumn("{task.description:56}"), BarColumn(16), MofNCompleteColumn(), TimeElapsedColumn())
    out = console()
    with Progress(*columns, console=out, transient=True) as progress:
        whole = progress.add_task("", total=len(jobs))
        for number, job in enumerate(jobs, 1):
            shape = f"{job.rows} × {job.vocab} {job.dtype}, {job.divergence}"
            if not out.is_terminal:
                out.print(f"{number}/{len(jobs)}: {shape}, {job.threads} threads: {', '.join(job.providers)}")

            def tick(what: str, shape: str = shape) -> None:
                progress.update(whole, description=f"{shape}: {what}")

            results += run_job(job, tick)
            progress.advance(whole)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables, write CSV and PNG. Exit status 1 where a provider's result was wrong."""
    arguments = _parser().parse_args(argv)
    names = list(PRESETS) if arguments.preset == "all" else [arguments.preset]
    presets = {**PRESETS, **{name: preset.all_jobs for name, preset in EXTRA.items()}}
    results = _run([job for name in names for job in presets[name](arguments)])
    add_rates(results)
    out = console()
    about = machine()
    out.print(f"{about['cpu']}, {about['cores']} cores, instruction set {about['isa']}, torch {about['torch']}, "
              f"fastkd {about['fastkd']} {about['commit']}")  # fmt: skip
    out.print(
        f"T = {arguments.temperature:g}, KD + CE, logits in, loss and gradient out. Cold: {flush_bytes() >> 20} MiB "
        "touched before each run. A fresh gradient takes the memory that lingers of the one before; fastkd-first pays "
        "its page faults, like all that naive allocates; naive-warm keeps its memory from run to run. "
        "GB/s: of what must move at least: 3 N·V for loss and gradient, 2 for copy and value; with a sparse teacher "
        "2 and 1."
    )
    for table in [*all_tables(results), *(table for preset in EXTRA.values() for table in preset.all_tables(results))]:
        out.print(table)
    targets = table_of_targets(results, linear_jobs.all_targets(results))
    if targets:
        out.print(targets)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_csv(results, arguments.out / "bench.csv")
    drawn = draw(results, arguments.out / "bench.png")
    out.print(f"written: {arguments.out / 'bench.csv'}" + (f", {arguments.out / 'bench.png'}" if drawn else ""))
    wrong = [result["wrong"] for result in results if "wrong" in result]
    for message in wrong:
        out.print(f"[red]wrong result, not timed:[/red] {message}")
    return 1 if wrong else 0
