"""Writing so that a kill or a power cut leaves either the old state or the new one, never half of one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

PART = ".part-"  # prefix of what is not complete yet; removed at the next start


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one move."""
    write_bytes(path, text.encode())


def put(path: Path, data: bytes) -> None:
    """Write a file that nobody reads yet."""
    path.write_bytes(data)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file in one move. Where the bytes cannot be written (OSError) nothing of them is left."""
    part = path.with_name(PART + path.name)
    try:
        put(part, data)
        sync(part)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    os.replace(part, path)
    sync(path.parent)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Replace a safetensors file in one move."""
    part = path.with_name(PART + path.name)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part)
    sync(part)
    os.replace(part, path)
    sync(path.parent)


def write_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """Create the folder ``path`` in one move: ``fill`` writes into a hidden neighbour that is then renamed.

    An existing folder of that name is replaced; between its removal and the rename there is a moment with neither,
    so what must survive a kill is never written over.
    """
    part = path.with_name(PART + path.name)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    fill(part)
    for file in sorted(part.rglob("*")):
        sync(file)
    sync(part)
    remove_folder(path)
    os.rename(part, path)
    sync(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder so that a kill half way through does not leave something that looks whole."""
    if path.exists():
        doomed = path.with_name(PART + "removed-" + path.name)
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(path, doomed)
        shutil.rmtree(doomed)


def remove_parts(folder: Path) -> None:
    """Remove what an interrupted write left in ``folder``."""
    for part in folder.glob(PART + "*"):
        shutil.rmtree(part) if part.is_dir() else part.unlink()
