"""kd_loss over a vocabulary that lies on several processes: values, bits, bytes, errors. 2 and 4 of gloo."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import linear_cases
import pytest
import shard_cases
import shard_dtensors
import shard_linear_dtensors
import torch
from inputs import Outcome, reference_of, run_backend
from reference import DIVERGENCES
from shard_cases import bits_of
from tolerances import assert_close_to_reference

WORLDS = (2, 4)
CASES = {(world, name): case for world in WORLDS for name, case in shard_cases.cases(world).items()}
LINEAR_CASES = shard_cases.linear_shard_cases()


def _results(world: int) -> list[dict[str, Any]]:
    results = _outcome(world)
    assert isinstance(results, list), results
    return results


@cache
def _outcome(world: int) -> list[dict[str, Any]] | str:
    """Of each rank, or what was missing."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).with_name("shard_worker.py")), str(world), folder]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        missing = [rank for rank in range(world) if not (Path(folder) / f"{rank}.pt").exists()]
        if missing:
            return f"no results of ranks {missing} of {world}: {done.stderr[-3000:]}"
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


@pytest.fixture(params=WORLDS, scope="module")
def world(request) -> int:
    return request.param


@pytest.mark.parametrize("world,name", CASES, ids=[f"{world} {name}" for world, name in CASES])
def test_is_the_loss_of_the_whole_vocabulary(world: int, name: str) -> None:
    """Against fp64; the same bits on every rank; padding, which is NaN, unread and with gradient 0."""
    shard_cases.assert_whole(CASES[world, name], [result["cases"][name] for result in _results(world)])


@pytest.mark.parametrize("name", LINEAR_CASES)
def test_linear_is_the_loss_of_the_whole_heads(name: str, world: int) -> None:
    """The gradient of the hidden states is the whole one on every rank, those of the heads are the ranks' rows."""
    case, ranks = LINEAR_CASES[name], [result["cases"][f"linear {name}"] for result in _results(world)]
    problem = linear_cases.make_problem(case.inputs)
    for rank in ranks[1:]:
        assert torch.equal(bits_of(rank["loss"]), bits_of(ranks[0]["loss"]))
        assert torch.equal(bits_of(rank["gradients"][0]), bits_of(ranks[0]["gradients"][0]))
    parts = shard_cases.shards(case.plan, case.inputs.vocab, world)
    whole = [ranks[0]["gradients"][0]]
    for number in range(1, len(ranks[0]["gradients"])):
        rows = []
        for rank, (start, stop) in sorted(enumerate(parts), key=lambda pair: pair[1]):
            gradient = ranks[rank]["gradients"][number]
            assert (gradient[stop - start :] == 0).all()
            rows.append(gradient[: stop - start])
        whole.append(torch.cat(rows))
    if case.frozen:
        problem = problem._replace(student=(problem.student[0], *(x.detach() for x in problem.student[1:])))
        expected = linear_cases.expected_of(problem, **case.options).gradients[0]
        assert len(whole) == 1
        torch.testing.assert_close(whole[0], torch.from_numpy(expected).float(), rtol=1e-5, atol=1e-6)
        return
    outcome = linear_cases.Outcome(ranks[0]["loss"], tuple(whole), None)
    linear_cases.assert_right(problem, outcome, shard_cases.linear_upstream(case), **case.options)


@pytest.mark.parametrize("name", shard_dtensors.CASES)
def test_dtensors_are_taken_as_they_lie(name: str, world: int) -> None:
    """The loss of the whole tensors on every rank; the worker checks that the gradient has the logits' placements."""
    case = shard_dtensors.CASES[name]
    inputs, keywords = shard_dtensors.whole(case)
    options = {k: v for k, v in keywords.items() if k != "return_stats"}
    expected = reference_of(inputs, options)
    eager = run_backend(inputs, {**options, "backend": "eager"}, in_fp32=True)
    for result in _results(world):
        rank = result["cases"][f"DTensor {name}"]
        assert (rank is None) == (len(case.axes) == 2 and world == 2)
        if rank is not None:
            assert_close_to_reference(Outcome(rank["loss"], rank["gradient"], None), expected, eager, roundings=2)


