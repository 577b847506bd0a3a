"""Compiles the CUDA kernels with nvcc, without a torch that knows CUDA: their sources include no torch header."""

import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

SOURCES = Path("csrc/kernels/cuda")
# Binary code for each of these, and the last one's portable form for what comes after.
ARCHITECTURES = "80;90a;100a;90+PTX"
FLAGS = ["-std=c++17", "-O3", "-Werror", "all-warnings", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra,-g0"]
NO_TOOLKIT = """
FASTKD_CUDA=1 asks for the CUDA kernels, and no CUDA toolkit was found (tried {tried}).
  name one:     CUDA_HOME=/path/to/cuda pip install ...
  or install:   pip install 'cuda-toolkit[nvcc,cudart,cccl,crt,nvvm]==13.0.*'
"""


class Toolkit(NamedTuple):
    """Where nvcc and the static runtime are."""

    nvcc: Path
    libraries: Path


def _places() -> list[Path]:
    named = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    on_path = shutil.which("nvcc")
    behind = [Path(on_path).resolve().parent.parent] if on_path else []
    wheels = [Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13"]
    return named or [Path("/usr/local/cuda"), *behind, *wheels]


def find_toolkit() -> Toolkit | None:
    """The toolkit that FASTKD_CUDA (auto, 0, 1) allows; None where CUDA is left out."""
    wish = os.environ.get("FASTKD_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"FASTKD_CUDA must be auto, 0 or 1; got {wish!r}")
    if wish == "0":
        return None
    places = _places()
    for place in places:
        for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
            toolkit = Toolkit(place / "bin" / "nvcc", place / folder)
            if toolkit.nvcc.exists() and (toolkit.libraries / "libcudart_static.a").exists():
                return toolkit
    if wish == "1":
        raise SystemExit(NO_TOOLKIT.format(tried=", ".join(map(str, places))))
    return None


def architectures() -> list[str]:
    """Names as torch has them: 90a, or 90+PTX; FASTKD_CUDA_ARCHS holds others than the default, between semicolons."""
    return [name.strip() for name in os.environ.get("FASTKD_CUDA_ARCHS", ARCHITECTURES).split(";")]


def _architecture_flags() -> list[str]:
    flags = []
    for name in architectures():
        number, _, ptx = name.partition("+")
        flags += ["-gencode", f"arch=compute_{number},code={'compute' if ptx else 'sm'}_{number}"]
    return flags


def _is_fresh(out: Path, made_of: Path) -> bool:
    """Whether the object is newer than all that it was made of, by the rule that nvcc wrote for make."""
    if not (out.exists() and made_of.exists()):
        return False
    files = made_of.read_text().replace("\\\n", " ").partition(" : ")[2].split()
    made = out.stat().st_mtime
    return bool(files) and all(os.path.exists(name) and os.stat(name).st_mtime < made for name in files)


def _compile(toolkit: Toolkit, source: Path, out: Path) -> str:
    made_of, stamp = out.with_suffix(".d"), out.with_suffix(".command")
    command = [str(toolkit.nvcc), *FLAGS, *_architecture_flags(), "-MMD", "-MF", str(made_of)]
    command += ["-c", str(source), "-o", str(out)]
    if stamp.exists() and stamp.read_text() == " ".join(command) and _is_fresh(out, made_of):
        return str(out)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{source} could not be compiled:\n{done.stdout}{done.stderr}")
    stamp.write_text(" ".join(command))
    return str(out)


def compile_kernels(toolkit: Toolkit, folder: Path) -> list[str]:
    """Object files of all kernels, those whose sources and headers did not change as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    workers = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        return list(
            pool.map(
                lambda source: _compile(toolkit, source, folder / f"{source.stem}.o"),
                sorted(SOURCES.glob("*.cu")),
            )
        )
