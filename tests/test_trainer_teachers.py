"""fastkd distill with a model, a cache and a server as the teacher: the same loss, the same errors before a step."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_tiny import granite, make_cache
from safetensors.torch import load_file
from test_trainer_resume import interrupt_after
from trainer_tiny import make_config, make_model, make_tokenizer, make_world, text
from transformers import AutoModelForCausalLM

from fastkd.trainer import objective, train
from fastkd.trainer.metrics import read_metrics
from fastkd.trainer.train import distill

V = 300
WHOLE = {"max_train_rows": None, "max_eval_rows": 4}  # rows of make_config


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teacher and text, a student with its tokenizer, and caches of every kind."""
    world = make_world(tmp_path_factory.mktemp("world"))
    make_model(world / "student", blocks=2, seed=9)
    make_tokenizer(world / "student")
    make_cache(world, world / "hidden", **WHOLE)
    make_cache(world, world / "exact", dtype="float32", **WHOLE)
    make_cache(world, world / "all", kind="topk", k=V, **WHOLE)
    make_cache(world, world / "top5", kind="topk", k=5, temperature=2.0, **WHOLE)
    make_cache(world, world / "draws", kind="sampled", k=50, **WHOLE)
    return world


@pytest.fixture(scope="module")
def url(world: Path) -> Iterator[str]:
    """A server that answers as vLLM does, from the teacher."""
    model = AutoModelForCausalLM.from_pretrained(world / "teacher")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, answer = (
                (200, self.answer(asked)) if asked["model"] == "served" else (404, {"error": "no such model"})
            )
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def answer(self, asked: dict) -> dict:
            ids = torch.tensor([asked["prompt"]])
            with torch.no_grad():
                best = model(input_ids=ids).logits[0].log_softmax(-1).topk(min(V, asked["prompt_logprobs"]))
            rows = [
                {str(token): {"logprob": logprob} for token, logprob in zip(*row)}
                for row in zip(best.indices.tolist(), best.values.tolist())
            ]
            for row, token in zip(rows, asked["prompt"][1:]):
                row.setdefault(str(token), {"logprob": -30.0})  # the prompt's own token always comes
            return {"choices": [{"text": "", "prompt_logprobs": [None, *rows[:-1]]}]}

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def run(world: Path, out: Path, **changes: Any) -> list[dict]:
    """Lines of the metrics of a short run."""
    settings = {
        "student__keep_blocks": None, "student__path": str(world / "student"), "teacher__path": None,
        "optim__max_steps": 4, "eval_every": 4, "log_every": 1, **changes,
    }  # fmt: skip
    return read_metrics(distill(make_config(world, out, **settings)).metrics_path)


