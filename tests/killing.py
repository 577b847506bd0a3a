"""Children that die by SIGKILL at a chosen moment of what they write, for everything that must survive one."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from importlib import import_module
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

PRELOADED = ["killing", "trainer_kill", "cache_kill"]  # what children need, imported once by the server they fork from


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _resolve(name: str) -> tuple[Any, str]:
    """``module:attribute`` as the module and the attribute's name."""
    module, attribute = name.split(":")
    return import_module(module), attribute


def _count_durable(die_at: int | None) -> Callable[[], int]:
    """From now on fsync, rename and replace are counted, and the process dies before the one of number ``die_at``."""
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
    return lambda: operations


def _tear(writer: str, tear_at: int) -> None:
    """The file that call ``tear_at`` of ``writer`` writes is cut to its half, and the process dies."""
    module, attribute = _resolve(writer)
    real, written = getattr(module, attribute), 0

    def torn(*args: Any) -> Any:
        nonlocal written
        written += 1
        result = real(*args)
        if written == tear_at:
            path = next(a for a in args if isinstance(a, Path))
            os.truncate(path, path.stat().st_size // 2)
            _die()
        return result

    setattr(module, attribute, torn)


def run(
    body: str,
    arguments: Sequence[Any],
    count_file: str | None,
    die_at: int | None,
    writer: str | None,
    tear_at: int | None,
) -> None:
    """The life of a child; arguments as in :func:`start`."""
    operations = _count_durable(die_at)
    if writer and tear_at:
        _tear(writer, tear_at)
    module, attribute = _resolve(body)
    getattr(module, attribute)(*arguments)
    if count_file:
        Path(count_file).write_text(str(operations()))


def start(
    body: str,
    *arguments: Any,
    count_file: Path | None = None,
    die_at: int | None = None,
    writer: str | None = None,
    tear_at: int | None = None,
):
    """A child that calls ``body``, a ``module:function``; forked from a server that has imported everything once.

    Args:
        count_file: where to write how many durable operations it made.
        die_at: number of the durable operation (fsync, rename, replace; from 1) before which to die.
        writer: ``module:function`` that writes a file.
        tear_at: number of the call of ``writer`` whose file to cut to its half, and die.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), before]))
    try:
        forkserver.ensure_running()  # Python 3.11's server does not take over sys.path for what it preloads
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    child = context.Process(
        target=run, args=(body, arguments, str(count_file) if count_file else None, die_at, writer, tear_at)
    )
    child.start()
    return child


def join(child: Any, expected: int = 0) -> None:
    """Wait for a child, which must end with the exit code ``expected``."""
    child.join(60)
    assert child.exitcode == expected, f"the child ended with {child.exitcode}; expected {expected}"
