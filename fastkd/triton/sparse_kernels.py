"""The Triton kernels with a sparse teacher.

whole     a program takes a row through both sweeps. The second finds the row in its registers, where a block holds it
          (`resident`), or in the cache, where no more rows are under way than fit there: 2 N V elements moved
split     few rows, each split over programs: sums, finish, gradient; 2 N V where all rows fit the cache, else 3 N V
value     sums and finish: N V

ids, log2_p, draws  (rows, K) of the teacher as prepared by sparse.py; named (rows, K) fp32: gradients of those columns
offsets   (rows, blocks + 1) int32: the first entry of each block of the sweeps
pieces    (rows, splits, PIECE) fp32, a StudentPiece each
rest      (rows, 2) fp32: mass of the rest; 0, or NaN for a row with values that no teacher may have
states    (rows, STATE) fp32, a SparseGradient each

What a call has and asks for is known at run time (`flags`, `kind`): kernels are compiled for a dtype, a block and UNIT
alone. UNIT: elements that width, strides and addresses are multiples of, 16 bytes or 1; width and strides count them;
s_start, d_start: elements before the first row, where UNIT is 1. Pointers that `flags` say nothing lies behind are not
followed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from .pieces import MAX_PIECES
from .row import NO_COLUMN, RowOptions
from .sparse_named import (
    GRADIENT,
    HARD,
    LABELS,
    STATS,
    Named,
    Student,
    Task,
    capped,
    finish_sparse_row,
    ignore_sparse_row,
    label_at,
    reference_of,
    softening_at,
)
from .sparse_row import SparseGradient, StudentPiece, collapsed_student, empty_student, with_student_block

PIECE = tl.constexpr(8)
STATE = tl.constexpr(8)
INTEGERS = [
    "s_start", "s_inner", "s_outer", "s_stride", "d_start", "d_inner", "d_outer", "d_stride", "width", "rows",
    "ignore_index", "k", "splits", "blocks", "row_blocks", "flags", "kind",
]  # fmt: skip
POINTERS = [
    "ids", "log2_ps", "draws", "rest_of", "offsets", "pieces", "named", "states", "scales",
    "row_loss", "stats", "labels", "weights", "temperatures",
]  # fmt: skip


def kernel(function: Callable) -> Any:
    """Compiled once whatever the numbers and addresses are; the host sees to it that those of rows are multiples of 16
    bytes."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(do_not_specialize=[x for x in INTEGERS + POINTERS if x in names])(function)


