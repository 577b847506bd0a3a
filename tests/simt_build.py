"""Builds Python modules of kernels that run on the machine of tests/simt."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import harness
import pybind11
from torch.utils.cpp_extension import include_paths

SIMT = harness.ROOT / "tests" / "simt"
CSRC = harness.ROOT / "csrc"
MACHINE = ("fiber", "shadow", "memory", "machine", "meeting", "phases", "access", "report")
DIVERGENCES = ("forward_kl", "symmetric_kl", "jsd", "total_variation", "skew_forward_kl", "skew_reverse_kl")
KERNELS = (*DIVERGENCES, "sparse")  # a file each
FLAGS = ("-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas", f"-I{SIMT}", f"-I{SIMT / 'driver'}")
PYTHON = (f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_paths()['include']}")


def _compile(sources: Sequence[Path], folder: Path, flags: Sequence[str]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    objects = [folder / f"{source.stem}.o" for source in sources]
    harness.compile_all([(source, out, (*FLAGS, *flags)) for source, out in zip(sources, objects)])
    return objects


def compile_machine(folder: Path, flags: Sequence[str] = ("-O2",)) -> list[Path]:
    """The machine's objects, in ``folder``."""
    return _compile([SIMT / f"{part}.cpp" for part in MACHINE], folder, flags)


def compile_selftest(folder: Path, flags: Sequence[str] = ("-O2",)) -> list[Path]:
    """The module of the machine's own kernels."""
    return _compile([SIMT / "selftest.cpp"], folder, (*flags, *PYTHON))


def write_bounds(folder: Path, csrc: Path) -> None:
    """simt_bounds.h: what stands before each kernel as the most threads a block that it is compiled for."""
    source = "".join(path.read_text() for path in sorted((csrc / "kernels" / "cuda").glob("*.cuh")))
    found = re.findall(r"FASTKD_KERNEL\(([^,()]+), [^()]+\)\s*(\w+)\(FASTKD_CONSTANT", source)
    assert found
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "simt_bounds.h").write_text("".join(f"#define BOUND_{kernel} ({most})\n" for most, kernel in found))


def is_made_of(made: Path, file: str) -> bool:
    """Whether compile_kernels made the object of, among others, csrc/``file``."""
    files = made.with_suffix(".d").read_text().split()
    return any(Path(name).resolve() == CSRC / file for name in files)


def compile_kernels(
    folder: Path,
    csrc: Path = CSRC,
    kernels: Sequence[str] = KERNELS,
    flags: Sequence[str] = ("-O1",),
    known: Sequence[Path] = (),
) -> list[Path]:
    """What nvcc compiles, from any copy of csrc: these kernels and the host side. known: objects of these sources that
    are taken as they are."""
    cuda = csrc / "kernels" / "cuda"
    if csrc != CSRC:  # what knows the kernels finds them beside it
        shutil.copytree(SIMT, csrc.parent / "tests" / "simt", dirs_exist_ok=True)
    driver = csrc.parent / "tests" / "simt" / "driver"
    sources = [cuda / f"{name}.cu" for name in (*kernels, "launch")]
    sources += [cuda / "plan.cpp", driver / "announce.cpp", driver / "without.cpp"]
    write_bounds(folder, csrc)
    taken = {source.stem: path for path in known for source in sources if source.stem == path.stem}
    rest = [source for source in sources if source.stem not in taken]
    return [*taken.values(), *_compile(rest, folder, (*flags, "-MMD", f"-I{folder}", "-x", "c++"))]


def compile_operators(folder: Path) -> list[Path]:
    """The driver, and the operators that run them."""
    torch_headers = [f"-isystem{path}" for path in include_paths()]
    flags = ("-O1", "-DTORCH_TARGET_VERSION=0x020a000000000000", *torch_headers, *PYTHON)
    return _compile([SIMT / "kernels.cpp", SIMT / "driver" / "driver.cpp"], folder, flags)


def link(name: str, objects: Sequence[Path], folder: Path, libraries: Sequence[str] = ()) -> Path:
    return harness.link(objects, folder / f"{name}.so", ("-shared", "-Wl,--no-as-needed", *libraries))


def load(name: str, binary: Path) -> ModuleType:
    """Imports the PYBIND11_MODULE ``name`` of ``binary``."""
    spec = importlib.util.spec_from_file_location(name, binary)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module
