"""The benchmark itself: wrong providers are caught, the memory meter measures, tables fit, blanks have reasons."""

from __future__ import annotations

import argparse
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
from fastkd.bench import check, jobs, main, providers, report, tables, targets, worker
from fastkd.bench.providers import PROVIDERS, Problem, Provider

OURS = ["fastkd", "fastkd-first", "fastkd-inplace", "fastkd-value"]


@pytest.fixture
def problem() -> Problem:
    return Problem(rows=5, vocab=300, dtype=torch.float32)


def _error(provider: Provider, problem: Problem) -> float:
    provider.prepare(problem)
    return check.check(provider, problem, check.reference(problem), *provider.run(problem))


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@DTYPES
@pytest.mark.parametrize("name", ["naive", *OURS])
def test_right_providers_pass_the_check(name: str, dtype: torch.dtype) -> None:
    assert _error(PROVIDERS[name], Problem(19, 300, dtype)) <= check.MAX_ERROR[dtype] / 3


def test_all_divergences_pass_the_check() -> None:
    for divergence in fastkd.divergence.SPECS:
        _error(PROVIDERS["fastkd-inplace"], Problem(3, 100, torch.float32, divergence=divergence))


def test_trl_passes_the_check() -> None:
    pytest.importorskip("trl", reason="trl is not installed")
    for divergence in providers.TRL_BETA:
        _error(PROVIDERS["trl"], Problem(9, 100, torch.float32, divergence=divergence))


def _plant(spoil) -> Provider:
    """The naive provider with its loss or gradient spoilt."""

    def run(problem: Problem) -> tuple[torch.Tensor, torch.Tensor | None]:
        loss, gradient = PROVIDERS["naive"].run(problem)
        return spoil(problem, loss, gradient)

    return replace(PROVIDERS["naive"], name="planted", run=run)


def _wrong_loss(problem, loss, gradient):
    return loss * 1.06, gradient


def _no_number(problem, loss, gradient):
    return loss * float("nan"), gradient


def _wrong_last_column(problem, loss, gradient):
    gradient[-1, -1] += 0.1 * gradient[-1].norm()
    return loss, gradient


def _nan_in_the_first_row(problem, loss, gradient):
    gradient[0, 3] = float("nan")
    return loss, gradient


def _without_the_divergence(problem, loss, gradient):
    """Right wherever it is large: the label's column."""
    student = problem.student_logits.detach().requires_grad_()
    torch.nn.functional.cross_entropy(student, problem.labels).backward()
    rows = torch.arange(problem.rows)
    student.grad[rows, problem.labels] = gradient[rows, problem.labels]
    return loss, student.grad


def _half_the_temperature(problem, loss, gradient):
    return loss, PROVIDERS["naive"].run(replace(problem, temperature=problem.temperature / 2))[1]


def _without_labels(problem, loss, gradient):
    gradient[torch.arange(problem.rows), problem.labels] = 0
    return loss, gradient


def _of_fewer_rows(problem, loss, gradient):
    return loss, gradient[:-1]


PLANTED = [
    _wrong_loss, _no_number, _wrong_last_column, _nan_in_the_first_row, _without_the_divergence, _half_the_temperature,
    _without_labels, _of_fewer_rows,
]  # fmt: skip


@DTYPES
@pytest.mark.parametrize("spoil", PLANTED)
def test_planted_wrong_provider_is_caught(spoil, dtype: torch.dtype) -> None:
    problem = Problem(rows=19, vocab=300, dtype=dtype)
    with pytest.raises(check.WrongResult, match="planted: "):
        _error(_plant(spoil), problem)


def test_every_row_counts_in_the_loss() -> None:
    """Also one whose gradient is not compared."""
    problem = Problem(rows=50, vocab=40, dtype=torch.float32)
    expected = check.reference(problem)
    assert 1 not in expected.rows and {0, 49} <= set(expected.rows.tolist())
    problem.student_logits.data[1, problem.labels[1]] -= 1
    with pytest.raises(check.WrongResult, match="planted: error"):
        check.check(_plant(lambda p, *result: result), problem, expected, *PROVIDERS["naive"].run(problem))


def test_inplace_provider_returns_the_logits_memory(problem: Problem) -> None:
    provider = PROVIDERS["fastkd-inplace"]
    provider.prepare(problem)
    before = problem.student_logits.detach().clone()
    _, gradient = provider.run(problem)
    assert gradient.data_ptr() == problem.scratch["logits"].data_ptr()
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


def test_a_provider_frees_what_counts_as_its_memory() -> None:
    """Memory of a whole provider: naive holds several N x V tensors, the value none."""
    common = {"preset": "default", "rows": 64, "vocab": 64000, "dtype": "float32", "threads": 1, "rounds": 1}
    results = jobs.run_job(jobs.Job(providers=["naive", *OURS], **common), lambda what: None)
    report.add_rates(results)
    peak = {result["provider"]: result["peak_nv"] for result in results}
    assert peak["naive"] >= 3
    assert peak["fastkd"] == pytest.approx(1, abs=0.1)  # though what lingers was there already
    assert peak["fastkd-first"] == pytest.approx(1, abs=0.1)
    assert peak["fastkd-inplace"] <= 0.05 and peak["fastkd-value"] <= 0.05


