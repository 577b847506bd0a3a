"""The benchmark itself: wrong providers are caught, the memory meter measures, tables fit, blanks have reasons."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="fastkd[bench] is not installed")

from rich.console import Console

import fastkd
from fastkd.bench import jobs, main, measure, providers, report, targets
from fastkd.bench.providers import PROVIDERS, Problem

OURS = ["fastkd", "fastkd-inplace", "fastkd-value"]


@pytest.fixture
def problem() -> Problem:
    return Problem(rows=5, vocab=300, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["naive", *OURS])
def test_right_providers_pass_the_check(name: str, dtype: torch.dtype) -> None:
    assert measure.check(PROVIDERS[name], Problem(5, 300, dtype)) <= measure.MAX_ERROR[dtype]


def test_all_divergences_pass_the_check() -> None:
    for divergence in fastkd.divergence.SPECS:
        measure.check(PROVIDERS["fastkd-inplace"], Problem(3, 100, torch.float32, divergence=divergence))


def _wrong_loss(problem: Problem) -> tuple[torch.Tensor, torch.Tensor | None]:
    loss, gradient = PROVIDERS["naive"].run(problem)
    return loss * 1.001, gradient


def _wrong_column(problem: Problem) -> tuple[torch.Tensor, torch.Tensor | None]:
    loss, gradient = PROVIDERS["naive"].run(problem)
    gradient[-1, -1] += 0.01 * gradient.abs().max()
    return loss, gradient


def _no_number(problem: Problem) -> tuple[torch.Tensor, torch.Tensor | None]:
    loss, gradient = PROVIDERS["naive"].run(problem)
    return loss * float("nan"), gradient


@pytest.mark.parametrize("run", [_wrong_loss, _wrong_column, _no_number])
def test_planted_wrong_provider_is_caught(problem: Problem, run) -> None:
    with pytest.raises(measure.WrongResult, match="planted: error"):
        measure.check(replace(PROVIDERS["naive"], name="planted", run=run), problem)


def test_inplace_provider_returns_the_logits_memory(problem: Problem) -> None:
    provider = PROVIDERS["fastkd-inplace"]
    provider.prepare(problem)
    before = problem.student_logits.detach().clone()
    _, gradient = provider.run(problem)
    assert gradient.data_ptr() == providers._inplace_logits[id(problem)].data_ptr()
    assert torch.equal(problem.student_logits.detach(), before)


METER = """
import json, sys, torch
from fastkd.bench.measure import peak_extra_bytes
size = int(sys.argv[1])
keep = []
one = peak_extra_bytes(lambda: keep.append(torch.ones(size // 4)))
freed = peak_extra_bytes(lambda: torch.ones(size // 4).sum())
none = peak_extra_bytes(lambda: keep[0].add_(1))
print(json.dumps([one, freed, none]))
"""


def test_memory_meter_measures_known_allocations() -> None:
    size = 200 << 20
    done = subprocess.run([sys.executable, "-c", METER, str(size)], capture_output=True, text=True, check=True)
    kept, freed, none = (value / size for value in json.loads(done.stdout))
    assert 0.98 <= kept <= 1.1  # what stays counts
    assert 0.98 <= freed <= 1.1  # and what was freed again before the end
    assert none <= 0.05


def test_a_provider_that_cannot_run_is_a_blank_with_a_reason() -> None:
    job = jobs.Job(4, 50, "float32", ["copy", "liger", "fastkd"], threads=1, rounds=2, memory=False)
    results = {result["provider"]: result for result in jobs.run_job(job, lambda what: None)}
    assert "p50" not in results["liger"] and results["liger"]["missing"]
    assert results["fastkd"]["p20"] <= results["fastkd"]["p50"] <= results["fastkd"]["p80"]
    assert results["liger"]["missing"].split()[0] in _printed(list(results.values()))


def _printed(results: list[report.Result]) -> str:
    text = io.StringIO()
    console = Console(file=text, width=report.WIDTH)
    for table in report.tables(results):
        console.print(table)
    return text.getvalue()


def test_command_writes_tables_csv_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--rows", "6", "--vocab", "400", "--dtype", "float32", "--rounds", "2", "--threads", "1"]
    assert main([*arguments, "--providers", "copy", "naive", *OURS, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines()) <= report.WIDTH
    assert "times naive" not in printed  # those targets are for 256 x 128256
    with (tmp_path / "bench.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["provider"] for row in rows] == ["copy", "naive", *OURS]
    assert list(rows[0]) == list(report.COLUMNS)
    for row in rows:
        assert row["cpu"] and row["isa"] == fastkd.ops.cpu_isa() and row["torch"] == torch.__version__
        assert 0 < float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])
        assert float(row["bytes"]) == PROVIDERS[row["provider"]].moves * 6 * 400 * 4
    assert (tmp_path / "bench.png").stat().st_size > 10_000


def test_a_wrong_result_is_not_timed_and_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"provider": "fastkd", "wrong": "fastkd: error 1 against fp64", "rows": 1, "vocab": 2, "dtype": "float32"}
    fields = {"divergence": "forward_kl", "threads": 1, "cold": True}
    monkeypatch.setattr("fastkd.bench._run", lambda jobs: [{**wrong, **fields}])
    assert main(["--out", str(tmp_path)]) == 1
    assert not (tmp_path / "bench.png").exists()


def test_targets_read_the_run() -> None:
    common = {"rows": 256, "vocab": 128256, "dtype": "float32", "divergence": "forward_kl", "threads": 2, "cold": True}
    times = {"copy": 0.01, "naive": 1.0, "fastkd": 0.05, "fastkd-inplace": 0.02}
    results = [
        {**common, "provider": name, "p20": t, "p50": t, "p80": t, "moves": PROVIDERS[name].moves}
        for name, t in times.items()
    ]
    report.add_rates(results)
    by_name = {target.what: target for target in targets.all_targets()}
    fresh = by_name["float32: times naive, fresh gradient"]
    assert fresh.measure(results) == pytest.approx(20) and not fresh.met(20)
    share = by_name["float32: share of copy bandwidth, in place"]
    assert share.measure(results) == pytest.approx(0.75) and share.met(0.75)
    assert by_name["bfloat16: times naive, in place"].measure(results) is None
