"""Gates on what nvcc made of the CUDA kernels: no spills, registers for the stated occupancy, wide accesses, few
special functions. Read from the extension that the other tests use."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from fastkd import ops

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))
import sass  # noqa: E402

if ops.load_error or not ops.cuda_architectures():
    pytest.skip("the extension has no CUDA kernels (no CUDA toolkit)", allow_module_level=True)
if not sass.find_cuobjdump():
    pytest.skip("cuobjdump is in neither a CUDA toolkit nor Triton's wheel", allow_module_level=True)

SPEC = importlib.util.find_spec("fastkd._C")
assert SPEC and SPEC.origin
LIBRARY = Path(SPEC.origin)
ARCHS = [f"sm_{a}" for a in ops.cuda_architectures().split(", ") if "+PTX" not in a]
KINDS = ("forward_kl", "symmetric_kl", "jsd", "total_variation", "skew_forward_kl", "skew_reverse_kl")
REGISTERS = 65536  # of a multiprocessor
MOST_SPECIAL = 7  # results a column that the special-function unit of an H100 gives at 3 N V bytes in bf16


def expected_kernels() -> set[sass.Kernel]:
    found = {sass.Kernel(name, None, None) for name in ("scales_kernel", "total_kernel", "rescale_kernel")}
    for divergence in KINDS:
        for rich in (False, True):
            names = ["warp_resident", "block_resident", "stream_sums", "stream_finish"]
            names += [] if divergence in KINDS[:2] else ["stream_terms"]
            found |= {sass.Kernel(name, divergence, rich) for name in names}
    found |= {sass.Kernel(name, None, None) for name in ("sparse_prepare", "shard_gather", "shard_spread")}
    names = ("sparse_resident", "sparse_sums", "sparse_finish")
    return found | {sass.Kernel(name, None, rich) for name in names for rich in (False, True)}


# threads a block and blocks a multiprocessor that the registers must allow
def occupancy(kernel: sass.Kernel, arch: str) -> tuple[int, int]:
    if kernel.name in ("sparse_prepare", "shard_gather"):
        return 32, 16
    if kernel.name in ("sparse_sums", "sparse_finish", "shard_spread"):
        return 256, 2
    if kernel.name in ("block_resident", "sparse_resident"):
        if kernel.rich:
            return 512, 1
        return (256, 3) if arch != "sm_80" else (512, 1)  # slices of a cluster; a whole row
    if kernel.name == "rescale_kernel":
        return 256, 3
    return (1024, 1) if kernel.divergence is None else (256, 2)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_is_there(arch: str) -> None:
    assert {kernel for a, kernel in sass.resources(LIBRARY) if a == arch} == expected_kernels()


@pytest.mark.parametrize("arch", ARCHS)
def test_no_spills_and_registers_for_the_occupancy(arch: str) -> None:
    for kernel in sorted(expected_kernels(), key=str):
        used = sass.resources(LIBRARY)[arch, kernel]
        assert used.stack == used.local == 0, (arch, kernel, used)
        threads, blocks = occupancy(kernel, arch)
        per_warp = -(-used.registers // 8) * 8 * 32
        assert per_warp * (threads // 32) * blocks <= REGISTERS, (arch, kernel, used)


def has(instructions: list[sass.Instruction], opcode: str, width: str) -> bool:
    return any(i.opcode.startswith(opcode + ".") and width in i.opcode.split(".") for i in instructions)


@pytest.mark.parametrize("arch", ARCHS)
def test_accesses_of_16_bytes(arch: str) -> None:
    """Copies or loads, and stores of the gradient, by 128 bits."""
    for kernel, instructions in sass.code(LIBRARY, arch).items():
        if kernel.name in ("warp_resident", "block_resident", "sparse_resident"):
            assert has(instructions, "LDGSTS", "128"), (arch, kernel)
            assert has(instructions, "LDS", "128") and has(instructions, "STG", "128"), (arch, kernel)
            in_bulk = any(i.opcode.startswith("UBLKCP") for i in instructions)
            assert in_bulk == (kernel.name == "block_resident" and arch != "sm_80"), (arch, kernel)
        elif kernel.name in ("stream_sums", "stream_terms", "sparse_sums"):
            assert has(instructions, "LDG", "128"), (arch, kernel)
        elif kernel.name in ("stream_finish", "rescale_kernel", "sparse_finish"):
            assert has(instructions, "LDG", "128") and has(instructions, "STG", "128"), (arch, kernel)


@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch != "sm_80"])
def test_special_functions_a_column(arch: str) -> None:
    """Where the compiler keeps every sweep a loop of one entry, which for sm_80 it does not."""
    for kernel, instructions in sass.code(LIBRARY, arch).items():
        if kernel.name not in ("block_resident", "warp_resident") or kernel.rich:
            continue
        loops = sass.hot_loops(instructions)
        sweeps = 2 if kernel.divergence in KINDS[:2] else 3
        assert len(loops) == sweeps, (arch, kernel, loops)
        assert sum(loop.special for loop in loops) <= 4 * MOST_SPECIAL, (arch, kernel, loops)


@pytest.mark.parametrize("arch", ARCHS)
def test_special_functions_on_all_ways(arch: str) -> None:
    """The same limit and, of every four columns, what few need: 3 where sums are restated, and 4 in both the first and
    the last sweep where the temperature is no integer. Also where a loop has several entries."""
    for kernel, instructions in sass.code(LIBRARY, arch).items():
        if kernel.name not in ("block_resident", "warp_resident") or kernel.rich:
            continue
        loops = sass.special_in_loops(instructions)
        assert len(loops) == (2 if kernel.divergence in KINDS[:2] else 3), (arch, kernel, loops)
        assert sum(loops) <= 4 * MOST_SPECIAL + 3 + 4 + 4, (arch, kernel, loops)


def test_planted_spill_would_be_seen() -> None:
    """The gate reads real numbers: every kernel uses registers, and some kernel uses its whole allowance."""
    used = [r.registers for r in sass.resources(LIBRARY).values()]
    assert min(used) > 10 and max(used) > 100


def test_size_and_hidden_runtime() -> None:
    assert os.stat(LIBRARY).st_size <= 25 << 20
    with LIBRARY.open("rb") as file:
        tables = [s for s in ELFFile(file).iter_sections() if isinstance(s, SymbolTableSection)]
        symbols = [s for table in tables if table.name == ".dynsym" for s in table.iter_symbols()]
    exported = {s.name for s in symbols if s["st_shndx"] != "SHN_UNDEF" and s["st_info"]["bind"] != "STB_LOCAL"}
    assert not {name for name in exported if name.startswith(("cuda", "__cuda"))}
    weak = {s.name for s in symbols if s["st_shndx"] == "SHN_UNDEF" and s["st_info"]["bind"] == "STB_WEAK"}
    assert "aoti_torch_get_current_cuda_stream" in weak
