"""Who writes what: a byte of one file a claim, given back by the system when its process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Locks:
    """Claims of the processes that write one folder; POSIX record locks, which NFS has too.

    They are between processes: two writers of one process do not see each other.
    """

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    def try_claim(self, number: int) -> bool:
        """Take claim ``number`` (from 0) if nobody has it; it then stays until :meth:`close` or the process ends."""
        try:
            fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 1 + number)
        except (BlockingIOError, PermissionError):  # what POSIX allows for "another has it"
            return False
        return True

    def give_back(self, number: int) -> None:
        """Let others take claim ``number``."""
        fcntl.lockf(self._handle, fcntl.LOCK_UN, 1, 1 + number)

    @contextmanager
    def whole_folder(self) -> Iterator[None]:
        """Alone with the index; waits for it."""
        fcntl.lockf(self._handle, fcntl.LOCK_EX, 1, 0)
        try:
            yield
        finally:
            fcntl.lockf(self._handle, fcntl.LOCK_UN, 1, 0)

    def close(self) -> None:
        """Give everything back."""
        os.close(self._handle)
