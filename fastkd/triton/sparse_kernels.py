"""The Triton kernels with a sparse teacher: two sweeps of the student, K gathers, 3 N V elements moved (1 for the value
alone).

entries   ids (rows, K) int32 ascending, width or more where there is none; log2_p, weight (rows, K) fp32
offsets   (rows, blocks + 1) int32: the first entry of each block of the sweeps
pieces    (rows, splits, PIECE) fp32, a StudentPiece each
named     (rows, K) fp32: gradients of the named columns
rest      (rows, 2) fp32: mass of the rest; 0, or NaN for a row with values that no teacher may have
states    (rows, STATE) fp32: what the gradient's sweep needs of a row
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import (
    block_columns,
    ignore_row,
    label_of,
    load_block,
    logit_at,
    poison_of,
    row_offset,
    softening_of,
    store_gradient,
    zero_row,
)
from .pieces import MAX_PIECES
from .row import LN2, NO_COLUMN, RowOptions, finite, softcapped, weigh
from .sparse_row import (
    StudentPiece,
    collapsed_student,
    empty_student,
    hard_lse_of,
    named_term,
    rest_term,
    sparse_cross_entropy,
    student_row,
    with_student_block,
)

PIECE = tl.constexpr(8)
STATE = tl.constexpr(8)
CHANGING = ["rows", "splits", "blocks", "row_blocks", "k", "ignore_index", "s_inner", "d_inner"]


@triton.jit
def reference_of(row, softcap, CAPPED: tl.constexpr):
    """A logit of the row, that sums of all its logits are taken relative to; 0 where it is a mask."""
    x = logit_at(row, 0, 1, softcap, CAPPED)
    return tl.where(x > float("-inf"), x, 0.0)


@triton.jit(do_not_specialize=CHANGING)
def sparse_sums_kernel(
    student, s_inner, s_outer, s_stride, width, ids, offsets, pieces, labels, temperatures, ignore_index, k, splits,
    blocks, row_blocks, temperature, student_softcap,
    HARD: tl.constexpr, STATS: tl.constexpr, CAPPED: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """First sweep: the sums of one piece of a row. Programs (row, split)."""
    program = tl.program_id(0)
    n, split = program // splits, program % splits
    if labels is not None:
        if label_of(labels, n) == ignore_index:
            return
    soft = softening_of(temperature, temperatures, n)
    s_row = student + row_offset(n, s_inner, s_outer, s_stride)
    reference = 0.0
    if HARD:
        reference = reference_of(s_row, student_softcap, CAPPED)
    row_ids, first = ids + n.to(tl.int64) * k, offsets + n.to(tl.int64) * (row_blocks + 1)
    p = empty_student(LANES)
    for block in range(split * blocks, tl.minimum((split + 1) * blocks, row_blocks)):
        columns = block_columns(block, LANES, VECTOR)
        s = load_block(s_row, columns, width, student_softcap, CAPPED)
        rest = s
        for i in range(tl.load(first + block), tl.load(first + block + 1)):
            rest = tl.where(columns == tl.load(row_ids + i), float("-inf"), rest)
        p = with_student_block(p, s, rest, columns, width, reference, soft, HARD, STATS)
    p = collapsed_student(p, soft, HARD, STATS)
    at = pieces + program.to(tl.int64) * PIECE
    tl.store(at, p.largest)
    tl.store(at + 1, p.sum)
    if HARD:
        tl.store(at + 2, p.sum_hard)
        tl.store(at + 4, p.linear)
    if STATS:
        tl.store(at + 3, p.entropy)
        tl.store(at + 5, p.peak)
        tl.store(at + 6, p.top.to(tl.float32, bitcast=True))


@triton.jit
def merged_students(at, count, soft, HARD: tl.constexpr, STATS: tl.constexpr):
    lane = tl.arange(0, MAX_PIECES)
    given, field = lane < count, at + lane * PIECE
    p = empty_student(MAX_PIECES)
    sum_hard, entropy, linear, peak, top = p.sum_hard, p.entropy, p.linear, p.peak, p.top
    largest, total = tl.load(field, mask=given, other=float("-inf")), tl.load(field + 1, mask=given, other=0.0)
    if HARD:
        sum_hard, linear = tl.load(field + 2, mask=given, other=0.0), tl.load(field + 4, mask=given, other=0.0)
    if STATS:
        entropy = tl.load(field + 3, mask=given, other=0.0)
        peak = tl.load(field + 5, mask=given, other=float("-inf"))
        top = tl.load(field + 6, mask=given, other=0.0).to(tl.int32, bitcast=True)
    return collapsed_student(StudentPiece(largest, total, sum_hard, entropy, linear, peak, top), soft, HARD, STATS)


@triton.jit
def named_logits(s_row, ids, start, k, width, softcap, CAPPED: tl.constexpr, ENTRIES: tl.constexpr):
    """Places, columns and logits of ENTRIES entries from `start` on, -inf where there is none."""
    i = start + tl.arange(0, ENTRIES)
    column = tl.load(ids + i, mask=i < k, other=NO_COLUMN)
    s = tl.load(s_row + column, mask=column < width, other=float("-inf")).to(tl.float32)
    if CAPPED:
        s = softcapped(s, softcap)
    return i, column, s


@triton.jit
def entropy_part(log2_q):
    return -weigh(tl.exp2(log2_q), log2_q)


@triton.jit(do_not_specialize=CHANGING)
def sparse_finish_kernel(
    student, s_inner, s_outer, s_stride, width, ids, log2_ps, weights_of_draws, rest_of, pieces, named, states, scales,
    row_loss, stats, labels, weights, temperatures, rows, ignore_index, k, splits, temperature, student_softcap,
    resolution, beta, beta_rest, by_t2, kd_weight, ce_weight, label_smoothing, z_loss,
    DIVERGENCE: tl.constexpr, SAMPLED: tl.constexpr, BUCKET: tl.constexpr, HARD: tl.constexpr, CAPPED: tl.constexpr,
    ENTRIES: tl.constexpr,
):  # fmt: skip
    """Loss and statistics of a row, gradients of its named columns, and what the sweep of the others needs. One program
    a row; K logits gathered."""
    n = tl.program_id(0)
    label = label_of(labels, n)
    if labels is not None:
        if label == ignore_index:
            ignore_row(n, rows, row_loss, stats)
            return
    soft = softening_of(temperature, temperatures, n)
    o = RowOptions(beta, beta_rest, by_t2, kd_weight, ce_weight, label_smoothing, z_loss)
    s_row = student + row_offset(n, s_inner, s_outer, s_stride)
    row_ids, row_log2_p = ids + n.to(tl.int64) * k, log2_ps + n.to(tl.int64) * k
    row_draws = weights_of_draws + n.to(tl.int64) * k
    rest = merged_students(pieces + n.to(tl.int64) * splits * PIECE, splits, soft, HARD, stats is not None)
    peaks = tl.full([ENTRIES], float("-inf"), tl.float32)
    for start in range(0, k, ENTRIES):
        _i, _column, s = named_logits(s_row, row_ids, start, k, width, student_softcap, CAPPED, ENTRIES)
        peaks = tl.maximum(peaks, s)
    peak = tl.maximum(rest.largest, tl.max(peaks, axis=0))
    zeros = tl.zeros([ENTRIES], tl.float32)
    sums, hards = zeros, zeros
    for start in range(0, k, ENTRIES):
        _i, _column, s = named_logits(s_row, row_ids, start, k, width, student_softcap, CAPPED, ENTRIES)
        y = (s - finite(peak)) * soft.slope
        sums += tl.exp2(y)
        if HARD:
            hards += tl.exp2(soft.temperature * y)
    row = student_row(rest, peak, tl.sum(sums, axis=0), tl.sum(hards, axis=0), soft)
    values, dlogqs, student_entropies, teacher_entropies = zeros, zeros, zeros, zeros
    best, tops = tl.full([ENTRIES], float("-inf"), tl.float32), tl.full([ENTRIES], NO_COLUMN, tl.int32)
    for start in range(0, k, ENTRIES):
        i, column, s = named_logits(s_row, row_ids, start, k, width, student_softcap, CAPPED, ENTRIES)
        log2_p = tl.load(row_log2_p + i, mask=i < k, other=float("-inf"))
        weight = tl.load(row_draws + i, mask=i < k, other=0.0)
        log2_q = (s - finite(peak)) * soft.slope - row.log2_sum
        value, dlogq = named_term(log2_p, weight, log2_q, o, DIVERGENCE, SAMPLED)
        values += tl.where(column < width, value, 0.0)
        dlogqs += tl.where(column < width, dlogq, 0.0)
        if stats is not None:
            student_entropies += entropy_part(log2_q)
            teacher_entropies -= weigh(weight if SAMPLED else tl.exp2(log2_p), log2_p)
            tops = tl.where(log2_p > best, column, tops)
            best = tl.maximum(best, log2_p)
    total, dlogq_sum = tl.sum(values, axis=0), tl.sum(dlogqs, axis=0)
    spoilt = 0.0 * row.sum + tl.load(rest_of + 2 * n.to(tl.int64) + 1)  # or NaN
    poison = poison_of(labels, label, width, soft) + spoilt
    dlogq_rest, rest_entropy = 0.0, 0.0
    if not SAMPLED:
        mass = tl.load(rest_of + 2 * n.to(tl.int64))
        value, dlogq_rest, rest_entropy = rest_term(mass, resolution, row, o, DIVERGENCE, BUCKET)
        total += value
        dlogq_sum += dlogq_rest
    kd = total * LN2 + spoilt
    squared = tl.where(by_t2 != 0, soft.temperature * soft.temperature, 1.0)
    loss = tl.where(kd_weight == 0, 0.0, kd_weight * squared * kd)  # a part of weight 0 may be infinite
    ce = 0.0
    if HARD:
        reference = reference_of(s_row, student_softcap, CAPPED)
        label_logit = logit_at(s_row, label, width, student_softcap, CAPPED)
        ce = sparse_cross_entropy(row, rest.linear, reference, width, label_logit, o, soft)
        loss += tl.where(ce_weight == 0, 0.0, ce_weight * ce)
    token = 1.0
    if weights is not None:
        token = tl.load(weights + n)
    tl.store(row_loss + n, token * loss + poison)
    if stats is not None:
        at, apart = stats + n, rows.to(tl.int64)
        log2_q = rest.entropy / tl.where(rest.sum > 0, rest.sum, 1.0) + row.rest_shift - row.log2_sum
        of_rest = tl.where(rest.sum > 0, -tl.exp2(row.log2_rest) * log2_q, 0.0)
        top_t = tl.min(tl.where(best == tl.max(best, axis=0), tops, NO_COLUMN), axis=0)
        tl.store(at, kd)
        tl.store(at + apart, ce)
        tl.store(at + 2 * apart, (of_rest + tl.sum(student_entropies, axis=0)) * LN2 + spoilt)
        tl.store(at + 3 * apart, (rest_entropy + tl.sum(teacher_entropies, axis=0)) * LN2)
        tl.store(at + 4 * apart, (rest.top == top_t).to(tl.float32))
    if named is not None:
        scale = token * tl.load(scales + 1)
        factor = scale * kd_weight * tl.where(by_t2 != 0, soft.temperature, 1.0 / soft.temperature) * LN2
        of_q = tl.where(kd_weight == 0, 0.0, spoilt - factor * dlogq_sum / row.sum)
        hard, constant, of_label = 0.0 * scale, poison, 0.0 * scale
        if HARD:
            weight = scale * ce_weight
            hard = tl.where(weight == 0, 0.0, weight * (1.0 + 2.0 * z_loss * hard_lse_of(row)) / row.sum_hard)
            constant -= weight * label_smoothing / width
            of_label = -weight * (1.0 - label_smoothing)
        row_named = named + n.to(tl.int64) * k
        for start in range(0, k, ENTRIES):
            i, column, s = named_logits(s_row, row_ids, start, k, width, student_softcap, CAPPED, ENTRIES)
            log2_p = tl.load(row_log2_p + i, mask=i < k, other=float("-inf"))
            draws = tl.load(row_draws + i, mask=i < k, other=0.0)
            y = (s - finite(peak)) * soft.slope
            _value, dlogq = named_term(log2_p, draws, y - row.log2_sum, o, DIVERGENCE, SAMPLED)
            d = of_q * tl.exp2(y) + tl.where(kd_weight == 0, 0.0, factor * dlogq) + constant
            if HARD:
                d += hard * tl.exp2(soft.temperature * y) + tl.where(column == label, of_label, 0.0)
            tl.store(row_named + i, d, mask=i < k)
        of_rest = of_q * tl.exp2(row.rest_shift)
        own = tl.where(rest.sum > 0, factor * dlogq_rest / tl.where(rest.sum > 0, rest.sum, 1.0), 0.0)
        state = states + n.to(tl.int64) * STATE
        tl.store(state, rest.largest)
        tl.store(state + 1, of_rest + tl.where(kd_weight == 0, 0.0, own))
        tl.store(state + 2, hard * tl.exp2(soft.temperature * row.rest_shift))
        tl.store(state + 3, constant)
        tl.store(state + 4, of_label)


@triton.jit(do_not_specialize=CHANGING)
def sparse_gradient_kernel(
    student, s_inner, s_outer, s_stride, gradient, d_inner, d_outer, d_stride, width, ids, offsets, named, states,
    labels, temperatures, rows, ignore_index, k, splits, blocks, row_blocks, temperature, student_softcap,
    HARD: tl.constexpr, CAPPED: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Last sweep: the gradient, which may be the student's own memory."""
    # rows in the opposite order of the sweep before: its last rows are still in the cache
    n, split = rows - 1 - tl.program_id(0) // splits, tl.program_id(0) % splits
    first, last = split * blocks, tl.minimum((split + 1) * blocks, row_blocks)
    label = label_of(labels, n)
    d_row = gradient + row_offset(n, d_inner, d_outer, d_stride)
    if labels is not None:
        if label == ignore_index:
            zero_row(d_row, width, first, last, LANES, VECTOR)
            return
    soft = softening_of(temperature, temperatures, n)
    s_row = student + row_offset(n, s_inner, s_outer, s_stride)
    state = states + n.to(tl.int64) * STATE
    largest, of_e, hard = tl.load(state), tl.load(state + 1), tl.load(state + 2)
    constant, of_label = tl.load(state + 3), tl.load(state + 4)
    row_ids, row_named = ids + n.to(tl.int64) * k, named + n.to(tl.int64) * k
    first_entry = offsets + n.to(tl.int64) * (row_blocks + 1)
    for block in range(first, last):
        columns = block_columns(block, LANES, VECTOR)
        s = load_block(s_row, columns, width, student_softcap, CAPPED)
        y = (s - finite(largest)) * soft.slope
        d = of_e * tl.exp2(y) + constant
        if HARD:
            d += hard * tl.exp2(soft.temperature * y) + tl.where(columns == label, of_label, 0.0)
        for i in range(tl.load(first_entry + block), tl.load(first_entry + block + 1)):
            d = tl.where(columns == tl.load(row_ids + i), tl.load(row_named + i), d)
        store_gradient(d_row, d, s, columns, width, width, student_softcap, CAPPED)
