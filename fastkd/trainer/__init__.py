"""fastkd distill: a thin reference trainer for causal language models."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run ``fastkd distill``; the exit status: 0 done, 1 an error that was explained, 130 interrupted."""
    from rich.console import Console

    from . import command
    from .config import parse_config
    from .train import distill

    config = parse_config(argv)

    def work(console: Console) -> None:
        outcome = distill(config, console)
        path = outcome.student_path
        console.print(f"student of step {outcome.step} of {outcome.total_steps}: {path}", highlight=False)
        console.print(f"curves: {path.parent / 'curves.png'}", highlight=False)
        print(f'AutoModelForCausalLM.from_pretrained("{path}")')

    interrupted = "interrupted; the same command with --resume true continues after the last checkpoint"
    return command.run("fastkd distill", work, interrupted)
