"""A model of a GPU's last cache under the loads and stores of Triton's interpreter (run with triton_plugin): which
bytes reach the memory.

Lines of 128 bytes, any line at any place; the least recently used one leaves first, and before it the ones that their
last access marked `evict_first`. The programs of a launch that are under way at a time take turns, a load or store
each; the next program begins where one has ended. A store of a line fetches nothing."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

LINE = 128


class Access(NamedTuple):
    """Lines in the order of their addresses."""

    lines: np.ndarray
    write: bool
    leaves_first: bool


Launch = list[list[Access]]  # of each program


class Recorder:
    """What the programs of each launch load and store while it lasts."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.program: tuple | None = None

    def begin_launch(self) -> None:
        self.launches.append([])
        self.program = None

    def access(self, builder: InterpreterBuilder, pointers, mask, write: bool, policy: tuple) -> None:
        if builder.grid_idx != self.program:
            self.program = builder.grid_idx
            self.launches[-1].append([])
        addresses = np.asarray(pointers.data)[np.broadcast_to(mask.data, np.shape(pointers.data))]
        if addresses.size:
            lines = np.unique(addresses // LINE)
            self.launches[-1][-1].append(Access(lines, write, "evict_first" in str(policy).lower()))


@contextmanager
def recording() -> Iterator[Recorder]:
    recorder = Recorder()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    run, policy_of = GridExecutor.__call__, getattr(InterpreterBuilder, "get_cache_policy", None)

    def recorded_load(self, pointers, mask, *rest):
        recorder.access(self, pointers, mask, False, rest[1:])
        return load(self, pointers, mask, *rest)

    def recorded_store(self, pointers, value, mask, *rest):
        recorder.access(self, pointers, mask, True, rest)
        return store(self, pointers, value, mask, *rest)

    def recorded_run(self, *args, **kwargs):
        recorder.begin_launch()
        return run(self, *args, **kwargs)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = recorded_load, recorded_store
    GridExecutor.__call__ = recorded_run
    if policy_of is not None:  # Triton 3.9 asks the builder for one object; before, the policy itself is passed
        InterpreterBuilder.get_cache_policy = lambda self, modifier, eviction: eviction
    try:
        yield recorder
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store
        GridExecutor.__call__ = run
        if policy_of is not None:
            InterpreterBuilder.get_cache_policy = policy_of


class Cache:
    def __init__(self, size: int) -> None:
        self.capacity = size // LINE
        self.fetched: list[int] = []  # lines, in order
        self.written: list[int] = []
        self._dirty: set[int] = set()
        self._classes: tuple[OrderedDict[int, None], OrderedDict[int, None]] = (OrderedDict(), OrderedDict())

    def access(self, access: Access) -> None:
        mine, other = self._classes if access.leaves_first else self._classes[::-1]
        for line in access.lines.tolist():
            known = line in mine or line in other
            mine.pop(line, None)
            other.pop(line, None)
            if not known and not access.write:
                self.fetched.append(line)
            mine[line] = None
            if access.write:
                self._dirty.add(line)
            if len(mine) + len(other) > self.capacity:
                self._evict()

    def _evict(self) -> None:
        first, usual = self._classes
        line, _ = (first or usual).popitem(last=False)
        if line in self._dirty:
            self._dirty.remove(line)
            self.written.append(line)

    def flush(self) -> None:
        self.written += sorted(self._dirty)
        self._dirty.clear()


def turns(launch: Launch, at_once: int, apart: int = 0) -> Iterator[Access]:
    """at_once: programs under way; apart: accesses by which each begins later than the one before it."""
    waiting = iter(launch)
    under_way = [(-apart * i, program) for i, program in zip(range(at_once), waiting)]
    while under_way:
        later = []
        for place, program in under_way:
            if 0 <= place < len(program):
                yield program[place]
            if place + 1 < len(program):
                later.append((place + 1, program))
            elif (following := next(waiting, None)) is not None:
                later.append((0, following))
        under_way = later


def bytes_moved(launches: list[Launch], size: int, at_once: int, ranges: list[tuple[int, int]], apart: int = 0) -> int:
    """Between the memory and a cache of `size` bytes: of lines that lie in one of the ranges of addresses."""
    cache = Cache(size)
    for launch in launches:
        for access in turns(launch, at_once, apart):
            cache.access(access)
    cache.flush()
    moved = np.array(cache.fetched + cache.written, dtype=np.int64) * LINE
    inside = np.zeros(len(moved), dtype=bool)
    for first, last in ranges:
        inside |= (moved >= first // LINE * LINE) & (moved < last)
    return int(inside.sum()) * LINE
