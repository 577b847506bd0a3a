"""The CUDA kernels with a sparse teacher as shipped, run on the CPU by the machine of tests/simt: numbers against the
reference, every way of launching, exact bytes, values that no teacher may have."""

from __future__ import annotations

import pytest
import simt_backend
import torch
from inputs import BF16, FP16, FP32, LAYOUTS, Case
from sparse_cases import SPARSE_CASES, SparseCase, SparseInputs
from test_cuda_kernels import LAUNCHES
from test_cuda_launches import WAYS, edges_of, moved
from test_sparse import COMBINATIONS, Problem, problem_of

import fastkd
from fastkd import TopKTeacher

OTHERS = list(LAUNCHES.values())[1:]
# Every case with three of the thirteen combinations, each combination with ten cases; the options alternate.
TABLE = [
    (index, *combination, place % 2 == 1)
    for index in range(len(SPARSE_CASES))
    for place, combination in enumerate(COMBINATIONS)
    if (3 * index + place) % 13 < 3
]


@pytest.fixture(autouse=True)
def _needs_native(native: str) -> None:
    """The operators' schemas and the packing of arguments are those of the extension."""


def check(problem: Problem, launch: dict, **overrides) -> None:
    with simt_backend.native_on_simt(**launch):
        problem.check(problem.run(backend="native", **overrides))


@pytest.mark.parametrize("chosen", TABLE, ids=lambda c: f"{c[0]}-{SPARSE_CASES[c[0]].name}-{c[1]}-{c[2]}")
def test_table(chosen: tuple) -> None:
    """As planned for a small GPU, and launched in another way, there in place where the layout allows it."""
    problem, place = problem_of(*chosen), TABLE.index(chosen)
    check(problem, {**LAUNCHES["planned"], "seed": place})
    if problem.case.vocab < 5000:
        inplace = place % 2 == 0 and LAYOUTS[problem.case.layout].inplace
        check(problem, {**OTHERS[place % len(OTHERS)], "seed": place}, inplace=inplace)


@pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES)
@pytest.mark.parametrize("tail,divergence", [("bucket", "jsd"), ("sampled", "forward_kl")])
def test_schedules(tail: str, divergence: str, launch: dict) -> None:
    """Six schedules: right, and the same bits."""
    case = Case("schedules", lead=(2,), vocab=1031, student_dtype=BF16, regime="late_top")
    problem = Problem(SparseCase(case, 40), tail, divergence, True)
    first = None
    for seed in range(6):
        with simt_backend.native_on_simt(**launch, seed=seed):
            outcome = problem.run(backend="native", inplace=seed % 2 == 1)
        problem.check(outcome)
        bits = torch.cat([outcome.loss.view(-1), outcome.gradient.float().view(-1), *map(torch.flatten, outcome.stats)])
        first = bits if first is None else first
        assert torch.equal(bits.nan_to_num(7.0), first.nan_to_num(7.0))


