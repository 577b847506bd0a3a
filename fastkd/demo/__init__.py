"""fastkd demo: distil a real pretrained model on this machine, with figures that say what came of it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    """Run ``fastkd demo``; the exit status: 0 done, 1 an error that was explained."""
    parser = argparse.ArgumentParser(prog="fastkd demo", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="the same path with very little text, under 90 s")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the results (%(default)s)")
    parser.add_argument("--cache", type=Path, default=Path(".data"), help="folder of teacher and text (%(default)s)")
    parser.add_argument("--minutes", type=float, default=9.0, help="time to aim at (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="choice and order of the rows (%(default)s)")
    args = parser.parse_args(list(argv))
    if not args.minutes > 0:
        parser.error(f"argument --minutes: {args.minutes}; allowed: a positive number")

    import datasets
    from rich.console import Console
    from transformers.utils import logging

    from .run import run_demo

    logging.set_verbosity_error()  # the messages that matter are this program's own
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    console = Console(width=100, highlight=False)
    try:
        run_demo(args.out, args.cache, args.smoke, 60 * args.minutes, args.seed, console)
    except (ValueError, RuntimeError) as error:
        console.print(f"fastkd demo: {error}", style="red", markup=False)
        return 1
    return 0
