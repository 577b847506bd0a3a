"""Runs of the trainer in child processes that die by SIGKILL at a chosen moment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import killing
import torch
import transformers.models.llama.modeling_llama  # noqa: F401  loaded in the server, not in each child
from rich.console import Console
from trainer_tiny import make_config

from fastkd.trainer import plot  # noqa: F401
from fastkd.trainer.train import distill

SETTINGS: dict[str, Any] = {
    "optim__max_steps": 6,
    "eval_every": 2,
    "checkpoint_every": 2,
    "log_every": 1,
    "select": "best",
    "teacher__cache_hidden": True,
}


def run(world: str, out: str) -> None:
    """The body of a child."""
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere:
        distill(make_config(Path(world), Path(out), resume=True, **SETTINGS), Console(file=nowhere))


def start(world: Path, out: Path, **moment: Any):
    """A child that runs or resumes the run in ``out``; ``moment`` as in :func:`killing.start`."""
    writer = "fastkd.trainer.checkpoint:save_file"
    return killing.start("trainer_kill:run", str(world), str(out), writer=writer, **moment)


def finish(world: Path, out: Path) -> None:
    """Resume until the end; the run must succeed."""
    killing.join(start(world, out))
