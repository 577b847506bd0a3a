"""A pytest plugin for a process of its own: Triton believes in a GPU, compiles for it what the host code launches, and
runs nothing. The tensors are on the CPU; only their dtypes, addresses and strides are looked at."""

from __future__ import annotations

import os
from typing import NamedTuple

os.environ.pop("TRITON_INTERPRET", None)
# Triton's cache is shared by checkouts and would hand out kernels that name the files of another
os.environ["TRITON_DISABLE_LINE_INFO"] = "1"

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastkd.triton import launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class StubDriver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        place = list(TARGETS.values()).index(self.target)  # compiled kernels are kept per device
        return place + len(TARGETS) * (knobs.runtime.jit_cache_hook is not None)

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def is_active(self) -> bool:
        return True


OPTIONS = ("num_warps", "maxnreg", "enable_fp_fusion")  # of the compilers, as the launches state them


class Key(NamedTuple):
    """What Triton tells kernels apart by: types of arguments, constants, options, and what it assumes of arguments."""

    kernel: str
    types: tuple
    constants: tuple
    options: tuple
    assumed: tuple = ()


class Launch(NamedTuple):
    """A kernel that would have run: its name, programs, keyword constants and what was compiled for it, or, where
    launches are only recorded, what would have been."""

    name: str
    programs: int
    constants: dict
    compiled: object
    key: Key | None = None


launches: list[Launch] = []
_run = JITFunction.run
_noted: list[Key] = []


def by_name(x: dict) -> tuple:
    return tuple(sorted(x.items()))


def _note(*, fn, compile: dict, **_) -> bool:
    """Triton's hook before it compiles: True, don't."""
    names = list(compile["signature"])
    constants = {names[path[0]]: value for path, value in compile["constants"].items()}
    assumed = tuple(str(x) for x in compile["configs"][0].items() if x[1])
    _noted[:] = [Key(fn.name, by_name(compile["signature"]), by_name(constants), (), assumed)]
    return True


def _compile_only(self: JITFunction, *args, grid, warmup, **kwargs):
    compiled = _run(self, *args, grid=grid, warmup=True, **kwargs)
    options = {name: kwargs[name] for name in OPTIONS if name in kwargs}
    key = None if compiled is not None else _noted[0]._replace(options=by_name(options))
    launches.append(Launch(self.fn.__name__, grid[0], kwargs, compiled, key))
    return compiled


def compile_for(name: str) -> None:
    """From now on everything that is launched is compiled for this target and recorded in `launches`."""
    JITFunction.run = _compile_only
    knobs.runtime.jit_cache_hook = None
    driver.set_active(StubDriver(TARGETS[name]))
    launch.threads_per_warp = lambda device: TARGETS[name].warp_size
    launch.limits_registers = lambda device: TARGETS[name].backend == "cuda"
    launches.clear()


def record_for(name: str) -> None:
    """From now on everything that is launched is recorded in `launches` and compiled for nobody."""
    compile_for(name)
    knobs.runtime.jit_cache_hook = _note


def pytest_configure() -> None:
    assert not launch.INTERPRETED and isinstance(launch.kernels.sums_kernel, triton.JITFunction)
    compile_for("sm_90")
