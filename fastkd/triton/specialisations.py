"""Every kernel that launch.py can ask Triton to compile on one device: the list is short, and nothing else is compiled.

Triton would specialise by more: by integers that are 1 or multiples of 16, by the alignment of tensors, by arguments
that are None, by the dtype of every tensor. Here all of that is known at run time, but for the width of a logit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from ..divergence import SPECS
from . import launch

LOGIT_BYTES = (2, 4)


class Specialisation(NamedTuple):
    """A kernel by name, the bytes of a logit of both models (0 where it takes none), and what it is compiled with."""

    kernel: str
    student: int
    teacher: int
    constants: Mapping[str, str | int | bool]


def _ends(device: torch.device) -> Iterator[Specialisation]:
    for name in ("scale_kernel", "total_kernel"):
        yield Specialisation(name, 0, 0, launch.one_program(device))
    for size in LOGIT_BYTES:
        shape = launch.shape_of(launch.SWEEP_BLOCKS[size], device, busy=False)
        yield Specialisation("rescale_kernel", size, 0, shape)


def _sweeps(student: int, teacher: int, full: bool, device: torch.device) -> Iterator[Specialisation]:
    shape = {"FULL": full, **launch.shape_of(launch.SWEEP_BLOCKS[student], device, full)}
    two_sweeps = [name for name in SPECS if name not in launch.ONE_SWEEP]
    kernels = {"sums_kernel": [*launch.ONE_SWEEP, "terms"], "terms_kernel": two_sweeps, "gradient_kernel": list(SPECS)}
    for name, divergences in kernels.items():
        for divergence in divergences:
            yield Specialisation(name, student, teacher, {"DIVERGENCE": divergence, **shape})


def _resident(student: int, teacher: int, device: torch.device) -> Iterator[Specialisation]:
    shape = launch.shape_of(launch.RESIDENT_BLOCKS[student], device, busy=True)
    for divergence in SPECS:
        yield Specialisation("resident_kernel", student, teacher, {"DIVERGENCE": divergence, **shape})


def every(device: torch.device) -> list[Specialisation]:
    """Of dense teachers, vocabulary shards included."""
    found = list(_ends(device))
    for student in LOGIT_BYTES:
        for teacher in LOGIT_BYTES:
            for full in (False, True):
                found += _sweeps(student, teacher, full, device)
            found += _resident(student, teacher, device)
    return found
