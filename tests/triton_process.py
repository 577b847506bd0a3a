"""Suites of the Triton kernels, each in a pytest of its own: kernels run in Triton's interpreter or are compiled for
GPUs, and neither can share a process with the other or with this one."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

TESTS = Path(__file__).parent
SECONDS = 550

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


class Run(NamedTuple):
    """Arguments of one pytest, and how many of its tests must at least have passed."""

    arguments: tuple[str, ...]
    passed: int


def check_passes(run: Run) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *run.arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, timeout=SECONDS)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-6000:]
    passed = re.search(r"(\d+) passed", output)
    assert passed and int(passed.group(1)) >= run.passed, output[-3000:]
    assert "skipped" not in output, output[-3000:]