@triton.jit
def row_at(base, n, start, inner, outer, stride, UNIT: tl.constexpr):
    """Row n: rows lie on two levels of strides, `inner` of them per outer step. 64 bits."""
    at = ((n // inner).to(tl.int64) * outer + (n % inner).to(tl.int64) * stride) * UNIT
    if UNIT == 1:
        at += start
    return base + at


@triton.jit
def columns_of(block, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """(LANES, VECTOR) columns of a block."""
    start = block * (LANES * VECTOR)
    return start + tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def without_named(s, columns, ids, first, last, start):
    """s with -inf at the entries first ... last - 1, which lie in the block from `start` on. An entry sets a bit of its
    lane: a comparison a lane, not a column."""
    LANES: tl.constexpr = columns.shape[0]
    VECTOR: tl.constexpr = columns.shape[1]
    lane = start + tl.arange(0, LANES) * VECTOR
    bits = (tl.max(s, axis=1) > float("inf")).to(tl.int32)  # 0, by the threads that have the lane
    for i in range(first, last):
        column = tl.load(ids + i)
        within = (column - start) % VECTOR
        bits = bits | tl.where(lane == column - within, 1 << within, 0)
    named = (bits[:, None] >> tl.arange(0, VECTOR)[None, :]) & 1
    return tl.where(named != 0, float("-inf"), s)


@triton.jit
def summed_blocks(
    student, ids, offsets, first, last, reference, hard, stats, LANES: tl.constexpr, VECTOR: tl.constexpr
):  # fmt: skip
    """The sums of blocks first ... last - 1, by lanes."""
    p = empty_student(LANES)
    for block in range(first, last):
        columns = columns_of(block, LANES, VECTOR)
        x = tl.load(student.row + columns, mask=columns < student.width, other=float("-inf"))
        s = capped(x, student.softcap)
        entry, end = tl.load(offsets + block), tl.load(offsets + block + 1)
        rest = without_named(s, columns, ids, entry, end, block * (LANES * VECTOR))
        p = with_student_block(p, s, rest, columns, student.width, reference, student.soft, hard, stats)
    return p


@triton.jit
def store_block_gradient(at, x, columns, label, student, g, hard):
    """x: logits as they are stored. The line is written for good: it need not stay in the cache."""
    s = capped(x, student.softcap)
    y = (s - tl.where(g.largest == float("-inf"), 0.0, g.largest)) * student.soft.slope
    d = g.of_e * tl.exp2(y) + g.constant
    if hard:
        d += g.hard * tl.exp2(student.soft.temperature * y) + tl.where(columns == label, g.of_label, 0.0)
    if student.softcap != 0:  # the chain rule is 1 - (s / cap)^2; a mask is left as it is
        u = s / student.softcap
        d *= tl.where(s == float("-inf"), 1.0, 1.0 - u * u)
    d = d.to(at.dtype.element_ty)
    tl.store(at + columns, d, mask=columns < student.width, eviction_policy="evict_first")


@triton.jit
def store_gradients(d_row, student, label, g, first, last, hard, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Of blocks first ... last - 1, the last one first: what was read last is still in the cache. It may overwrite the
    student; nobody reads a logit again."""
    for i in range(first, last):
        columns = columns_of(first + last - 1 - i, LANES, VECTOR)
        x = tl.load(
            student.row + columns, mask=columns < student.width, other=float("-inf"), eviction_policy="evict_first"
        )
        store_block_gradient(d_row, x, columns, label, student, g, hard)


@triton.jit
def store_named(d_row, named, first, last, width, ENTRIES: tl.constexpr):
    """Entries first ... last - 1 over what the sweep has stored there."""
    tl.debug_barrier()
    for start in range(first, last, ENTRIES):
        i = start + tl.arange(0, ENTRIES)
        column = tl.load(named.ids + i, mask=i < last, other=NO_COLUMN)
        d = tl.load(named.gradient + i, mask=i < last, other=0.0)
        tl.store(d_row + column, d.to(d_row.dtype.element_ty), mask=column < width)


@triton.jit
def store_zeros(d_row, width, first, last, LANES: tl.constexpr, VECTOR: tl.constexpr):
    for block in range(first, last):
        columns = columns_of(block, LANES, VECTOR)
        zeros = tl.zeros([LANES, VECTOR], d_row.dtype.element_ty)
        tl.store(d_row + columns, zeros, mask=columns < width, eviction_policy="evict_first")


@triton.jit
def named_of(n, ids, log2_ps, draws, gradients, k):
    at = n.to(tl.int64) * k
    return Named(ids + at, log2_ps + at, draws + at, gradients + at, k)


@kernel
def sparse_sums_kernel(
    student, s_start, s_inner, s_outer: tl.int64, s_stride: tl.int64, width, ids, offsets, pieces, labels, temperatures,
    ignore_index: tl.int64, k, splits, blocks, row_blocks, flags, temperature, softcap,
    LANES: tl.constexpr, VECTOR: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """First sweep of a piece of a row. Programs (row, split)."""
    program = tl.program_id(0)
    n, split = program // splits, program % splits
    if ((flags & LABELS) != 0) & (label_at(n, labels, flags) == ignore_index):
        return
    soft = softening_at(n, temperature, temperatures, flags)
    row = Student(row_at(student, n, s_start, s_inner, s_outer, s_stride, UNIT), width * UNIT, softcap, soft)
    hard, stats = (flags & HARD) != 0, (flags & STATS) != 0
    first, last = split * blocks, tl.minimum((split + 1) * blocks, row_blocks)
    row_ids, row_offsets = ids + n.to(tl.int64) * k, offsets + n.to(tl.int64) * (row_blocks + 1)
    p = summed_blocks(row, row_ids, row_offsets, first, last, reference_of(row), hard, stats, LANES, VECTOR)
    p = collapsed_student(p, soft, hard, stats)
    at = pieces + program.to(tl.int64) * PIECE
    tl.store(at, p.largest)
    tl.store(at + 1, p.sum)
    tl.store(at + 2, p.sum_hard)
    tl.store(at + 3, p.entropy)
    tl.store(at + 4, p.linear)
    tl.store(at + 5, p.peak)
    tl.store(at + 6, p.top.to(tl.float32, bitcast=True))


@triton.jit
def merged_students(at, count, soft, hard, stats):
    lane = tl.arange(0, MAX_PIECES)
    given, field = lane < count, at + lane * PIECE
    largest = tl.load(field, mask=given, other=float("-inf"))
    total, sum_hard = tl.load(field + 1, mask=given, other=0.0), tl.load(field + 2, mask=given, other=0.0)
    entropy, linear = tl.load(field + 3, mask=given, other=0.0), tl.load(field + 4, mask=given, other=0.0)
    peak, top = tl.load(field + 5, mask=given, other=float("-inf")), tl.load(field + 6, mask=given, other=0.0)
    p = StudentPiece(largest, total, sum_hard, entropy, linear, peak, top.to(tl.int32, bitcast=True))
    return collapsed_student(p, soft, hard, stats)


@kernel
def sparse_finish_kernel(
    student, s_start, s_inner, s_outer: tl.int64, s_stride: tl.int64, width, ids, log2_ps, draws, rest_of, pieces,
    named, states, scales, row_loss, stats, labels, weights, temperatures, rows, ignore_index: tl.int64, k, splits,
    flags, kind, temperature, softcap, lowest, resolution, beta, beta_rest, by_t2, kd_weight, ce_weight,
    label_smoothing, z_loss, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Loss and statistics of a row, gradients of its named columns, and what the sweep of the others needs. One program
    a row; K logits gathered."""
    n = tl.program_id(0)
    label = label_at(n, labels, flags)
    if ((flags & LABELS) != 0) & (label == ignore_index):
        ignore_sparse_row(n, rows, row_loss, stats, flags)
        return
    soft = softening_at(n, temperature, temperatures, flags)
    row = Student(row_at(student, n, s_start, s_inner, s_outer, s_stride, 1), width, softcap, soft)
    at = pieces + n.to(tl.int64) * splits * PIECE
    rest = merged_students(at, splits, soft, (flags & HARD) != 0, (flags & STATS) != 0)
    o = RowOptions(beta, beta_rest, by_t2, kd_weight, ce_weight, label_smoothing, z_loss)
    g = finish_sparse_row(
        n, rows, rest, row, named_of(n, ids, log2_ps, draws, named, k), label, reference_of(row),
        Task(o, kind, lowest, resolution, flags), rest_of, scales, weights, row_loss, stats, ENTRIES,
    )  # fmt: skip
    if (flags & GRADIENT) != 0:
        state = states + n.to(tl.int64) * STATE
        tl.store(state, g.largest)
        tl.store(state + 1, g.of_e)
        tl.store(state + 2, g.hard)
        tl.store(state + 3, g.constant)
        tl.store(state + 4, g.of_label)


@kernel
def sparse_gradient_kernel(
    student, s_start, s_inner, s_outer: tl.int64, s_stride: tl.int64, gradient, d_start, d_inner, d_outer: tl.int64,
    d_stride: tl.int64, width, ids, offsets, named, states, labels, temperatures, rows, ignore_index: tl.int64, k,
    splits, blocks, row_blocks, flags, temperature, softcap,
    LANES: tl.constexpr, VECTOR: tl.constexpr, UNIT: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Last sweep of a piece of a row: the gradient, which may be the student's own memory."""
    # rows in the opposite order of the sweep before: its last rows are still in the cache
    n, split = rows - 1 - tl.program_id(0) // splits, tl.program_id(0) % splits
    first, last = split * blocks, tl.minimum((split + 1) * blocks, row_blocks)
    label = label_at(n, labels, flags)
    d_row = row_at(gradient, n, d_start, d_inner, d_outer, d_stride, UNIT)
    if ((flags & LABELS) != 0) & (label == ignore_index):
        store_zeros(d_row, width * UNIT, first, last, LANES, VECTOR)
        return
    soft = softening_at(n, temperature, temperatures, flags)
    row = Student(row_at(student, n, s_start, s_inner, s_outer, s_stride, UNIT), width * UNIT, softcap, soft)
    at = states + n.to(tl.int64) * STATE
    g = SparseGradient(tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4))
    store_gradients(d_row, row, label, g, first, last, (flags & HARD) != 0, LANES, VECTOR)
    row_offsets = offsets + n.to(tl.int64) * (row_blocks + 1)
    entries = named_of(n, ids, named, named, named, k)
    store_named(d_row, entries, tl.load(row_offsets + first), tl.load(row_offsets + last), width * UNIT, ENTRIES)


@kernel
def sparse_row_kernel(
    student, s_start, s_inner, s_outer: tl.int64, s_stride: tl.int64, gradient, d_start, d_inner, d_outer: tl.int64,
    d_stride: tl.int64, width, ids, log2_ps, draws, rest_of, offsets, named, scales, row_loss, stats, labels, weights,
    temperatures, rows, ignore_index: tl.int64, k, row_blocks, flags, kind, temperature, softcap, lowest, resolution,
    beta, beta_rest, by_t2, kd_weight, ce_weight, label_smoothing, z_loss,
    RESIDENT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, UNIT: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Whole rows, each by one program, as many at a time as there are programs. RESIDENT: a row is one block."""
    o = RowOptions(beta, beta_rest, by_t2, kd_weight, ce_weight, label_smoothing, z_loss)
    task = Task(o, kind, lowest, resolution, flags)
    hard, with_stats = (flags & HARD) != 0, (flags & STATS) != 0
    n = tl.program_id(0)
    for _ in range(n, rows, tl.num_programs(0)):
        label = label_at(n, labels, flags)
        d_row = row_at(gradient, n, d_start, d_inner, d_outer, d_stride, UNIT)
        if ((flags & LABELS) != 0) & (label == ignore_index):
            ignore_sparse_row(n, rows, row_loss, stats, flags)
            if (flags & GRADIENT) != 0:
                store_zeros(d_row, width * UNIT, 0, row_blocks, LANES, VECTOR)
        else:
            soft = softening_at(n, temperature, temperatures, flags)
            row = Student(row_at(student, n, s_start, s_inner, s_outer, s_stride, UNIT), width * UNIT, softcap, soft)
            reference = reference_of(row)
            entries = named_of(n, ids, log2_ps, draws, named, k)
            row_offsets = offsets + n.to(tl.int64) * (row_blocks + 1)
            if RESIDENT:
                columns = columns_of(0, LANES, VECTOR)
                x = tl.load(
                    row.row + columns, mask=columns < row.width, other=float("-inf"), eviction_policy="evict_first"
                )
                s = capped(x, softcap)
                rest = without_named(s, columns, entries.ids, 0, tl.load(row_offsets + 1), 0)
                p = with_student_block(
                    empty_student(LANES), s, rest, columns, row.width, reference, soft, hard, with_stats
                )
            else:
                p = summed_blocks(
                    row, entries.ids, row_offsets, 0, row_blocks, reference, hard, with_stats, LANES, VECTOR
                )
            g = finish_sparse_row(
                n, rows, collapsed_student(p, soft, hard, with_stats), row, entries, label, reference, task, rest_of,
                scales, weights, row_loss, stats, ENTRIES,
            )  # fmt: skip
            if (flags & GRADIENT) != 0:
                tl.debug_barrier()  # in place, what was gathered is overwritten
                if RESIDENT:
                    store_block_gradient(d_row, x, columns, label, row, g, hard)
                else:
                    store_gradients(d_row, row, label, g, 0, row_blocks, hard, LANES, VECTOR)
                store_named(d_row, entries, 0, tl.load(row_offsets + row_blocks), row.width, ENTRIES)
        n += tl.num_programs(0)
