"""Builds and runs the standalone harness of tests/cpp, which drives the torch-free kernels without Python."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastkd import ops

ROOT = Path(__file__).resolve().parent.parent
CPP = ROOT / "tests" / "cpp"
PARTS = ("memory", "reference", "sparse_reference", "problems", "products", "run", "main")
WARNINGS = (
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-unused-parameter",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
)
# instruction set -> compiler flags; test_native_harness.py holds them against setup.py
ISA_FLAGS = {
    "baseline": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
}
KERNELS = {"baseline": "kBaselineKernels", "avx2": "kAvx2Kernels", "avx512": "kAvx512Kernels"}


def runnable_isas() -> tuple[str, ...]:
    """Instruction sets that this machine runs, best last."""
    return ("baseline",) if ops.load_error else ops.cpu_isas()


def find_compiler() -> str:
    """The C++ compiler of the build; skips the test where there is none."""
    for candidate in (*os.environ.get("CXX", "").split()[:1], "c++", "g++", "clang++"):
        if shutil.which(candidate):
            return candidate
    pytest.skip("no C++ compiler")


def _run(command: Sequence[str | Path]) -> None:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stderr}"


def compile_all(jobs: Sequence[tuple[Path, Path, Sequence[str]]]) -> None:
    """Compile (source, object, flags), as many at a time as there are cores."""
    compiler = find_compiler()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda j: _run([compiler, "-std=c++17", *WARNINGS, *j[2], "-c", j[0], "-o", j[1]]), jobs))


def compile_parts(folder: Path, isa: str, flags: Sequence[str]) -> list[Path]:
    """The harness's own objects. What computes the answers stays without sanitizers: it is most of the time, and
    nothing of it is under test."""
    objects = [folder / f"{part}.o" for part in PARTS]
    own = {part: ("-O2",) if part in ("reference", "sparse_reference", "memory") else flags for part in PARTS}
    define = f"-DHARNESS_KERNELS={KERNELS[isa]}"
    compile_all([(CPP / f"{part}.cpp", out, (*own[part], define)) for part, out in zip(PARTS, objects)])
    return objects


def compile_kernels(folder: Path, isa: str, flags: Sequence[str], csrc: Path = ROOT / "csrc") -> list[Path]:
    """The kernels of one instruction set and their host side, from any copy of csrc."""
    cpu = csrc / "kernels" / "cpu"
    hosts = ("launch", "products_launch", "sparse_launch")
    objects = [folder / f"{name}.o" for name in ("kernels", *hosts)]
    sources = [(cpu / f"isa_{isa}.cpp", (*flags, *ISA_FLAGS[isa]))]
    sources += [(cpu / f"{name}.cpp", tuple(flags)) for name in hosts]
    compile_all([(source, out, own) for (source, own), out in zip(sources, objects)])
    return objects


def link(objects: Sequence[Path], binary: Path, flags: Sequence[str] = ()) -> Path:
    _run([find_compiler(), *flags, *objects, "-o", binary, "-lpthread"])
    return binary


def build(folder: Path, isa: str, flags: Sequence[str]) -> Path:
    """The harness for one instruction set of the sources as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    objects = compile_parts(folder, isa, flags) + compile_kernels(folder, isa, flags)
    return link(objects, folder / "harness", flags)


def run(binary: Path, *arguments: str, prefix: Sequence[str] = (), timeout: float = 240) -> subprocess.CompletedProcess:
    """Runs the harness; output and errors as text."""
    command = [*prefix, str(binary), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)


def problems_in(output: str) -> int:
    """How many problems the harness says it ran."""
    found = re.search(r"^(\d+) problems", output, re.MULTILINE)
    return int(found.group(1)) if found else 0
