"""What the trainer's commands share: their configuration from a file and flags, and how a run ends for the shell."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

from jsonargparse import ArgumentParser
from rich.console import Console

Config = TypeVar("Config")


def parse(config_class: type[Config], prog: str, description: str, argv: Sequence[str]) -> Config:
    """Read ``--config file.yaml`` and flags into the dataclass. Ends the process with a message on a bad one."""
    parser = ArgumentParser(prog=prog, description=f"{description} Flags override the file given with --config.")
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below.")
    parser.add_class_arguments(config_class, None)
    parsed = parser.instantiate(parser.parse_args(list(argv)))
    return config_class(**{f.name: parsed[f.name] for f in dataclasses.fields(config_class)})  # type: ignore[arg-type]


def run(prog: str, work: Callable[[Console], None], interrupted: str) -> int:
    """Do the work; the exit status: 0 done, 1 an error that was explained, 130 interrupted."""
    import datasets
    from transformers.utils import logging

    logging.set_verbosity_error()  # the messages that matter are this program's own
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    console = Console(stderr=True)
    try:
        work(console)
    except (ValueError, RuntimeError) as error:
        console.print(f"{prog}: {error}", style="red", markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print(interrupted)
        return 130
    return 0
