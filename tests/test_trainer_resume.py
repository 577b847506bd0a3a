"""A run that is killed and resumed ends with the very bits of a run that was not."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trainer_kill import finish, start
from trainer_tiny import make_config, make_world

from fastkd.trainer.metrics import read_metrics
from fastkd.trainer.train import distill

TIMES = {"tokens_per_s"}  # of a metrics line; they are measured, not computed


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def uninterrupted(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A whole run, and how many durable operations it made."""
    folder = tmp_path_factory.mktemp("whole")
    child = start(world, folder / "out", count_file=folder / "operations")
    child.join(60)
    assert child.exitcode == 0
    return folder / "out", int((folder / "operations").read_text())


def everything(out: Path) -> dict[str, object]:
    """What two runs must have in common: the student's and the last checkpoint's bytes, and the metrics."""
    state: dict[str, object] = {
        str(f.relative_to(out)): f.read_bytes()
        for f in [*out.glob("student/*"), *out.glob("checkpoints/*/*")]
        if f.suffix != ".png"
    }
    lines = [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(out / "metrics.jsonl")]
    return {**state, "metrics": lines}


def assert_same(out: Path, reference: Path) -> None:
    ours, theirs = everything(out), everything(reference)
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if ours[name] != theirs[name]] == []
    assert "student/model.safetensors" in theirs
    assert not list(out.rglob(".part-*"))


def test_two_whole_runs_are_the_same(world: Path, uninterrupted: tuple[Path, int], tmp_path: Path) -> None:
    finish(world, tmp_path / "out")
    assert_same(tmp_path / "out", uninterrupted[0])
    finish(world, tmp_path / "out")  # resumed when nothing is left to do
    assert_same(tmp_path / "out", uninterrupted[0])


@pytest.mark.parametrize("part", range(20))
def test_killed_between_durable_operations(
    world: Path, uninterrupted: tuple[Path, int], tmp_path: Path, part: int
) -> None:
    """Twenty moments spread over every fsync and rename of a run: configuration, cache, checkpoints, best, final."""
    reference, operations = uninterrupted
    assert operations > 24
    child = start(world, tmp_path / "out", die_at=1 + part * (operations - 1) // 19)
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    finish(world, tmp_path / "out")
    assert_same(tmp_path / "out", reference)


@pytest.mark.parametrize("file", [1, 5, 9])  # model of the first, optimizer of the second, rng of the third checkpoint
def test_killed_in_the_middle_of_a_checkpoint_file(
    world: Path, uninterrupted: tuple[Path, int], tmp_path: Path, file: int
) -> None:
    child = start(world, tmp_path / "out", tear_at=file)
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert list((tmp_path / "out" / "checkpoints").glob(".part-*"))
    finish(world, tmp_path / "out")
    assert_same(tmp_path / "out", uninterrupted[0])


def test_killed_from_outside_during_a_step(world: Path, uninterrupted: tuple[Path, int], tmp_path: Path) -> None:
    child = start(world, tmp_path / "out")
    deadline = time.monotonic() + 60
    while not any(line["step"] >= 3 for line in read_metrics(tmp_path / "out" / "metrics.jsonl")):
        assert time.monotonic() < deadline and child.is_alive()
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    child.join(60)
    finish(world, tmp_path / "out")
    assert_same(tmp_path / "out", uninterrupted[0])


def test_dropout_draws_on_where_it_stopped(world: Path, tmp_path: Path) -> None:
    """The generator's state is restored: with dropout a resumed run differs as soon as one number does."""
    settings = {
        "student__keep_blocks": None,
        "student__config": str(world / "dropout"),
        "eval_every": 0,
        "data__eval": [],
    }
    teacher = json.loads((world / "teacher" / "config.json").read_text())
    (world / "dropout").mkdir()
    (world / "dropout" / "config.json").write_text(json.dumps({**teacher, "attention_dropout": 0.3}))
    whole = distill(make_config(world, tmp_path / "whole", **settings))
    half = make_config(world, tmp_path / "half", **settings)
    interrupt_after(half, 7)
    half.resume = True
    torch.manual_seed(1234)  # what the process did before must not matter
    resumed = distill(half)
    ours, theirs = (load_file(o.student_path / "model.safetensors") for o in (resumed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def interrupt_after(config, step: int) -> None:
    """Run until ``step`` and raise there, as Ctrl-C does."""
    from fastkd.trainer import train

    real = train.train_step

    def step_or_stop(run, number, logged):
        if number > step:
            raise KeyboardInterrupt
        return real(run, number, logged)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "train_step", step_or_stop)
        distill(config)


def test_resume_with_other_settings_is_refused(world: Path, tmp_path: Path) -> None:
    distill(make_config(world, tmp_path / "out", optim__max_steps=3))
    with pytest.raises(ValueError, match=r"differing: optim.lr: 0.002 -> 0.001"):
        distill(make_config(world, tmp_path / "out", optim__max_steps=3, optim__lr=1e-3, resume=True))


def test_damaged_checkpoint_is_named(world: Path, tmp_path: Path) -> None:
    distill(make_config(world, tmp_path / "out", optim__max_steps=3))
    file = tmp_path / "out" / "checkpoints" / "step-00000003" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"step-00000003 is damaged .* remove that folder"):
        distill(make_config(world, tmp_path / "out", optim__max_steps=3, resume=True))
