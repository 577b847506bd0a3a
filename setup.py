"""Builds fastkd._C: one stable-ABI extension (torch >= 2.10, Python >= 3.10) with a kernel per CPU instruction set, and
the CUDA kernels where a CUDA toolkit is found (FASTKD_CUDA=auto), asked for (1) or not (0)."""

import os
import platform
import shutil
import sys
from pathlib import Path

from setuptools import setup

NO_COMPILER = """
fastkd needs a C++17 compiler and found none ({tried}).
  Debian, Ubuntu:  apt-get install g++        Fedora:  dnf install gcc-c++        macOS:  xcode-select --install
  or name one:     CXX=/path/to/g++ pip install ...
"""
NO_TORCH = """
fastkd builds against an installed PyTorch >= 2.10 and could not import it ({error}).
  pip install torch ninja "setuptools>=77" wheel && pip install --no-build-isolation .
"""


def choose_compiler() -> None:
    """Puts the C++ compiler that is there into CXX; ends the build with one readable message if there is none."""
    named = os.environ.get("CXX", "").split()
    if not named:
        os.environ.pop("CXX", None)  # set but empty: setuptools would run the first flag as the compiler
    for candidate in named[:1] or ("c++", "g++", "clang++"):
        if shutil.which(candidate):
            os.environ.setdefault("CXX", candidate)  # else the one that built Python, which may be missing
            return
    raise SystemExit(NO_COMPILER.format(tried=f"CXX={named[0]}" if named else "c++, g++, clang++"))


choose_compiler()
sys.path.insert(0, "csrc")
import nvcc  # noqa: E402

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    raise SystemExit(NO_TORCH.format(error=error)) from None

CPU = Path("csrc/kernels/cpu")
HOST = ("lingering_memory", "launch", "products_launch", "shard_launch", "sparse_launch", "select")
FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-unused-parameter", "-g0"]
FLAGS += [f"-ffile-prefix-map={Path.cwd()}/="]  # error messages name csrc/..., not the build machine's folders
ISA_FLAGS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    # gcc 12 takes the undefined operand of its own AVX-512 intrinsics for an uninitialised variable
    ISA_FLAGS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]


class Build(BuildExtension):
    """Compiles each instruction set with its own flags, then the rest as torch does it."""

    def build_extensions(self) -> None:
        headers = [str(path) for path in sorted(Path("csrc").rglob("*.h"))]  # nvcc.py looks after the .cuh
        for extension in self.extensions:
            extension.depends = headers
            extension.extra_objects = [
                obj
                for isa, flags in ISA_FLAGS.items()
                for obj in self.compiler.compile(
                    [str(CPU / f"isa_{isa}.cpp")],
                    output_dir=self.build_temp,
                    extra_postargs=FLAGS + flags,
                    depends=headers,
                )
            ]
            if TOOLKIT:
                extension.extra_objects += nvcc.compile_kernels(TOOLKIT, Path(self.build_temp) / "cuda")
        super().build_extensions()


TOOLKIT = nvcc.find_toolkit()
SOURCES = ["csrc/torch/library.cpp", "csrc/torch/cpu_ops.cpp", *(str(CPU / f"{name}.cpp") for name in HOST)]
SOURCES += ["csrc/kernels/cuda/plan.cpp"]  # arithmetic, which explanations need without CUDA too
MACROS = [("TORCH_TARGET_VERSION", "0x020a000000000000")]
LINK = []
if TOOLKIT:
    SOURCES += ["csrc/torch/cuda_ops.cpp"]
    MACROS += [("FASTKD_CUDA_ARCHS", f'"{", ".join(nvcc.architectures())}"')]
    # the runtime is part of the extension and hidden, so that it meets no other; the stream comes from libtorch
    LINK = [f"-L{TOOLKIT.libraries}", "-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"]
    LINK += ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]

setup(
    ext_modules=[
        CppExtension(
            "fastkd._C",
            SOURCES,
            py_limited_api=True,
            define_macros=MACROS,
            extra_compile_args=FLAGS,
            extra_link_args=LINK,
        )
    ],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
