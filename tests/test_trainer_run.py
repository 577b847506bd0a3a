"""A run of the trainer: what it computes, what it leaves, how it is configured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from cache_tiny import granite
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from trainer_tiny import make_config, make_model, make_tokenizer, make_world
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

from fastkd.trainer import main, objective
from fastkd.trainer.config import parse_config, to_dict
from fastkd.trainer.data import load_rows, rows_of_step
from fastkd.trainer.metrics import read_metrics
from fastkd.trainer.models import load_model, load_tokenizer, pick_precision
from fastkd.trainer.teacher import ModelTeacher
from fastkd.trainer.train import distill


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def lines(outcome, event: str) -> list[dict]:
    return [line for line in read_metrics(outcome.metrics_path) if line["event"] == event]


def test_a_whole_run(world: Path, tmp_path: Path) -> None:
    """Learns, logs, plots, and leaves a student that transformers loads with its tokenizer."""
    out = tmp_path / "out"
    outcome = distill(make_config(world, out, optim__max_steps=40, eval_every=10, select="best"))
    evaluations, steps = lines(outcome, "eval"), lines(outcome, "train")
    assert [e["step"] for e in evaluations] == [0, 10, 20, 30, 40]
    assert [s["step"] for s in steps] == list(range(2, 41, 2))
    assert evaluations[-1]["nll"] < evaluations[0]["nll"] - 0.5
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert all(s["tokens_per_s"] > 0 and s["grad_norm"] > 0 for s in steps)
    best = min(evaluations, key=lambda e: e["nll"])
    assert outcome.step == best["step"] and outcome.held_out["nll"] == best["nll"]

    student = AutoModelForCausalLM.from_pretrained(outcome.student_path)
    tokenizer = AutoTokenizer.from_pretrained(outcome.student_path)
    assert student.config.num_hidden_layers == 4
    config = make_config(world, out)
    rows = load_rows("data.eval", config.data, tokenizer, config.seed)
    with torch.no_grad():
        logits = student(input_ids=rows.input_ids).logits[:, :-1]
    nll = F.cross_entropy(logits.flatten(0, 1).double(), rows.input_ids[:, 1:].flatten()).item()
    assert nll == pytest.approx(best["nll"], abs=1e-5)

    with Image.open(out / "curves.png") as image:
        assert image.size[0] > 800 and len(image.convert("L").getcolors(256)) > 20
    assert list((out / "checkpoints").iterdir()) == [out / "checkpoints" / "step-00000040"]
    assert not list(out.rglob("*.bin")) + list(out.rglob("*.pt")) + list(out.rglob("*.pkl"))


@pytest.mark.parametrize("cache_hidden", [False, True])
def test_first_loss_is_the_one_of_the_books(world: Path, tmp_path: Path, cache_hidden: bool) -> None:
    """KD + CE of the first step against log_softmax and kl_div in fp64 on the shifted logits, means over all rows."""
    changes = {
        "loss__temperature": 2.0, "loss__kd_weight": 0.7, "loss__ce_weight": 0.4, "log_every": 1, "optim__max_steps": 1,
        "student__keep_blocks": None, "student__path": str(make_model(tmp_path / "student", blocks=2, seed=9)),
        "teacher__cache_hidden": cache_hidden,
    }  # fmt: skip
    config = make_config(world, tmp_path / "out", **changes)
    outcome = distill(config)
    rows = load_rows("data.train", config.data, load_tokenizer("teacher", config.teacher.path), config.seed)
    ids = rows.input_ids[rows_of_step(0, len(rows), 4, config.seed)]
    with torch.no_grad():
        student = load_model("student", config.student.path)(input_ids=ids).logits[:, :-1].flatten(0, 1).double()
        teacher = load_model("teacher", config.teacher.path)(input_ids=ids).logits[:, :-1].flatten(0, 1).double()
    lq, lp = (student / 2).log_softmax(-1), (teacher / 2).log_softmax(-1)
    kd = F.kl_div(lq, lp, log_target=True, reduction="batchmean").item()
    ce = F.cross_entropy(student, ids[:, 1:].flatten()).item()
    (line,) = lines(outcome, "train")
    close = {"rel": 2e-3 if cache_hidden else 1e-5}  # the cache keeps hidden states in fp16
    assert line["kd"] == pytest.approx(kd, **close) and line["ce"] == pytest.approx(ce, rel=1e-5)
    assert line["loss"] == pytest.approx(0.7 * 4 * kd + 0.4 * ce, **close)


def test_accumulation_is_a_bigger_batch(world: Path, tmp_path: Path) -> None:
    results = []
    for name, rows, passes in (("one", 4, 1), ("four", 1, 4)):
        changes = {"optim__rows_per_batch": rows, "optim__accumulation": passes, "log_every": 1, "optim__max_steps": 4}
        results.append(distill(make_config(world, tmp_path / name, **changes)))
    for one, four in zip(*(lines(r, "train") for r in results), strict=True):
        for figure in ("loss", "kd", "ce", "grad_norm"):
            assert one[figure] == pytest.approx(four[figure], rel=2e-4)
    one, four = (load_file(r.student_path / "model.safetensors") for r in results)
    before = load_file(world / "teacher" / "model.safetensors")
    name = "model.embed_tokens.weight"
    moved = (one[name] - before[name]).norm()
    assert moved > 0 and (one[name] - four[name]).norm() < 0.02 * moved  # Adam divides tiny gradients by tiny roots


def test_hard_labels_alone_do_not_ask_the_teacher(world: Path, tmp_path: Path, monkeypatch) -> None:
    def batch(self, split, *_):
        raise AssertionError(f"the teacher was asked for {split}")

    monkeypatch.setattr(ModelTeacher, "batch", batch)
    changes = {"loss__kd_weight": 0.0, "loss__ce_weight": 1.0, "data__eval": [], "log_every": 1}
    outcome = distill(make_config(world, tmp_path / "out", **changes))
    steps = lines(outcome, "train")
    assert steps[-1]["ce"] < steps[0]["ce"]
    assert all(s["kd"] is None and s["loss"] == pytest.approx(s["ce"], rel=1e-6) for s in steps)
    assert not lines(outcome, "eval") and (tmp_path / "out" / "curves.png").exists()


def test_student_from_a_configuration_is_random_and_seeded(world: Path, tmp_path: Path) -> None:
    config = json.loads((world / "teacher" / "config.json").read_text())
    (tmp_path / "small.json").write_text(json.dumps({**config, "num_hidden_layers": 1, "hidden_size": 16}))
    source = {"student__keep_blocks": None, "student__config": str(tmp_path / "small.json"), "optim__max_steps": 2}
    first, again, other = (
        load_file(
            distill(make_config(world, tmp_path / str(i), seed=seed, **source)).student_path / "model.safetensors"
        )
        for i, seed in enumerate([0, 0, 1])
    )
    assert first["model.embed_tokens.weight"].shape == (300, 16)
    assert all(torch.equal(first[n], again[n]) for n in first) and not all(
        torch.equal(first[n], other[n]) for n in first
    )


def test_heads_padded_to_different_sizes(world: Path, tmp_path: Path) -> None:
    wide = make_model(tmp_path / "wide", blocks=2, vocab_size=320)
    changes = {"student__keep_blocks": None, "student__path": str(wide), "loss__vocab": "truncate"}
    outcome = distill(make_config(world, tmp_path / "out", **changes))
    assert lines(outcome, "eval")[-1]["kl"] < lines(outcome, "eval")[0]["kl"]
    assert AutoModelForCausalLM.from_pretrained(outcome.student_path).config.vocab_size == 320


def test_a_softcap_after_the_head(world: Path, tmp_path: Path) -> None:
    """Gemma 2 caps its logits by tanh, which needs them again in backward; a cache of hidden states keeps the cap."""
    config = Gemma2Config(
        num_hidden_layers=2, hidden_size=32, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, vocab_size=300, final_logit_softcapping=5.0, query_pre_attn_scalar=16, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path / "gemma")
    make_tokenizer(tmp_path / "gemma")
    source = {"student__keep_blocks": None, "student__path": str(tmp_path / "gemma")}
    outcome = distill(make_config(world, tmp_path / "out", **source))
    assert lines(outcome, "eval")[-1]["nll"] < lines(outcome, "eval")[0]["nll"]
    source |= {"teacher__path": str(tmp_path / "gemma"), "teacher__cache_hidden": True, "optim__max_steps": 1}
    (start, _) = lines(distill(make_config(world, tmp_path / "cached", **source)), "eval")
    assert start["kl"] == pytest.approx(0, abs=1e-4) and start["agreement"] > 0.99  # student and teacher are the same
    source["teacher__path"] = str(granite(tmp_path / "granite"))
    with pytest.raises(ValueError, match=r"cache_hidden=true does not fit GraniteForCausalLM"):
        distill(make_config(world, tmp_path / "scaled", **source))


def test_gradient_takes_the_memory_of_the_logits(world: Path, tmp_path: Path, monkeypatch) -> None:
    """The student's logits come straight from its head, so the loss may overwrite them; the trainer asks for that."""
    asked = []
    real = objective.KDLoss.forward
    monkeypatch.setattr(
        objective.KDLoss, "forward", lambda self, *a, **k: (asked.append(self.options.inplace), real(self, *a, **k))[1]
    )
    distill(make_config(world, tmp_path / "out", optim__max_steps=2, data__eval=[]))
    assert asked == [True] * 4


