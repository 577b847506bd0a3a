"""Text to rows: reading files, tokenizing, packing into rows of seq_len, the order of the rows."""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, load_from_disk
from datasets.exceptions import DatasetGenerationError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .config import DataConfig


@dataclass
class Rows:
    """Packed rows.

    input_ids: ``(R, S)`` int64.
    document: ``(R,)`` int64, the document that a row begins in; rows of one document are not independent.
    """

    input_ids: Tensor
    document: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)


def find_files(argument: str, names: str | list[str]) -> list[Path]:
    """The files and saved datasets meant by names and glob patterns, in the order given, sorted within a pattern.

    Raises:
        ValueError: a name that matches nothing, or a folder that is not a saved dataset.
    """
    found: list[Path] = []
    for name in [names] if isinstance(names, str) else names:
        matches = [Path(name)] if Path(name).exists() else [Path(m) for m in sorted(glob.glob(name, recursive=True))]
        if not matches:
            raise ValueError(f"{argument}: {name!r} does not exist and matches no file")
        found += [m for m in matches if m.is_file() or len(matches) == 1]
    for path in found:
        if path.is_dir() and not ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
            raise ValueError(
                f"{argument}: folder {str(path)!r} was not written by datasets.save_to_disk; allowed: text files, "
                f".jsonl files, such folders, or a pattern like {str(path / '**' / '*.txt')!r}"
            )
    return found


def _read(argument: str, path: Path, text_field: str) -> Dataset:
    """One source as a dataset with a column ``text``, or with ``input_ids`` if it was tokenized before."""
    if path.is_dir():
        data = load_from_disk(str(path))
        if isinstance(data, DatasetDict):
            raise ValueError(
                f"{argument}: {str(path)!r} holds splits {sorted(data)}; name one: {str(path / next(iter(data)))!r}"
            )
        if "input_ids" in data.column_names:
            return data.select_columns(["input_ids"])
    elif path.suffix in (".jsonl", ".json"):
        try:
            data = Dataset.from_json(str(path), keep_in_memory=True)
        except (DatasetGenerationError, ValueError) as error:
            raise ValueError(f"{argument}: {str(path)!r} is not jsonl: {error.__cause__ or error}") from None
    else:
        try:
            return Dataset.from_dict({"text": [path.read_text(encoding="utf-8")]})
        except UnicodeDecodeError as error:
            raise ValueError(f"{argument}: {str(path)!r} is not UTF-8 text: {error}") from None
    if text_field not in data.column_names:
        raise ValueError(
            f"{argument}: {str(path)!r} has no {text_field!r}; data.text_field allows {sorted(data.column_names)}"
        )
    data = data.select_columns([text_field])
    return data if text_field == "text" else data.rename_column(text_field, "text")


def _tokenized(argument: str, path: Path, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    """Token ids of every document of one source, ``(length,)`` int64 each."""
    data = _read(argument, path, config.text_field)
    documents: list[list[int]] = []
    for batch in data.iter(batch_size=64):
        if "input_ids" in batch:
            documents += batch["input_ids"]
        else:
            texts = [text or "" for text in batch["text"]]
            documents += tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [torch.tensor(ids, dtype=torch.int64) for ids in documents]


def pack(documents: list[Tensor], seq_len: int, cross_documents: bool, eos: int | None) -> Rows:
    """Cut documents into rows.

    Args:
        documents: ``(length,)`` int64 token ids of each.
        seq_len: S.
        cross_documents: join all documents with ``eos`` first; otherwise each document loses its last partial row.
        eos: end-of-text id; None joins without one.
    """
    if cross_documents:
        ending = torch.tensor([] if eos is None else [eos], dtype=torch.int64)
        documents = [torch.cat([d, ending]) for d in documents]
    else:
        documents = [d[: len(d) - len(d) % seq_len] for d in documents]
    stream = torch.cat(documents)
    owner = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor([len(d) for d in documents]))
    rows = len(stream) // seq_len
    return Rows(stream[: rows * seq_len].view(rows, seq_len), owner[: rows * seq_len : seq_len].clone())


def take_in_turn(rows: Rows, count: int | None, seed: int) -> Rows:
    """``count`` rows, one of each document before a second of any; documents and their rows in seeded random order.

    The first ``k`` of ``count`` rows are the rows that ``count=k`` gives. None takes all rows in their own order.
    """
    if count is None or count >= len(rows):
        return rows
    shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    seen: dict[int, int] = {}
    turns = []
    for position, row in enumerate(shuffled):
        document = int(rows.document[row])
        seen[document] = seen.get(document, -1) + 1
        turns.append((seen[document], position, row))
    chosen = torch.tensor([row for _, _, row in sorted(turns)[:count]], dtype=torch.int64)
    return Rows(rows.input_ids[chosen], rows.document[chosen])


def load_rows(argument: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> Rows:
    """Packed rows of ``data.train`` or ``data.eval``.

    Args:
        argument: ``data.train`` or ``data.eval``.

    Raises:
        ValueError: missing files, wrong columns, or too little text for one row.
    """
    names, limit = (
        (config.train, config.max_train_rows) if argument == "data.train" else (config.eval, config.max_eval_rows)
    )
    files = find_files(argument, names)
    documents = [ids for path in files for ids in _tokenized(argument, path, config, tokenizer)]
    if not documents:
        raise ValueError(f"{argument} holds no document: {', '.join(map(str, files))} are empty")
    rows = pack(documents, config.seq_len, config.cross_documents, tokenizer.eos_token_id)
    if not len(rows):
        longest, total = max(map(len, documents), default=0), sum(map(len, documents))
        raise ValueError(
            f"{argument} is too short for one row of data.seq_len={config.seq_len} tokens: {len(files)} files, "
            f"{total} tokens, the longest document {longest}; allowed: more text or a smaller data.seq_len"
        )
    return take_in_turn(rows, limit, seed)


def rows_of_step(step: int, rows: int, rows_per_step: int, seed: int) -> Tensor:
    """Indices of the rows of optimizer step ``step`` (from 0): a seeded permutation in every epoch, whose last
    partial step is left out. A function of its arguments alone, so the position in the data is the step number."""
    steps_per_epoch = rows // rows_per_step
    epoch, position = divmod(step, steps_per_epoch)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return order[position * rows_per_step : (position + 1) * rows_per_step]


def shifted_labels(input_ids: Tensor, ignore_index: int = -100) -> Tensor:
    """``(B, S)`` next-token labels: the token that follows, ``ignore_index`` at the last position of a row."""
    labels = torch.full_like(input_ids, ignore_index)
    labels[:, :-1] = input_ids[:, 1:]
    return labels
