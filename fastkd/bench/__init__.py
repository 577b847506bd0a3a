"""``fastkd bench``: time and memory of the loss against naive PyTorch, checked before they are measured."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fastkd.divergence import SPECS

from .jobs import PRESETS, Job, run_job
from .plot import draw
from .providers import PROVIDERS
from .report import BYTES, Result, add_rates, console, cpu_model, machine, tables, write_csv
from .targets import table_of_targets


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastkd bench", description=__doc__)
    parser.add_argument("--preset", choices=[*PRESETS, "all"], default="default", help="what to measure")
    parser.add_argument("--rows", type=int, default=256, help="N (default: 256)")
    parser.add_argument("--vocab", type=int, default=128256, help="V (default: 128256)")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=list(BYTES))
    parser.add_argument("--divergence", default="forward_kl", choices=list(SPECS))
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: all that torch uses")
    parser.add_argument("--rounds", type=int, default=10, help="timed runs of each provider (default: 10)")
    parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS), help="default: all that apply")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of bench.csv and bench.png")
    return parser


def _run(jobs: Sequence[Job]) -> list[Result]:
    results: list[Result] = []
    columns = (TextColumn("{task.description:46}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(), transient=True) as progress:
        whole = progress.add_task("", total=len(jobs))
        for job in jobs:
            shape = f"{job.rows} × {job.vocab} {job.dtype}"

            def tick(what: str, shape: str = shape) -> None:
                progress.update(whole, description=f"{shape}: {what}")

            results += run_job(job, tick)
            progress.advance(whole)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables, write CSV and PNG. Exit status 1 where a provider's result was wrong."""
    arguments = _parser().parse_args(argv)
    names = list(PRESETS) if arguments.preset == "all" else [arguments.preset]
    results = _run([job for name in names for job in PRESETS[name](arguments)])
    add_rates(results)
    out = console()
    about = machine()
    out.print(f"{cpu_model()}, instruction set {about['isa']}, torch {about['torch']}, commit {about['commit'] or '?'}")
    out.print("Loss and gradient from logits; fresh gradients pay their page faults; 64 MiB touched between cold runs.")
    for table in tables(results):
        out.print(table)
    targets = table_of_targets(results)
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