@pytest.mark.parametrize("name", shard_linear_dtensors.CASES)
def test_heads_that_are_dtensors_are_taken_as_they_lie(name: str, world: int) -> None:
    """The loss and the gradients of the whole tensors; the worker checks how the gradients lie."""
    case = shard_linear_dtensors.CASES[name]
    problem, up = linear_cases.make_problem(case.inputs), shard_linear_dtensors.upstream(case)
    for result in _results(world):
        rank = result["cases"][f"linear DTensor {name}"]
        assert (rank is None) == (len(case.axes) == 2 and world == 2)
        if rank is not None:
            linear_cases.assert_right(problem, linear_cases.Outcome(**rank, stats=None), up, **case.options)


REFUSED = {
    "weight Shard(1)": ("TypeError", "student_weight", "Shard(0) in one mesh dimension", "Shard(dim=1)"),
    "weight Partial": ("TypeError", "student_weight", "Replicate", "Partial"),
    "hidden Shard(-1)": ("TypeError", "student_hidden", "Shard of rows", "Shard(dim=1)"),
    "hidden Partial": ("TypeError", "student_hidden", "Shard of rows", "Partial"),
    "rows and vocabulary in one dimension": ("ValueError", "rows or the vocabulary, not both", "student_weight.redist"),
    "another mesh": ("ValueError", "student_weight", "mesh of student_hidden"),
    "bias lies otherwise": ("ValueError", "student_bias", "Shard(dim=0)", "Replicate"),
    "bias of a part": ("TypeError", "student_bias not", "as DTensors"),
    "bias too short": ("ValueError", "student_bias", "V = 12", "(11,)"),
    "hidden of this rank": ("TypeError", "student_weight is a DTensor", "student_hidden not", "[Replicate()]", "FSDP2"),
    "weight of this rank": ("TypeError", "student_hidden is a DTensor", "student_weight not"),
    "head that FSDP2 shards": ("TypeError", "student_weight is a DTensor", "FSDP2", "student_weight.full_tensor()"),
    "only labels": ("TypeError", "labels is a DTensor", "student_hidden and student_weight and student_bias not"),
    "teacher's head lies otherwise": ("ValueError", "teacher_weight", "Shard(dim=0)", "Replicate"),
    "teacher's hidden lies otherwise": ("ValueError", "teacher_hidden", "Shard(dim=0)", "Replicate"),
    "teacher's rows": ("ValueError", "teacher_hidden", "leading dimensions (4,)", "(5, 20)"),
    "teacher's vocabulary": ("ValueError", "teacher_weight", "12 columns as a DTensor", "got 13"),
    "whole head of the teacher": ("ValueError", "teacher_weight", "columns as this rank's part of it", "got 12"),
    "teacher trains": ("ValueError", "teacher_weight must not require grad", "teacher_weight.detach()"),
    "labels lie otherwise": ("ValueError", "labels", "Shard(dim=0)", "Replicate"),
    "labels too short": ("ValueError", "labels", "leading dimensions (4,)", "(3,)"),
}  # fmt: skip


@pytest.mark.parametrize("name", shard_linear_dtensors.WRONG)
def test_heads_that_lie_in_no_way_that_is_meant(name: str, world: int) -> None:
    """Every rank says it by itself: what only some of them saw would leave the others waiting."""
    for rank, result in enumerate(_results(world)):
        (kind, message), (error, *words) = result["refused"][name], REFUSED[name]
        assert kind == error and all(word in message for word in words), f"rank {rank}: {kind} {message}"


FLOATS = {  # a token that each rank sends, in each exchange
    "forward_kl": (5,), "reverse_kl": (5,), "symmetric_kl": (6,), "jsd": (4, 2), "total_variation": (4, 2),
    "skew_forward_kl": (4, 2), "skew_reverse_kl": (4, 2), "everything": (13,),
}  # fmt: skip


