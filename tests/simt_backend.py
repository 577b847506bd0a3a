"""The shipped CUDA kernels as a backend: built by g++ for the machine of tests/simt, and entered where kd_loss looks
for its native operators."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import simt_build
import torch
from torch.library import Library

from fastkd import ops, shard_native, shard_ops, sparse_ops

WORDS = ("forward", "forward_", "rescale", "rescale_")
SHARD_WORDS = ("sums", "terms", "gradient", "gradient_")
NAME = "simt_kernels"
_entered: list[ModuleType] = []


@functools.cache
def _library() -> Library:
    """The operators fastkd::simt_*, with the schemas of fastkd::kd_*, fastkd::sparse_* and fastkd::shard_*."""
    library = Library("fastkd", "FRAGMENT")
    for word in WORDS:
        schema = str(getattr(torch.ops.fastkd, f"kd_{word}").default._schema)
        library.define("simt_" + schema.removeprefix("fastkd::kd_"))
    for word in ("sparse_forward", "sparse_forward_", *(f"shard_{word}" for word in SHARD_WORDS)):
        schema = str(getattr(torch.ops.fastkd, word).default._schema)
        library.define("simt_" + schema.removeprefix("fastkd::"))
    return library


def link(objects: Sequence[Path], folder: Path) -> Path:
    """The module of operators and kernels."""
    return simt_build.link(NAME, objects, folder, ("-L" + str(Path(torch.__file__).parent / "lib"), "-ltorch_cpu"))


def enter(binary: Path) -> ModuleType:
    """Imports a module and registers its operators; one in a process."""
    assert not _entered
    _library()
    module = simt_build.load(NAME, binary)
    module.announce()
    ops.register_backend("simt", "simt_")
    sparse_ops.register_backend("simt", "simt_sparse_forward", "simt_rescale")
    parts = (
        functools.partial(part, prefix="simt_")
        for part in (shard_native.sums, shard_native.terms, shard_native.gradient)
    )
    shard_ops.registered["simt"] = shard_ops.Parts(*parts, ("cpu",))
    _entered.append(module)
    return module


def module() -> ModuleType:
    """The kernels as they are, built once a run."""
    if not _entered:
        folder = Path(tempfile.mkdtemp(prefix="fastkd-simt-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        objects = [*simt_build.compile_machine(folder), *simt_build.compile_kernels(folder)]
        enter(link([*objects, *simt_build.compile_operators(folder)], folder))
    return _entered[0]


@contextmanager
def native_on_simt(**configuration) -> Iterator[ModuleType]:
    """Within it, backend="native" runs the CUDA kernels on the machine; see ``configure`` in simt/kernels.cpp."""
    built, tables = module(), (ops.registered, sparse_ops.registered, shard_ops.registered)
    own = [table["native"] for table in tables]
    built.configure(**configuration)
    for table in tables:
        table["native"] = table["simt"]
    try:
        yield built
    finally:
        for table, operators in zip(tables, own):
            table["native"] = operators
