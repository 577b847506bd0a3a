"""How a loss with a sparse teacher is launched: pure functions of its shape and the device's processors and cache."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from . import launch
from .launch import Block, Rows, Split

# By UNIT, blocks of the sweeps of whole rows: two lanes of 16 bytes a thread; where every column has an address of its
# own, two lanes spill: one. With as many registers as it may take, a program has a multiprocessor to itself. A row of
# no more than MOST_RESIDENT blocks stays in registers.
ROW_BLOCKS = {8: Block(1024, 8, threads=512), 4: Block(1024, 4, threads=512), 1: Block(512, 4, threads=512)}
MOST_RESIDENT = 1
# ... of split rows: one lane a thread.
SPLIT_BLOCKS = {8: Block(256, 8, threads=256), 4: Block(256, 4, threads=256), 1: Block(256, 4, threads=256)}
ROW_REGISTERS, FINISH_REGISTERS, SPLIT_REGISTERS = 128, 128, 80
WARP_ENTRIES = 128  # of K at a time, by one warp: nothing goes from warp to warp

CACHE_SHARE = 7 / 8  # of the last level: what rows under way may take of it; the rest is for all else
# Last levels in front of the memory that a device does not tell of (AMD tells the second level of one of its dies).
LAST_LEVELS = {"gfx942": 256 << 20, "gfx950": 256 << 20}
UNKNOWN_CACHE = 32 << 20


class Plan(NamedTuple):
    """programs: that take whole rows, one after the other; 0 where rows are split."""

    block: Block
    programs: int
    resident: bool
    split: Split


@functools.cache
def cache_of(device: torch.device) -> int:
    """Bytes of the last cache in front of the device's memory."""
    if device.type == "cpu":
        return UNKNOWN_CACHE
    properties = torch.get_device_module(device).get_device_properties(device)
    architecture = getattr(properties, "gcnArchName", "").split(":")[0]
    return LAST_LEVELS.get(architecture) or getattr(properties, "L2_cache_size", 0) or UNKNOWN_CACHE


def rows_at_once(rows: int, columns: int, item_size: int, processors: int, cache: int) -> int:
    """Programs that take whole rows, so that a row is in the cache when it is read again; 0: rows are split instead.
    They are where all of them fit the cache anyway, where too few rows fit to keep half of the processors at work,
    and where the last round would leave more time unused than is saved (a third: 2 N V moved instead of 3)."""
    fitting = int(CACHE_SHARE * cache) // (columns * item_size)
    at_once = min(fitting, processors)
    if rows <= fitting or 2 * at_once < processors:
        return 0
    rounds = -(-rows // at_once)
    return -(-rows // rounds) if 3 * rows >= 2 * rounds * at_once else 0


def plan_of(rows: int, columns: int, item_size: int, unit: int, gradient: bool, device: tuple[int, int]) -> Plan:
    """device: processors and bytes of cache. A value alone is read once: rows too wide for registers are split."""
    if columns <= MOST_RESIDENT * ROW_BLOCKS[unit].columns:
        return Plan(ROW_BLOCKS[unit], rows, True, Split(1, 1))
    programs = rows_at_once(rows, columns, item_size, *device) if gradient else 0
    block = ROW_BLOCKS[unit] if programs else SPLIT_BLOCKS[unit]
    return Plan(block, programs, False, launch.split_rows(rows, columns, block, device[0]))


def unit_of(student: Rows, gradient: Rows | None, columns: int) -> int:
    """Elements that rows, their strides and their width are multiples of: those of 16 bytes, or 1."""
    unit = 16 // student.data.element_size()
    for rows in (student, gradient or student):
        numbers = (columns, rows.outer_stride, rows.inner_stride)
        if rows.data.data_ptr() % 16 or any(number % unit for number in numbers):
            return 1
    return unit


def base_of(rows: Rows) -> tuple[Tensor, int]:
    """A tensor that begins at a multiple of 16 bytes, where its storage does, and elements from there to the rows."""
    x = rows.data
    start = x.data_ptr() % 16 // x.element_size()
    if start == 0 or start > x.storage_offset():
        return x, 0
    return x.as_strided((1,), (1,), x.storage_offset() - start), start
