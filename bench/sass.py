"""What nvcc made of the CUDA kernels, read from the extension: registers, stack, and the instructions of the hot loops.

Needs cuobjdump, of a CUDA toolkit or of Triton's wheel.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import networkx as nx

DIVERGENCES = (
    "forward_kl", "reverse_kl", "symmetric_kl", "jsd", "total_variation", "skew_forward_kl", "skew_reverse_kl",
)  # fmt: skip
WIDE_LOADS = ("LDG", "LDGSTS", "LDS")


def find_cuobjdump() -> str | None:
    """Path of the disassembler; None where there is none."""
    wheel = Path(sysconfig.get_paths()["purelib"]) / "triton" / "backends" / "nvidia" / "bin" / "cuobjdump"
    toolkit = Path("/usr/local/cuda/bin/cuobjdump")
    return shutil.which("cuobjdump") or next((str(p) for p in (toolkit, wheel) if p.exists()), None)


class Kernel(NamedTuple):
    """A kernel by its C++ name; divergence and rich are None for the ones that do not have them."""

    name: str
    divergence: str | None
    rich: bool | None


class Resources(NamedTuple):
    """As cuobjdump -res-usage states them, in registers and bytes."""

    registers: int
    stack: int
    local: int


def kernel_of(symbol: str) -> Kernel:
    name = re.search(r"fastkd3gpu\d+([a-z_]+?)(?:I|E|N)", symbol)
    kind = re.search(r"DivergenceE(\d)ELb([01])", symbol)
    sparse = re.search(r"SparseKindILb([01])E", symbol)
    assert name, symbol
    if sparse:
        return Kernel(name[1], None, sparse[1] == "1")
    return Kernel(name[1], DIVERGENCES[int(kind[1])] if kind else None, kind[2] == "1" if kind else None)


def _cuobjdump(library: Path, *flags: str) -> str:
    tool = find_cuobjdump()
    assert tool, "no cuobjdump"
    return subprocess.run([tool, *flags, str(library)], check=True, capture_output=True, text=True).stdout


@lru_cache(maxsize=4)
def resources(library: Path) -> dict[tuple[str, Kernel], Resources]:
    """(architecture, kernel) -> what it takes."""
    found: dict[tuple[str, Kernel], Resources] = {}
    arch = symbol = ""
    for line in _cuobjdump(library, "-res-usage").splitlines():
        if m := re.search(r"arch = (sm_\w+)", line):
            arch = m[1]
        elif m := re.search(r"Function (\S+):", line):
            symbol = m[1]
        elif m := re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", line):
            found[arch, kernel_of(symbol)] = Resources(*map(int, m.groups()))
    return found


class Instruction(NamedTuple):
    """address in bytes; text without predicate."""

    address: int
    predicated: bool
    text: str

    @property
    def opcode(self) -> str:
        return self.text.split()[0].rstrip(";")

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        m = re.search(r"\b(0x[0-9a-f]+)\b", self.text) if self.opcode.startswith(("BRA", "JMP")) else None
        return int(m[1], 16) if m else None


@lru_cache(maxsize=4)
def code(library: Path, arch: str) -> dict[Kernel, list[Instruction]]:
    """The instructions of every kernel for one architecture."""
    kernels: dict[Kernel, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in _cuobjdump(library, "-sass", "-arch", arch).splitlines():
        if m := re.search(r"Function : (\S+)", line):
            current = kernels[kernel_of(m[1])] = []
        elif m := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\S+\s+)?(.*?)\s*;", line):
            current.append(Instruction(int(m[1], 16), bool(m[2]), m[3]))
    return kernels


class Counts(NamedTuple):
    """Instructions of one pass through a loop's body, on its cheapest way."""

    special: int  # MUFU: exp2, log2, reciprocal
    fused: int  # FFMA, FMUL, FADD
    all: int


def _blocks(instructions: list[Instruction]) -> Iterator[tuple[int, int]]:
    """Half-open index ranges without a branch in or out."""
    targets = {i.target for i in instructions if i.target is not None}
    start = 0
    for k, instruction in enumerate(instructions):
        if instruction.address in targets and k > start:
            yield start, k
            start = k
        if instruction.target is not None or instruction.opcode in ("EXIT", "RET"):
            yield start, k + 1
            start = k + 1
    if start < len(instructions):
        yield start, len(instructions)


def _count(instructions: list[Instruction]) -> Counts:
    opcodes = [i.opcode for i in instructions]
    special = sum(o.startswith("MUFU") for o in opcodes)
    return Counts(special, sum(o.startswith(("FFMA", "FMUL", "FADD")) for o in opcodes), len(opcodes))


def _flow(instructions: list[Instruction]) -> nx.DiGraph:
    """Blocks as nodes, each with its counts; an edge is as dear as the block that it leaves."""
    blocks = list(_blocks(instructions))
    by_address = {instructions[a].address: n for n, (a, _) in enumerate(blocks)}
    flow = nx.DiGraph()
    for n, (a, b) in enumerate(blocks):
        flow.add_node(n, counts=_count(instructions[a:b]))
        last = instructions[b - 1]
        conditional = last.predicated or re.search(r"\bU?P\d|\bR\d", last.text) is not None
        if last.target in by_address:
            flow.add_edge(n, by_address[last.target])
        ends = last.target is not None or last.opcode in ("EXIT", "RET")
        if n + 1 < len(blocks) and (conditional or not ends):
            flow.add_edge(n, n + 1)
    return flow


def _cheapest_pass(flow: nx.DiGraph, header: int, latch: int) -> Counts:
    """From a loop's header to its branch back: fewest special functions, then fewest instructions."""
    cost = lambda n, m, _: 10_000 * flow.nodes[n]["counts"].special + flow.nodes[n]["counts"].all  # noqa: E731
    path = nx.dijkstra_path(flow, header, latch, weight=cost)
    counts = [flow.nodes[n]["counts"] for n in path]
    return Counts(*(sum(c) for c in zip(*counts)))


def hot_loops(instructions: list[Instruction]) -> list[Counts]:
    """The loops that call special functions on every pass, in the order of the code."""
    flow = _flow(instructions)
    dominator = nx.immediate_dominators(flow, 0)

    def dominates(a: int, b: int) -> bool:
        while b != a and dominator.get(b, b) != b:
            b = dominator[b]
        return a == b

    backward = [(t, h) for t, h in flow.edges if h <= t and h in dominator and t in dominator and dominates(h, t)]
    passes = [_cheapest_pass(flow, h, t) for t, h in sorted(backward, key=lambda edge: edge[1])]
    return [c for c in passes if c.special >= 4]


def special_in_loops(instructions: list[Instruction]) -> list[int]:
    """Special functions in each loop that has at least 4, whatever its entries: those of rare ways too."""
    flow = _flow(instructions)
    loops = (c for c in nx.strongly_connected_components(flow) if len(c) > 1 or flow.has_edge(*[*c] * 2))
    counts = [sum(flow.nodes[n]["counts"].special for n in loop) for loop in loops]
    return [count for count in counts if count >= 4]