@pytest.fixture(scope="module")
def dense(world: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """With the model as the teacher."""
    return run(world, tmp_path_factory.mktemp("dense") / "out", teacher__path=str(world / "teacher"))


def assert_same_run(lines: list[dict], dense: list[dict], close: float) -> None:
    assert len(lines) == len(dense) == 6
    for ours, theirs in zip(lines, dense):
        for figure in ("loss", "kd", "ce", "grad_norm", "nll", "kl", "agreement", "teacher_nll"):
            if figure in ours:
                assert ours[figure] == pytest.approx(theirs[figure], rel=close, abs=close / 10), (figure, ours["step"])


@pytest.mark.parametrize(
    "name, close", [("exact", 1e-4), ("hidden", 3e-3), ("all", 1e-4)]
)  # fp32 states; fp16 ones; all 300 log-probabilities
def test_a_cache_gives_the_run_of_its_model(world: Path, tmp_path: Path, dense, monkeypatch, name, close) -> None:
    def no_logits(*_: object) -> None:
        raise AssertionError("the student's logits were made")

    monkeypatch.setattr(objective, "_dense", no_logits)
    lines = run(world, tmp_path / "out", teacher__cache=str(world / name))
    assert_same_run(lines, dense, close)
    assert ("teacher_nll" in lines[0]) == (name != "all")
    assert not (tmp_path / "out" / "teacher_hidden").exists()


def test_a_server_gives_the_run_of_its_model(world: Path, tmp_path: Path, dense, url: str) -> None:
    served = {"teacher__url": url, "teacher__model": "served", "teacher__k": V}
    assert_same_run(run(world, tmp_path / "out", **served), dense, 1e-4)


def test_fewer_columns(world: Path, tmp_path: Path, dense, url: str) -> None:
    """The loss is lower than the dense one (a bucket hides what is in it) but learns; draws are noisy around it."""
    top5 = run(world, tmp_path / "a", teacher__cache=str(world / "top5"), loss__temperature=2.0)
    assert top5[1]["kd"] > 0 and top5[-1]["kl"] < top5[0]["kl"]
    renormalised = {"teacher__tail": "renormalize", "loss__temperature": 3.0}  # any temperature
    assert run(world, tmp_path / "b", teacher__cache=str(world / "top5"), **renormalised)[1]["kd"] > 0
    served = run(world, tmp_path / "c", teacher__url=url, teacher__model="served", teacher__k=5)
    assert 0 < served[1]["kd"] < dense[1]["kd"]
    draws = run(world, tmp_path / "d", teacher__cache=str(world / "draws"))
    assert draws[1]["kd"] == pytest.approx(dense[1]["kd"], rel=0.2) and draws[-1]["nll"] < draws[0]["nll"]


def test_a_student_whose_logits_are_not_its_heads(world: Path, tmp_path: Path) -> None:
    """Its own logits meet the teacher's, made of the cached states, or its K columns."""
    student = {"student__path": str(granite(tmp_path / "granite"))}
    dense = run(world, tmp_path / "a", teacher__path=str(world / "teacher"), **student)
    assert_same_run(run(world, tmp_path / "b", teacher__cache=str(world / "exact"), **student), dense, 1e-4)
    assert_same_run(run(world, tmp_path / "c", teacher__cache=str(world / "all"), **student), dense, 1e-4)


def test_hard_labels_read_the_held_out_rows_alone(world: Path, tmp_path: Path, monkeypatch) -> None:
    asked = set()
    real = train.TeacherSource.teacher

    def teacher(self, progress):
        found = real(self, progress)
        batch = found.batch
        found.batch = lambda split, *rest: (asked.add(split), batch(split, *rest))[1]
        return found

    monkeypatch.setattr(train.TeacherSource, "teacher", teacher)
    changes = {"loss__kd_weight": 0.0, "loss__ce_weight": 1.0, "data__max_train_rows": 20}
    lines = run(world, tmp_path / "out", teacher__cache=str(world / "hidden"), **changes)
    assert asked == {"eval"} and lines[-1]["kl"] > 0


@pytest.mark.parametrize("name", ["hidden", "draws"])
def test_resumed_bit_for_bit(world: Path, tmp_path: Path, name: str) -> None:
    settings = {
        "student__keep_blocks": None, "student__path": str(world / "student"), "optim__max_steps": 8,
        "teacher__path": None, "teacher__cache": str(world / name), "data__eval": [],
    }  # fmt: skip
    whole = distill(make_config(world, tmp_path / "whole", **settings))
    half = make_config(world, tmp_path / "half", **settings)
    interrupt_after(half, 5)  # two steps after the checkpoint of step 3
    half.resume = True
    torch.manual_seed(1234)
    ours, theirs = (load_file(o.student_path / "model.safetensors") for o in (distill(half), whole))
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    start = load_file(world / "student" / "model.safetensors")
    assert not torch.equal(theirs["model.embed_tokens.weight"], start["model.embed_tokens.weight"])


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({}, r"one of teacher.path, teacher.cache and teacher.url; got none"),
    "two": (
        {"teacher__cache": "W/hidden", "teacher__url": "http://a"},
        r"http://a'; allowed: one of them",
    ),
    "no model to prune": (
        {"teacher__cache": "W/hidden", "student__path": None, "student__keep_blocks": 4},
        r"student.keep_blocks prunes the teacher's model; got teacher.path=None",
    ),
    "two caches": ({"teacher__cache": "W/hidden", "teacher__cache_hidden": True}, r"allowed: with teacher.path alone"),
    "no cache": ({"teacher__cache": "W/teacher"}, r"teacher' is no teacher cache: it has no index.json"),
    "other model": ({"teacher__cache": "W/hidden", "teacher__path": "W/student"}, r"made with the model .*; got the"),
    "other text": (
        {"teacher__cache": "W/hidden", "data__train": "W/eval.txt"},
        r"was made of other text: rows 0",
    ),
    "other length": ({"teacher__cache": "W/hidden", "data__seq_len": 16}, r"rows of 32 tokens; got \d+ rows of 16"),
    "no held-out rows": ({"teacher__cache": "W/train_only"}, r"has no split 'eval'; allowed: 'train'"),
    "other tokenizer": (
        {"teacher__cache": "W/hidden", "student__path": "W/renamed"},
        r"the teacher and student.path have different tokenizers",
    ),
    "cache's tokenizer changed": (
        {"teacher__cache": "W/retokenized"},
        r"made with the tokenizer .*; got the",
    ),
    "flipped bit": ({"teacher__cache": "W/flipped"}, r"train-00000004.safetensors is damaged: its checksum is"),
    "cut off": ({"teacher__cache": "W/cut"}, r"eval-00000000.safetensors is damaged: found 100 bytes"),
    "temperature": ({"teacher__cache": "W/top5"}, r"loss: temperature is 1.0, but the teacher's .* taken at 2.0"),
    "divergence": (
        {"teacher__cache": "W/draws", "loss__divergence": "jsd"},
        r"loss: divergence='jsd' is not defined for tail='sampled'",
    ),
    "padded heads": (
        {"teacher__cache": "W/all", "loss__vocab": "truncate"},
        r"loss.vocab='truncate' with a teacher of K columns; allowed: error",
    ),
    "no name": ({"teacher__url": "http://a"}, r"teacher.server='vllm' needs teacher.model"),
    "no tokenizer": (
        {"teacher__url": "http://a", "teacher__model": "m", "student__path": None, "student__config": "W/student"},
        r"teacher.url needs the served model's tokenizer",
    ),
    "nobody there": (
        {"teacher__url": "http://127.0.0.1:9", "teacher__model": "m"},
        r"teacher.url: the first row of train: .*127.0.0.1:9/v1/completions cannot be reached",
    ),
    "refused": (
        {"teacher__url": "URL", "teacher__model": "m"},
        r"row of train: .* answered 404 .*no such model",
    ),
    "timeout": (
        {"teacher__url": "URL", "teacher__model": "m", "teacher__timeout": 0.0},
        r"timeout=0.0; allowed",
    ),
    "k": ({"teacher__url": "URL", "teacher__model": "served", "teacher__k": 0}, r"teacher.k=0; allowed: at least 1"),
}


