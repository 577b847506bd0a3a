"""The Triton kernels: sweeps over the rows of both models, and what stands before and behind them.

A row is `columns` wide, in blocks of LANES x VECTOR columns; a thread reads VECTOR neighbours at a time. A row may be
split over several programs, each with `blocks` consecutive blocks. No atomics: what programs have to tell each other
goes through `pieces` and `terms` (rows, splits, 2), fp32, and is merged by every reader in the same order.

streaming   scale, sums, [terms], gradient, total: 5 N V elements moved, 7 with terms
resident    scale, whole row, total: 3 N V, for rows that fit in the registers of one program
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import before, clear_row, first_columns, load_blocks, logit_at_column, row_at, run_time, store_block
from .pieces import FIELDS, LABEL_FIELD, MAX_PIECES, merged_pieces, store_piece
from .row import (
    CHECKED,
    HARD,
    LABELS,
    LN2,
    STATS,
    STUDENT_FP16,
    TEMPERATURES,
    WEIGHTS,
    WIDE,
    RowOptions,
    Softening,
    coefficients_of,
    collapsed,
    cross_entropy_of,
    divergence_of,
    empty_piece,
    gradient_of_block,
    has,
    softcapped,
    terms_of_block,
    with_block,
)


@triton.jit
def softening_of(temperature, temperatures, n, asked):
    t = tl.load(temperatures + n, mask=has(asked, TEMPERATURES), other=temperature)
    return Softening(t, 1.4426950408889634 / t)  # log2(e) / T


@triton.jit
def label_of(labels, n, asked):
    return tl.load(labels + n, mask=has(asked, LABELS), other=-1)


@triton.jit
def poison_of(label, width, soft, asked):
    """NaN for a row whose label or temperature is out of range, else 0: nothing on the device can raise."""
    poison = tl.where(soft.temperature > 0, tl.where(soft.temperature < float("inf"), 0.0, float("nan")), float("nan"))
    return tl.where(((label < 0) | (label >= width)) & has(asked, CHECKED), float("nan"), poison)


@triton.jit
def student_logit(row, label, width, asked, softcap, FULL: tl.constexpr):
    x = logit_at_column(row, label, width, has(asked, STUDENT_FP16))
    if FULL:
        x = softcapped(x, softcap)
    return x


@triton.jit
def entropy_of(weighted, total):
    """-sum q log q in nats, from sum 2^y y and sum 2^y."""
    return (tl.log2(total) - weighted / total) * LN2


@triton.jit
def write_stats(at, rows, kd, ce, row):
    """The five figures of a row, `rows` (int64) apart."""
    tl.store(at, kd)
    tl.store(at + rows, ce)
    tl.store(at + 2 * rows, entropy_of(row.entropy_s, row.sum_s))
    tl.store(at + 3 * rows, entropy_of(row.entropy_t, row.sum_t))
    tl.store(at + 4 * rows, (row.top_s == row.top_t).to(tl.float32))


@triton.jit
def finish_row(
    n, rows, row, term_sum, dlogq_sum, label_logit, poison, scales, weights, row_loss, stats, first_program, o, soft,
    asked, DIVERGENCE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Writes the row's loss and statistics (by its first program) and returns the coefficients of its gradient."""
    weight = tl.load(weights + n, mask=has(asked, WEIGHTS), other=1.0)
    kd = divergence_of(row, term_sum, o, DIVERGENCE)
    squared = tl.where(o.by_t2 != 0, soft.temperature * soft.temperature, 1.0)
    loss = tl.where(o.kd_weight == 0, 0.0, o.kd_weight * squared * kd)  # a part of weight 0 may be infinite
    ce = tl.full([], 0.0, tl.float32)
    if has(asked, HARD):
        ce = cross_entropy_of(row, label_logit, o, soft)
        loss += tl.where(o.ce_weight == 0, 0.0, o.ce_weight * ce)
    if first_program:
        tl.store(row_loss + n, weight * loss + poison)
        if FULL:
            if has(asked, STATS):
                write_stats(stats + n, rows.to(tl.int64), kd, ce, row)
    return coefficients_of(row, dlogq_sum, weight * tl.load(scales + 1), poison, o, soft, asked, DIVERGENCE)


@triton.jit
def ignore_row(n, rows, row_loss, stats, asked):
    tl.store(row_loss + n, 0.0)
    if has(asked, STATS):
        for i in tl.static_range(5):
            tl.store(stats + n + i * rows.to(tl.int64), 0.0)


@triton.jit
def through_softcap(d, s, softcap):
    """s: softcapped logits, whose chain rule is 1 - (s / cap)^2; a mask is left as it is."""
    u = s / tl.where(softcap > 0, softcap, 1.0)
    return d * tl.where((s == float("-inf")) | (softcap == 0), 1.0, 1.0 - u * u)


