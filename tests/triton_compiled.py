"""Compiled for GPUs that are not here, by test_triton_compiled.py: spills, registers, width of the loads and rounding,
read from what the compilers left; compilations counted while a training run changes its numbers."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import triton
import triton_driver
from reference import DIVERGENCES
from triton.compiler import CompiledKernel
from triton_driver import TARGETS, Launch, compile_for

from fastkd.triton import launch, ops

NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WIDE, NARROW = 128256, 4096  # swept; resident, at its widest
# Vector registers per thread of gfx942, which takes no limit: five waves a SIMD, and four with every option at once.
PLAIN_AMD, BUSY_AMD = 96, 128


class Resources(NamedTuple):
    registers: int
    spilled: int  # bytes of stack or local memory
    loads: int  # instructions that load 16 bytes of global memory
    stores: int


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
    return Resources(registers, max(stack, local), wide["ld"], wide["st"])


def _of_amdgcn(text: str) -> Resources:
    def number(pattern: str) -> int:
        found = re.search(pattern, text)
        assert found, f"the amdgcn text lacks {pattern}"
        return int(found.group(1))

    spilled = number(r"ScratchSize: (\d+)") + number(r"\.vgpr_spill_count:\s+(\d+)")
    wide = Counter(re.findall(r"\b(?:global|buffer)_(load|store)_dwordx4\b", text))
    return Resources(number(r"\.vgpr_count:\s+(\d+)"), spilled, wide["load"], wide["store"])


@functools.cache
def resources_of(compiled: CompiledKernel) -> Resources:
    asm = compiled.asm
    return _of_cubin(asm["cubin"], asm["ptx"]) if "cubin" in asm else _of_amdgcn(asm["amdgcn"])


def _numbers(**changes: float) -> torch.Tensor:
    scalars = launch.Scalars(0.5, 2.0, 1.0, 0.5, 0.1, 1e-3, 0.0, 0.0)._replace(**changes)
    return torch.tensor(scalars, dtype=torch.float64)


def _loss(
    divergence: str, dtype: torch.dtype, columns: int, *, busy: bool = False, rows: int = 2, gradient: bool = True,
    reduction: str = "mean", ignore_index: int = -100, items: torch.Tensor | None = None, **numbers: float,
) -> list[Launch]:  # fmt: skip
    """What one call launches. busy: every option that is compiled in at once."""
    triton_driver.launches.clear()
    student, teacher = (torch.zeros(rows, columns, dtype=dtype) for _ in range(2))
    per_row = torch.ones(rows) if busy else None
    numbers = {"student_softcap": 20.0 if busy else 0.0, **numbers}
    ops._forward(
        student, teacher, torch.zeros(rows, dtype=torch.int64), per_row, per_row, items, _numbers(**numbers),
        divergence, True, ignore_index, reduction, busy, gradient,
    )  # fmt: skip
    return list(triton_driver.launches)


@pytest.fixture(params=os.environ.get("FASTKD_TRITON_TARGETS", ",".join(TARGETS)).split(","))
def target(request: pytest.FixtureRequest) -> str:
    compile_for(request.param)
    return request.param


def _limit(target: str, busy: bool) -> int:
    if target.startswith("gfx"):
        return BUSY_AMD if busy else PLAIN_AMD
    return launch.BUSY_REGISTERS if busy else launch.PLAIN_REGISTERS


def _over_rows(launches: list[Launch]) -> list[Launch]:
    return [x for x in launches if x.programs > 1]


def _check_resources(divergence: str, kind: str, dtype: str, busy: bool, target: str) -> None:
    """No spill, registers as stated, and every load and store of a row 16 bytes wide."""
    columns = WIDE if kind == "swept" else NARROW
    over_rows = _over_rows(_loss(divergence, DTYPES[dtype], columns, busy=busy))
    assert {x.name == "resident_kernel" for x in over_rows} == {kind == "resident"}
    for x in over_rows:
        found = resources_of(x.compiled)
        name = f"{x.name} {divergence} {dtype} {target}: {found}"
        assert found.spilled == 0, name
        assert found.registers <= _limit(target, busy or kind == "resident"), name
        threads = x.constants["num_warps"] * TARGETS[target].warp_size
        each = max(1, x.constants["LANES"] // threads)  # 16-byte pieces of a row that a thread takes at a time
        assert found.loads >= 2 * each, name
        if x.name in ("gradient_kernel", "resident_kernel"):
            assert found.stores >= each, name


@pytest.mark.parametrize("busy", [False, True], ids=["plain", "busy"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["swept", "resident"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_resources(divergence: str, kind: str, dtype: str, busy: bool, target: str) -> None:
    _check_resources(divergence, kind, dtype, busy, target)


@pytest.mark.parametrize("kind", ["swept", "resident"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_fp16_takes_what_bf16_takes(divergence: str, kind: str) -> None:
    compile_for("sm_90")
    _check_resources(divergence, kind, "fp16", False, "sm_90")


@pytest.mark.parametrize("dtype", DTYPES)
def test_machine_code_is_as_wide_as_its_ptx_and_leaves_the_stack_alone(dtype: str) -> None:
    compile_for("sm_90")
    for columns in (WIDE, NARROW):
        for x in _over_rows(_loss("jsd", DTYPES[dtype], columns, busy=True)):
            code = _tool("nvdisasm", x.compiled.asm["cubin"], "-c")
            names = re.findall(r"\b(?:LDG|STG|LDL|STL)[\w.]*", code)
            wide = Counter(name[:3] for name in names if name.endswith(".128"))
            found = resources_of(x.compiled)
            assert wide["LDG"] >= found.loads > 0 and wide["STG"] >= found.stores, names
            assert not [name for name in names if name.startswith(("LDL", "STL"))]


def test_the_meter_sees_narrow_loads_and_spills() -> None:
    """Rows of an odd width cannot be read 16 bytes at a time; 32768 columns in registers spill."""
    compile_for("sm_90")
    (sums, *_) = [x for x in _loss("forward_kl", torch.bfloat16, WIDE + 1) if x.name == "sums_kernel"]
    assert resources_of(sums.compiled).loads == 0
    kept = dict(launch.MAX_RESIDENT)
    try:
        launch.MAX_RESIDENT.update({2: 32768})
        (row, *_) = [x for x in _loss("jsd", torch.bfloat16, 32768) if x.name == "resident_kernel"]
        assert resources_of(row.compiled).spilled > 0
    finally:
        launch.MAX_RESIDENT.update(kept)


def test_bf16_is_rounded_to_nearest() -> None:
    compile_for("sm_90")
    (gradient, *_) = [x for x in _loss("forward_kl", torch.bfloat16, WIDE) if x.name == "gradient_kernel"]
    assert re.search(r"cvt\.rn\.bf16", gradient.compiled.asm["ptx"])
    assert not re.search(r"cvt\.rz\.bf16", gradient.compiled.asm["ptx"])


@pytest.mark.parametrize("grid", ["rescale", "rescale_"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_rescale(dtype: str, grid: str, target: str) -> None:
    triton_driver.launches.clear()
    gradient = torch.zeros(2, WIDE, dtype=DTYPES[dtype])
    (ops._rescale if grid == "rescale" else ops._rescale_inplace)(gradient, torch.ones(()), torch.ones(()))
    (x,) = triton_driver.launches
    found = resources_of(x.compiled)
    assert found.spilled == 0 and found.registers <= launch.PLAIN_REGISTERS
    assert found.loads >= 1 and found.stores >= 1


class TestCompilations:
    """A compilation takes a second or more: training must not meet a new one after its first step."""

    @pytest.fixture(autouse=True)
    def _count(self) -> Iterator[None]:
        compile_for("sm_90")
        yield

    def _new(self, first: list[Launch], later: list[Launch]) -> set[str]:
        known = {id(x.compiled) for x in first}
        return {x.name for x in later if id(x.compiled) not in known}

    @pytest.mark.parametrize("columns", [WIDE, NARROW])
    @pytest.mark.parametrize("divergence", ["jsd", "symmetric_kl", "skew_forward_kl"])
    def test_annealed_numbers(self, divergence: str, columns: int) -> None:
        first = _loss(divergence, torch.bfloat16, columns)
        for step in range(1, 8):
            numbers = {
                "beta": step / 8, "temperature": 4.0 - step / 2, "kd_weight": 1 - step / 9, "ce_weight": step / 7,
                "label_smoothing": step / 20, "z_loss": step * 1e-4,
            }  # fmt: skip
            assert not self._new(first, _loss(divergence, torch.bfloat16, columns, **numbers))

    @pytest.mark.parametrize("columns", [WIDE, NARROW])
    def test_numbers_of_rows(self, columns: int) -> None:
        """Also 1, which Triton would make a constant, and multiples of 16, which it would tell from others."""
        first = _loss("forward_kl", torch.float32, columns, rows=7)
        for rows in (1, 2, 15, 16, 32, 33):
            assert not self._new(first, _loss("forward_kl", torch.float32, columns, rows=rows))

    def test_items_and_ignore_index(self) -> None:
        first = _loss("forward_kl", torch.bfloat16, WIDE, items=torch.tensor(3.0))
        for items, ignore_index in ((1.0, 0), (16.0, 1), (77.0, -1), (5.0, 16)):
            later = _loss("forward_kl", torch.bfloat16, WIDE, items=torch.tensor(items), ignore_index=ignore_index)
            assert not self._new(first, later)

    def test_the_count_sees_another_specialisation(self) -> None:
        first = _loss("forward_kl", torch.bfloat16, WIDE)
        assert self._new(first, _loss("forward_kl", torch.bfloat16, WIDE, busy=True))
        assert self._new(first, _loss("reverse_kl", torch.bfloat16, WIDE)) == {"sums_kernel", "gradient_kernel"}
        assert not self._new(first, _loss("forward_kl", torch.bfloat16, WIDE))

    @pytest.mark.parametrize(
        "divergence,columns,kernels",
        [("forward_kl", WIDE, 4), ("jsd", WIDE, 5), ("forward_kl", NARROW, 3), ("jsd", NARROW, 3)],
    )
    def test_kernels_launched(self, divergence: str, columns: int, kernels: int) -> None:
        assert len(_loss(divergence, torch.bfloat16, columns)) == kernels
        assert len(_loss(divergence, torch.bfloat16, columns, reduction="none")) == kernels - 1


class TestShapes:
    """The shape of a launch is a pure function of numbers."""

    def test_rows_that_fill_the_device_are_not_split(self) -> None:
        block = launch.SWEEP_BLOCKS[2]
        assert launch.split_rows(132 * launch.PROGRAMS_PER_PROCESSOR, WIDE, block, 132).splits == 1

    @pytest.mark.parametrize("rows", [1, 2, 3, 17, 100, 1000])
    @pytest.mark.parametrize("columns", [1, 8193, 32001, 128256, 262144, 1 << 20, 1 << 24])
    def test_splits_cover_the_row_once(self, rows: int, columns: int) -> None:
        for block in launch.SWEEP_BLOCKS.values():
            split = launch.split_rows(rows, columns, block, 132)
            blocks = -(-columns // block.columns)
            assert 1 <= split.splits <= launch.pieces.MAX_PIECES.value
            assert (split.splits - 1) * split.blocks < blocks <= split.splits * split.blocks

    @pytest.mark.parametrize("size", [2, 4])
    def test_resident_blocks_hold_the_row(self, size: int) -> None:
        for columns in (1, 2, 31, 33, 255, 256, 257, 1000, 4096, launch.MAX_RESIDENT[size]):
            block = launch.resident_block(columns, size)
            assert block is not None and block.columns >= columns and block.lanes * block.vector >= block.threads
            assert block.lanes & (block.lanes - 1) == 0
        assert launch.resident_block(launch.MAX_RESIDENT[size] + 1, size) is None
