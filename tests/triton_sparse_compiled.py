"""The Triton kernels with a sparse teacher, compiled for GPUs that are not here, by test_triton_sparse.py: all that a
launch can be compiled as is listed; no spill, few registers, rows read and written 16 bytes at a time."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import pytest
import torch
import triton_driver
from triton_compiled import DTYPES, WIDE, resources_of
from triton_driver import Launch

from fastkd.triton import launch, sparse, sparse_plan

K = 64
# name -> columns, whether rows that wide are taken whole
WAYS = {"split": (WIDE, False), "whole": (WIDE, True), "in registers": (2048, True)}
KERNELS = {"split": ["sparse_sums_kernel", "sparse_finish_kernel", "sparse_gradient_kernel"]}
REGISTERS = {
    "sparse_row_kernel": sparse_plan.ROW_REGISTERS, "sparse_finish_kernel": sparse_plan.FINISH_REGISTERS,
}  # fmt: skip
# gfx942, which takes no limit: split rows by five waves a SIMD, whole ones by two, a program a processor.
AMD_REGISTERS, AMD_ROW_REGISTERS = 96, 256
# Of all that can be compiled; the rest differs in the widening of a logit, or has been compiled for its neighbours.
COMPILED = [
    *((target, "bf16", "aligned") for target in triton_driver.TARGETS),
    ("sm_90", "fp32", "aligned"), ("gfx942", "fp32", "aligned"),
    ("sm_90", "bf16", "odd"), ("gfx942", "bf16", "odd"),
    ("gfx942", "bf16", "large"),  # AMD's compiler is told which tensors are beyond 2 GiB
]  # fmt: skip
TAILS = {"bucket": ("forward_kl", "reverse_kl", "jsd", "total_variation", "skew_forward_kl", "skew_reverse_kl",
                    "symmetric_kl"), "renormalize": ("forward_kl",), "sampled": ("forward_kl",)}  # fmt: skip

HAS = ("labels", "weights", "temperatures", "stats", "gradient")


def _loss(
    way: str, dtype: torch.dtype, kind: str = "aligned", divergence: str = "jsd", tail: str = "bucket",
    has: tuple[str, ...] = (), rows: int = 2, k: int = K, inplace: bool = False, ignore_index: int = -100,
    **numbers: float,
) -> list[Launch]:  # fmt: skip
    """What one call launches for its rows. has: labels, weights, temperatures, stats, gradient."""
    triton_driver.launches.clear()
    columns, whole = WAYS[way]
    first = 1 if kind == "odd" else 0
    student = torch.empty(1 << 31 if kind == "large" else rows * columns + 1, dtype=dtype)  # nothing is touched
    student = student[first : first + rows * columns].view(rows, columns)
    ids = torch.arange(k).expand(rows, k).contiguous()
    given = lambda name, tensor: tensor if name in has else None  # noqa: E731
    scalars = launch.Scalars(0.5, 2.0, 1.0, 0.5 if "labels" in has else 0.0, 0.1, 1e-3, 0.0, 2.0)._replace(**numbers)
    arguments = [
        student, ids, torch.full((rows, k), -10.0), None, given("labels", torch.zeros(rows, dtype=torch.int64)),
        given("weights", torch.ones(rows)), given("temperatures", torch.ones(rows)), None,
        torch.tensor(scalars, dtype=torch.float64), tail, divergence, True, ignore_index, "mean", "stats" in has,
    ]  # fmt: skip
    kept = sparse_plan.rows_at_once
    sparse_plan.rows_at_once = lambda *_: rows if whole else 0
    try:
        if inplace:
            sparse._forward_inplace(*arguments)
        else:
            sparse._forward(*arguments, "gradient" in has)
    finally:
        sparse_plan.rows_at_once = kept
    return [x for x in triton_driver.launches if x.name.startswith("sparse_")]


def _specialisations(dtype: torch.dtype, kinds: tuple[str, ...] = ("aligned", "odd")) -> list[Launch]:
    """All there are for a dtype."""
    found = [x for way in WAYS for kind in kinds for x in _loss(way, dtype, kind, has=("gradient",))]
    return list({id(x.compiled): x for x in found}.values())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("target,dtype,kind", COMPILED)
def test_resources(target: str, dtype: str, kind: str, way: str) -> None:
    triton_driver.compile_for(target)
    launched = _loss(way, DTYPES[dtype], kind, has=("gradient",))
    assert [x.name for x in launched] == KERNELS.get(way, ["sparse_row_kernel"])
    for x in launched:
        found, finish = resources_of(x.compiled), x.name == "sparse_finish_kernel"
        name = f"{x.name}: {found}"
        assert found.spilled == 0, name
        limit = REGISTERS.get(x.name, sparse_plan.SPLIT_REGISTERS)
        if target == "gfx942":
            limit = AMD_ROW_REGISTERS if x.name == "sparse_row_kernel" else AMD_REGISTERS
        assert found.registers <= limit, name
        if kind != "odd" and not finish:
            assert found.loads >= (2 if way == "in registers" else 1), name
            assert found.stores >= (x.name != "sparse_sums_kernel"), name


def test_nothing_else_is_compiled() -> None:
    """Whatever is asked for, of whatever rows, is one of the specialisations: a dtype, a block, 16 bytes or not."""
    triton_driver.compile_for("sm_90")
    known = {id(x.compiled): x.name for x in _specialisations(torch.bfloat16)}
    assert Counter(known.values()) == {
        "sparse_sums_kernel": 2, "sparse_finish_kernel": 1, "sparse_gradient_kernel": 2, "sparse_row_kernel": 4
    }  # fmt: skip
    options = [
        {"divergence": divergence, "tail": tail, "has": has}
        for (tail, divergences), has in zip(
            itertools.cycle(TAILS.items()),
            [chosen for n in range(6) for chosen in itertools.combinations(HAS, n)],
        )
        for divergence in divergences
    ]
    numbers = [
        {"rows": 1, "k": 1}, {"rows": 16, "k": 16, "student_softcap": 20.0}, {"rows": 33, "k": 300, "inplace": True},
        {"rows": 2, "ignore_index": 1 << 40, "beta": 1.0, "temperature": 1.0, "kd_weight": 0.0},
    ]  # fmt: skip
    for i, more in enumerate(options):
        for way, kind in itertools.product(WAYS, ("aligned", "odd")):
            for x in _loss(way, torch.bfloat16, kind, **more, **numbers[i % len(numbers)]):
                assert id(x.compiled) in known, (x.name, way, kind, more, numbers[i % len(numbers)])


def test_no_thread_waits_for_another_within_a_sweep() -> None:
    """Lanes stay with their threads: a layout that changed would take shared memory and a barrier a block."""
    triton_driver.compile_for("sm_90")
    for way in WAYS:
        for x in _loss(way, torch.bfloat16, has=("gradient",)):
            assert "convert_layout" not in x.compiled.asm["ttgir"], x.name


def test_named_columns_wait_for_the_sweep_and_it_for_them() -> None:
    """A gradient may lie over a logit that another thread has yet to gather, and the named columns' over what the sweep
    has stored: their own (N), barrier (B), the block's (W), barrier, the named ones over it (S)."""
    triton_driver.compile_for("sm_90")
    for way, order in (("split", "WBS"), ("whole", "NBWBS"), ("in registers", "NBWBS")):
        text = _loss(way, torch.bfloat16, has=("gradient",))[-1].compiled.asm["ttgir"]
        marks = ""
        for line in re.findall(r"(?:gpu|ttg)\.barrier|tt\.store [^\n]*", text):
            kinds = {"barrier": "B", "x!tt.ptr<f32>": "N", "x8x!tt.ptr<bf16>": "W", "x!tt.ptr<bf16>": "S"}
            marks += next((mark for part, mark in kinds.items() if part in line), "")
        assert marks.endswith(order), (way, marks)


def test_the_second_read_and_the_writes_leave_the_cache_first() -> None:
    triton_driver.compile_for("sm_90")
    (row,) = _loss("whole", torch.bfloat16, has=("gradient",))
    ptx = row.compiled.asm["ptx"]
    assert len(re.findall(r"ld\.global\.[\w.:]*evict_first[\w.:]*v4", ptx)) >= 1
    assert len(re.findall(r"st\.global\.[\w.:]*evict_first[\w.:]*v4", ptx)) >= 1
    assert len(re.findall(r"ld\.global\.(?![\w.:]*evict)[\w.:]*v4", ptx)) >= 1
