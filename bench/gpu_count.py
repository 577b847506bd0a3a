"""What the CUDA kernels cost on paper: bytes, special functions and instructions a column, counted from the code that
nvcc made, and the limit that follows for three GPUs. Run: python bench/gpu_count.py

Nothing here is a measurement: it says which unit would be busy longest, were everything else free.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

import sass

MODULES = {"a100": "sm_80", "h100": "sm_90a", "b200": "sm_100a"}
RESIDENT, SWEEPS = 3, 5  # N V elements of traffic of a resident row, and of a streamed one with a one-sweep value


class Machine(NamedTuple):
    """Published figures of a GPU: NVIDIA's architecture papers and data sheets."""

    bandwidth: float  # bytes a second
    clock: float  # Hz, boost
    multiprocessors: int
    lanes: int = 128  # instructions of a thread that a multiprocessor issues a cycle
    special: int = 16  # of them special functions


GPUS = {
    "a100": Machine(2.04e12, 1.41e9, 108),
    "h100": Machine(3.35e12, 1.755e9, 132),
    "b200": Machine(8.0e12, 1.85e9, 148),
}


class Row(NamedTuple):
    divergence: str
    kernel: str
    traffic: int  # elements a column
    special: float  # a column
    fused: float
    instructions: float
    shares: dict[str, tuple[float, str]]  # gpu -> share of bandwidth that the other units allow, and which


def limit(gpu: Machine, traffic: int, special: float, instructions: float) -> tuple[float, str]:
    """Columns a second by each unit, over those of the memory; bf16 logits and gradient."""
    memory = gpu.bandwidth / (2 * traffic)
    cycles = gpu.clock * gpu.multiprocessors
    rates = {"special": cycles * gpu.special / special, "issue": cycles * gpu.lanes / instructions}
    unit = min(rates, key=lambda name: rates[name])
    share = rates[unit] / memory
    return (1.0, "memory") if share >= 1 else (share, unit)


def count(library: Path, arch: str = "sm_90a") -> list[Row]:
    code = sass.code(library, arch)
    rows = []
    for divergence in sass.DIVERGENCES:
        kind = "symmetric_kl" if divergence == "reverse_kl" else divergence
        mixed = kind in ("forward_kl", "symmetric_kl")
        for kernel, names in (
            ("resident", ["block_resident"]),
            ("streaming", ["stream_sums", *([] if mixed else ["stream_terms"]), "stream_finish"]),
        ):
            loops = []
            for name in names:
                found = sass.hot_loops(code[sass.Kernel(name, kind, False)])
                loops += found if kernel == "resident" else [min(found, key=lambda c: c.all)]
            special, fused, everything = (sum(c) / 4 for c in zip(*loops))
            traffic = RESIDENT if kernel == "resident" else SWEEPS if mixed else SWEEPS + 2
            shares = {name: limit(gpu, traffic, special, everything) for name, gpu in GPUS.items()}
            rows.append(Row(divergence, kernel, traffic, special, fused, everything, shares))
    return rows


def markdown(rows: list[Row]) -> str:
    lines = [
        "| divergence | kernel | N·V moved | special functions | FMA, mul, add | instructions | A100 | H100 | B200 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        shares = " | ".join(f"{share:.0%} {unit}" for share, unit in r.shares.values())
        counts = f"{r.traffic} | {r.special:g} | {r.fused:.0f} | {r.instructions:.0f}"
        lines.append(f"| {r.divergence} | {r.kernel} | {counts} | {shares} |")
    return "\n".join(lines)


if __name__ == "__main__":
    spec = importlib.util.find_spec("fastkd._C")
    assert spec and spec.origin, "fastkd is not built"
    print(markdown(count(Path(spec.origin))))
