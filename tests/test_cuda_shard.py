"""The CUDA kernels of a vocabulary shard as shipped, run on the CPU by the machine of tests/simt: all ranks in one
process, numbers against the reference, every way of launching, what is launched and moved."""

from __future__ import annotations

from typing import Any

import pytest
import shard_cases
import simt_backend
import torch
from inputs import BF16, FP16, FP32, Case
from reference import DIVERGENCES
from shard_cases import EVERYTHING, HARD, ShardCase, bits_of
from shard_ranks import run_ranks
from test_cuda_kernels import LAUNCHES
from test_cuda_launches import MIXED, edges_of, moved
from torch._subclasses.fake_tensor import FakeTensorMode

import fastkd
from fastkd import VocabShard, cuda, ops, shard_native, shard_ops
from fastkd.ops import scalars_of
from fastkd.options import Options
from fastkd.shard_eager import Piece, Row

WAYS = {name: launch for name, launch in LAUNCHES.items() if name == "planned" or name.startswith("streaming")}
CASES = [(name, case) for name, case in shard_cases.cases(4).items() if case.backend == "native"]


@pytest.fixture(autouse=True)
def _needs_native(native: str) -> None:
    """The operators' schemas and the packing of arguments are those of the extension."""


def run_case(case: ShardCase, world: int, launch: dict) -> list[dict[str, Any]]:
    shards = shard_cases.shards(case.plan, case.inputs.vocab, world)
    with simt_backend.native_on_simt(**launch):
        return run_ranks(lambda rank: shard_cases.run_rank(case, rank, world), shards)


