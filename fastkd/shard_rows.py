"""From the sums of all ranks' pieces of a row to the row's loss: what csrc/core does for the pieces of one process
(accumulators.h, finish.h), in torch operations on (P, N) and (N). P ranks, N rows; exponents are base 2.

Every rank computes this from the same numbers in the same order, so that all have the same bits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .options import Options

LOG2E, LN2 = math.log2(math.e), math.log(2)
MIXED = ("forward_kl", "reverse_kl", "symmetric_kl")  # values from the first sweep alone

# Sums over a piece, relative to its own largest logits, or without statistics to what is not far below them; y_s, y_t:
# exponents (logit - largest) log2(e) / T.
FIELDS = (
    "largest_s",
    "largest_t",
    "sum_s",  # of 2^y_s
    "sum_t",
    "dot_t",  # of 2^y_t (y_t - y_s)
    "dot_s",  # of 2^y_s (y_s - y_t)
    "sum_hard",  # of 2^(T y_s): at T = 1
    "label",  # the student's logit at the label; NaN where another rank has it
    "linear_s",  # of y_s
    "entropy_s",  # of 2^y_s y_s
    "entropy_t",
    "top_s",  # column of the largest logit in the whole vocabulary, as an integer of the same width
    "top_t",
)
_EMPTY = {"largest_s": -math.inf, "largest_t": -math.inf, "label": math.nan}
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


def shares(o: Options) -> tuple[float, float]:
    """Weights of KL(teacher || student) and KL(student || teacher) in a mixed divergence."""
    if o.divergence == "symmetric_kl":
        return o.beta, 1 - o.beta
    return (1.0, 0.0) if o.divergence == "forward_kl" else (0.0, 1.0)


def needs_hard(o: Options, has_labels: bool) -> bool:
    """Whether the cross-entropy is in the loss or the statistics."""
    return has_labels and (o.ce_weight != 0 or o.return_stats)


def sent_fields(o: Options, has_labels: bool) -> tuple[str, ...]:
    """What a rank sends of a row."""
    wanted = {"largest_s", "largest_t", "sum_s", "sum_t"}
    if o.divergence in MIXED:
        wanted |= {name for name, share in zip(("dot_t", "dot_s"), shares(o)) if share}
    if needs_hard(o, has_labels):
        wanted |= {"sum_hard", "label"} | ({"linear_s"} if o.label_smoothing else set())
    if o.return_stats:
        wanted |= {"entropy_s", "entropy_t", "top_s", "top_t"}
    return tuple(name for name in FIELDS if name in wanted)


def empty_piece(like: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """(F, N) of a rank without columns."""
    piece = torch.zeros(len(FIELDS), rows, dtype=dtype, device=like.device)
    for name, value in _EMPTY.items():
        piece[FIELDS.index(name)] = value
    return piece


def as_integers(columns: Tensor) -> Tensor:
    """A field that holds columns as the integers that they are."""
    return columns.view(_INTEGERS[columns.dtype])


def finite_reference(largest: Tensor) -> Tensor:
    """A reference that can be subtracted: all masked has none."""
    return torch.where(torch.isneginf(largest), 0.0, largest)


def _where_scaled(scale: Tensor, value: Tensor) -> Tensor:
    """scale * value, and 0 where the scale is 0: what vanishes stays 0 even if infinite."""
    return torch.where(scale == 0, 0.0, scale * value)


def _times(amount: Tensor, shift: Tensor) -> Tensor:
    """An empty sum has nothing to shift."""
    return torch.where(amount == 0, 0.0, amount * shift)


def _top(largest: Tensor, columns: Tensor) -> Tensor:
    """(N): the lowest column of those that hold the largest logit of all ranks."""
    held = largest == largest.amax(0)
    column = as_integers(columns.contiguous())
    return torch.where(held, column, torch.iinfo(column.dtype).max).amin(0)


def merge(pieces: Tensor, fields: tuple[str, ...], t: Tensor | float, widths: Tensor) -> dict[str, Tensor]:
    """The row's sums (N), by name, from the pieces (P, F, N) of all ranks. t: temperature, (N) or a number; widths
    (P, 1): columns of each rank. top_s and top_t are integers."""
    piece = {name: pieces[:, number] for number, name in enumerate(fields)}
    slope = LOG2E / t
    row: dict[str, Tensor] = {name: piece[name].amax(0) for name in ("largest_s", "largest_t")}
    shift_s, shift_t = (
        (piece[name] - finite_reference(row[name])) * slope for name in ("largest_s", "largest_t")
    )  # log2 of what the sums of a rank are short of the row's
    scale_s, scale_t = torch.exp2(shift_s), torch.exp2(shift_t)
    of_s, of_t = piece["sum_s"], piece["sum_t"]
    row["sum_s"], row["sum_t"] = (scale_s * of_s).sum(0), (scale_t * of_t).sum(0)
    if "dot_t" in piece:
        row["dot_t"] = _where_scaled(scale_t, piece["dot_t"] + _times(of_t, shift_t - shift_s)).sum(0)
    if "dot_s" in piece:
        row["dot_s"] = _where_scaled(scale_s, piece["dot_s"] + _times(of_s, shift_s - shift_t)).sum(0)
    if "entropy_s" in piece:
        row["entropy_s"] = _where_scaled(scale_s, piece["entropy_s"] + _times(of_s, shift_s)).sum(0)
        row["entropy_t"] = _where_scaled(scale_t, piece["entropy_t"] + _times(of_t, shift_t)).sum(0)
        row["top_s"] = _top(piece["largest_s"], piece["top_s"])
        row["top_t"] = _top(piece["largest_t"], piece["top_t"])
    if "sum_hard" in piece:
        row["sum_hard"] = (torch.exp2(t * shift_s) * piece["sum_hard"]).sum(0)
    if "label" in piece:
        label = piece["label"]
        elsewhere = torch.isnan(label)
        owners = (~elsewhere).sum(0)  # one, unless the ranks' labels differ
        row["label"] = torch.where(owners == 1, torch.where(elsewhere, 0.0, label).sum(0), math.nan)
    if "linear_s" in piece:
        row["linear_s"] = (piece["linear_s"] + _times(widths.expand_as(shift_s), shift_s)).sum(0)
    return row


class Finished(NamedTuple):
    """Of each row (N)."""

    loss: Tensor  # weighted, not divided
    dlogq: Tensor  # sum of d term / d log q over the vocabulary
    lse: Tensor | None  # of the student at T = 1; None without a cross-entropy
    stats: Tensor | None  # (5, N)


def _kl(dot: Tensor, weight: Tensor, log2_own: Tensor, log2_other: Tensor) -> Tensor:
    return LN2 * (dot / weight - (log2_own - log2_other))


def _mixed(o: Options, row: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Divergence and sum of dlogq: -w - of the forward part, (1 - w) (KL(q || p) + 1) of the other."""
    log2_s, log2_t = torch.log2(row["sum_s"]), torch.log2(row["sum_t"])
    forward, reverse = shares(o)
    value, dlogq = torch.zeros_like(log2_s), torch.full_like(log2_s, -forward)
    if forward:  # a direction of weight 0 is left out: it may be infinite
        value = value + forward * _kl(row["dot_t"], row["sum_t"], log2_t, log2_s)
    if reverse:
        kl = _kl(row["dot_s"], row["sum_s"], log2_s, log2_t)
        value, dlogq = value + reverse * kl, dlogq + reverse * (kl + 1)
    return value, dlogq


