"""fastkd cache-teacher: what it stores of a model, how it is driven, what it refuses."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import killing
import pytest
import torch
from cache_tiny import granite, make_cache, make_data
from trainer_tiny import make_tokenizer, make_world
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from fastkd.cache import model_fingerprint
from fastkd.trainer.cache_teacher import main
from fastkd.trainer.data import load_rows
from fastkd.trainer.models import load_tokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def rows_of(world: Path, name: str) -> torch.Tensor:
    data = make_data(world)
    tokenizer = load_tokenizer("teacher", str(world / "teacher"))
    return load_rows(f"data.{name}", data, tokenizer, 0).input_ids


@pytest.fixture(scope="module")
def logits(world: Path) -> torch.Tensor:
    """(11, 32, 300) of the training rows."""
    model = AutoModelForCausalLM.from_pretrained(world / "teacher")
    with torch.no_grad():
        return model(input_ids=rows_of(world, "train")).logits


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_hidden_states_and_head_give_the_logits(world: Path, tmp_path: Path, logits: torch.Tensor, dtype: str) -> None:
    cache = make_cache(world, tmp_path / "c", dtype=dtype)
    assert list(cache.index.splits) == ["train", "eval"]
    batch = cache.rows("train", rows_of(world, "train")).batch(range(11))
    assert str(batch["hidden"].dtype) == f"torch.{dtype}"
    head = cache.head()
    again = torch.nn.functional.linear(batch["hidden"].float(), head.weight.float())
    unit = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 2**-22}[dtype]
    bound = unit * batch["hidden"].abs().float() @ head.weight.abs().float().T  # of a rounding of each hidden state
    assert ((again - logits).abs() <= 1.1 * bound + 1e-5).all()
    cache.rows("eval", rows_of(world, "eval"))
    assert cache.spec.model == model_fingerprint(world / "teacher") and cache.spec.precision == "fp32"
    tokens = json.loads((tmp_path / "c" / "tokenizer" / "tokenizer.json").read_text())
    assert tokens["model"] == json.loads((world / "teacher" / "tokenizer.json").read_text())["model"]


def test_the_k_largest(world: Path, tmp_path: Path, logits: torch.Tensor) -> None:
    cache = make_cache(world, tmp_path / "c", kind="topk", k=7, temperature=2.0)
    batch = cache.rows("train").batch(range(11))
    teacher = cache.teacher(batch, "renormalize")
    best = (logits / 2).log_softmax(-1).topk(7)
    assert teacher.ids.dtype == torch.int32 and teacher.ids.long().equal(best.indices)
    torch.testing.assert_close(teacher.logprobs, best.values, rtol=1e-5, atol=1e-5)
    assert (teacher.tail, teacher.temperature, teacher.weights) == ("renormalize", 2.0, None)
    assert cache.index.head is None and not (tmp_path / "c" / "head.safetensors").exists()


def test_draws_are_of_the_teacher_and_do_not_depend_on_who_drew(world: Path, tmp_path: Path, logits) -> None:
    sampled = {"kind": "sampled", "k": 400, "dtype": "float32", "proposal_temperature": 1.5}
    cache = make_cache(world, tmp_path / "a", **sampled)
    teacher = cache.teacher(cache.rows("train").batch(range(11)))
    assert teacher.tail == "sampled"
    drawn = torch.zeros_like(logits).scatter_add_(-1, teacher.ids.long(), teacher.weights)
    wanted = logits.softmax(-1)
    error = (drawn - wanted).abs().sum(-1).mean()
    assert error < 0.8  # 400 draws of some 150 columns
    assert (drawn.mean((0, 1)) - wanted.mean((0, 1))).abs().sum() < 0.06  # less by the root of 352 positions
    # a cache that another process went on with has the same draws
    index = cache.index
    last = index.splits["train"].shards[1].file
    whole = (tmp_path / "a" / last).read_bytes()
    (tmp_path / "a" / last).unlink()
    make_cache(world, tmp_path / "a", **sampled)
    assert (tmp_path / "a" / last).read_bytes() == whole
    other = make_cache(world, tmp_path / "b", seed=1, **sampled)
    assert not other.rows("train")[0]["ids"].equal(cache.rows("train")[0]["ids"])
    first, second = (cache.rows("train")[row]["ids"].sort().values for row in (0, 3))
    assert not first.equal(second)


def gemma(folder: Path) -> Path:
    """A model that caps its logits by tanh."""
    config = Gemma2Config(
        num_hidden_layers=2, hidden_size=32, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, vocab_size=300, final_logit_softcapping=5.0, query_pre_attn_scalar=16, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    Gemma2ForCausalLM(config).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def test_a_softcap_is_part_of_the_head(world: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(gemma(tmp_path / "gemma"))
    cache = make_cache(world, tmp_path / "c", tmp_path / "gemma", dtype="float32")
    batch, head = cache.rows("train").batch(range(3)), cache.head()
    assert head.softcap == 5.0
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"]).logits
    again = 5 * torch.tanh(torch.nn.functional.linear(batch["hidden"], head.weight.float()) / 5)
    torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-4)


def test_a_model_that_scales_its_logits(world: Path, tmp_path: Path) -> None:
    """Hidden states would lose it; the k largest are taken from the logits themselves."""
    model = AutoModelForCausalLM.from_pretrained(granite(tmp_path / "granite"))
    with pytest.raises(ValueError, match=r"kind=hidden does not fit GraniteForCausalLM, which changes its logits"):
        make_cache(world, tmp_path / "a", tmp_path / "granite")
    cache = make_cache(world, tmp_path / "b", tmp_path / "granite", kind="topk", k=5)
    batch = cache.rows("train").batch([4, 9])
    with torch.no_grad():
        best = model(input_ids=batch["input_ids"]).logits.log_softmax(-1).topk(5)
    assert batch["ids"].long().equal(best.indices)
    torch.testing.assert_close(batch["logprobs"], best.values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"k": 0}, "k=0; allowed: at least 1"),
        ({"kind": "topk", "k": 301}, "k=301; allowed: 1 to 300, the vocabulary"),
        ({"temperature": 2.0}, "temperature=2.0 with kind='hidden'; allowed: 1"),
        ({"kind": "topk", "temperature": 0.0}, "temperature=0.0; allowed: a positive number"),
        ({"kind": "topk", "proposal_temperature": 2.0}, "proposal_temperature=2.0 with kind='topk'"),
        ({"shard_rows": 0}, "shard_rows=0; allowed: at least 1"),
        ({"rows_per_batch": 0}, "rows_per_batch=0; allowed: at least 1"),
        ({"teacher": Path("none")}, "teacher.path='none' does not exist"),
    ],
)
def test_refused_before_anything_is_written(world: Path, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_cache(world, tmp_path / "c", **changes)
    assert not (tmp_path / "c").exists()


def test_command_line(world: Path, tmp_path: Path, capsys) -> None:
    """Says what it will take before it begins, continues where it was, and explains what is wrong on one line."""
    flags = ["--teacher.path", f"{world}/teacher", "--data.train", f"{world}/train.txt", "--data.seq_len", "32"]
    flags += ["--output_dir", str(tmp_path / "c"), "--kind", "topk", "--k", "8", "--device", "cpu"]
    flags += ["--precision", "fp32"]
    assert main(flags) == 0
    printed = " ".join(capsys.readouterr().err.split())
    assert "top 8, float32" in printed and "rows of 32 tokens in" in printed and "MB in all, into" in printed
    assert "rows/s" in printed and f"teacher cache: {tmp_path / 'c'}" in printed.replace("\n", "")
    before = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "c").iterdir()}
    assert main(flags) == 0
    assert {f.name: f.stat().st_mtime_ns for f in (tmp_path / "c").iterdir()} == before
    capsys.readouterr()
    assert main([*flags, "--k", "9"]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "fastkd cache-teacher:" in error and "width: 8 -> 9" in error and "Traceback" not in error


def test_two_processes_of_accelerate(world: Path, tmp_path: Path) -> None:
    """Started as accelerate and torchrun start processes: both write, and the result is that of one."""
    make_cache(world, tmp_path / "one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [
        killing.start("cache_kill:cache_teacher_as", str(world), str(tmp_path / "two"), rank, port) for rank in range(2)
    ]
    for child in children:
        killing.join(child)
    names = {f.name for f in (tmp_path / "one").iterdir() if f.is_file()}
    assert names == {f.name for f in (tmp_path / "two").iterdir() if f.is_file()}
    assert all((tmp_path / "one" / n).read_bytes() == (tmp_path / "two" / n).read_bytes() for n in names)
