"""Reading a cache: rows in any order and process, and every way in which it can be the wrong one or damaged."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import cache_kill
import pytest
import torch
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import Whitespace
from torch.utils.data import DataLoader
from trainer_tiny import make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastkd.cache import CacheWriter, Head, Spec, TeacherCache, data_fingerprint, model_fingerprint
from fastkd.cache import reader as cache_reader
from fastkd.cache.fingerprint import tokenizer_fingerprint
from fastkd.cache.format import read_index

SPLITS = cache_kill.make_splits()
TRAIN = SPLITS["train"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "cache"
    cache_kill.write(str(folder))
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "c")
    return tmp_path / "c"


def expected(rows: list[int]) -> torch.Tensor:
    """fp16 hidden states of training rows."""
    return torch.cat([cache_kill.compute("train", row, TRAIN[row : row + 1])["hidden"] for row in rows]).half()


def test_rows_in_any_order(whole: Path, monkeypatch) -> None:
    monkeypatch.setattr(cache_reader, "MOST_OPEN", 2)
    rows = TeacherCache(whole).rows("train", TRAIN)
    assert len(rows) == 10 and rows[-1]["input_ids"].equal(TRAIN[9])
    order = [9, 0, 5, 5, 3, 8]
    batch = rows.batch(torch.tensor(order))
    assert batch["hidden"].dtype == torch.float16 and batch["hidden"].equal(expected(order))
    assert batch["input_ids"].dtype == torch.int64 and batch["input_ids"].equal(TRAIN[order])
    assert len(rows._open) == 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert rows.batch(order)["hidden"].equal(expected(order))
    with pytest.raises(IndexError, match=r"row 10 of 'train'; allowed: -10 to 9"):
        rows[10]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_shuffling_loader_with_workers(whole: Path, context: str) -> None:
    """The parent has shards open already, which its children must not use."""
    rows = TeacherCache(whole).rows("train", TRAIN)
    assert rows[2]["input_ids"].equal(TRAIN[2])
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(
        rows, batch_size=3, shuffle=True, num_workers=2, multiprocessing_context=context, generator=generator
    )
    batches = list(loader)
    ids, hidden = (torch.cat([b[name] for b in batches]) for name in ("input_ids", "hidden"))
    order = [int((row == TRAIN).all(1).nonzero()) for row in ids]
    assert sorted(order) == list(range(10)) and order != sorted(order)
    assert hidden.equal(expected(order))


def test_a_forked_process_opens_its_own(whole: Path, monkeypatch) -> None:
    rows = TeacherCache(whole).rows("train")
    parents = {row: rows[row] and rows._open[row // 4] for row in (0, 4, 8)}
    assert len(rows._open) == 3
    monkeypatch.setattr(cache_reader.os, "getpid", lambda: -1)
    assert rows[4]["hidden"].equal(expected([4])[0])
    assert list(rows._open) == [1] and rows._open[1] is not parents[4]


def test_head_is_kept_exactly(whole: Path) -> None:
    head, kept = cache_kill.make_head(), TeacherCache(whole).head()
    assert kept.weight.equal(head.weight) and kept.bias.equal(head.bias) and kept.softcap == 5.0


def test_head_of_16_bit_values_takes_16_bits(tmp_path: Path) -> None:
    """A checkpoint in bf16 that was loaded as fp32 is stored as it was."""
    weight = torch.randn(50, 8).bfloat16().float()
    writer = CacheWriter(tmp_path / "c", SPLITS, cache_kill.SPEC, head=Head(weight))
    writer.open()
    writer.run(cache_kill.compute)
    stored = load_file(tmp_path / "c" / "head.safetensors")
    assert stored["weight"].dtype == torch.bfloat16 and stored["weight"].float().equal(weight)
    assert TeacherCache(tmp_path / "c").head().bias is None


def test_index_is_readable_and_nothing_is_pickled(whole: Path) -> None:
    text = (whole / "index.json").read_text()
    index = json.loads(text)
    assert index["format"] == 1 and index["splits"]["train"]["data"] == data_fingerprint(TRAIN)
    assert [s["rows"] for s in index["splits"]["train"]["shards"]] == [4, 4, 2]
    assert sum(line.lstrip().startswith('{"file": "train-') for line in text.splitlines()) == 3  # a line each
    assert {f.suffix for f in whole.iterdir() if f.is_file() and f.name != "lock"} == {".json", ".safetensors"}


SECOND = "train-00000004.safetensors"


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("position", [8, 300, -1])  # in the header of a shard, in its ids, in its last hidden state
def test_a_flipped_bit_is_found_in_the_shard_it_is_in(copy: Path, position: int) -> None:
    flip(copy / SECOND, position)
    cache = TeacherCache(copy)
    rows = cache.rows("train")
    assert rows[0]["hidden"].equal(expected([0])[0])  # what is whole can be read
    for use in (lambda: rows[5], cache.verify, lambda: TeacherCache(copy).verify()):
        with pytest.raises(ValueError, match=rf"{SECOND} is damaged: its checksum is \w{{32}}; allowed: \w{{32}}"):
            use()


def test_every_shard_is_verified_once(whole: Path, monkeypatch) -> None:
    hashed = []
    real = cache_reader.checksum_file
    monkeypatch.setattr(cache_reader, "checksum_file", lambda path: hashed.append(path.name) or real(path))
    cache = TeacherCache(whole)
    assert hashed == []
    cache.rows("train")[5]
    assert hashed == [SECOND]
    sizes: list[int] = []
    cache.verify(sizes.append)
    for row in range(10):
        cache.rows("train")[row]
    cache.head()
    assert sorted(hashed) == sorted(f.name for f in whole.glob("*.safetensors"))
    assert sum(sizes) == sum(f.stat().st_size for f in whole.glob("*.safetensors"))


def test_damage_that_is_seen_on_opening(copy: Path) -> None:
    size = (copy / SECOND).stat().st_size
    os.truncate(copy / SECOND, size - 1)
    with pytest.raises(ValueError, match=rf"{SECOND} is damaged: found {size - 1} bytes; allowed: the {size} bytes"):
        TeacherCache(copy)
    (copy / SECOND).unlink()
    with pytest.raises(ValueError, match=rf"{SECOND} is damaged: found nothing; allowed: the {size} bytes"):
        TeacherCache(copy)


def test_a_shard_cut_off_after_opening(copy: Path) -> None:
    rows = TeacherCache(copy).rows("train")
    os.truncate(copy / SECOND, 100)
    with pytest.raises(ValueError, match=rf"{SECOND} is damaged: found 100 bytes"):
        rows[4]


def test_shards_that_were_swapped(copy: Path) -> None:
    a, b = copy / "train-00000000.safetensors", copy / SECOND
    first = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(first)
    with pytest.raises(ValueError, match=r"train-00000000.safetensors is damaged"):
        TeacherCache(copy).verify()


def test_other_tokens(whole: Path) -> None:
    """The whole split or the first of it, and a difference in one token names the shard."""
    cache = TeacherCache(whole)
    for rows in (10, 8, 6, 1):
        assert len(cache.rows("train", TRAIN[:rows])) == 10
    for row in (0, 4, 9):
        other = TRAIN.clone()
        other[row, 3] = (other[row, 3] + 1) % 50
        first = row // 4 * 4
        message = (
            rf"made of other text: rows {first}-{min(first + 3, 9)} in train-{first:08d}.safetensors have the data"
        )
        with pytest.raises(ValueError, match=message):
            cache.rows("train", other)
        with pytest.raises(ValueError, match="made of other text"):
            cache.rows("train", other[: row + 1])
        if first:
            cache.rows("train", other[:first])
    with pytest.raises(ValueError, match=r"has 10 rows of 6 tokens; got 10 rows of 5"):
        cache.rows("train", TRAIN[:, :5])
    with pytest.raises(ValueError, match=r"has 3 rows of 6 tokens; got 10 rows of 6"):
        cache.rows("eval", TRAIN)
    with pytest.raises(ValueError, match=r"has no split 'test'; allowed: 'train', 'eval'"):
        cache.rows("test")


def test_other_models_and_tokenizers(whole: Path) -> None:
    TeacherCache(whole, model="m", tokenizer="t")
    with pytest.raises(ValueError, match=r"was made with the model m; got the model x; allowed"):
        TeacherCache(whole, model="x")
    with pytest.raises(ValueError, match=r"was made with the tokenizer t; got the tokenizer x; allowed"):
        TeacherCache(whole, tokenizer="x")


def test_what_is_no_cache_or_not_finished(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no teacher cache: it has no index.json"):
        TeacherCache(tmp_path)
    text = (copy / "index.json").read_text()
    cases = {
        text.replace('"format": 1', '"format": 2'): r"index.json has format 2; allowed: 1",
        text[: len(text) // 2]: r"index.json is damaged",
        text.replace('"rows"', '"row"'): r"index.json is damaged: ",
        "[]": r"index.json has format 'list'; allowed: 1",
    }
    for changed, message in cases.items():
        assert changed != text
        (copy / "index.json").write_text(changed)
        with pytest.raises(ValueError, match=message):
            TeacherCache(copy)
    (copy / "index.json").write_text(text)
    index = read_index(copy)
    del index.splits["train"].shards[1]
    (copy / "index.json").write_text(index.to_json())
    with pytest.raises(ValueError, match=r"is not finished: 2 of 3 shards of 'train'; allowed: a finished one"):
        TeacherCache(copy)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "logits"}, "kind='logits' is not known; allowed: hidden, topk, sampled"),
        ({"dtype": "int8"}, "dtype='int8' is not known; allowed: float16"),
        ({"width": 0}, "width=0; allowed: at least 1"),
        ({"kind": "topk"}, "head=given with kind='topk'"),
        ({"width": 9}, r"head.weight is \(50, 8\); allowed: \(50, 9\)"),
        ({"vocab_size": 20}, r"has ids 1 to 49; allowed: 0 to 19"),
    ],
)
def test_arguments_of_a_writer(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec = Spec(**{**vars(cache_kill.SPEC), **change})
        CacheWriter(tmp_path / "c", SPLITS, spec, head=cache_kill.make_head())


def test_more_arguments_of_a_writer(tmp_path: Path) -> None:
    spec, head = cache_kill.SPEC, cache_kill.make_head()
    for splits, shard_rows, message in (
        ({"a/b": TRAIN}, None, "split 'a/b'; allowed: letters, digits and _"),
        ({"a": TRAIN.float()}, None, r"splits\['a'\] must be \(R, S\) token ids; got \(10, 6\) torch.float32"),
        ({"a": TRAIN[:0]}, None, r"must be \(R, S\) token ids; got \(0, 6\)"),
        ({"a": TRAIN}, 0, "shard_rows=0; allowed: at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            CacheWriter(tmp_path / "c", splits, spec, head=head, shard_rows=shard_rows)
    with pytest.raises(ValueError, match=r"k=51; allowed: 1 to 50, the vocabulary"):
        CacheWriter(tmp_path / "c", SPLITS, Spec("topk", "float32", 51, 50))
    writer = CacheWriter(tmp_path / "c", SPLITS, spec, head=head)
    writer.open()
    with pytest.raises(ValueError, match=r"compute gave hidden of \(1, 6, 7\); allowed: \(1, 6, 8\)"):
        writer.run(lambda split, row, ids: {"hidden": torch.zeros(len(ids), 6, 7)})


def test_fingerprints_of_models(tmp_path: Path) -> None:
    """Of what is computed: one weight, its dtype or the configuration changes it; a new place or other files do not."""
    first = model_fingerprint(make_model(tmp_path / "a"))
    assert (
        model_fingerprint(make_model(tmp_path / "b")) == first != model_fingerprint(make_model(tmp_path / "c", seed=1))
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    assert model_fingerprint(tmp_path / "parts") == first
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-6
    model.save_pretrained(tmp_path / "weight")
    assert model_fingerprint(tmp_path / "weight") != first
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert model_fingerprint(tmp_path / "a") != first
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no weights; allowed: a folder with .safetensors"):
        model_fingerprint(tmp_path / "none")


def test_fingerprints_of_tokenizers_and_data(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "a")
    first = tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path / "a")) == first
    assert tokenizer_fingerprint(make_tokenizer(tmp_path / "b", corpus="quite other words " * 50)) != first
    tokenizer.backend_tokenizer.pre_tokenizer = Whitespace()
    assert tokenizer_fingerprint(tokenizer) != first
    assert data_fingerprint(TRAIN) == data_fingerprint(TRAIN.int()) != data_fingerprint(TRAIN.view(20, 3))
