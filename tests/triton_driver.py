"""A pytest plugin for a process of its own: Triton believes in a GPU, compiles for it what the host code launches, and
runs nothing. The tensors are on the CPU; only their dtypes, addresses and strides are looked at."""

from __future__ import annotations

import os
from typing import NamedTuple

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
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
        return list(TARGETS.values()).index(self.target)  # compiled kernels are kept per device

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def is_active(self) -> bool:
        return True


class Launch(NamedTuple):
    """A kernel that would have run: its name, programs, keyword constants and what was compiled for it."""

    name: str
    programs: int
    constants: dict
    compiled: object


launches: list[Launch] = []
_run = JITFunction.run


def _compile_only(self: JITFunction, *args, grid, warmup, **kwargs):
    compiled = _run(self, *args, grid=grid, warmup=True, **kwargs)
    launches.append(Launch(self.fn.__name__, grid[0], kwargs, compiled))
    return compiled


def compile_for(name: str) -> None:
    """From now on everything that is launched is compiled for this target and recorded in `launches`."""
    JITFunction.run = _compile_only
    driver.set_active(StubDriver(TARGETS[name]))
    launch.threads_per_warp = lambda device: TARGETS[name].warp_size
    launch.limits_registers = lambda device: TARGETS[name].backend == "cuda"
    launches.clear()


def pytest_configure() -> None:
    assert not launch.INTERPRETED and isinstance(launch.kernels.sums_kernel, triton.JITFunction)
    compile_for("sm_90")
