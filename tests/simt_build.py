"""Builds Python modules of kernels that run on the machine of tests/simt."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import harness
import pybind11

SIMT = harness.ROOT / "tests" / "simt"
MACHINE = ("fiber", "shadow", "memory", "machine", "meeting", "access", "report")
FLAGS = ("-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas", f"-I{SIMT}")


def compile_machine(folder: Path, flags: Sequence[str] = ()) -> list[Path]:
    """The machine's objects, in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    objects = [folder / f"{part}.o" for part in MACHINE]
    harness.compile_all([(SIMT / f"{part}.cpp", out, (*FLAGS, *flags)) for part, out in zip(MACHINE, objects)])
    return objects


def compile_binding(source: Path, folder: Path, csrc: Path = harness.ROOT / "csrc", flags: Sequence[str] = ()) -> Path:
    """A file with a PYBIND11_MODULE; ``csrc`` may be a copy with planted bugs."""
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / f"{source.stem}.o"
    includes = (f"-I{csrc}", f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_paths()['include']}")
    harness.compile_all([(source, out, (*FLAGS, *includes, *flags))])
    return out


def load(name: str, objects: Sequence[Path], folder: Path) -> ModuleType:
    """Links ``objects`` to the module ``name`` (its PYBIND11_MODULE) and imports it."""
    binary = harness.link(objects, folder / f"{name}.so", ("-shared",))
    spec = importlib.util.spec_from_file_location(name, binary)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module
