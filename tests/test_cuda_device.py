"""The table of cases on a CUDA device, by the native and the Triton kernels, against the reference on the CPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch

np = pytest.importorskip("numpy", reason="the reference is written in numpy")

import linear_cases  # noqa: E402
import shard_cases  # noqa: E402
from cases import CASES  # noqa: E402
from device_inputs import run_on  # noqa: E402
from inputs import BF16, FP32, LAYOUTS  # noqa: E402
from reference import DIVERGENCES  # noqa: E402
from shard_ranks import run_ranks  # noqa: E402
from test_loss import problem_of  # noqa: E402

from fastkd import ops  # noqa: E402

WIDE = 40000  # columns; beyond, the reference takes a second a case
# Every case, with every other divergence in turn: the reference on the CPU takes nearly all of the time.
TABLE = [
    (index, divergence)
    for index, case in enumerate(CASES)
    for place, divergence in enumerate(DIVERGENCES)
    if (index + place) % (2 if case.vocab < WIDE else 4) == 0
]
FEW = [
    (index, divergence)
    for place, (index, divergence) in enumerate(TABLE)
    if place % 6 == 0 and CASES[index].vocab < WIDE  # Triton compiles for each kind of call
]


def _name(chosen: tuple[int, str]) -> str:
    return f"{chosen[0]}-{CASES[chosen[0]].name}-{chosen[1]}"


@pytest.fixture(scope="module")
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: this PyTorch has no CUDA, or there is no driver")
    return torch.device("cuda")


@pytest.fixture(scope="module")
def native_on(device: torch.device) -> torch.device:
    if "cuda" not in ops.native_devices():
        pytest.skip("the extension has no CUDA kernels: FASTKD_CUDA=1 python setup.py build_ext --inplace")
    return device


@pytest.mark.parametrize("chosen", TABLE, ids=_name)
def test_native(chosen: tuple[int, str], native_on: torch.device) -> None:
    """Every option at once; in place too where the layout allows it, in half of the tests."""
    index, divergence = chosen
    problem = problem_of(index, divergence, True)
    inplace = LAYOUTS[CASES[index].layout].inplace and (index + DIVERGENCES.index(divergence)) % 4 == 0
    problem.check(run_on(problem, native_on, backend="native", inplace=inplace))
    if index % 4 == 0:
        alone = problem_of(index, divergence, False)
        alone.check(run_on(alone, native_on, backend="native"))


@pytest.mark.parametrize("chosen", FEW, ids=_name)
def test_triton(chosen: tuple[int, str], device: torch.device) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    problem = problem_of(*chosen, True)
    problem.check(run_on(problem, device, backend="triton"))


SHARDED = [case for case in shard_cases.cases(4).values() if case.backend == "native"]


@pytest.mark.parametrize("case", SHARDED, ids=lambda case: case.name)
def test_native_shards(case: shard_cases.ShardCase, native_on: torch.device) -> None:
    """Four ranks' columns, one after the other on one device."""
    shards = shard_cases.shards(case.plan, case.inputs.vocab, 4)
    shard_cases.assert_whole(case, run_ranks(lambda rank: shard_cases.run_rank(case, rank, 4, "cuda"), shards))


@pytest.mark.parametrize("logits_dtype", [FP32, BF16])
def test_linear_waits_for_nothing(logits_dtype: torch.dtype, native_on: torch.device) -> None:
    """60 % of the rows are ignored; from sm_90 on the products of bf16 logits read the number of the others there."""
    case = linear_cases.Case(rows=450, hidden=64, teacher_hidden=96, vocab=3001, dtype=BF16, ignored=0.6, bias=False)
    problem, upstream = linear_cases.make_problem(case), torch.linspace(-1, 2, 450)
    there = lambda x: None if x is None else x.detach().to(native_on)  # noqa: E731
    student, teacher = ([there(x) for x in model] for model in (problem.student, problem.teacher))
    for x in student[:2]:
        x.requires_grad_()
    moved = linear_cases.Problem(tuple(student), tuple(teacher), there(problem.labels))
    options = {"temperature": 2.0, "ce_weight": 0.5, "reduction": "none"}
    keywords = {"chunk_size": 128, "logits_dtype": logits_dtype, "backend": "native", **options}
    up = upstream.to(native_on)
    linear_cases.run(moved, up, **keywords)  # what is loaded, or tuned, in the first call
    torch.cuda.set_sync_debug_mode("error")
    try:
        outcome = linear_cases.run(moved, up, **keywords)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    outcome = linear_cases.Outcome(outcome.loss.cpu(), tuple(g.cpu() for g in outcome.gradients), None)
    linear_cases.assert_right(problem, outcome, upstream, **options)
