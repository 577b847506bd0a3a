"""Writing a cache: shard by shard, by any number of processes, each of which may be killed at any moment.

A shard is written under a hidden name, synced, renamed, and only then entered into the index, which is replaced in one
move. So what the index names is whole, and a kill loses the shards that were being written and nothing else.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from .. import files
from .fingerprint import checksum, checksum_file, data_fingerprint
from .format import (
    HEAD,
    INDEX,
    LOCK,
    TOKENIZER,
    FileRecord,
    Head,
    Index,
    Shard,
    Spec,
    Split,
    check_split_name,
    read_index,
    shard_name,
)  # fmt: skip
from .locks import Locks

SHARD_BYTES = 128_000_000  # the most that a kill loses; large enough that files and syncs cost nothing
SHARDS = 16  # of a split that is smaller than that many such shards, so that several processes and a kill have parts
WAIT_S = 0.1  # between two looks at shards that other processes are writing
HEADER_BYTES = 1000  # of a safetensors file, at most, with its line in the index
TOKENIZER_BYTES = 32_000_000

# (split, number of the first row, input_ids (R, S) int64) -> every tensor of Spec.tensors but input_ids, (R, ...)
Compute = Callable[[str, int, Tensor], Mapping[str, Tensor]]


class CacheWriter:
    """One pass of a teacher into a folder.

    Args:
        folder: new, or with a part of the same cache.
        splits: name -> ``(R, S)`` packed token ids.
        spec: what is stored.
        head: of the teacher, for hidden states.
        shard_rows: rows in a file; default 128 MB of them, fewer where there are few.

    Raises:
        ValueError: an argument that does not fit.
    """

    def __init__(
        self,
        folder: Path,
        splits: Mapping[str, Tensor],
        spec: Spec,
        *,
        head: Head | None = None,
        shard_rows: int | None = None,
    ) -> None:
        self.folder, self.splits, self.spec = Path(folder), dict(splits), spec
        _check(self.splits, spec, head, shard_rows)
        self._head = None if head is None else {
            name: narrowest(x) for name, x in (("weight", head.weight), ("bias", head.bias)) if x is not None
        }  # fmt: skip
        planned = {name: self._plan(ids, shard_rows) for name, ids in self.splits.items()}
        self.index = Index(spec, planned, softcap=None if head is None else head.softcap)
        # in the order in which they are written, and by which they are claimed
        self._shards = [(name, number) for name, split in planned.items() for number in range(split.count)]
        self._locks: Locks | None = None

    def _plan(self, ids: Tensor, shard_rows: int | None) -> Split:
        rows, seq_len = ids.shape
        if shard_rows is None:
            shard_rows = max(1, min(SHARD_BYTES // self.spec.row_bytes(seq_len), -(-rows // SHARDS)))
        return Split(rows, seq_len, shard_rows, data_fingerprint(ids))

    def predicted(self) -> dict[str, int]:
        """Bytes by what they are for, at the worst moment."""
        sizes = {
            name: split.rows * self.spec.row_bytes(split.seq_len) + split.count * HEADER_BYTES
            for name, split in self.index.splits.items()
        }
        if self._head:
            sizes["head"] = sum(x.numel() * x.element_size() for x in self._head.values()) + HEADER_BYTES
        return sizes

    def done_rows(self) -> int:
        """Rows in shards that are whole, whoever wrote them."""
        return sum(shard.rows for split in self.index.splits.values() for shard in split.shards.values())

    def open(self, fill_tokenizer: Callable[[Path], object] | None = None, repair: bool = False) -> None:
        """Begin the folder, or join what is there; nothing is written where it does not fit.

        Args:
            fill_tokenizer: writes the tokenizer into a folder.
            repair: compare the checksums of the shards that are there, and write again those that are damaged. One
                that is missing or of another size always is.

        Raises:
            ValueError: the folder holds something else, or the disk is too small.
        """
        self._check_folder()
        present = sum(f.stat().st_size for f in self.folder.rglob("*") if f.is_file()) if self.folder.exists() else 0
        self._check_disk(present, TOKENIZER_BYTES if fill_tokenizer else 0)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._locks = Locks(self.folder / LOCK)
            with self._locks.whole_folder():
                if (self.folder / INDEX).exists():
                    self._join(repair)
                else:
                    self._begin(fill_tokenizer)
        except OSError as error:
            raise ValueError(f"{str(self.folder)!r} cannot be written: {error}") from None

    def run(self, compute: Compute, report: Callable[[int], None] = lambda rows: None) -> None:
        """Write what is missing; returns when every shard is whole, whoever wrote it.

        Args:
            compute: the teacher.
            report: told the rows that are done, after each shard.

        Raises:
            ValueError: a shard that could not be written, or that ``compute`` got wrong; those before it are whole.
        """
        assert self._locks is not None, "open() comes first"
        try:
            self._write_missing(self._locks, compute, report)
        finally:
            self._locks.close()

    def _write_missing(self, locks: Locks, compute: Compute, report: Callable[[int], None]) -> None:
        while missing := [entry for entry in enumerate(self._shards) if not self._is_whole(*entry[1])]:
            wrote = False
            for claim, (name, number) in missing:
                if not locks.try_claim(claim):
                    continue
                self._refresh()  # another process may have finished it since
                if not self._is_whole(name, number):
                    self._write_shard(name, number, compute)
                    wrote = True
                locks.give_back(claim)
                report(self.done_rows())
            if not wrote:
                time.sleep(WAIT_S)
                self._refresh()

    def _is_whole(self, name: str, number: int) -> bool:
        return number in self.index.splits[name].shards

    def _refresh(self) -> None:
        self.index = read_index(self.folder)

    def _check_folder(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{str(self.folder)!r} is a file; allowed: a folder, new or with a part of this cache")
        if not self.folder.exists() or (self.folder / INDEX).exists():
            return
        ours = {HEAD, TOKENIZER, LOCK}  # an index comes last, so a kill leaves these without one
        other = [f.name for f in self.folder.iterdir() if f.name not in ours and not f.name.startswith(files.PART)]
        if other:
            raise ValueError(
                f"{str(self.folder)!r} holds {other[0]!r} and is no cache; allowed: a new or empty folder, or one with "
                "a part of this cache"
            )

    def _check_disk(self, present: int, tokenizer: int) -> None:
        sizes = self.predicted()
        place = next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())
        needed, free = sum(sizes.values()) + tokenizer - present, shutil.disk_usage(place).free
        if needed > free:
            parts = ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in sizes.items())
            raise ValueError(
                f"{str(self.folder)!r} has {free / 1e6:,.1f} MB free and the cache needs {needed / 1e6:,.1f} MB more "
                f"({parts}); allowed: a disk with more space, fewer rows, or less of each (kind, k, dtype)"
            )

    def _join(self, repair: bool) -> None:
        there = read_index(self.folder)
        if differing := there.differences(self.index):
            raise ValueError(
                f"{str(self.folder)!r} holds a cache that was begun with other settings: {'; '.join(differing)}; "
                "allowed: the same ones, or another folder"
            )
        self.index = there
        before = there.to_json()
        for split in there.splits.values():
            for number, shard in list(split.shards.items()):
                if not _is_as_recorded(self.folder, shard, repair):
                    del split.shards[number]
        if there.head and self._head and not _is_as_recorded(self.folder, there.head, repair):
            there.head = self._store(HEAD, safetensors.torch.save(self._head))
        if there.to_json() != before:
            files.write_text(self.folder / INDEX, there.to_json())

    def _begin(self, fill_tokenizer: Callable[[Path], object] | None) -> None:
        """Everything that comes once; the index last."""
        files.remove_parts(self.folder)
        if fill_tokenizer:
            files.write_folder(self.folder / TOKENIZER, fill_tokenizer)
        if self._head:
            self.index.head = self._store(HEAD, safetensors.torch.save(self._head))
        files.write_text(self.folder / INDEX, self.index.to_json())

    def _store(self, name: str, data: bytes) -> FileRecord:
        try:
            files.write_bytes(self.folder / name, data)
        except OSError as error:
            free = shutil.disk_usage(self.folder).free
            raise ValueError(
                f"{self.folder / name} cannot be written: {error.strerror} ({len(data) / 1e6:,.1f} MB, "
                f"{free / 1e6:,.1f} MB free); what the index names is whole, and the same command goes on after it"
            ) from None
        return FileRecord(name, len(data), checksum(data))

    def _write_shard(self, name: str, number: int, compute: Compute) -> None:
        rows = self.index.splits[name].range_of(number)
        ids = self.splits[name][rows.start : rows.stop]
        tensors = {"input_ids": ids, **compute(name, rows.start, ids)}
        stored = {}
        for key, (shape, dtype) in self.spec.tensors(ids.shape[1]).items():
            stored[key] = tensors[key].to("cpu", dtype).contiguous()
            if stored[key].shape != (len(rows), *shape):
                raise ValueError(
                    f"compute gave {key} of {tuple(stored[key].shape)}; allowed: {(len(rows), *shape)} for these rows"
                )
        if self.spec.kind == "hidden" and not torch.isfinite(stored["hidden"]).all():
            raise ValueError(
                f"the teacher's hidden states do not fit {self.spec.dtype} in rows {rows.start}-{rows.stop - 1} of "
                f"{name}; allowed: dtype=bfloat16 or float32, or no cache of hidden states"
            )
        record = self._store(shard_name(name, rows.start), safetensors.torch.save(stored))
        shard = Shard(record.file, record.bytes, record.checksum, len(rows), data_fingerprint(ids))
        assert self._locks is not None
        with self._locks.whole_folder():
            self._refresh()
            self.index.splits[name].shards[number] = shard
            try:
                files.write_text(self.folder / INDEX, self.index.to_json())
            except OSError as error:
                raise ValueError(
                    f"{self.folder / INDEX} cannot be written: {error.strerror}; it is as it was"
                ) from None


def _is_as_recorded(folder: Path, record: FileRecord, by_checksum: bool) -> bool:
    path = folder / record.file
    if not path.is_file() or path.stat().st_size != record.bytes:
        return False
    return not by_checksum or checksum_file(path) == record.checksum


def narrowest(x: Tensor) -> Tensor:
    """The tensor on the CPU in a 16-bit dtype that holds every value of it, or in its own."""
    x = x.detach().cpu().contiguous()
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(x.to(dtype).to(x.dtype), x):
            return x.to(dtype)
    return x


def _check(splits: dict[str, Tensor], spec: Spec, head: Head | None, shard_rows: int | None) -> None:
    for name, ids in splits.items():
        check_split_name(name)
        if ids.dim() != 2 or 0 in ids.shape or ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"splits[{name!r}] must be (R, S) token ids; got {tuple(ids.shape)} {ids.dtype}")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= spec.vocab_size:
            raise ValueError(f"splits[{name!r}] has ids {low} to {high}; allowed: 0 to {spec.vocab_size - 1}")
    if shard_rows is not None and shard_rows < 1:
        raise ValueError(f"shard_rows={shard_rows}; allowed: at least 1, or None")
    if (spec.kind == "hidden") != (head is not None):
        raise ValueError(f"head={'None' if head is None else 'given'} with kind={spec.kind!r}; allowed: a head with "
                         "kind='hidden', none with the others")  # fmt: skip
    if head is not None and head.weight.shape != (spec.vocab_size, spec.width):
        raise ValueError(f"head.weight is {tuple(head.weight.shape)}; allowed: {(spec.vocab_size, spec.width)}")
    if spec.kind == "topk" and spec.width > spec.vocab_size:
        raise ValueError(f"k={spec.width}; allowed: 1 to {spec.vocab_size}, the vocabulary")
