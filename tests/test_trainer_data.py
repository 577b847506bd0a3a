"""Text to rows: sources, packing, the order of the rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from trainer_tiny import make_tokenizer, text

from fastkd.trainer.config import DataConfig
from fastkd.trainer.data import Rows, find_files, load_rows, pack, rows_of_step, shifted_labels, take_in_turn

DOCUMENTS = [text(seed, 40) for seed in range(5)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def sources(tmp_path: Path, tokenizer) -> dict[str, str | list[str]]:
    """The same five documents in every form that is accepted."""
    for number, document in enumerate(DOCUMENTS):
        (tmp_path / f"{number}.txt").write_text(document)
    (tmp_path / "all.jsonl").write_text("".join(json.dumps({"text": d, "more": 1}) + "\n" for d in DOCUMENTS))
    (tmp_path / "body.jsonl").write_text("".join(json.dumps({"body": d}) + "\n" for d in DOCUMENTS))
    Dataset.from_dict({"text": DOCUMENTS}).save_to_disk(str(tmp_path / "saved"))
    ids = [tokenizer(d)["input_ids"] for d in DOCUMENTS]
    Dataset.from_dict({"input_ids": ids}).save_to_disk(str(tmp_path / "tokenized"))
    return {
        "files": [str(tmp_path / f"{i}.txt") for i in range(5)],
        "pattern": str(tmp_path / "*.txt"),
        "jsonl": str(tmp_path / "all.jsonl"),
        "body": str(tmp_path / "body.jsonl"),
        "saved": str(tmp_path / "saved"),
        "tokenized": str(tmp_path / "tokenized"),
    }


@pytest.mark.parametrize("form", ["pattern", "jsonl", "body", "saved", "tokenized"])
def test_every_form_gives_the_same_rows(sources, tokenizer, form: str) -> None:
    expected = load_rows("data.train", DataConfig(sources["files"], seq_len=16), tokenizer, 0)
    field = "body" if form == "body" else "text"
    rows = load_rows("data.train", DataConfig(sources[form], text_field=field, seq_len=16), tokenizer, 0)
    assert len(expected) > 5
    assert torch.equal(rows.input_ids, expected.input_ids)
    assert torch.equal(rows.document, expected.document)


def test_rows_spell_the_documents_joined_by_the_end_token(sources, tokenizer) -> None:
    rows = load_rows("data.train", DataConfig(sources["files"], seq_len=8), tokenizer, 0)
    spelled = tokenizer.decode(rows.input_ids.flatten())
    assert "<eos>".join(DOCUMENTS).startswith(spelled)
    assert len("<eos>".join(DOCUMENTS)) - len(spelled) < 8 * 12


def test_pack_across_documents() -> None:
    rows = pack([torch.tensor([1, 2, 3]), torch.tensor([4, 5]), torch.tensor([6, 7, 8])], 3, True, 0)
    assert rows.input_ids.tolist() == [[1, 2, 3], [0, 4, 5], [0, 6, 7]]
    assert rows.document.tolist() == [0, 0, 1]


def test_pack_within_documents_drops_the_rest_of_each() -> None:
    rows = pack([torch.arange(7), torch.arange(2), torch.arange(10, 13)], 3, False, 0)
    assert rows.input_ids.tolist() == [[0, 1, 2], [3, 4, 5], [10, 11, 12]]
    assert rows.document.tolist() == [0, 0, 2]


def test_take_in_turn_spreads_over_documents_and_has_the_prefix_property() -> None:
    document = torch.tensor([0] * 10 + [1] * 2 + [2] * 5)
    rows = Rows(torch.arange(17)[:, None], document)
    nine = take_in_turn(rows, 9, seed=3)
    counts = torch.bincount(nine.document)
    assert counts.tolist() == [4, 2, 3] or counts.tolist() == [3, 2, 4]
    assert len(set(nine.input_ids.flatten().tolist())) == 9
    assert torch.equal(document[nine.input_ids.flatten()], nine.document)
    assert torch.equal(take_in_turn(rows, 4, seed=3).input_ids, nine.input_ids[:4])
    assert not torch.equal(take_in_turn(rows, 9, seed=4).input_ids, nine.input_ids)


def test_every_epoch_sees_every_row_once_in_another_order() -> None:
    epochs = [torch.cat([rows_of_step(5 * e + s, 22, 4, seed=1) for s in range(5)]) for e in range(2)]
    for seen in epochs:
        assert len(set(seen.tolist())) == 20  # 22 rows, 4 a step: the last partial step is left out
    assert epochs[0].tolist() != epochs[1].tolist()


def test_labels_are_the_next_token_and_the_last_position_has_none() -> None:
    assert shifted_labels(torch.tensor([[5, 6, 7], [8, 9, 1]])).tolist() == [[6, 7, -100], [9, 1, -100]]


def test_pattern_is_sorted_and_folders_in_it_are_skipped(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "c.txt").mkdir()
    assert [f.name for f in find_files("data.train", str(tmp_path / "*.txt"))] == ["a.txt", "b.txt"]
