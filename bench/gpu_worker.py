"""The worker's end of gpu_runner.run_worker: which keys are done, and one JSON object a line."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any

FAULTED = 3  # exit status: the device's context is lost to this process


def emit(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)


def device_faulted(error: BaseException) -> bool:
    """Whether nothing more can be asked of the device from this process."""
    words = str(error).lower()
    sticky = ("illegal", "misaligned", "unspecified launch failure", "device-side assert", "launch timed out")
    return any(word in words for word in sticky)


def work(jobs: Iterable[tuple[str, Callable[[], dict[str, Any]]]]) -> None:
    """Does the jobs (key, function to a row) that are not done; an error is that job's result."""
    done = set(json.loads(sys.stdin.readline() or "[]"))
    for key, job in jobs:
        if key in done:
            continue
        emit({"begin": key})
        try:
            row = {"key": key, "ok": True, **job()}
        except Exception as error:
            brief = f"{type(error).__name__}: {error}"[:600]
            place = traceback.extract_tb(error.__traceback__)[-1]
            emit({"key": key, "ok": False, "error": brief, "at": f"{place.name}:{place.lineno}"})
            if device_faulted(error):
                sys.exit(FAULTED)
            continue
        emit(row)