@pytest.fixture(scope="module")
def damaged(world: Path) -> None:
    make_model(world / "renamed", blocks=2)
    make_tokenizer(world / "renamed", corpus="quite other words make quite other tokens " * 50)
    make_cache(world, world / "train_only", **WHOLE, eval=False)
    for name in ("retokenized", "flipped", "cut"):
        shutil.copytree(world / "hidden", world / name)
    make_tokenizer(world / "retokenized" / "tokenizer", corpus=text(0, 50))
    path = world / "flipped" / "train-00000004.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    os.truncate(world / "cut" / "eval-00000000.safetensors", 100)


@pytest.mark.parametrize("case", ERRORS)
def test_refused_before_the_first_step(world: Path, damaged, url: str, tmp_path: Path, monkeypatch, case: str) -> None:
    changes, message = ERRORS[case]
    monkeypatch.setattr(train, "train_step", lambda *_: pytest.fail("a step was taken"))
    placed = {
        k: v.replace("W/", f"{world}/").replace("URL", url) if isinstance(v, str) else v for k, v in changes.items()
    }
    with pytest.raises((ValueError, RuntimeError), match=message):
        run(world, tmp_path / "out", **placed)
    assert not (tmp_path / "out" / "config.yaml").exists(), "a refused run must not look like one to resume"
