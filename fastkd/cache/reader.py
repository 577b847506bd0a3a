"""Reading a cache: files mapped into memory, rows in any order, in any process.

Sizes of all shards are looked at on opening, which catches at once what was cut off or is missing. The checksum of a
shard is compared when a process first touches it; or that of all by :meth:`TeacherCache.verify`, and then by no process
that was forked or handed the cache afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset

from ..topk import TopKTeacher
from .fingerprint import checksum_file, data_fingerprint
from .format import HEAD, FileRecord, Head, Index, Shard, Split, read_index

MOST_OPEN = 64  # shards mapped at a time by a data set of a process
_REMEDY = "the command that made it makes it again, with --repair true"


class TeacherCache:
    """A finished cache.

    Args:
        folder: what ``fastkd cache-teacher`` or :class:`fastkd.cache.CacheWriter` wrote.
        model: fingerprint of the model that it must be of; None: not compared.
        tokenizer: likewise.

    Raises:
        ValueError: not a cache, not finished, of another model or tokenizer, or a file that is missing or has another
            size; the message names the file.
    """

    def __init__(self, folder: str | Path, *, model: str | None = None, tokenizer: str | None = None) -> None:
        self.folder = Path(folder)
        self.index: Index = read_index(self.folder)
        self.spec = self.index.spec
        self.check_made_with("model", model)
        self.check_made_with("tokenizer", tokenizer)
        for name, split in self.index.splits.items():
            if len(split.shards) < split.count:
                raise ValueError(
                    f"cache {str(self.folder)!r} is not finished: {len(split.shards)} of {split.count} shards of "
                    f"{name!r}; allowed: a finished one; the command that began it goes on with it"
                )
        for record in self._records():
            _check_size(self.folder, record)
        self._verified: set[str] = set()

    def check_made_with(self, what: Literal["model", "tokenizer"], fingerprint: str | None) -> None:
        """Refuse a cache of another; None is not compared.

        Raises:
            ValueError: with both fingerprints.
        """
        ours = getattr(self.spec, what)
        if fingerprint is not None and ours and ours != fingerprint:
            raise ValueError(
                f"cache {str(self.folder)!r} was made with the {what} {ours}; got the {what} {fingerprint}; "
                "allowed: the one that it was made with"
            )

    def _records(self) -> list[FileRecord]:
        shards = [shard for split in self.index.splits.values() for _, shard in sorted(split.shards.items())]
        return [*([self.index.head] if self.index.head else []), *shards]

    def verify(self, report: Callable[[int], None] = lambda count: None) -> None:
        """Compare the checksum of every file; ``report`` is told their bytes, file by file.

        Raises:
            ValueError: a file whose bytes are not those that were written; the message names it.
        """
        for record in self._records():
            self.touch(record)
            report(record.bytes)

    def touch(self, record: FileRecord) -> None:
        """Compare the checksum of a file, once a process."""
        if record.file in self._verified:
            return
        _check_size(self.folder, record)
        came = checksum_file(self.folder / record.file)
        if came != record.checksum:
            raise ValueError(
                f"{self.folder / record.file} is damaged: its checksum is {came}; allowed: {record.checksum}, that of "
                f"what was written; {_REMEDY}"
            )
        self._verified.add(record.file)

    def head(self) -> Head:
        """The teacher's head.

        Raises:
            ValueError: the cache is of another kind, or the file is damaged.
        """
        if self.index.head is None:
            raise ValueError(
                f"cache {str(self.folder)!r} is of kind {self.spec.kind!r} and has no head; allowed: hidden"
            )
        self.touch(self.index.head)
        tensors = load_file(self.folder / HEAD)
        return Head(tensors["weight"], tensors.get("bias"), self.index.softcap)

    def rows(self, split: str, input_ids: Tensor | None = None) -> CachedRows:
        """The rows of a split.

        Args:
            split: its name.
            input_ids: ``(R, S)`` the tokens that its first R rows must be of. None: not compared.

        Raises:
            ValueError: there is no such split, or a shard of it is of other tokens.
        """
        if split not in self.index.splits:
            names = ", ".join(map(repr, self.index.splits))
            raise ValueError(f"cache {str(self.folder)!r} has no split {split!r}; allowed: {names}")
        rows = CachedRows(self, split)
        if input_ids is not None:
            rows.check_data(input_ids)
        return rows

    def teacher(
        self, batch: dict[str, Tensor], tail: Literal["bucket", "renormalize"] = "bucket", device: Any = None
    ) -> TopKTeacher:
        """What :func:`fastkd.sparse_kd_loss` takes, of a batch of rows ``(B, S, K)``.

        tail: of a cache of kind topk, which both are good for; draws are "sampled".
        """
        if self.spec.kind == "hidden":
            raise ValueError(f"cache {str(self.folder)!r} holds hidden states; allowed: kind topk or sampled")
        weights = batch.get("weights")
        found = TopKTeacher(
            batch["ids"], batch["logprobs"], tail if self.spec.kind == "topk" else "sampled",
            weights=weights, temperature=self.spec.temperature,
        )  # fmt: skip
        return found if device is None else found.to(device)


class CachedRows(Dataset):
    """Rows of a split, as a data set for :class:`torch.utils.data.DataLoader` with any sampler and workers.

    A row is ``input_ids (S)`` int64 and ``hidden (S, H)``, or ``ids (S, K)`` int32 with ``logprobs (S, K)`` and, where
    the draws have them, ``weights (S, K)``. Files are opened by each process when it first needs them.
    """

    def __init__(self, cache: TeacherCache, split: str) -> None:
        self.cache, self.name = cache, split
        self.split: Split = cache.index.splits[split]
        self._open: dict[int, Any] = {}
        self._owner = 0

    def __len__(self) -> int:
        return self.split.rows

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "_owner": 0}  # what is open stays with its process

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {self.name!r}; allowed: {-len(self)} to {len(self) - 1}")
        number, within = divmod(int(row) % len(self), self.split.shard_rows)
        shard = self._shard(number)
        tensors = {key: shard.get_slice(key)[within] for key in self.cache.spec.tensors(self.split.seq_len)}
        return {**tensors, "input_ids": tensors["input_ids"].long()}

    def batch(self, rows: Sequence[int] | Tensor) -> dict[str, Tensor]:
        """Some rows, stacked: ``(B, ...)``."""
        found = [self[int(row)] for row in rows]
        # autocast on the CPU refuses to stack fp16
        with torch.autocast("cpu", enabled=False):
            return {key: torch.stack([row[key] for row in found]) for key in found[0]}

    def check_data(self, input_ids: Tensor) -> None:
        """Refuse a cache of other tokens.

        Raises:
            ValueError: naming the first shard that is of others.
        """
        where = f"split {self.name!r} of cache {str(self.cache.folder)!r}"
        rows, seq_len = input_ids.shape
        if seq_len != self.split.seq_len or rows > self.split.rows:
            raise ValueError(
                f"{where} has {self.split.rows} rows of {self.split.seq_len} tokens; got {rows} rows of {seq_len}; "
                "allowed: the rows that it was made of, or the first of them"
            )
        for number in range(-(-rows // self.split.shard_rows)):
            span, shard = self.split.range_of(number), self.split.shards[number]
            ours = input_ids[span.start : span.stop]
            whole = len(ours) == shard.rows
            theirs = shard.data if whole else data_fingerprint(self._shard(number).get_slice("input_ids")[: len(ours)])
            if (came := data_fingerprint(ours)) != theirs:
                raise ValueError(
                    f"{where} was made of other text: rows {span.start}-{span.start + len(ours) - 1} in {shard.file} "
                    f"have the data fingerprint {theirs}; got {came}; "
                    "allowed: the same text, tokenizer, row length and seed"
                )

    def _shard(self, number: int) -> Any:
        if self._owner != os.getpid():  # forked: what the parent has open is not ours to use
            self._open, self._owner = {}, os.getpid()
        if number not in self._open:
            record: Shard = self.split.shards[number]
            self.cache.touch(record)
            if len(self._open) >= MOST_OPEN:
                del self._open[next(iter(self._open))]
            self._open[number] = safe_open(self.cache.folder / record.file, framework="pt")
        return self._open[number]


def _check_size(folder: Path, record: FileRecord) -> None:
    path = folder / record.file
    came = f"{path.stat().st_size} bytes" if path.is_file() else "nothing"
    if came != f"{record.bytes} bytes":
        raise ValueError(
            f"{path} is damaged: found {came}; allowed: the {record.bytes} bytes that were written; {_REMEDY}"
        )