@triton.jit
def store_gradient_block(
    row, block, d, s, shared_width, width, softcap, asked,
    FULL: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    if FULL:
        if softcap != 0:
            d = through_softcap(d, s, softcap)
    if shared_width < width:  # beyond the shared vocabulary
        d = tl.where(before(shared_width - first_columns(block, LANES, VECTOR), VECTOR), d, 0.0)
    store_block(row, block, d, width, has(asked, STUDENT_FP16), has(asked, WIDE), LANES, VECTOR)


@run_time
def sums_kernel(
    student, s_inner, s_outer: tl.int64, s_stride: tl.int64, teacher, t_inner, t_outer: tl.int64, t_stride: tl.int64,
    width, pieces, labels, temperatures, ignore_index: tl.int64, asked, splits, blocks,
    temperature, student_softcap, teacher_softcap,
    DIVERGENCE: tl.constexpr, FULL: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """First sweep: the sums of one piece of a row. Programs (row, split); reads 2 N V."""
    program = tl.program_id(0)
    n, split = program // splits, program % splits
    label = label_of(labels, n, asked)
    if has(asked, LABELS) & (label == ignore_index):
        return
    soft = softening_of(temperature, temperatures, n, asked)
    s_row = row_at(student, n, s_inner, s_outer, s_stride, VECTOR)
    t_row = row_at(teacher, n, t_inner, t_outer, t_stride, VECTOR)
    # in place, the sweep of the gradient finds it overwritten
    label_logit = student_logit(s_row, label, width, asked, student_softcap, FULL)
    p = empty_piece(LANES)
    for block in range(split * blocks, tl.minimum((split + 1) * blocks, tl.cdiv(width, LANES * VECTOR))):
        s, t = load_blocks(s_row, t_row, block, width, asked, student_softcap, teacher_softcap, FULL, LANES, VECTOR)
        p = with_block(p, s, t, first_columns(block, LANES, VECTOR), width, soft, asked, DIVERGENCE, FULL)
    p = collapsed(p, soft, asked, DIVERGENCE, FULL)
    store_piece(pieces + program.to(tl.int64) * FIELDS, p, label_logit, asked, DIVERGENCE, FULL)


@run_time
def terms_kernel(
    student, s_inner, s_outer: tl.int64, s_stride: tl.int64, teacher, t_inner, t_outer: tl.int64, t_stride: tl.int64,
    width, pieces, terms, labels, temperatures, ignore_index: tl.int64, asked, splits, blocks,
    temperature, student_softcap, teacher_softcap, beta, beta_rest,
    DIVERGENCE: tl.constexpr, FULL: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Second sweep of jsd, total_variation and the skew divergences: sums of term and dlogq; reads 2 N V."""
    program = tl.program_id(0)
    n, split = program // splits, program % splits
    if has(asked, LABELS) & (label_of(labels, n, asked) == ignore_index):
        return
    soft = softening_of(temperature, temperatures, n, asked)
    row = merged_pieces(pieces + n.to(tl.int64) * splits * FIELDS, splits, soft, asked & 0, DIVERGENCE, False)
    s_row = row_at(student, n, s_inner, s_outer, s_stride, VECTOR)
    t_row = row_at(teacher, n, t_inner, t_outer, t_stride, VECTOR)
    term_sum, dlogq_sum = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    for block in range(split * blocks, tl.minimum((split + 1) * blocks, tl.cdiv(width, LANES * VECTOR))):
        s, t = load_blocks(s_row, t_row, block, width, asked, student_softcap, teacher_softcap, FULL, LANES, VECTOR)
        value, dlogq, _e_s, _y_s = terms_of_block(s, t, row, soft, beta, beta_rest, DIVERGENCE)
        term_sum += tl.sum(value, axis=1)
        dlogq_sum += tl.sum(dlogq, axis=1)
    at = terms + program.to(tl.int64) * 2
    tl.store(at, tl.sum(term_sum, axis=0))
    tl.store(at + 1, tl.sum(dlogq_sum, axis=0))


@run_time
def gradient_kernel(
    student, s_inner, s_outer: tl.int64, s_stride: tl.int64, teacher, t_inner, t_outer: tl.int64, t_stride: tl.int64,
    gradient, d_inner, d_outer: tl.int64, d_stride: tl.int64, width, gradient_width, pieces, terms, scales, row_loss,
    stats, labels, weights, temperatures, rows, ignore_index: tl.int64, asked, splits, blocks, pieces_per_row,
    temperature, student_softcap, teacher_softcap,
    beta, beta_rest, by_t2, kd_weight, ce_weight, label_smoothing, z_loss,
    DIVERGENCE: tl.constexpr, FULL: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Last sweep: loss and statistics of a row, and its gradient; reads 2 N V, writes N V, which may be the student's
    own memory. For the value alone gradient_width is 0, and no logit is read."""
    # rows in the opposite order of the sweep before: its last rows are still in the cache
    n, split = rows - 1 - tl.program_id(0) // splits, tl.program_id(0) % splits
    first = split * blocks
    last = tl.minimum(first + blocks, tl.cdiv(gradient_width, LANES * VECTOR))
    label = label_of(labels, n, asked)
    d_row = row_at(gradient, n, d_inner, d_outer, d_stride, VECTOR)
    if has(asked, LABELS) & (label == ignore_index):
        if split == 0:
            ignore_row(n, rows, row_loss, stats, asked)
        clear_row(d_row, gradient_width, first, last, has(asked, WIDE), LANES, VECTOR)
        return
    soft = softening_of(temperature, temperatures, n, asked)
    o = RowOptions(beta, beta_rest, by_t2, kd_weight, ce_weight, label_smoothing, z_loss)
    at = pieces + n.to(tl.int64) * pieces_per_row * FIELDS
    row = merged_pieces(at, pieces_per_row, soft, asked, DIVERGENCE, FULL)
    label_logit = tl.load(at + LABEL_FIELD, mask=has(asked, HARD), other=0.0)
    term_sum, dlogq_sum = 0.0, 0.0
    if DIVERGENCE != "forward_kl" and DIVERGENCE != "reverse_kl" and DIVERGENCE != "symmetric_kl":
        piece = tl.arange(0, MAX_PIECES)
        term = terms + (n.to(tl.int64) * pieces_per_row + piece) * 2
        term_sum = tl.sum(tl.load(term, mask=piece < pieces_per_row, other=0.0), axis=0)
        dlogq_sum = tl.sum(tl.load(term + 1, mask=piece < pieces_per_row, other=0.0), axis=0)
    c = finish_row(
        n, rows, row, term_sum, dlogq_sum, label_logit, poison_of(label, width, soft, asked),
        scales, weights, row_loss, stats, split == 0, o, soft, asked, DIVERGENCE, FULL,
    )  # fmt: skip
    s_row = row_at(student, n, s_inner, s_outer, s_stride, VECTOR)
    t_row = row_at(teacher, n, t_inner, t_outer, t_stride, VECTOR)
    for block in range(first, last):
        s, t = load_blocks(s_row, t_row, block, width, asked, student_softcap, teacher_softcap, FULL, LANES, VECTOR)
        d = gradient_of_block(s, t, first_columns(block, LANES, VECTOR), row, c, label, o, soft, asked, DIVERGENCE)
        store_gradient_block(d_row, block, d, s, width, gradient_width, student_softcap, asked, FULL, LANES, VECTOR)


@run_time
def resident_kernel(
    student, s_inner, s_outer: tl.int64, s_stride: tl.int64, teacher, t_inner, t_outer: tl.int64, t_stride: tl.int64,
    gradient, d_inner, d_outer: tl.int64, d_stride: tl.int64, width, gradient_width, scales, row_loss,
    stats, labels, weights, temperatures, rows, ignore_index: tl.int64, asked,
    temperature, student_softcap, teacher_softcap,
    beta, beta_rest, by_t2, kd_weight, ce_weight, label_smoothing, z_loss,
    DIVERGENCE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """A whole row, of at most LANES x VECTOR columns, read once: 3 N V for every divergence."""
    n = tl.program_id(0)
    label = label_of(labels, n, asked)
    d_row = row_at(gradient, n, d_inner, d_outer, d_stride, VECTOR)
    if has(asked, LABELS) & (label == ignore_index):
        ignore_row(n, rows, row_loss, stats, asked)
        clear_row(d_row, gradient_width, 0, 1, has(asked, WIDE), LANES, VECTOR)
        return
    soft = softening_of(temperature, temperatures, n, asked)
    o = RowOptions(beta, beta_rest, by_t2, kd_weight, ce_weight, label_smoothing, z_loss)
    s_row = row_at(student, n, s_inner, s_outer, s_stride, VECTOR)
    t_row = row_at(teacher, n, t_inner, t_outer, t_stride, VECTOR)
    s, t = load_blocks(s_row, t_row, 0, width, asked, student_softcap, teacher_softcap, True, LANES, VECTOR)
    p = with_block(empty_piece(LANES), s, t, first_columns(0, LANES, VECTOR), width, soft, asked, DIVERGENCE, True)
    row = collapsed(p, soft, asked, DIVERGENCE, True)
    label_logit = student_logit(s_row, label, width, asked, student_softcap, True)
    term_sum, dlogq_sum = 0.0, 0.0
    if DIVERGENCE != "forward_kl" and DIVERGENCE != "reverse_kl" and DIVERGENCE != "symmetric_kl":
        value, dlogq, _e_s, _y_s = terms_of_block(s, t, row, soft, beta, beta_rest, DIVERGENCE)
        term_sum, dlogq_sum = tl.sum(tl.sum(value, axis=1), axis=0), tl.sum(tl.sum(dlogq, axis=1), axis=0)
    c = finish_row(
        n, rows, row, term_sum, dlogq_sum, label_logit, poison_of(label, width, soft, asked),
        scales, weights, row_loss, stats, n == n, o, soft, asked, DIVERGENCE, True,
    )  # fmt: skip
    if gradient_width > 0:
        d = gradient_of_block(s, t, first_columns(0, LANES, VECTOR), row, c, label, o, soft, asked, DIVERGENCE)
        store_gradient_block(d_row, 0, d, s, width, gradient_width, student_softcap, asked, True, LANES, VECTOR)
