"""The preset linear of ``fastkd bench``: its check, its figures, its command."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest
import torch

from fastkd.bench import linear_jobs, linear_worker, main
from fastkd.bench.check import WrongResult
from fastkd.bench.linear_providers import PROVIDERS, LinearProblem


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["naive", "fastkd"])
def test_right_providers_pass_and_wrong_ones_do_not(name: str, dtype: torch.dtype) -> None:
    problem = LinearProblem(40, 16, 24, 500, dtype).part(20)
    expected = linear_worker.reference(problem)
    right = PROVIDERS[name]
    assert linear_worker.check(right, problem, expected) > 0

    def one_row_missing(p: LinearProblem) -> torch.Tensor:
        loss = right.run(p)
        p.student[0].grad[3] = 0
        return loss

    def half_the_weight(p: LinearProblem) -> torch.Tensor:
        loss = right.run(p)
        p.student[1].grad[250:] *= 0.5
        return loss

    wrong_loss = lambda p: 1.2 * right.run(p)  # noqa: E731
    for run in (one_row_missing, half_the_weight, wrong_loss, lambda p: torch.tensor(1.0)):
        with pytest.raises(WrongResult):
            linear_worker.check(dataclasses.replace(right, run=run), problem, expected)


def test_products_are_the_four_of_the_task() -> None:
    problem = LinearProblem(40, 16, 24, 500, torch.float32)
    products = PROVIDERS["products"]
    products.prepare(problem)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        products.run(problem)
    counts = {e.key: e.count for e in profile.key_averages()}
    assert counts["aten::mm"] == 3 and counts["aten::addmm_"] == 1
    weight_gradient, once = problem.buffers[2], problem.buffers[0].t() @ problem.student[0].detach()
    torch.testing.assert_close(weight_gradient, once)


def test_ignored_rows_are_about_as_many_as_said() -> None:
    problem = LinearProblem(2000, 2, 2, 5, torch.float32)
    assert abs(float((problem.some_labels == -100).float().mean()) - 0.7) < 0.05


def _results(**fields) -> list[dict]:
    shape = {"preset": "linear", "rows": 4096, "hidden": 576, "teacher_hidden": 576, "vocab": 49152, "threads": 2}
    figures = {"products": (1.0, -1e6), "naive": (3.0, 2e9), "fastkd": (1.05, 1e8), "fastkd-ignored": (0.3, 9e7)}
    return [
        {**shape, "dtype": "float32", "temperature": 2.0, "provider": name, "p20": p50, "p50": p50, "p80": p50,
         "extra": extra, "peak": extra, **fields}
        for name, (p50, extra) in figures.items()
    ]  # fmt: skip


def test_targets_read_the_run() -> None:
    results = _results()
    targets = linear_jobs.all_targets(results)
    assert [target.met(target.measure(results)) for target in targets] == [True] * 5
    values = [target.measure(results) for target in targets]
    assert values == pytest.approx([1.05, 3 / 1.05, 0.05, 100, 0.3 / 1.05])
    assert all(target.measure(_results(threads=1)) is None for target in targets)
    without_naive = [r for r in results if r["provider"] != "naive"]
    assert [t.measure(without_naive) is None for t in targets] == [False, True, True, False, False]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--preset linear --tokens 48 --heads 576/576x49152 --dtype bfloat16 --rounds 2 --threads 2 --out"
    assert main([*arguments.split(), str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "48 tokens, H 576/576, V 49152, bfloat16" in printed and max(map(len, printed.splitlines())) <= 100
    with (tmp_path / "bench.csv").open() as file:
        rows = {row["provider"]: row for row in csv.DictReader(file)}
    assert set(rows) == set(linear_jobs.LINEAR)
    assert all(float(row["p50"]) > 0 and row["hidden"] == "576" and row["peak"] for row in rows.values())
    assert 0 < float(rows["fastkd"]["error"]) < 5e-2
