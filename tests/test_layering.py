"""The walls between the layers, checked on this tree and shown to hold on planted ones."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import layers
import pytest

import fastkd

ROOT = Path(__file__).parents[1]
STANDARD_LIBRARY = frozenset(sys.stdlib_module_names)
# words of other projects for what fastkd calls otherwise (DESIGN §7)
BANNED_WORDS = {"target", "targets", "pred", "predictions", "alpha", "num_output_chunks", "shift_labels", "hard_weight"}


def test_csrc_layers() -> None:
    assert layers.csrc_violations(ROOT / "csrc") == []


def test_python_layers() -> None:
    assert layers.python_violations(ROOT / "fastkd", STANDARD_LIBRARY) == []


def test_file_lengths() -> None:
    folders = ("csrc", "fastkd", "tests", "bench")
    files = [p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in {".py", ".h", ".cpp", ".cu", ".cuh"}]
    assert len(files) > 40
    assert layers.length_violations(ROOT, [*files, ROOT / "setup.py"]) == []


def test_public_words() -> None:
    words = set(inspect.signature(fastkd.kd_loss).parameters) | set(fastkd.__all__) | set(fastkd.KDStats._fields)
    assert not {part for word in words for part in [word, *word.split("_")]} & BANNED_WORDS
    assert all(re.fullmatch(r"[a-z0-9_]+", name) for name in inspect.signature(fastkd.kd_loss).parameters)


@pytest.mark.parametrize(
    "file,line,what",
    [
        ("core/row.h", "#include <torch/library.h>", "only csrc/torch knows torch"),
        ("kernels/cpu/a.cpp", "#include <ATen/ATen.h>", "only csrc/torch knows torch"),
        ("kernels/cpu/a.cpp", "#include <Python.h>", "only csrc/torch knows torch"),
        ("core/row.h", "#include <cuda_runtime.h>", "csrc/core knows no CUDA"),
        ("core/row.h", '#include "../kernels/params.h"', "core may not know kernels"),
        ("core/row.h", '#include "kernels/params.h"', "core may not know kernels"),
        ("kernels/params.h", '#include "../torch/rows.h"', "kernels may not know torch"),
    ],
)
def test_planted_include_is_found(tmp_path: Path, file: str, line: str, what: str) -> None:
    for name in ("core/row.h", "kernels/params.h", "kernels/cpu/a.cpp", "torch/rows.h"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("#pragma once\n")
    assert layers.csrc_violations(tmp_path) == []
    (tmp_path / file).write_text(line + "\n")
    (violation,) = layers.csrc_violations(tmp_path)
    assert what in violation and file in violation


@pytest.mark.parametrize(
    "file,line,what",
    [
        ("ops.py", "from .trainer import train", "may not know trainer"),
        ("functional.py", "def f():\n    import fastkd.bench", "may not know bench"),
        ("modules.py", "from . import cli", "may not know cli"),
        ("modules.py", "import importlib\nimportlib.import_module('fastkd.demo')", "may not know demo"),
        ("ops.py", "from .functional import kd_loss", "ops is not above functional"),
        ("functional.py", "from fastkd.modules import KDLoss", "functional is not above modules"),
        ("modules.py", "from . import kd_loss", "modules is not above kd_loss"),
        ("backends.py", "import fastkd", "backends is not above the package"),
        ("scratch.py", "import torch", "has no place in CORE_ORDER"),
        ("ops.py", "import transformers", "depends on torch alone"),
        ("ops.py", "from rich.table import Table", "depends on torch alone"),
        ("trainer/train.py", "from ..demo import run", "may not know demo"),
        ("bench/run.py", "from fastkd.trainer import train", "may not know trainer"),
    ],
)
def test_planted_import_is_found(tmp_path: Path, file: str, line: str, what: str) -> None:
    path = tmp_path / "fastkd" / file
    path.parent.mkdir(parents=True)
    if file != "scratch.py":
        path.write_text("import math\nimport torch\nfrom .options import Options\n")
        assert layers.python_violations(tmp_path / "fastkd", STANDARD_LIBRARY) == []
    path.write_text(line + "\n")
    (violation,) = layers.python_violations(tmp_path / "fastkd", STANDARD_LIBRARY)
    assert what in violation


def test_planted_long_file_is_found(tmp_path: Path) -> None:
    long, setup = tmp_path / "long.py", tmp_path / "setup.py"
    long.write_text("x = 1\n" * 401)
    setup.write_text("x = 1\n" * 120)
    assert len(layers.length_violations(tmp_path, [long, setup])) == 2