@pytest.mark.parametrize("index", range(len(CASES)), ids=[name for name, _ in CASES])
def test_table(index: int) -> None:
    """The cases of the CPU's kernels; two or four ranks and the way of launching in turn."""
    case, world = CASES[index][1], (2, 4)[index % 2]
    launch = list(WAYS.values())[index // 2 % len(WAYS)]
    shard_cases.assert_whole(case, run_case(case, world, {**launch, "seed": index}))


@pytest.mark.parametrize("launch", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_schedules(divergence: str, launch: dict) -> None:
    """Six schedules: right, and the same bits; over the logits in three of them."""
    inputs = Case("schedules", lead=(2,), vocab=1031, student_dtype=BF16, teacher_dtype=BF16, regime="late_top")
    first = None
    for seed in range(6):
        options = {"divergence": divergence, **EVERYTHING, "inplace": seed % 2 == 1}
        case = ShardCase(inputs, options, backend="native")
        ranks = run_case(case, 2, {**launch, "seed": seed})
        if seed < 2:
            shard_cases.assert_whole(case, ranks)
        bits = torch.cat([bits_of(x) for rank in ranks for x in (rank["loss"], rank["stats"], rank["gradient"])])
        first = bits if first is None else first
        assert torch.equal(bits, first)


@pytest.mark.parametrize("dtypes", [(FP32, BF16), (FP16, FP32), (FP16, FP16)])
def test_dtypes(dtypes: tuple) -> None:
    """Models stored in different widths, and fp16 with every option, over the logits and beside them."""
    for seed, divergence in enumerate(("skew_forward_kl", "symmetric_kl")):
        inputs = Case("dtypes", lead=(2, 2), vocab=523, student_dtype=dtypes[0], teacher_dtype=dtypes[1])
        case = ShardCase(inputs, {"divergence": divergence, **EVERYTHING, "inplace": seed == 1}, backend="native")
        shard_cases.assert_whole(case, run_case(case, 2, {**WAYS["streaming in 5 parts"], "seed": seed}))


def test_full_size() -> None:
    """Two ranks with half of 128256 columns each, as an H100 would be asked."""
    inputs = Case("full size", lead=(2,), vocab=128256, student_dtype=BF16, teacher_dtype=BF16)
    case = ShardCase(inputs, {**HARD, "divergence": "jsd"}, "even", "native")
    shard_cases.assert_whole(case, run_case(case, 2, {"seed": 3}))
    plan = simt_backend.module().plan()
    assert plan["variant"] == "streaming" and plan["splits"] > 8 and "exchanged" in plan["reason"]


# --- one piece: what is launched, moved and left alone --------------------------------------------------------------

NAMES = {"sums": "{}.sums", "terms": "{}.terms", "gradient": "{}.finish"}


def _piece(dtype: torch.dtype, vocab: int, divergence: str, labels: torch.Tensor, padding: int = 0) -> Piece:
    o = Options(divergence=divergence, ce_weight=0.5, temperature=2.0)
    g = torch.Generator().manual_seed(5)
    student, teacher = (torch.randn(len(labels), vocab + padding, generator=g).to(dtype) for _ in range(2))
    for x in (student, teacher):
        x[:, vocab:] = torch.nan
    owned = labels >= 0
    return Piece(student, teacher, labels, owned, None, scalars_of(o), o, VocabShard(8, 8 + vocab), True)


def _steps(piece: Piece, launch: dict, inplace: bool) -> tuple[dict[str, list[dict]], int, torch.Tensor]:
    """Launches of each step, the parts of a row, the gradient; the piece is the whole vocabulary's."""
    steps, rows = {}, torch.ones(len(piece.student))
    with simt_backend.native_on_simt(**launch, seed=5) as machine:
        parts = shard_ops.registered["native"]
        found = parts.sums(piece)
        steps["sums"] = machine.launches()
        sums = {name: found[number] for number, name in enumerate(shard_native.FIELDS)}
        if piece.options.divergence not in MIXED:
            parts.terms(piece, sums)
            steps["terms"] = machine.launches()
        into = piece.student.clone() if inplace else None
        written = piece._replace(student=into) if into is not None else piece
        gradient = parts.gradient(written, Row(sums, None, rows, rows, rows, 4 * found.shape[1]), into)
        steps["gradient"] = machine.launches()
        return steps, machine.plan()["splits"], gradient


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("dtype,vocab", [(FP32, 2051), (BF16, 2051), (BF16, 2048)])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_launches_and_bytes(divergence: str, dtype: torch.dtype, vocab: int, inplace: bool) -> None:
    """5 N V over all steps, 7 with terms, and the logit at the label, which is asked for four times; a row's numbers
    beside that: nothing else of the logits."""
    rows, size = 3, dtype.itemsize
    piece = _piece(dtype, vocab, divergence, torch.full((rows,), vocab - 1))
    steps, splits, _ = _steps(piece, WAYS["streaming in 5 parts"], inplace)
    kind = "symmetric_kl" if divergence == "reverse_kl" else divergence
    for step, launches in steps.items():
        kernels = [NAMES[step].format(kind)]
        kernels = kernels if step == "sums" else ["shard.spread", *kernels]
        assert [x["kernel"] for x in launches] == kernels + (["shard.gather"] if step != "gradient" else [])
        assert [x["grid"] for x in launches if x["kernel"] == NAMES[step].format(kind)] == [rows * splits]
        counted = moved(launches, "bytes_read", "bytes_written", "wide_reads", "wide_writes")
        wide = (rows * vocab - sum(edges_of(row, vocab, 16 // size) for row in range(rows))) // (16 // size)
        labels = 4 * rows * size if step == "sums" else 0
        assert counted["student bytes_read"] == rows * vocab * size + labels
        assert counted["teacher bytes_read"] == rows * vocab * size
        assert counted["student wide_reads"] == counted["teacher wide_reads"] == wide
        written = {key: value for key, value in counted.items() if key.endswith("bytes_written")}
        written.pop("workspace bytes_written")
        to = "student" if inplace else "gradient"
        expected = {
            "sums": ("sums", 13 * rows * 4),
            "terms": ("sums", 2 * rows * 4),
            "gradient": (to, rows * vocab * size),
        }
        assert written == {f"{expected[step][0]} bytes_written": expected[step][1]}
        assert step != "gradient" or counted[f"{to} wide_writes"] == wide


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_ignored_rows_and_padding_are_left_alone(divergence: str) -> None:
    """Of three rows the middle one counts: a third of the bytes. Padding is written, not read."""
    vocab, labels = 2048, torch.tensor([-1, 5, -1])
    piece = _piece(BF16, vocab, divergence, labels, padding=5)
    steps, _, gradient = _steps(piece, WAYS["streaming in 5 parts"], inplace=False)
    for step, launches in steps.items():
        counted = moved(launches, "bytes_read", "bytes_written")
        assert counted["teacher bytes_read"] == vocab * 2
        assert counted["student bytes_read"] == vocab * 2 + (8 if step == "sums" else 0)
    assert counted["gradient bytes_written"] == 3 * (vocab + 5) * 2
    assert (gradient[labels < 0] == 0).all() and (gradient[:, vocab:] == 0).all() and gradient[1, :vocab].all()


def test_rows_that_no_loss_may_have() -> None:
    """What no host has looked at: the row's scale is NaN then, and so is its gradient; no other row's is."""
    piece = _piece(FP32, 100, "forward_kl", torch.tensor([3, 4, 5]))
    ones = torch.ones(3)
    with simt_backend.native_on_simt(**WAYS["planned"], seed=1):
        parts = shard_ops.registered["native"]
        sums = dict(zip(shard_native.FIELDS, parts.sums(piece)))
        scale = torch.tensor([1.0, torch.nan, 1.0])
        gradient = parts.gradient(piece, Row(sums, None, -ones, ones, scale, 400), None)
    assert gradient[1].isnan().all() and gradient[[0, 2]].isfinite().all()


# --- what the package says ------------------------------------------------------------------------------------------


def test_plan_of_a_shard() -> None:
    """Always swept, whatever would fit; both exchanges cost a read of the columns."""
    for rows, vocab in ((8192, 500), (8192, 16032), (1, 128256)):
        plan = cuda.plan_loss(rows, vocab, cuda.GPUS["h100"], shard=True)
        assert plan.variant == "streaming" and plan.sweeps == 2 and "exchanged" in plan.reason
        assert cuda.plan_loss(rows, vocab, cuda.GPUS["h100"], shard=True, mixed_kl=False).sweeps == 3
    assert cuda.plan_loss(8192, 500, cuda.GPUS["h100"]).variant == "warp"


def test_native_takes_shards_on_every_device_it_is_built_for() -> None:
    assert shard_ops.registered["native"].devices == ops.native_devices()
    assert f"vocab_shard: {', '.join(ops.native_devices())}" in fastkd.backends().reasons["native"]


@pytest.mark.skipif("cuda" not in ops.native_devices(), reason="the extension has no CUDA kernels")
def test_explain_of_a_shard_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of a device that is not here; the plan is that of the rank's columns, whatever padding is behind them."""
    monkeypatch.setattr(cuda, "gpu_of", lambda _: cuda.GPUS["h100"])
    with FakeTensorMode():
        x = torch.empty(3, 32768, device="cuda", dtype=BF16)
        answer = fastkd.explain(x, x, vocab_shard=VocabShard(0, 20000))
        nothing = fastkd.explain(x, x, vocab_shard=VocabShard(7, 7))
    assert answer.backend == nothing.backend == "native"
    plan = cuda.plan_loss(3, 20000, cuda.GPUS["h100"], shard=True)
    assert str(plan) in answer.reasons["native"] and plan.splits > 1
    assert "no column" in nothing.reasons["native"]
