"""The preset sparse of ``fastkd bench``: its check, its command."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest
import torch

from fastkd.bench import main, sparse_jobs
from fastkd.bench.check import WrongResult, check
from fastkd.bench.sparse_worker import SPARSE_PROVIDERS, SparseProblem, naive_topk_loss, references


def test_wrong_results_are_refused() -> None:
    """The naive loss, the dense one and ours agree with the fp64 reference of theirs; a rest left out does not, nor the
    dense loss taken for the sparse one."""
    problem = SparseProblem(6, 500, torch.float32, k=8)
    expected = references(problem)
    for name in ("naive", "dense", "fastkd", "fastkd-value"):
        provider = SPARSE_PROVIDERS[name]
        problem.student_logits.grad = None
        assert check(provider, problem, expected(provider), *provider.run(problem)) < 1e-4

    def without_rest(problem: SparseProblem):
        teacher = problem.teacher
        lp = torch.log_softmax(teacher.logprobs, -1)
        changed = dataclasses.replace(teacher, logprobs=lp)
        loss = naive_topk_loss(problem.student_logits, changed, problem.labels, problem.temperature)
        (gradient,) = torch.autograd.grad(loss.nan_to_num(0.0), problem.student_logits)
        return loss.detach().nan_to_num(0.0), gradient

    for run, name in ((without_rest, "naive"), (SPARSE_PROVIDERS["dense"].run, "fastkd")):
        problem.student_logits.grad = None
        provider = dataclasses.replace(SPARSE_PROVIDERS[name], run=run)
        with pytest.raises(WrongResult):
            check(provider, problem, expected(provider), *run(problem))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = "--preset sparse --rows 16 --vocab 3000 --k 8 --dtype bfloat16 --rounds 2 --threads 2 --out"
    assert main([*arguments.split(), str(tmp_path)]) == 0
    with (tmp_path / "bench.csv").open() as file:
        rows = {row["provider"]: row for row in csv.DictReader(file)}
    assert list(rows) == sparse_jobs.PROVIDERS
    assert all(row["k"] == "8" and float(row["p50"]) > 0 for row in rows.values())
    assert all(float(row["error"]) < 0.05 for name, row in rows.items() if name != "copy")
    assert "16 × 3000 bfloat16, K = 8" in capsys.readouterr().out