def test_loss_that_is_not_finite_stops_the_run(world: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"the loss is (nan|inf) at step \d+; lower optim.lr"):
        distill(make_config(world, tmp_path / "out", optim__lr=1e30, optim__clip_norm=0.0, data__eval=[]))


def test_file_and_flags(world: Path, tmp_path: Path, capsys) -> None:
    """Flags win over the file, the resolved configuration is saved, and it can be read back."""
    out = tmp_path / "out"
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(to_dict(make_config(world, tmp_path / "elsewhere"))))
    flags = ["--config", str(tmp_path / "c.yaml"), "--output_dir", str(out), "--optim.max_steps", "5"]
    flags += ["--loss.divergence", "jsd", "--loss.beta=0.25", "--optim.schedule_options", "{min_lr_rate: 0.5}"]
    assert main(flags) == 0
    printed = capsys.readouterr()
    assert f'AutoModelForCausalLM.from_pretrained("{out / "student"}")' in printed.out
    assert "held-out nll" in printed.err and "tokens/s" in printed.err
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert saved["loss"]["divergence"] == "jsd" and saved["loss"]["beta"] == 0.25 and saved["optim"]["max_steps"] == 5
    assert saved["optim"]["lr"] == 2e-3 and saved["optim"]["schedule_options"] == {"min_lr_rate": 0.5}
    again = parse_config(["--config", str(out / "config.yaml")])
    assert to_dict(again) == saved
    assert main([*flags, "--resume", "true"]) == 0  # finished already: restores, saves the same student again


