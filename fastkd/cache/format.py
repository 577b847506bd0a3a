"""What a cache of a teacher is on disk: a folder with index.json, shards, and the teacher's head.

index.json                    format, Spec, head, splits with the record of every whole shard
head.safetensors              weight (V, H), bias (V); hidden states only
tokenizer/                    the teacher's, where the writer was given one
train-00000000.safetensors    rows of the split "train" from row 0 on: input_ids (R, S) int32, and
                              hidden (R, S, H) | ids (R, S, K) int32, logprobs (R, S, K), weights (R, S, K)
lock                          empty; its bytes are claimed by the processes that write
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

FORMAT = 1
INDEX, HEAD, TOKENIZER, LOCK = "index.json", "head.safetensors", "tokenizer", "lock"
KINDS = ("hidden", "topk", "sampled")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class Head(NamedTuple):
    """What makes logits of final hidden states: ``softcap * tanh((hidden @ weight.T + bias) / softcap)``.

    weight: ``(V, H)``. bias: ``(V)`` or None. softcap: None for none.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class Spec:
    """What is stored of which teacher.

    kind: hidden (final hidden states), topk (the K largest log-probabilities) or sampled (K draws).
    dtype: of hidden states or log-probabilities: float16, bfloat16 or float32. Ids are int32.
    width: H of hidden states, K of the others.
    vocab_size: V, columns of the teacher's head.
    model, tokenizer: fingerprints; "" where unknown, which is not compared.
    precision: of the arithmetic that made it, in words.
    temperature: at which log-probabilities were taken; 1 for hidden states.
    proposal_temperature: of the draws, where it is not the temperature; they then carry weights.
    seed: of the draws.
    """

    kind: str
    dtype: str
    width: int
    vocab_size: int
    model: str = ""
    tokenizer: str = ""
    precision: str = "fp32"
    temperature: float = 1.0
    proposal_temperature: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is not known; allowed: {', '.join(KINDS)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is not known; allowed: {', '.join(DTYPES)}")
        for name in ("width", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}; allowed: at least 1")

    def tensors(self, seq_len: int) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Name -> shape of one row and dtype of every tensor in a shard."""
        dtype, wide = DTYPES[self.dtype], torch.Size([seq_len, self.width])
        row = {"input_ids": (torch.Size([seq_len]), torch.int32)}
        if self.kind == "hidden":
            return {**row, "hidden": (wide, dtype)}
        row |= {"ids": (wide, torch.int32), "logprobs": (wide, dtype)}
        return row if self.proposal_temperature is None else {**row, "weights": (wide, torch.float32)}

    def row_bytes(self, seq_len: int) -> int:
        """Bytes of one row of ``seq_len`` tokens."""
        return sum(shape.numel() * dtype.itemsize for shape, dtype in self.tensors(seq_len).values())


@dataclass(frozen=True)
class FileRecord:
    """A file that is whole: its size and the checksum of its bytes."""

    file: str
    bytes: int
    checksum: str


@dataclass(frozen=True)
class Shard(FileRecord):
    """A whole shard. data: fingerprint of the token ids of its rows."""

    rows: int
    data: str


@dataclass
class Split:
    """Rows of one name. data: fingerprint of all token ids. shards: number -> whole shard."""

    rows: int
    seq_len: int
    shard_rows: int
    data: str
    shards: dict[int, Shard] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Shards when it is complete."""
        return -(-self.rows // self.shard_rows)

    def range_of(self, number: int) -> range:
        """Rows of a shard."""
        return range(number * self.shard_rows, min(self.rows, (number + 1) * self.shard_rows))


@dataclass
class Index:
    """index.json. head: its file, None where there is none. softcap: of the head."""

    spec: Spec
    splits: dict[str, Split]
    head: FileRecord | None = None
    softcap: float | None = None

    def to_json(self) -> str:
        """Readable, and one line a shard."""
        splits = {}
        for name, split in self.splits.items():
            fixed = {k: v for k, v in dataclasses.asdict(split).items() if k != "shards"}
            splits[name] = {**fixed, "shards": [dataclasses.asdict(s) for _, s in sorted(split.shards.items())]}
        head = None if self.head is None else dataclasses.asdict(self.head)
        tree = {
            "format": FORMAT,
            "teacher": dataclasses.asdict(self.spec),
            "head": head,
            "softcap": self.softcap,
            "splits": splits,
        }
        return re.sub(r"\{\n\s+(\"file\"[^{}]*?)\n\s+\}", _one_line, json.dumps(tree, indent=1)) + "\n"

    def differences(self, other: Index) -> list[str]:
        """Settings in which another index cannot continue this one, as ``name: here -> there``."""
        ours, theirs = self._fixed(), other._fixed()
        names = sorted(ours.keys() | theirs.keys())
        return [f"{n}: {ours.get(n)!r} -> {theirs.get(n)!r}" for n in names if ours.get(n) != theirs.get(n)]

    def _fixed(self) -> dict[str, Any]:
        fixed: dict[str, Any] = {**dataclasses.asdict(self.spec), "softcap": self.softcap}
        for name, split in self.splits.items():
            for key in ("rows", "seq_len", "shard_rows", "data"):
                fixed[f"{name}.{key}"] = getattr(split, key)
        return fixed


def _one_line(match: re.Match) -> str:
    return "{" + re.sub(r"\n\s+", " ", match[1]) + "}"


def shard_name(split: str, first_row: int) -> str:
    """File of a shard."""
    return f"{split}-{first_row:08d}.safetensors"


def check_split_name(name: str) -> None:
    """Names go into file names."""
    if not re.fullmatch(r"[A-Za-z0-9_]+", name):
        raise ValueError(f"split {name!r}; allowed: letters, digits and _")


def read_index(folder: Path) -> Index:
    """The index of a cache.

    Raises:
        ValueError: there is none, or of another format, or it is damaged.
    """
    path = folder / INDEX
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} is no teacher cache: it has no {INDEX}; allowed: a folder that "
                         "fastkd cache-teacher wrote")  # fmt: skip
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        came = tree.get("format") if isinstance(tree, dict) else type(tree).__name__
        raise ValueError(f"{path} has format {came!r}; allowed: {FORMAT}")
    try:
        return _from_tree(tree)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__} {error}") from None


def _from_tree(tree: dict[str, Any]) -> Index:
    splits = {}
    for name, entry in tree["splits"].items():
        split = Split(**{**entry, "shards": {}})
        for record in entry["shards"]:
            shard = Shard(**record)
            first = int(re.fullmatch(r".*-(\d+)\.safetensors", shard.file)[1])  # type: ignore[index]
            split.shards[first // split.shard_rows] = shard
        splits[name] = split
    head = None if tree["head"] is None else FileRecord(**tree["head"])
    return Index(Spec(**tree["teacher"]), splits, head, tree["softcap"])
