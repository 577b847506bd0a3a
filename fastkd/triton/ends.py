"""What stands around the rows: the denominator before them, the total behind them, the upstream factor in backward."""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import CHANGING, block_columns, row_offset


@triton.jit(do_not_specialize=CHANGING)
def scale_kernel(
    scales, pending, labels, weights, num_items, rows, ignore_index,
    MEAN: tl.constexpr, NORMALISED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """scales: 1 / denominator of the mean (1 for the other reductions), and as much of it as the stored gradient has
    (NORMALISED: all); pending: what it still lacks. One program."""
    denominator = 1.0
    if MEAN:
        if num_items is not None:
            denominator = tl.load(num_items)
        else:
            lanes = tl.zeros([BLOCK], tl.float32)
            for start in range(0, rows, BLOCK):
                n = start + tl.arange(0, BLOCK)
                weight = tl.full([BLOCK], 1.0, tl.float32)
                if weights is not None:
                    weight = tl.load(weights + n, mask=n < rows, other=0.0)
                counts = n < rows
                if labels is not None:
                    counts = counts & (tl.load(labels + n, mask=n < rows, other=0) != ignore_index)
                lanes += tl.where(counts, weight, 0.0)
            denominator = tl.sum(lanes, axis=0)
    scale = 1.0 / tl.where(denominator == 0, 1.0, denominator)  # no token: the sum, which is 0, stays as it is
    tl.store(scales, scale)
    tl.store(scales + 1, scale if NORMALISED else 1.0)
    tl.store(pending, 1.0 if NORMALISED else scale)


@triton.jit(do_not_specialize=CHANGING)
def total_kernel(loss, row_loss, scales, rows, BLOCK: tl.constexpr):
    """The loss: the sum over rows times 1 / denominator, in an order that depends on BLOCK alone. One program."""
    lanes = tl.zeros([BLOCK], tl.float32)
    for start in range(0, rows, BLOCK):
        n = start + tl.arange(0, BLOCK)
        lanes += tl.load(row_loss + n, mask=n < rows, other=0.0)
    tl.store(loss, tl.sum(lanes, axis=0) * tl.load(scales))


@triton.jit(do_not_specialize=[*CHANGING, "upstream_stride"])
def rescale_kernel(
    source, s_inner, s_outer, s_stride, scaled, d_inner, d_outer, d_stride, width, upstream, upstream_stride, pending,
    splits, blocks, INPLACE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """scaled = source * upstream * pending, row by row. In place, a row whose factor is 1 is not touched."""
    n, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    factor = tl.load(upstream + n.to(tl.int64) * upstream_stride) * tl.load(pending)
    if INPLACE:
        if factor == 1:
            return
    s_row = source + row_offset(n, s_inner, s_outer, s_stride)
    d_row = scaled + row_offset(n, d_inner, d_outer, d_stride)
    for block in range(split * blocks, tl.minimum((split + 1) * blocks, tl.cdiv(width, LANES * VECTOR))):
        columns = block_columns(block, LANES, VECTOR)
        x = tl.load(s_row + columns, mask=columns < width, other=0.0).to(tl.float32)
        tl.store(d_row + columns, (factor * x).to(scaled.dtype.element_ty), mask=columns < width)
