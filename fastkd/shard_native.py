"""The parts of a shard's rows by the extension's operators torch.ops.fastkd.shard_*, or by others of the same
schemas whose names begin with a prefix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .shard_eager import Piece, Row
from .shard_rows import FIELDS

_OF_THE_ROW = FIELDS[: FIELDS.index("sum_hard") + 1]  # then dlogq, scale, owned


def _arguments(piece: Piece, vocab: int) -> tuple:
    o, shard = piece.options, piece.shard
    return (
        piece.teacher, piece.labels, piece.temperatures, piece.scalars, o.divergence, o.scale_by_t2, o.return_stats,
        shard.start, shard.width, vocab,
    )  # fmt: skip


def _rows(piece: Piece, sums: dict[str, Tensor], *rest: Tensor | None) -> Tensor:
    """(10, N): what the kernels know a whole row by; 0 what they do not need."""
    nothing = torch.zeros_like(sums["sum_s"])
    given = [sums.get(name, nothing) for name in _OF_THE_ROW]
    return torch.stack([*given, *(nothing if x is None else x.to(nothing.dtype) for x in rest)])


def _operator(prefix: str, name: str) -> Callable[..., Any]:
    return getattr(torch.ops.fastkd, f"{prefix}shard_{name}")


def sums(piece: Piece, prefix: str = "") -> Tensor:
    """(F, N), in the order of FIELDS."""
    found = _operator(prefix, "sums")(piece.student, *_arguments(piece, piece.shard.stop))
    if piece.hard:  # the kernels read some column's logit where the label is elsewhere
        assert piece.owned is not None
        found[FIELDS.index("label")].masked_fill_(~piece.owned, torch.nan)
    return found


def terms(piece: Piece, row: dict[str, Tensor], prefix: str = "") -> Tensor:
    """(2, N): sums of term and dlogq over the piece."""
    rows = _rows(piece, row, None, None, None)
    return _operator(prefix, "terms")(piece.student, *_arguments(piece, piece.shard.stop), rows)


def gradient(piece: Piece, row: Row, into: Tensor | None, prefix: str = "") -> Tensor:
    """(..., C) in the student's dtype: over the student's logits where ``into`` is them."""
    rows = _rows(piece, row.sums, row.dlogq, row.scale, piece.owned)
    arguments = (*_arguments(piece, row.vocab), rows)
    if into is None:
        return _operator(prefix, "gradient")(piece.student, *arguments)
    _operator(prefix, "gradient_")(piece.student, *arguments)
    return into
