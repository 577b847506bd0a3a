"""The CUDA kernels as shipped, run on the CPU by the machine of tests/simt: numbers against the reference, over the
table of cases and every way a kernel can be launched."""

from __future__ import annotations

import pytest
import simt_backend
import torch
from cases import CASES
from inputs import BF16, FP16, FP32, Case
from reference import DIVERGENCES
from test_loss import Problem

# name -> how the kernels are launched; the arithmetic's own choice, and ways that it would take for longer rows
LAUNCHES = {
    "planned": {"multiprocessors": 4},
    "one block": {"variant": "block", "threads": 64, "arch": 80},  # no bulk copies
    "cluster of 4": {"variant": "cluster", "threads": 64, "parts": 4},
    "cluster of 16": {"variant": "cluster", "threads": 32, "parts": 16},
    "streaming": {"variant": "streaming", "threads": 96, "parts": 1},
    "streaming in 5 parts": {"variant": "streaming", "threads": 64, "parts": 5},
    "streaming in 40 parts": {"variant": "streaming", "threads": 32, "parts": 40},
}


@pytest.fixture(autouse=True)
def _needs_native(native: str) -> None:
    """The operators' schemas and the packing of arguments are those of the extension."""


def check(problem: Problem, launch: dict, **overrides) -> None:
    with simt_backend.native_on_simt(**launch):
        problem.check(problem.run(backend="native", **overrides))


@pytest.mark.parametrize("everything", [False, True], ids=["alone", "everything"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("index", range(len(CASES)), ids=[f"{i}-{case.name}" for i, case in enumerate(CASES)])
def test_table(index: int, divergence: str, everything: bool) -> None:
    """As planned for a small GPU, a schedule of its own for every case; narrow ones launched in another way too, in two
    where every option is asked for."""
    case = CASES[index]
    problem = Problem(case, divergence, everything)
    ways = list(LAUNCHES.values())
    others = [ways[1 + (index + k) % (len(ways) - 1)] for k in range((2 if everything else 1) * (case.vocab < 5000))]
    for launch in [LAUNCHES["planned"], *others]:
        check(problem, {**launch, "seed": index})


@pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_schedules(divergence: str, launch: dict) -> None:
    """Ten schedules: right, and the same bits."""
    case = Case("schedules", lead=(3,), vocab=1031, student_dtype=BF16, teacher_dtype=BF16, regime="late_top")
    problem = Problem(case, divergence, True)
    first = None
    for seed in range(10):
        with simt_backend.native_on_simt(**launch, seed=seed):
            outcome = problem.run(backend="native")
        problem.check(outcome)
        bits = torch.cat([outcome.loss.view(-1), outcome.gradient.float().view(-1), *map(torch.flatten, outcome.stats)])
        first = bits if first is None else first
        assert torch.equal(bits.nan_to_num(7.0), first.nan_to_num(7.0))


@pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES)
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16), (FP16, FP16), (FP32, BF16), (FP16, FP32)])
def test_dtypes_in_place(launch: dict, dtypes: tuple) -> None:
    """The gradient over the logits: what is read must have been read before it is overwritten."""
    for seed, layout in enumerate(["contiguous", "padded", "shifted"]):
        lead = (2, 2) if layout == "shifted" else (3,)
        case = Case("in place", lead=lead, vocab=523, student_dtype=dtypes[0], teacher_dtype=dtypes[1], layout=layout)
        problem = Problem(case, "forward_kl", False) if layout == "padded" else Problem(case, "jsd", True)
        check(problem, {**launch, "seed": seed}, inplace=True)
