"""fastkd distill: a thin reference trainer for causal language models."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run ``fastkd distill``; the exit status: 0 done, 1 an error that was explained, 130 interrupted."""
    import datasets
    from rich.console import Console
    from transformers.utils import logging

    from .config import parse_config
    from .train import distill

    config = parse_config(argv)
    logging.set_verbosity_error()  # the messages that matter are this program's own
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    console = Console(stderr=True)
    try:
        outcome = distill(config, console)
    except (ValueError, RuntimeError) as error:
        console.print(f"fastkd distill: {error}", style="red", markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; the same command with --resume true continues after the last checkpoint")
        return 130
    console.print(f"student of step {outcome.step} of {outcome.total_steps}: {outcome.student_path}", highlight=False)
    console.print(f"curves: {outcome.student_path.parent / 'curves.png'}", highlight=False)
    print(f'AutoModelForCausalLM.from_pretrained("{outcome.student_path}")')
    return 0
