"""A pytest plugin for a process of its own: every loss that a test asks of the native backend is computed by Triton's
interpreter instead, so that the suites of the loss hold for the Triton kernels as they stand.

    python -m pytest -p triton_plugin tests/test_loss_options.py             rows in blocks as shipped
    python -m pytest -p triton_plugin --small-blocks tests/test_loss.py      every row swept, in blocks of 512 or 1024
    ... --third 0                                                            every third (case, divergence) of the table
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from types import ModuleType

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports the kernels

import numpy as np
import pytest
import torch
import triton.language as tl
from reference import DIVERGENCES
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from fastkd import functional
from fastkd.triton import launch

_select = functional.select_backend


def _triton_for_native(backend: str, *arguments: Tensor | bool) -> str:
    chosen = _select("triton" if backend == "native" else backend, *arguments)
    return "triton" if chosen == "native" else chosen


_cast = InterpreterBuilder.cast_impl


def _cast_like_the_hardware(self: InterpreterBuilder, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
    """The interpreter truncates to bf16; compiled kernels round to nearest (triton_compiled.py reads it)."""
    if (src.dtype.scalar, dst_type.scalar) == (tl.float32, tl.bfloat16):
        rounded = torch.from_numpy(np.atleast_1d(src.data)).to(torch.bfloat16).view(torch.int16).numpy()
        return TensorHandle(rounded.view(np.uint16).reshape(np.shape(src.data)), tl.bfloat16)
    return _cast(self, src, dst_type)


_patch_lang = interpreter._patch_lang


@functools.cache
def _languages_of(function: Callable) -> tuple[ModuleType, ...]:
    return tuple(x for x in function.__globals__.values() if x is tl or x is tl.core)


def _patch_once(function: Callable) -> interpreter._LangPatchScope:
    """The interpreter replaces Triton's language again in every call of a device function: half of its time."""
    if any(tl.core.is_builtin(language.load) for language in _languages_of(function)):
        return _patch_lang(function)
    return interpreter._LangPatchScope()


def sweep_in_small_blocks(host=launch) -> None:
    """Several blocks, pieces and programs even for rows that would stay in registers. host: launch.py or a copy."""
    host.RESIDENT_BLOCKS.clear()
    host.SWEEP_BLOCKS.update({2: host.Block(128, 8, 128), 4: host.Block(128, 4, 128)})


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--small-blocks", action="store_true", help="sweep every row, in blocks of 512 or 1024 columns")
    parser.addoption("--third", type=int, choices=(0, 1, 2), help="of the table, one third of (case, divergence)")


def pytest_configure(config: pytest.Config) -> None:
    assert launch.INTERPRETED
    functional.select_backend = _triton_for_native
    InterpreterBuilder.cast_impl = _cast_like_the_hardware
    interpreter._patch_lang = _patch_once
    np.seterr(all="ignore")  # masked lanes compute what tl.where throws away
    if config.getoption("--small-blocks"):
        sweep_in_small_blocks()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    third = config.getoption("--third")
    if third is None:
        return

    def belongs(item: pytest.Item) -> bool:
        case = getattr(item, "callspec", None)
        if case is None or not {"index", "divergence"} <= case.params.keys():
            return True
        return (case.params["index"] + DIVERGENCES.index(case.params["divergence"])) % 3 == third

    config.hook.pytest_deselected(items=[item for item in items if not belongs(item)])
    items[:] = [item for item in items if belongs(item)]