@pytest.mark.parametrize("launch", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
def test_every_option(dtype: torch.dtype, launch: dict) -> None:
    """A softcap, which no case of the table has, and a temperature a row, over rows that share no boundary."""
    case = Case("options", lead=(3, 4), vocab=301, student_dtype=dtype, layout="shifted",
                options={"student_softcap": 5.0})  # fmt: skip
    problem = Problem(SparseCase(case, 30), "bucket", "symmetric_kl", True)
    check(problem, {**launch, "seed": 3})
    check(problem, {**launch, "seed": 4}, inplace=True)
    rows = Problem(SparseCase(case, 30), "renormalize", "forward_kl", False)
    rows.options["temperature"] = 0.5 + torch.rand(3, 4)
    with simt_backend.native_on_simt(**launch, seed=5):
        outcome = rows.run(backend="native")
    eager = rows.run(backend="eager")
    torch.testing.assert_close(outcome.loss, eager.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outcome.gradient, eager.gradient, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("vocab", [2048, 2051])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("launch", WAYS.values(), ids=WAYS)
def test_bytes(launch: dict, dtype: torch.dtype, vocab: int, inplace: bool) -> None:
    """Of the student, a row: V + K + 1 read where it is resident (each logit, the named ones again, the label's), its
    edges once more for the gradient, 2 V + K + 1 where it is streamed; V + K written. 2.1 N V at the most for a
    resident row of a size that matters."""
    rows, k, size = 3, 20, dtype.itemsize
    case = SparseCase(Case("bytes", lead=(rows,), vocab=vocab, student_dtype=dtype, temperature=2.0), k)
    inputs = SparseInputs(case, "bucket")
    labels = torch.full((rows,), vocab - 1)
    student = inputs.inputs.student.clone().requires_grad_()
    with simt_backend.native_on_simt(**launch, seed=5) as machine:
        logits = student.clone() if inplace else student
        fastkd.sparse_kd_loss(logits, inputs.teacher, labels, divergence="jsd", ce_weight=1.0, temperature=2.0,
                              inplace=inplace, backend="native")  # fmt: skip
        launches, plan = machine.launches(), machine.plan()
    edges = sum(edges_of(row, vocab, 16 // size) for row in range(rows))
    streamed = plan["variant"] == "streaming"
    read = rows * (vocab * (2 if streamed else 1) + k + 1) + (0 if streamed else edges)
    written = rows * (vocab + k)
    counted = moved(launches, "bytes_read", "bytes_written", "wide_reads", "wide_writes")
    to = "student" if inplace else "gradient"
    assert counted["student bytes_read"] == read * size
    assert counted[f"{to} bytes_written"] == written * size
    wide = (rows * vocab - edges) // (16 // size)
    assert counted["student wide_reads"] == wide * (2 if streamed else 1)
    assert counted[f"{to} wide_writes"] == wide
    assert streamed or read + written <= 2.1 * rows * vocab


@pytest.mark.parametrize("launch", WAYS.values(), ids=WAYS)
def test_value_alone(launch: dict) -> None:
    """Without a gradient the student is read once, and nothing of N V is written."""
    inputs = SparseInputs(SparseCase(Case("value", lead=(3,), vocab=2048, student_dtype=BF16), 20), "bucket")
    with simt_backend.native_on_simt(**launch, seed=1) as machine:
        value = fastkd.sparse_kd_loss(inputs.inputs.student, inputs.teacher, temperature=2.0, backend="native")
        counted = moved(machine.launches(), "bytes_read", "bytes_written")
    assert counted["student bytes_read"] == 3 * (2048 + 20) * 2
    assert not any(key.startswith(("gradient", "student bytes_written")) for key in counted)
    torch.testing.assert_close(
        value, fastkd.sparse_kd_loss(inputs.inputs.student, inputs.teacher, temperature=2.0, backend="eager")
    )


INF = float("inf")
WRONG = {  # of row 1; row 0 stays as it is
    "id outside": ("bucket", {"ids": [5, 1029]}),
    "far id": ("bucket", {"ids": [5, 2**40]}),
    "negative id": ("bucket", {"ids": [5, -7]}),
    "id twice": ("renormalize", {"ids": [9, 9]}),
    "probability above 1": ("bucket", {"logprobs": [0.1, -5.0]}),
    "sum above 1": ("bucket", {"logprobs": [-0.1, -0.2]}),
    "NaN": ("renormalize", {"logprobs": [-1.0, float("nan")]}),
    "nothing named": ("renormalize", {"ids": [-1, -1], "logprobs": [-INF, -INF]}),
    "no draw": ("sampled", {"logprobs": [-INF, -INF]}),
    "weight": ("sampled", {"weights": [0.5, INF]}),
    "negative weight": ("sampled", {"weights": [0.5, -0.5]}),
}


@pytest.mark.parametrize("launch", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("tail,wrong", WRONG.values(), ids=WRONG)
def test_wrong_row(tail: str, wrong: dict, launch: dict) -> None:
    """Nothing waits for a look at values: the row is NaN, in value and gradient, and no other; as eager has it."""
    good = {"ids": [7, 3], "logprobs": [-1.0, -2.0], "weights": [0.5, 0.5]}
    rows = {name: torch.tensor([good[name], wrong.get(name, good[name])]) for name in good}
    weights = rows["weights"] if tail == "sampled" else None
    teacher = TopKTeacher(rows["ids"], rows["logprobs"], tail, weights=weights)
    student = torch.randn(2, 1029, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with simt_backend.native_on_simt(**launch, seed=7):
        loss = torch.ops.fastkd.simt_sparse_forward(
            student.detach(), teacher.ids, teacher.logprobs, weights, None, None, None, None,
            torch.tensor([0.5, 1, 1, 0, 0, 0, 0, 1.0], dtype=torch.float64), tail, "forward_kl", True, -100, "none",
            False, True,
        )  # fmt: skip
    assert loss[0][1].isnan() and loss[1][1].isnan().any()
    first = TopKTeacher(teacher.ids[:1], teacher.logprobs[:1], tail, weights=None if weights is None else weights[:1])
    expected = fastkd.sparse_kd_loss(student[:1], first, reduction="none", backend="eager")
    torch.testing.assert_close(loss[0][:1], expected.detach())
    torch.testing.assert_close(loss[1][:1], torch.autograd.grad(expected.sum(), student)[0][:1])


@pytest.mark.parametrize("seed,dtype", [(0, FP32), (1, BF16)], ids=["fp32", "bf16"])
def test_full_size(dtype: torch.dtype, seed: int) -> None:
    """128256 columns through the cluster that an H100 would run."""
    case = Case("full size", lead=(2,), vocab=128256, student_dtype=dtype)
    problem = Problem(SparseCase(case, 64), "bucket", "reverse_kl", True)
    check(problem, {"multiprocessors": 8, "seed": seed})
    plan = simt_backend.module().plan()
    assert plan["variant"] == "cluster" and plan["cluster"] >= 4 and plan["threads"] >= 128
