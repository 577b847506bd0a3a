"""All ranks of a vocabulary in one process, one after the other: for kernels that only run there, and planted bugs.

A rank runs until an exchange that the others have not come to yet, is left there, and runs again from its beginning
when they have; what its backend computed of its piece is not computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor

from fastkd import shard_loss, shard_ops
from fastkd.shard_exchange import ShardMap

T = TypeVar("T")


class _Waiting(Exception):
    """Of a rank, for the others."""


class _Group:
    """What the ranks have sent, and which of them runs."""

    def __init__(self, shards: Sequence[tuple[int, int]]) -> None:
        self.map = ShardMap(max(stop for _, stop in shards), tuple(stop - start for start, stop in shards))
        self.sent: list[dict[int, Tensor]] = []  # exchange -> rank -> its rows
        self.rank = self.exchange = 0
        self.computed: dict[tuple[str, int], Any] = {}

    def agree(self, *_: Any, **__: Any) -> ShardMap:
        return self.map

    def gather(self, _group: Any, _shard: Any, _common: Any, rows: Tensor, first: bool) -> tuple[Tensor, None]:
        assert first == (self.exchange == 0)
        if self.exchange == len(self.sent):
            self.sent.append({})
        everyone = self.sent[self.exchange]
        everyone[self.rank] = rows.clone()
        self.exchange += 1
        if len(everyone) < len(self.map.widths):
            raise _Waiting
        return torch.stack([everyone[rank] for rank in range(len(everyone))]), None

    def once(self, part: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The part of a backend, computed once a rank."""

        def computed(*arguments: Any) -> Tensor:
            key = (getattr(part, "func", part).__name__, self.rank)
            if key not in self.computed:
                self.computed[key] = part(*arguments)
            return self.computed[key]

        return computed


def run_ranks(run: Callable[[int], T], shards: Sequence[tuple[int, int]]) -> list[T]:
    """``run(rank)`` of every rank, which makes one call of ``kd_loss`` with its ``VocabShard`` of ``shards``."""
    group, results = _Group(shards), {}
    parts = {
        name: p._replace(sums=group.once(p.sums), terms=group.once(p.terms)) for name, p in shard_ops.registered.items()
    }
    patched: dict[str, Any] = {"_group_named": lambda _: None, "agree": group.agree, "gather": group.gather}
    with (
        mock.patch.multiple(shard_ops, registered=parts, **patched),
        mock.patch.object(shard_loss, "group_of", lambda _: SimpleNamespace(group_name="ranks of one process")),
    ):
        while len(results) < len(shards):
            for rank in range(len(shards)):
                group.rank, group.exchange = rank, 0
                try:
                    results[rank] = results[rank] if rank in results else run(rank)
                except _Waiting:
                    continue
    return [results[rank] for rank in range(len(shards))]
