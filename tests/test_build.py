"""What a user sees when the build or the choice of an instruction set goes wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fastkd.ops

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "csrc"))
import nvcc  # noqa: E402

MAX_MESSAGE_LINES = 12
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what the build reads."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("csrc", "fastkd"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def build(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tree,
        env={**os.environ, "FASTKD_CUDA": "0", **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("environment", [{"CXX": "/nonexistent/g++"}, {"PATH": "/nonexistent", "CXX": ""}])
def test_a_missing_compiler_is_one_readable_message(tree: Path, environment: dict[str, str]) -> None:
    done = build(tree, **environment)
    assert done.returncode != 0
    message = done.stdout + done.stderr
    assert "needs a C++17 compiler" in message and "apt-get install g++" in message
    assert "Traceback" not in message and len(message.splitlines()) <= MAX_MESSAGE_LINES, message


@needs_compiler
def test_the_compiler_that_is_there_is_used(tree: Path, tmp_path: Path) -> None:
    """Python was built with g++ and asks for it; a machine that has only clang++ must not end in a traceback."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("as", "ld", "ninja", "uname"):
        if found := shutil.which(tool, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])):
            (folder / tool).symlink_to(found)
    (folder / "clang++").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\nexec {shutil.which("g++")} "$@"\n')
    (folder / "clang++").chmod(0o755)
    done = build(tree, PATH=str(folder), CXX="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "isa_baseline.cpp" in (tmp_path / "called").read_text()


@needs_compiler
def test_a_changed_header_rebuilds_what_includes_it(tree: Path) -> None:
    first = build(tree)
    assert first.returncode == 0, first.stderr
    objects = sorted((tree / "build").rglob("isa_*.o")) + sorted((tree / "build").rglob("launch.o"))
    assert len(objects) >= 2
    before = {path: path.stat().st_mtime_ns for path in objects}
    time.sleep(0.02)
    (tree / "csrc" / "core" / "row.h").touch()
    again = build(tree)
    assert again.returncode == 0, again.stderr
    assert [path.name for path in objects if path.stat().st_mtime_ns == before[path]] == []


@pytest.mark.skipif(nvcc.find_toolkit() is None, reason="no CUDA toolkit")
def test_a_changed_header_rebuilds_the_kernels_that_include_it(tmp_path: Path, monkeypatch) -> None:
    """And no others; a header that is gone, too."""
    monkeypatch.setenv("FASTKD_CUDA_ARCHS", "80")
    monkeypatch.setattr(nvcc, "SOURCES", tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("one.h").write_text("constexpr int one = 1;\n")
    Path("with.cu").write_text('#include "one.h"\n__global__ void kernel(int* x) { *x = one; }\n')
    Path("without.cu").write_text("__global__ void kernel(int* x) { *x = 1; }\n")
    toolkit = nvcc.find_toolkit()
    assert toolkit

    def compiled() -> set[str]:
        times = lambda: {path.name: path.stat().st_mtime_ns for path in Path("out").glob("*.o")}  # noqa: E731
        before = times()
        assert {Path(path).name for path in nvcc.compile_kernels(toolkit, Path("out"))} == {"with.o", "without.o"}
        return {name for name, at in times().items() if before.get(name) != at}

    assert compiled() == {"with.o", "without.o"}
    assert compiled() == set()
    Path("one.h").touch()
    assert compiled() == {"with.o"}
    Path("one.h").unlink()
    with pytest.raises(SystemExit, match=r"with\.cu could not be compiled"):
        compiled()


def run_with_isa(isa: str) -> subprocess.CompletedProcess[str]:
    code = "import torch, fastkd; x = torch.zeros(1, 4); fastkd.kd_loss(x, x); print(fastkd.ops.cpu_isa())"
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "FASTKD_CPU_ISA": isa}, capture_output=True, text=True
    )


@pytest.mark.parametrize("isa", fastkd.ops.cpu_isas())
def test_an_instruction_set_can_be_forced(isa: str) -> None:
    assert run_with_isa(isa).stdout.strip() == isa


@pytest.mark.parametrize("isa", ["sse9", "AVX2", "avx2,avx512"])
def test_an_unknown_instruction_set_lists_those_available(isa: str) -> None:
    done = run_with_isa(isa)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last == f"ValueError: FASTKD_CPU_ISA={isa} does not run on this machine; available: " + ", ".join(
        fastkd.ops.cpu_isas()
    )


@pytest.mark.parametrize("command", ["backends", "explain"])
def test_a_forced_set_that_cannot_run_is_reported(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastkd", command],
        env={**os.environ, "FASTKD_CPU_ISA": "sse9"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert "FASTKD_CPU_ISA=sse9 does not run on this machine" in done.stdout
    assert "->" not in done.stdout  # the loss would raise, so no backend is marked as the one that runs