def _cross_entropy(o: Options, row: dict[str, Tensor], t: Tensor | float, vocab: int) -> tuple[Tensor, Tensor]:
    """(N) with label smoothing and z-loss, and lse."""
    reference, log2_hard = finite_reference(row["largest_s"]), torch.log2(row["sum_hard"])
    ce = LN2 * log2_hard - (row["label"] - reference)
    if o.label_smoothing:
        uniform = LN2 * (log2_hard - t * row["linear_s"] / vocab)
        ce = (1 - o.label_smoothing) * ce + o.label_smoothing * uniform
    lse = LN2 * log2_hard + row["largest_s"]
    if o.z_loss:
        ce = ce + o.z_loss * lse.square()
    return ce, lse


def _entropy(row: dict[str, Tensor], model: str) -> Tensor:
    total = row[f"sum_{model}"]
    return LN2 * (torch.log2(total) - row[f"entropy_{model}"] / total)


def finish(
    o: Options, row: dict[str, Tensor], terms: Tensor | None, t: Tensor | float, weights: Tensor, vocab: int
) -> Finished:
    """terms (2, N): sums of term and dlogq where the row's sums do not give them; weights (N): of the tokens."""
    nan_or_0 = 0.0 * (row["sum_s"] + row["sum_t"])  # NaN where a logit of the row is NaN or +inf
    divergence, dlogq = _mixed(o, row) if terms is None else (terms[0] + nan_or_0, terms[1] + nan_or_0)
    loss = torch.zeros_like(divergence)
    if o.kd_weight:  # a part of weight 0 is left out: it may be infinite
        loss = o.kd_weight * (t * t if o.scale_by_t2 else 1.0) * divergence
    ce, lse = torch.zeros_like(divergence), None
    if "sum_hard" in row:
        ce, lse = _cross_entropy(o, row, t, vocab)
        if o.ce_weight:
            loss = loss + o.ce_weight * ce
    stats = None
    if o.return_stats:
        agree = (row["top_s"] == row["top_t"]).to(ce.dtype)
        stats = torch.stack((divergence, ce, _entropy(row, "s"), _entropy(row, "t"), agree))
    return Finished(weights * loss, dlogq, lse, stats)
