"""What a run reports while it runs: metrics.jsonl and the progress line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from .. import files


class MetricsLog:
    """JSON lines, one an event, each with its optimizer step.

    Args:
        path: the file; created when missing.
        step: lines beyond this step, left by a run that was killed after its last checkpoint, are removed.
    """

    def __init__(self, path: Path, step: int) -> None:
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        files.write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, event: str, step: int, **values: Any) -> None:
        """Append one line and hand it to the operating system."""
        self._file.write(json.dumps({"event": event, "step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Wait until the lines are on the disk."""
        os.fsync(self._file.fileno())
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; one cut off by a kill is left out. Empty where there is no file."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole, _, _ = text.rpartition("\n")  # what follows the last line break was being written
    return [json.loads(line) for line in whole.splitlines()]


def progress_bar(console: Console) -> Progress:
    """Bar with loss, tokens/s and the time left. Tasks have the fields ``loss`` and ``speed``."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[speed]}"),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        refresh_per_second=2,
    )
