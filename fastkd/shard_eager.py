"""The parts of a shard's rows by torch operations: any device, up to fp64. Each materialises its share of N x V.

Every backend brings the same three: sums of a piece, sums of its terms given the row, its gradient given the row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .eager import divergence_slopes, divergence_terms, softcapped
from .options import Options
from .shard import VocabShard, accumulator_dtype
from .shard_rows import FIELDS, LN2, LOG2E, as_integers, finite_reference


class Piece(NamedTuple):
    """A rank's columns of N rows, at least one of them real."""

    student: Tensor  # (..., C), C >= the shard's width: what is beyond is padding
    teacher: Tensor  # (..., C')
    labels: Tensor | None  # (N) int64: column of the shard; 0 where another rank has it, -1 at ignored rows
    owned: Tensor | None  # (N) bool: the label is here
    temperatures: Tensor | None  # (N), else the options' number
    scalars: Tensor  # the options' numbers, as for kd_forward
    options: Options
    shard: VocabShard
    hard: bool  # a cross-entropy is asked for


class Row(NamedTuple):
    """What the gradient of a piece needs of its rows (N)."""

    sums: dict[str, Tensor]  # of shard_rows.merge
    terms: Tensor | None  # (2, N)
    dlogq: Tensor
    lse: Tensor | None
    scale: Tensor  # of the row's loss in the total, known before backward; 0 at ignored rows
    vocab: int


def _columns(piece: Piece, x: Tensor, softcap: float | None) -> Tensor:
    """(N, width) in the accumulators' dtype, softcapped; 0 at ignored rows."""
    x = x.reshape(-1, x.shape[-1])[:, : piece.shard.width]
    x = x.to(accumulator_dtype(piece.student.dtype, piece.teacher.dtype))
    if piece.labels is not None:
        x = torch.where((piece.labels >= 0).unsqueeze(1), x, 0.0)
    return softcapped(x, softcap)


def _both(piece: Piece) -> tuple[Tensor, Tensor]:
    o = piece.options
    return _columns(piece, piece.student, o.student_softcap), _columns(piece, piece.teacher, o.teacher_softcap)


def _temperature(piece: Piece, dtype: torch.dtype) -> Tensor | float:
    """A number, or (N, 1)."""
    if piece.temperatures is None:
        return piece.options.temperature
    return piece.temperatures.to(dtype).unsqueeze(1)


def _exponents(logits: Tensor, largest: Tensor, t: Tensor | float) -> Tensor:
    return (logits - finite_reference(largest).unsqueeze(1)) * (LOG2E / t)


def _weighed(weight: Tensor, value: Tensor) -> Tensor:
    return torch.where(weight > 0, weight * value, torch.where(weight == 0, 0.0, weight)).sum(1)


def sums(piece: Piece) -> Tensor:
    """(F, N), in the order of FIELDS."""
    student, teacher = _both(piece)
    t = _temperature(piece, student.dtype)
    largest_s, largest_t = student.amax(1), teacher.amax(1)
    y_s, y_t = _exponents(student, largest_s, t), _exponents(teacher, largest_t, t)
    e_s, e_t, ratio = torch.exp2(y_s), torch.exp2(y_t), y_t - y_s
    out = {
        "largest_s": largest_s, "largest_t": largest_t, "sum_s": e_s.sum(1), "sum_t": e_t.sum(1),
        "dot_t": _weighed(e_t, ratio), "dot_s": _weighed(e_s, -ratio),
    }  # fmt: skip
    if piece.hard:
        assert piece.labels is not None and piece.owned is not None
        out["sum_hard"] = torch.exp2(t * y_s).sum(1)
        at_label = student.gather(1, piece.labels.clamp(min=0).unsqueeze(1)).squeeze(1)
        out["label"] = torch.where(piece.owned, at_label, torch.nan)
        out["linear_s"] = y_s.sum(1)
    if piece.options.return_stats:
        out["entropy_s"], out["entropy_t"] = _weighed(e_s, y_s), _weighed(e_t, y_t)
    result = torch.zeros(len(FIELDS), student.shape[0], dtype=student.dtype, device=student.device)
    for name, value in out.items():
        result[FIELDS.index(name)] = value
    if piece.options.return_stats:
        for name, x in (("top_s", student), ("top_t", teacher)):
            as_integers(result)[FIELDS.index(name)] = x.argmax(1) + piece.shard.start
    return result


def _log_probabilities(piece: Piece, row: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """ln p and ln q over the whole vocabulary, of this shard's columns."""
    student, teacher = _both(piece)
    t = _temperature(piece, student.dtype)
    logs = []
    for logits, model in ((teacher, "t"), (student, "s")):
        y = _exponents(logits, row[f"largest_{model}"], t)
        logs.append(LN2 * (y - torch.log2(row[f"sum_{model}"]).unsqueeze(1)))
    return logs[0], logs[1]


def terms(piece: Piece, row: dict[str, Tensor]) -> Tensor:
    """(2, N): sums of term and dlogq over the piece."""
    arguments = (piece.options.divergence, piece.options.beta, *_log_probabilities(piece, row))
    return torch.stack((divergence_terms(*arguments).sum(1), divergence_slopes(*arguments).sum(1)))


def gradient(piece: Piece, row: Row, into: Tensor | None) -> Tensor:
    """(..., C) in the student's dtype: written ``into`` where that is given, else a new tensor."""
    o, scale = piece.options, row.scale.unsqueeze(1)
    lp, lq = _log_probabilities(piece, row.sums)
    t = _temperature(piece, lq.dtype)
    total = torch.zeros_like(lq)
    if o.kd_weight:
        slopes = divergence_slopes(o.divergence, o.beta, lp, lq)
        weight = scale * o.kd_weight * (t if o.scale_by_t2 else 1 / t)
        q = lq.exp()
        total = weight * (slopes - torch.where(q == 0, 0.0, q * row.dlogq.unsqueeze(1)))
    student = _columns(piece, piece.student, o.student_softcap)
    if piece.hard and o.ce_weight:
        total = total + _hard_gradient(piece, row, student, scale)
    if o.student_softcap is not None:
        slope = 1 - (student / o.student_softcap).square()
        total = total * torch.where(torch.isneginf(student), 1.0, slope)
    if into is None:
        into = torch.empty_like(piece.student, memory_format=torch.contiguous_format)
    width = piece.shard.width
    into[..., width:] = 0
    into[..., :width] = total.view(*into.shape[:-1], width)
    return into


def _hard_gradient(piece: Piece, row: Row, student: Tensor, scale: Tensor) -> Tensor:
    """Of the cross-entropy, with its weight."""
    o = piece.options
    assert piece.labels is not None and piece.owned is not None and row.lse is not None
    h = torch.exp2((student - finite_reference(row.sums["largest_s"]).unsqueeze(1)) * LOG2E)
    pull = h / row.sums["sum_hard"].unsqueeze(1) * (1 + 2 * o.z_loss * row.lse.unsqueeze(1))
    own = (piece.owned.to(pull.dtype) * (1 - o.label_smoothing)).unsqueeze(1)
    out = (pull - o.label_smoothing / row.vocab).scatter_add_(1, piece.labels.clamp(min=0).unsqueeze(1), -own)
    return scale * o.ce_weight * out
