"""The pieces of a row in memory: (rows, splits, FIELDS) fp32, written by the programs of the first sweep, merged by all
later ones in the same order."""

from __future__ import annotations

import triton
import triton.language as tl

from .row import HARD, Piece, collapsed, empty_piece, has

FIELDS = tl.constexpr(16)  # 64 bytes: the fields of Piece in their order, then the label's logit
LABEL_FIELD = tl.constexpr(13)
MAX_PIECES = tl.constexpr(64)  # per row


@triton.jit
def store_piece(at, p, label_logit, asked, DIVERGENCE: tl.constexpr, FULL: tl.constexpr):
    tl.store(at + 0, p.largest_s)
    tl.store(at + 1, p.largest_t)
    tl.store(at + 2, p.sum_s)
    tl.store(at + 3, p.sum_t)
    if DIVERGENCE == "forward_kl" or DIVERGENCE == "symmetric_kl":
        tl.store(at + 5, p.dot_t)
    if DIVERGENCE == "reverse_kl" or DIVERGENCE == "symmetric_kl":
        tl.store(at + 6, p.dot_s)
    if FULL:
        tl.store(at + 9, p.entropy_s)
        tl.store(at + 10, p.entropy_t)
        tl.store(at + 11, p.top_s.to(tl.float32, bitcast=True))
        tl.store(at + 12, p.top_t.to(tl.float32, bitcast=True))
    if has(asked, HARD):
        tl.store(at + 4, p.sum_hard)
        tl.store(at + 7, p.linear_s)
        tl.store(at + 8, p.columns)
        tl.store(at + LABEL_FIELD, label_logit)


@triton.jit
def merged_pieces(at, count, soft, asked, DIVERGENCE: tl.constexpr, FULL: tl.constexpr):
    """The sums of a row from those of its `count` pieces at `at`."""
    lane = tl.arange(0, MAX_PIECES)
    given, field = lane < count, at + lane * FIELDS
    p = empty_piece(MAX_PIECES)
    largest_s = tl.load(field, mask=given, other=float("-inf"))
    largest_t = tl.load(field + 1, mask=given, other=float("-inf"))
    sum_s, sum_t = tl.load(field + 2, mask=given, other=0.0), tl.load(field + 3, mask=given, other=0.0)
    dot_t, dot_s, entropy_s, entropy_t = p.dot_t, p.dot_s, p.entropy_s, p.entropy_t
    top_s, top_t = p.top_s, p.top_t
    if DIVERGENCE == "forward_kl" or DIVERGENCE == "symmetric_kl":
        dot_t = tl.load(field + 5, mask=given, other=0.0)
    if DIVERGENCE == "reverse_kl" or DIVERGENCE == "symmetric_kl":
        dot_s = tl.load(field + 6, mask=given, other=0.0)
    if FULL:
        entropy_s = tl.load(field + 9, mask=given, other=0.0)
        entropy_t = tl.load(field + 10, mask=given, other=0.0)
        top_s = tl.load(field + 11, mask=given, other=0.0).to(tl.int32, bitcast=True)
        top_t = tl.load(field + 12, mask=given, other=0.0).to(tl.int32, bitcast=True)
    hard = lane < tl.where(has(asked, HARD), count, 0)
    sum_hard = tl.load(field + 4, mask=hard, other=0.0)
    linear_s, columns = tl.load(field + 7, mask=hard, other=0.0), tl.load(field + 8, mask=hard, other=0.0)
    p = Piece(
        largest_s, largest_t, sum_s, sum_t, sum_hard, dot_t, dot_s, linear_s, columns, entropy_s, entropy_t,
        top_s, top_t,
    )  # fmt: skip
    return collapsed(p, soft, asked, DIVERGENCE, FULL)
