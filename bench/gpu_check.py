"""Everything that is to be known of fastkd on a CUDA GPU, by one command: build, correctness, times, sanitizers, tests.

    python bench/gpu_check.py OUT_FOLDER     within 8 minutes; again, it goes on where it was cut off
    python bench/gpu_check.py --list         the steps

Writes state.json, correctness.csv, times.csv and times.png. Exit status: 0 all steps done, 1 not, 2 no GPU here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import gpu_report
from gpu_runner import State, fingerprint, run_steps
from gpu_steps import STEPS

SECONDS = 470.0  # of the 8 minutes; the rest is the start, the report and the picture


def why_no_gpu() -> str:
    """Why nothing can run here; "" where a CUDA device can be used. Makes no context on it."""
    try:
        import torch
    except ImportError as error:
        return f"PyTorch could not be imported ({error})"
    if not torch.version.cuda:
        return f"this PyTorch ({torch.__version__}) was built without CUDA"
    return "" if torch.cuda.is_available() else "PyTorch finds no CUDA device or driver"


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT_FOLDER")
    parser.add_argument("--list", action="store_true", help="print the steps and their budgets")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all steps together (%(default).0f)")
    arguments = parser.parse_args(argv)
    if not arguments.list and arguments.out is None:
        parser.error("OUT_FOLDER is missing: the folder that the results are written into")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = arguments_of(argv)
    if arguments.list:
        for step in STEPS:
            print(f"{step.name:12} {step.seconds:4.0f} s  {step.what}")
        return 0
    missing = why_no_gpu()
    if missing:
        print(f"gpu_check needs a CUDA GPU: {missing}; nothing was run", file=sys.stderr)
        return 2
    say = lambda text: print(text, flush=True)  # noqa: E731
    state = State(arguments.out, fingerprint())
    run_steps(STEPS, state, arguments.seconds, say, lambda: gpu_report.write_tables(state, arguments.out))
    no_picture = gpu_report.draw(state, arguments.out / "times.png")
    say("")
    gpu_report.print_report(state, say)
    if no_picture:
        say(f"no picture: {no_picture}")
    return 0 if all(state.step(step.name).get("status") == "done" for step in STEPS) else 1


if __name__ == "__main__":
    sys.exit(main())
