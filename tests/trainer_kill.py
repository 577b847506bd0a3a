"""Runs of the trainer in child processes that die by SIGKILL at a chosen moment."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # noqa: F401  loaded in the server, not in each child
from rich.console import Console
from trainer_tiny import make_config

from fastkd.trainer import checkpoint, plot  # noqa: F401
from fastkd.trainer.train import distill

SETTINGS: dict[str, Any] = {
    "optim__max_steps": 6,
    "eval_every": 2,
    "checkpoint_every": 2,
    "log_every": 1,
    "select": "best",
    "teacher__cache_hidden": True,
}


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run(world: str, out: str, count_file: str | None, die_at: int | None, tear_at: int | None) -> None:
    """The body of a child.

    Args:
        count_file: where to write how many durable operations the run made.
        die_at: number of the durable operation (fsync, rename, replace; from 1) before which to die.
        tear_at: number of the checkpoint file to write only half of, and die.
    """
    torch.set_num_threads(1)
    operations = 0

    def counted(real: Any) -> Any:
        def wrapper(*args: Any, **keywords: Any) -> Any:
            nonlocal operations
            operations += 1
            if operations == die_at:
                _die()
            return real(*args, **keywords)

        return wrapper

    for name in ("fsync", "rename", "replace"):
        setattr(os, name, counted(getattr(os, name)))
    written, save_file = 0, checkpoint.save_file

    def torn(tensors: Any, path: Path) -> None:
        nonlocal written
        written += 1
        save_file(tensors, path)
        if written == tear_at:
            os.truncate(path, path.stat().st_size // 2)
            _die()

    checkpoint.save_file = torn
    with open(os.devnull, "w") as nowhere:
        distill(make_config(Path(world), Path(out), resume=True, **SETTINGS), Console(file=nowhere))
    if count_file:
        Path(count_file).write_text(str(operations))


def start(
    world: Path,
    out: Path,
    count_file: Path | None = None,
    die_at: int | None = None,
    tear_at: int | None = None,
):
    """A child that runs or resumes the run in ``out``; forked from a server that has imported everything once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainer_kill"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), before]))
    try:
        forkserver.ensure_running()  # Python 3.11's server does not take over sys.path for what it preloads
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    arguments = (str(world), str(out), str(count_file) if count_file else None, die_at, tear_at)
    child = context.Process(target=run, args=arguments)
    child.start()
    return child


def finish(world: Path, out: Path) -> None:
    """Resume until the end; the run must succeed."""
    child = start(world, out)
    child.join(60)
    assert child.exitcode == 0, f"the resumed run ended with {child.exitcode}"