def _printed(results: list[report.Result]) -> str:
    text = io.StringIO()
    console = Console(file=text, width=report.WIDTH)
    for table in tables.all_tables(results):
        console.print(table)
    return text.getvalue()


def test_a_provider_that_cannot_run_is_a_blank_with_a_reason() -> None:
    job = jobs.Job("default", 4, 50, "float32", ["copy", "liger", "fastkd"], threads=1, rounds=2, memory=False)
    results = {result["provider"]: result for result in jobs.run_job(job, lambda what: None)}
    assert "p50" not in results["liger"] and results["liger"]["missing"]
    assert results["fastkd"]["p20"] <= results["fastkd"]["p50"] <= results["fastkd"]["p80"]
    assert f"liger: {results['liger']['missing']}" in _printed(list(results.values()))


def _say_into(messages: list[dict], monkeypatch: pytest.MonkeyPatch, run) -> None:
    monkeypatch.setattr(worker, "say", lambda **message: messages.append(message))
    monkeypatch.setitem(PROVIDERS, "compile", replace(PROVIDERS["compile"], run=run))


def test_a_provider_that_raises_is_a_blank_with_a_reason(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(problem: Problem):
        raise OSError("no C++ compiler\nand a long story")

    messages: list[dict] = []
    _say_into(messages, monkeypatch, run)
    assert [provider.name for provider in worker._usable(worker.DENSE, ["compile", "naive"], problem)] == ["naive"]
    assert {"provider": "compile", "missing": "OSError: no C++ compiler"} in messages


def test_a_wrong_provider_is_not_timed(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[dict] = []
    _say_into(messages, monkeypatch, _plant(_without_labels).run)
    assert [provider.name for provider in worker._usable(worker.DENSE, ["compile", "naive"], problem)] == ["naive"]
    assert [m["provider"] for m in messages if "wrong" in m] == ["compile"]


def test_a_process_that_fails_is_a_wrong_result(capfd: pytest.CaptureFixture[str]) -> None:
    job = jobs.Job("default", 4, 50, "no_such_dtype", ["fastkd"], threads=1, rounds=2, memory=False)
    (result,) = jobs.run_job(job, lambda what: None)
    assert "p50" not in result and "status 1" in result["wrong"]
    assert "no_such_dtype" in capfd.readouterr().err


COMMAND = ["--rows", "6", "--vocab", "400", "--dtype", "float32", "--rounds", "2", "--threads", "1"]


def test_command_writes_tables_csv_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--providers", "copy", "naive", *OURS, "--out", str(tmp_path)]) == 0
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


@pytest.mark.parametrize("preset", ["divergences", "vocab", "grid"])
def test_presets_fit_their_tables(preset: str) -> None:
    """Made-up times of the preset's own jobs: every row of its tables appears, within the width."""
    dtypes = ["float32", "bfloat16"]
    arguments = argparse.Namespace(rows=256, vocab=128256, dtype=dtypes, threads=2, rounds=3, temperature=2.0)
    results = []
    for job in jobs.PRESETS[preset](arguments):
        fields = {key: getattr(job, key) for key in (*report.GROUP, "temperature")}
        results += [{**fields, "provider": p, "p20": 0.1, "p50": 0.12, "p80": 0.2, "moves": 3} for p in job.providers]
    report.add_rates(results)
    printed = _printed(results)
    assert max(len(line) for line in printed.splitlines()) <= report.WIDTH
    assert "…" not in printed
    shown = {str(result["divergence"] if preset == "divergences" else result["vocab"]) for result in results}
    assert all(name in printed for name in shown)
    measured = [target.what for target in targets.all_targets() if target.measure(results) is not None]
    assert measured


def test_the_warm_allocator_is_never_mistaken() -> None:
    arguments = argparse.Namespace(
        rows=8, vocab=64, dtype=["float32"], threads=1, rounds=1, temperature=2.0, divergence="forward_kl"
    )
    for wanted in (None, ["naive-warm"], ["naive", "naive-warm"]):
        arguments.providers = wanted
        for job in jobs.default_jobs(arguments):
            assert ("naive-warm" in job.providers) == bool(job.extra_environment)
    (result,) = jobs.run_job(job, lambda what: None)
    assert result["allocator"] == "warm allocator" and result["p50"] > 0


def test_a_wrong_result_fails_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"provider": "fastkd", "wrong": "fastkd: error 1 against fp64", "rows": 1, "vocab": 2, "dtype": "float32"}
    fields = {"preset": "default", "divergence": "forward_kl", "threads": 1, "cold": True}
    monkeypatch.setattr("fastkd.bench._run", lambda jobs: [{**wrong, **fields}])
    assert main(["--out", str(tmp_path)]) == 1
    assert not (tmp_path / "bench.png").exists()


def test_targets_read_the_run() -> None:
    common = {
        "preset": "default", "rows": 256, "vocab": 128256, "dtype": "float32", "divergence": "forward_kl", "threads": 2,
        "temperature": 2.0,
    }  # fmt: skip
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
    for other in ({"threads": 1}, {"temperature": 1.0}):  # not what the bounds were set for
        assert fresh.measure([{**result, **other} for result in results]) is None