@pytest.mark.parametrize("name", FLOATS)
def test_bytes_that_cross(name: str, world: int) -> None:
    """One exchange, or two, of a few numbers a token beside a header of 8 bytes; backward and later calls: no more."""
    for result in _results(world):
        seen = result["traffic"][name]
        sent = [8 + 4 * floats * seen["rows"] for floats in FLOATS[name]]
        assert seen["forward"] == [("_allgather_base_", size, world * size) for size in sent]
        assert seen["backward"] == []


WORDS = {
    "gap": ("ValueError", "gap", "rank 1: ["),
    "overlap": ("ValueError", "overlap", "rank 1: ["),
    "nothing": ("ValueError", "all ranks", "empty"),
    "columns": ("ValueError", "rank 1", "student_logits has", "columns"),
    "rows": ("ValueError", "same rows", "6 on rank 0", "7 on rank 1"),
    "divergence": ("ValueError", "same divergence", "'forward_kl' on rank 0", "'jsd' on rank 1"),
    "temperature": ("ValueError", "same temperature", "1.0 on rank 0", "2.0 on rank 1"),
    "backend": ("ValueError", "same backend", "'native' on rank 0", "'eager' on rank 1"),
    "temperature later": ("RuntimeError", "different arguments", "temperature="),
    "more rows later": ("RuntimeError", "different arguments", "rows="),
    "fewer rows later": ("RuntimeError", "different arguments", "rows="),
    "divergence later": ("RuntimeError", "different arguments", "divergence="),
    "late": ("RuntimeError", "vocab_shard", "timeout"),
}


@pytest.mark.parametrize("name", WORDS)
def test_every_rank_gets_an_error(name: str, world: int) -> None:
    """Within the timeout of the group, and with the reason."""
    import shard_worker

    error, *words = WORDS[name]
    for rank, result in enumerate(_results(world)):
        kind, message, seconds = result["errors"][name]
        assert kind == error, f"rank {rank}: {kind} {message}"
        assert all(word in message for word in words), f"rank {rank}: {message}"
        assert seconds < 3 * shard_worker.TIMEOUT


def test_a_rank_that_gets_too_few_columns_later(world: int) -> None:
    """It knows why; the others know that it differs."""
    for rank, result in enumerate(_results(world)):
        kind, message, _ = result["errors"]["columns later"]
        reason = "student_logits has" if rank == 1 else "different arguments"
        assert (kind == "ValueError") == (rank == 1) and reason in message


def test_a_rank_that_died(world: int) -> None:
    import shard_worker

    for result in _results(world)[:-1]:
        kind, message, seconds = result["errors"]["death"]
        assert kind == "RuntimeError" and "vocab_shard" in message and "a rank has ended" in message
        assert seconds < 3 * shard_worker.TIMEOUT


def test_parts_of_every_plan_are_the_vocabulary() -> None:
    for plan in ("even", "uneven", "last", "first"):
        for world in WORLDS:
            for vocab in (2, 37, 6149):
                columns = [c for part in sorted(shard_cases.shards(plan, vocab, world)) for c in range(*part)]
                assert columns == list(range(vocab)), (plan, world, vocab)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_slopes_are_those_of_the_terms(divergence: str) -> None:
    """The hand-derived dlogq against autograd of the terms, in fp64, masks among them."""
    from fastkd.eager import divergence_slopes, divergence_terms

    g = torch.Generator().manual_seed(1)
    lp, lq = ((3 * torch.randn(4, 30, generator=g, dtype=torch.float64)).log_softmax(-1) for _ in range(2))
    lp[0, :5], lq[0, 3:8], lp[1] = -torch.inf, -torch.inf, lq[1]
    leaf = lq.clone().requires_grad_()
    terms = divergence_terms(divergence, 0.3, lp, leaf)
    (expected,) = torch.autograd.grad(torch.where(terms.isfinite(), terms, 0.0).sum(), leaf)
    defined = terms.isfinite()
    torch.testing.assert_close(divergence_slopes(divergence, 0.3, lp, lq)[defined], expected[defined])
