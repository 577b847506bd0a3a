"""Whatever the user can get wrong is refused before the first step, by a message that says what is allowed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from trainer_tiny import make_config, make_model, make_tokenizer, make_world

from fastkd.trainer import main, preflight, train
from fastkd.trainer.config import to_dict
from fastkd.trainer.train import distill


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = make_world(tmp_path_factory.mktemp("world"))
    (world / "short.txt").write_text("the loss")
    (world / "empty.txt").write_text("")
    (world / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (world / "broken.jsonl").write_text('{"text": "a"}\n{"text": ')
    (world / "other.jsonl").write_text('{"body": "a"}\n')
    (world / "folder").mkdir()
    make_model(world / "wide", blocks=2, vocab_size=320)
    make_model(world / "narrow", blocks=2, vocab_size=200)
    make_model(world / "renamed", blocks=2)
    make_tokenizer(world / "renamed", corpus="quite other words make quite other tokens " * 50)
    make_model(world / "recut", blocks=2)
    tokens = json.loads((world / "teacher" / "tokenizer.json").read_text())
    tokens["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True}, tokens["pre_tokenizer"]]}  # fmt: skip
    tokens["model"]["merges"] = tokens["model"]["merges"][:5]
    shutil.copy(world / "teacher" / "tokenizer_config.json", world / "recut")
    (world / "recut" / "tokenizer.json").write_text(json.dumps(tokens))
    (world / "unknown").mkdir()
    (world / "unknown" / "config.json").write_text('{"model_type": "no-such-model"}')
    return world


SOURCE = {"student__keep_blocks": None}
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "no teacher": ({"teacher__path": "W/none"}, r"teacher.path='.*none' does not exist; allowed: a folder with config"),
    "teacher is text": ({"teacher__path": "W/train.txt"}, r"is not a .gguf file"),
    "teacher is empty": ({"teacher__path": "W/folder"}, r"has no config.json"),
    "teacher has no tokenizer": ({"teacher__path": "W/narrow"}, r"has no tokenizer"),
    "no training file": ({"data__train": "W/none.txt"}, r"data.train: '.*none.txt' does not exist"),
    "no evaluation file": ({"data__eval": ["W/eval.txt", "W/*.md"]}, r"data.eval: '.*\*.md' .* matches no file"),
    "not a saved dataset": ({"data__train": "W/folder"}, r"was not written by datasets.save_to_disk"),
    "not UTF-8": ({"data__train": "W/latin.txt"}, r"data.train: .* is not UTF-8"),
    "broken jsonl": ({"data__train": "W/broken.jsonl"}, r"broken.jsonl' is not jsonl"),
    "no such field": ({"data__train": "W/other.jsonl"}, r"has no 'text'; data.text_field allows \['body'\]"),
    "too short": ({"data__train": "W/short.txt"}, r"data.train is too short for one row of data.seq_len=32"),
    "empty": ({"data__eval": "W/empty.txt"}, r"data.eval is too short for one row"),
    "less than a step": ({"optim__rows_per_batch": 500}, r"gives \d+ rows of 32 tokens and one step takes 1000"),
    "no student": (SOURCE, r"exactly one of student.path, student.config, student.keep_blocks .* got none"),
    "two students": ({"student__path": "W/wide"}, r"got student.path='.*wide', student.keep_blocks=4"),
    "no such student": ({**SOURCE, "student__path": "W/none"}, r"student.path='.*none' does not exist"),
    "no configuration": ({**SOURCE, "student__config": "W/none"}, r"student.config='.*none' does not exist"),
    "unknown type": ({**SOURCE, "student__config": "W/unknown"}, r"student.config=.* is no configuration that"),
    "too deep": ({"student__keep_blocks": 6}, r"student.keep_blocks=6; allowed: 3 to 5 for a teacher of 6 blocks"),
    "wider head": ({**SOURCE, "student__path": "W/wide"}, r"head has 320 columns and the teacher's 300"),
    "narrow head": (
        {**SOURCE, "student__path": "W/narrow", "loss__vocab": "truncate"},
        r"ids up to 299 .* 200 columns",
    ),
    "other tokens": (
        {**SOURCE, "student__path": "W/renamed"},
        r"different tokenizers: 300 and 281 tokens, \d+ of them",
    ),
    "other merges": ({**SOURCE, "student__path": "W/recut"}, r"same tokens but cut text differently"),
    "temperature": ({"loss__temperature": -1.0}, r"temperature"),
    "divergence": ({"loss__divergence": "kl"}, r"divergence='kl'.*forward_kl"),
    "no loss": ({"loss__kd_weight": 0.0, "loss__ce_weight": 0.0}, r"leave nothing to learn"),
    "learning rate": ({"optim__lr": 0.0}, r"optim.lr=0.0; allowed: a positive number"),
    "warm-up": ({"optim__warmup_ratio": 1.5}, r"optim.warmup_ratio=1.5; allowed: 0 <= warmup_ratio < 1"),
    "row length": ({"data__seq_len": 1}, r"data.seq_len=1; allowed: at least 2"),
    "accumulation": ({"optim__accumulation": 0}, r"optim.accumulation=0; allowed: at least 1"),
    "schedule": ({"optim__schedule": "zigzag"}, r"optim.schedule='zigzag'"),
    "schedule that looks back": (
        {"optim__schedule": "reduce_lr_on_plateau", "optim__schedule_options": {}},
        r"optim.schedule='reduce_lr_on_plateau'; allowed: a schedule that depends on the step alone",
    ),
    "best of nothing": ({"data__eval": [], "select": "best"}, r"select='best' needs held-out text"),
    "output is a file": ({"output_dir": "W/train.txt"}, r"output_dir='.*train.txt' is a file"),
    "precision": ({"precision": "fp8"}, r"precision='fp8'; allowed: auto, fp32, bf16, fp16"),
}


def place(value: Any, world: Path) -> Any:
    """``W/`` stands for the folder of the tiny world."""
    if isinstance(value, list):
        return [place(v, world) for v in value]
    return value.replace("W/", f"{world}/") if isinstance(value, str) else value


@pytest.mark.parametrize("case", CASES)
def test_refused_before_the_first_step(world: Path, tmp_path: Path, monkeypatch, case: str) -> None:
    changes, message = CASES[case]
    monkeypatch.setattr(train, "train_step", lambda *_: pytest.fail("a step was taken"))
    config = make_config(world, tmp_path / "out", **{k: place(v, world) for k, v in changes.items()})
    with pytest.raises(ValueError, match=message):
        distill(config)
    assert not (tmp_path / "out" / "config.yaml").exists(), "a refused run must not look like one to resume"


def test_a_folder_with_a_run_is_not_written_over(world: Path, tmp_path: Path) -> None:
    distill(make_config(world, tmp_path / "out", optim__max_steps=1))
    with pytest.raises(ValueError, match=r"holds a run already; allowed: --resume true, or another folder"):
        distill(make_config(world, tmp_path / "out", optim__max_steps=1))


def test_full_disk(world: Path, tmp_path: Path, monkeypatch) -> None:
    """The prediction covers what a run writes without being far above it, and one byte less than it is refused."""
    changes = {"select": "best", "checkpoint_every": 4, "keep_checkpoints": 2, "teacher__cache_hidden": True}
    sizes = []
    real = preflight.predicted_sizes
    monkeypatch.setattr(preflight, "predicted_sizes", lambda *a: sizes.append(real(*a)) or sizes[-1])
    out = distill(make_config(world, tmp_path / "a", **changes)).student_path.parent
    written = {name: folder_size(out / name) for name in ("checkpoints", "student")}
    (predicted,) = sizes
    cached = sum(f.stat().st_size for f in (out / "teacher_hidden").glob("*.safetensors"))
    assert cached <= predicted["teacher's hidden states"] < cached + 40_000  # at most 1000 bytes of header a shard
    assert predicted["final student"] <= written["student"] < predicted["final student"] + 100_000
    # Two whole ones are left and a third is being written at the worst moment.
    assert written["checkpoints"] < predicted["checkpoints"] < 1.6 * written["checkpoints"]

    usage, needed = shutil.disk_usage(tmp_path), sum(predicted.values())
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(ValueError, match=r"MB free and the run needs .* MB more \(checkpoints .* final student"):
        distill(make_config(world, tmp_path / "b", **changes))
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage._replace(free=needed))
    distill(make_config(world, tmp_path / "b", **changes))


def folder_size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def test_output_that_cannot_be_made(world: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output_dir='.*' cannot be written"):
        distill(make_config(world, tmp_path / "file" / "out"))


def test_command_line_explains_on_one_line_and_returns_1(world: Path, tmp_path: Path, capsys) -> None:
    config = to_dict(make_config(world, tmp_path / "out", teacher__path=str(world / "none")))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    assert main(["--config", str(tmp_path / "c.yaml")]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert error.startswith("fastkd distill: teacher.path=") and "Traceback" not in error


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"epochs": 3}, "epochs"),
        ({"optim": {"learning_rate": 1e-3}}, "learning_rate"),
        ({"optim": {"lr": "fast"}}, "optim.lr"),
        ({"precision": "fp8"}, "precision"),
    ],
)
def test_unknown_keys_and_wrong_types_in_the_file(world: Path, tmp_path: Path, capsys, extra, message) -> None:
    config = to_dict(make_config(world, tmp_path / "out"))
    for key, value in extra.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as ended:
        main(["--config", str(tmp_path / "c.yaml")])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_unknown_flag(world: Path, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--teacher.path", "x", "--data.train", "y", "--output_dir", "z", "--optim.learning_rate", "1"])
    assert ended.value.code == 2 and "learning_rate" in capsys.readouterr().err
