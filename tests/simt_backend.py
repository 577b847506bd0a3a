"""The shipped CUDA kernels as a backend: built by g++ for the machine of tests/simt, and entered where kd_loss looks
for its native operators."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import simt_build
import torch
from torch.library import Library

from fastkd import ops

WORDS = ("forward", "forward_", "rescale", "rescale_")


@functools.cache
def _library() -> Library:
    """The operators fastkd::simt_*, with the schemas of fastkd::kd_*."""
    library = Library("fastkd", "FRAGMENT")
    for word in WORDS:
        schema = str(getattr(torch.ops.fastkd, f"kd_{word}").default._schema)
        library.define("simt_" + schema.removeprefix("fastkd::kd_"))
    return library


@functools.cache
def module() -> ModuleType:
    """Kernels and operators, built once a run."""
    folder = Path(tempfile.mkdtemp(prefix="fastkd-simt-"))
    objects = [*simt_build.compile_machine(folder), *simt_build.compile_kernels(folder)]
    objects += simt_build.compile_operators(folder)
    torch_library = ("-L" + str(Path(torch.__file__).parent / "lib"), "-ltorch", "-ltorch_cpu")
    _library()
    built = simt_build.load("simt_kernels", objects, folder, torch_library)
    built.announce(simt_build.launch_bounds())
    ops.register_backend("simt", "simt_")
    return built


@contextmanager
def native_on_simt(**configuration) -> Iterator[ModuleType]:
    """Within it, backend="native" runs the CUDA kernels on the machine; see ``configure`` in simt/kernels.cpp."""
    built, own = module(), ops.registered["native"]
    built.configure(**configuration)
    ops.registered["native"] = ops.registered["simt"]
    try:
        yield built
    finally:
        ops.registered["native"] = own
