"""Every specialisation of the dense kernels compiled for GPUs that are not here, by test_triton_compiled.py: spills,
registers, width of the loads and rounding, read from what the compilers left."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import triton
import triton_specialisations as listed
from triton.compiler import CompiledKernel
from triton_driver import TARGETS, compile_for

from fastkd.triton import launch
from fastkd.triton.specialisations import Specialisation

NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WIDE = 128256  # a vocabulary that is swept
# Vector registers per thread of gfx942, which takes no limit: six waves a SIMD; four with statistics or softcaps and
# for resident rows.
PLAIN_AMD, BUSY_AMD = 80, 128


class Resources(NamedTuple):
    registers: int
    spilled: int  # bytes of stack or local memory
    loads: int  # instructions that load 16 bytes of global memory
    stores: int
    half: int = 0  # instructions that load 8 bytes
    narrow: int = 0  # instructions that load a logit, or anything of its size


def _tool(name: str, cubin: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(NVIDIA / name), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _of_cubin(cubin: bytes, ptx: str) -> Resources:
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", _tool("cuobjdump", cubin, "-res-usage"))
    assert usage, "cuobjdump -res-usage has another format"
    registers, stack, local = map(int, usage.groups())
    wide = Counter(re.findall(r"\b(ld|st)\.global[\w.:]*\.v4\.[bfsu]32\b", ptx))
    loads = Counter(re.findall(r"\bld\.global[\w.:]*?(?:\.(v2))?\.[bfsu](16|32)\b", ptx))
    narrow = loads["", "16"] if loads["", "16"] else loads["", "32"]
    return Resources(registers, max(stack, local), wide["ld"], wide["st"], loads["v2", "32"], narrow)


def _of_amdgcn(text: str) -> Resources:
    def number(pattern: str) -> int:
        found = re.search(pattern, text)
        assert found, f"the amdgcn text lacks {pattern}"
        return int(found.group(1))

    spilled = number(r"ScratchSize: (\d+)") + number(r"\.vgpr_spill_count:\s+(\d+)")
    wide = Counter(re.findall(r"\b(?:global|buffer)_(load|store)_dwordx4\b", text))
    loads = Counter(re.findall(r"\b(?:global|buffer)_load_(ushort|short_d16|dwordx2|dword)\b", text))
    narrow = loads["ushort"] + loads["short_d16"] or loads["dword"]
    return Resources(number(r"\.vgpr_count:\s+(\d+)"), spilled, wide["load"], wide["store"], loads["dwordx2"], narrow)


@functools.cache
def resources_of(compiled: CompiledKernel) -> Resources:
    asm = compiled.asm
    return _of_cubin(asm["cubin"], asm["ptx"]) if "cubin" in asm else _of_amdgcn(asm["amdgcn"])


def _limit_of(x: Specialisation, target: str) -> int:
    if x.kernel in ("scale_kernel", "total_kernel"):
        return launch.BUSY_REGISTERS
    busy = bool(x.constants.get("FULL")) or x.kernel == "resident_kernel"
    if target.startswith("gfx"):
        return BUSY_AMD if busy else PLAIN_AMD
    return launch.BUSY_REGISTERS if busy else launch.PLAIN_REGISTERS


def _check_accesses(x: Specialisation, found: Resources, told: str) -> None:
    """16 bytes at a time wherever a lane has as many, and a way for rows that begin anywhere."""
    vector = int(x.constants["VECTOR"])
    models = [x.student, x.teacher] if x.teacher else [x.student]
    assert found.loads >= sum(vector * size // 16 for size in models), told
    assert found.half >= sum(vector * size == 8 for size in models), told
    narrowest = [size for size in models if size == min(models)]
    assert found.narrow >= vector * len(narrowest), told
    if x.kernel in ("gradient_kernel", "resident_kernel", "rescale_kernel"):
        assert found.stores >= 1, told


# by title, since what they are compiled with is the target's
TITLES = [listed.title(x) for x in listed.every()]


def test_they_are_few() -> None:
    assert len(TITLES) == len(set(TITLES)) <= 152


@pytest.mark.parametrize("title", TITLES)
def test_specialisation(title: str) -> None:
    """No spill, registers as stated, and rows accessed 16 bytes at a time, on every target."""
    for name, kernel in listed.compiled_for(title, list(TARGETS)).items():
        (x,) = [x for x in listed.every() if listed.title(x) == title]
        compile_for(name)
        found = resources_of(kernel)
        told = f"{title} for {name}: {found}"
        assert found.spilled == 0, told
        assert found.registers <= _limit_of(x, name), told
        if x.student:
            _check_accesses(x, found, told)


def _for_sm_90(title: str, **changes: int) -> CompiledKernel:
    compile_for("sm_90")
    (x,) = [x for x in listed.every() if listed.title(x) == title]
    return listed.compiled(x._replace(constants={**x.constants, **changes}), "sm_90")


@pytest.mark.parametrize("name", TARGETS)
def test_intermediate_code_stands_for_its_source(name: str) -> None:
    """What saves a compilation of every kernel from its source for every target."""
    title = "gradient_kernel-2-4-symmetric_kl"
    again = listed.compiled_for(title, [next(x for x in TARGETS if x != name), name])[name]
    compile_for(name)
    (x,) = [x for x in listed.every() if listed.title(x) == title]
    binary = "hsaco" if name.startswith("gfx") else "cubin"
    assert again.asm[binary] == listed.compiled(x, name).asm[binary]


@pytest.mark.parametrize(
    "title", ["gradient_kernel-4-4-jsd-full", "gradient_kernel-2-2-jsd", "resident_kernel-2-2-jsd"]
)
def test_machine_code_is_as_wide_as_its_ptx_and_leaves_the_stack_alone(title: str) -> None:
    kernel = _for_sm_90(title)
    names = re.findall(r"\b(?:LDG|STG|LDL|STL)[\w.]*", _tool("nvdisasm", kernel.asm["cubin"], "-c"))
    wide = Counter(name[:3] for name in names if name.endswith(".128"))
    found = resources_of(kernel)
    assert wide["LDG"] >= found.loads > 0 and wide["STG"] >= found.stores > 0, names
    assert not [name for name in names if name.startswith(("LDL", "STL"))]


def test_the_meter_sees_narrow_loads_and_spills() -> None:
    """A lane of one column has nothing to read at once; 32768 columns in registers spill."""
    assert resources_of(_for_sm_90("sums_kernel-2-2-forward_kl", VECTOR=1)).loads == 0
    assert resources_of(_for_sm_90("resident_kernel-2-2-jsd", LANES=4096)).spilled > 0


def test_16_bits_are_rounded_to_nearest() -> None:
    ptx = _for_sm_90("gradient_kernel-2-2-forward_kl").asm["ptx"]
    for dtype in ("bf16", "f16"):
        assert re.search(rf"cvt\.rn\.{dtype}", ptx) and not re.search(rf"cvt\.rz\.{dtype}", ptx)