def test_schedule_warms_up_and_decays(world: Path, tmp_path: Path) -> None:
    changes = {"optim__max_steps": 10, "optim__warmup_ratio": 0.2, "log_every": 1, "data__eval": []}
    rates = [s["next_lr"] for s in lines(distill(make_config(world, tmp_path / "out", **changes)), "train")]
    assert rates[0] == pytest.approx(1e-3) and rates[1] == pytest.approx(2e-3)
    assert rates[2:] == sorted(rates[2:], reverse=True) and rates[-1] == pytest.approx(2e-4)


def test_tokenized_rows_and_precision(world: Path, tmp_path: Path) -> None:
    ids = torch.randint(1, 300, (12, 16), generator=torch.Generator().manual_seed(0)).tolist()
    Dataset.from_dict({"input_ids": ids}).save_to_disk(str(tmp_path / "rows"))
    changes = {"data__train": str(tmp_path / "rows"), "data__seq_len": 16, "data__cross_documents": False}
    config = make_config(world, tmp_path / "out", **changes)
    rows = load_rows("data.train", config.data, load_tokenizer("teacher", config.teacher.path), 0)
    assert rows.input_ids.tolist() == ids
    distill(config)
    assert pick_precision("auto", torch.device("cpu")) in ("fp32", "bf16")
    assert pick_precision("fp16", torch.device("cpu")) == "fp16"
