"""Blocks of a row in memory: LANES x VECTOR columns, a thread's VECTOR neighbours at a time, as fp32.

Nothing of this is compiled in but the width of a logit. Kernels get logits of 2 bytes as int16, and whether they are
fp16 or bf16 with the call; so do they whether rows can be accessed 16 bytes at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import triton
import triton.language as tl

from .row import STUDENT_FP16, TEACHER_FP16, WIDE, has, softcapped


def run_time(function: Callable):
    """A kernel that Triton does not compile anew for any value, divisibility or alignment of its arguments."""
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if "constexpr" not in str(p.annotation)]
    return triton.jit(do_not_specialize=names)(function)


@triton.jit
def row_offset(n, inner, outer_stride, inner_stride):
    """Offset of row n in elements, 64 bits: rows lie on two levels of strides, `inner` of them per outer step."""
    return (n // inner).to(tl.int64) * outer_stride + (n % inner).to(tl.int64) * inner_stride


@triton.jit
def block_columns(block, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """(LANES, VECTOR) columns of a block."""
    start = block * (LANES * VECTOR)
    return start + tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def row_at(tensor, n, inner, outer_stride, inner_stride, VECTOR: tl.constexpr):
    """Row n. Triton lays threads out by what it knows of pointers, VECTOR neighbours each, and accesses as much at a
    time as it knows of pointers and mask. A row that begins anywhere gets the same layout, and is accessed element by
    element since nothing is known of its mask (`before`)."""
    size: tl.constexpr = VECTOR * (tensor.dtype.element_ty.primitive_bitwidth // 8)
    row = tensor + row_offset(n, inner, outer_stride, inner_stride)
    return tl.multiple_of(row, 16 if size > 16 else size)


@triton.jit
def masked_logit(row, fp16):
    """-inf as the row has it in memory."""
    if row.dtype.element_ty == tl.int16:
        x = tl.where(fp16, -1024, -128).to(tl.int16)
    else:
        x = float("-inf")
    return x


@triton.jit
def as_fp32(x, fp16):
    if x.dtype == tl.int16:
        if fp16:
            y = x.to(tl.float16, bitcast=True).to(tl.float32)
        else:
            y = x.to(tl.bfloat16, bitcast=True).to(tl.float32)
    else:
        y = x
    return y


@triton.jit
def logit_at_column(row, column, width, fp16):
    """One logit, 0 outside of the row."""
    return as_fp32(tl.load(row + column, mask=(column >= 0) & (column < width), other=0), fp16)


@triton.jit
def first_columns(block, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """(LANES) first column of each lane of a block."""
    return block * (LANES * VECTOR) + tl.arange(0, LANES) * VECTOR


@triton.jit
def before(left, VECTOR: tl.constexpr):
    """(LANES, VECTOR): the first left[i] columns of lane i."""
    return tl.arange(0, VECTOR)[None, :] < left[:, None]


@triton.jit
def load_raw(row, block, width, wide, other, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """A block as it lies in memory, `other` beyond the row."""
    if wide:
        inside = block_columns(block, LANES, VECTOR) < width // VECTOR * VECTOR  # a multiple, and known as one
        x = tl.load(row + block_columns(block, LANES, VECTOR), mask=inside, other=other)
    else:
        inside = before(width - first_columns(block, LANES, VECTOR), VECTOR)
        x = tl.load(row + block_columns(block, LANES, VECTOR), mask=inside, other=other)
    return x


@triton.jit
def both_as_fp32(s, t, s_fp16, t_fp16):
    """One branch for both, long enough for the compiler not to compute all its ways."""
    if s_fp16 == t_fp16:
        if s_fp16:
            x, y = as_fp32(s, True), as_fp32(t, True)
        else:
            x, y = as_fp32(s, False), as_fp32(t, False)
    else:
        x, y = as_fp32(s, s_fp16), as_fp32(t, t_fp16)
    return x, y


@triton.jit
def load_blocks(
    s_row, t_row, block, width, asked, student_softcap, teacher_softcap,
    FULL: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Both models' logits of a block, softcapped, -inf beyond the row."""
    s_fp16, t_fp16 = has(asked, STUDENT_FP16), has(asked, TEACHER_FP16)
    s_other, t_other = masked_logit(s_row, s_fp16), masked_logit(t_row, t_fp16)
    if has(asked, WIDE):
        s = load_raw(s_row, block, width, True, s_other, LANES, VECTOR)
        t = load_raw(t_row, block, width, True, t_other, LANES, VECTOR)
    else:
        s = load_raw(s_row, block, width, False, s_other, LANES, VECTOR)
        t = load_raw(t_row, block, width, False, t_other, LANES, VECTOR)
    s, t = both_as_fp32(s, t, s_fp16, t_fp16)
    if FULL:
        if student_softcap != 0:
            s = softcapped(s, student_softcap)
        if teacher_softcap != 0:
            t = softcapped(t, teacher_softcap)
    return s, t


@triton.jit
def load_one_block(row, block, width, fp16, wide, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """(LANES, VECTOR) fp32, 0 beyond the row."""
    return as_fp32(load_raw(row, block, width, wide, 0, LANES, VECTOR), fp16)


@triton.jit
def store_block(row, block, x, width, fp16, wide, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """x: (LANES, VECTOR) fp32, rounded to nearest."""
    if row.dtype.element_ty == tl.int16:
        if fp16:
            stored = x.to(tl.float16).to(tl.int16, bitcast=True)
        else:
            stored = x.to(tl.bfloat16).to(tl.int16, bitcast=True)
    else:
        stored = x
    if wide:
        inside = block_columns(block, LANES, VECTOR) < width // VECTOR * VECTOR
        tl.store(row + block_columns(block, LANES, VECTOR), stored, mask=inside)
    else:
        inside = before(width - first_columns(block, LANES, VECTOR), VECTOR)
        tl.store(row + block_columns(block, LANES, VECTOR), stored, mask=inside)


@triton.jit
def clear_row(row, width, first, last, wide, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Zeros in the blocks first to last."""
    for block in range(first, last):
        store_block(row, block, tl.zeros([LANES, VECTOR], tl.float32), width, False, wide, LANES, VECTOR)
