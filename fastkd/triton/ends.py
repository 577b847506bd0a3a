"""What stands around the rows: the denominator before them, the total behind them, the upstream factor in backward."""

from __future__ import annotations

import triton.language as tl

from .blocks import load_one_block, row_at, run_time, store_block
from .row import LABELS, STUDENT_FP16, WEIGHTS, WIDE, has

# Bits of `asked` besides those of row.py
MEAN = tl.constexpr(512)
ITEMS = tl.constexpr(1024)  # the mean's denominator is given
NORMALISED = tl.constexpr(2048)  # the gradient is stored divided by it
IN_PLACE = tl.constexpr(4096)


@run_time
def scale_kernel(
    scales, pending, labels, weights, num_items, rows, ignore_index: tl.int64, asked, BLOCK: tl.constexpr,
):  # fmt: skip
    """scales: 1 / denominator of the mean (1 for the other reductions), and as much of it as the stored gradient has
    (NORMALISED: all); pending: what it still lacks. One program."""
    denominator = tl.full([], 1.0, tl.float32)
    if has(asked, MEAN):
        if has(asked, ITEMS):
            denominator = tl.load(num_items)
        else:
            lanes = tl.zeros([BLOCK], tl.float32)
            for start in range(0, rows, BLOCK):
                n = start + tl.arange(0, BLOCK)
                weight = tl.load(weights + n, mask=n < tl.where(has(asked, WEIGHTS), rows, 0), other=1.0)
                # a label that is not there is any but the ignored one
                label = tl.load(labels + n, mask=n < tl.where(has(asked, LABELS), rows, 0), other=ignore_index ^ 1)
                lanes += tl.where((n < rows) & (label != ignore_index), weight, 0.0)
            denominator = tl.sum(lanes, axis=0)
    scale = 1.0 / tl.where(denominator == 0, 1.0, denominator)  # no token: the sum, which is 0, stays as it is
    normalised = has(asked, NORMALISED)
    tl.store(scales, scale)
    tl.store(scales + 1, tl.where(normalised, scale, 1.0))
    tl.store(pending, tl.where(normalised, 1.0, scale))


@run_time
def total_kernel(loss, row_loss, scales, rows, BLOCK: tl.constexpr):
    """The loss: the sum over rows times 1 / denominator, in an order that depends on BLOCK alone. One program."""
    lanes = tl.zeros([BLOCK], tl.float32)
    for start in range(0, rows, BLOCK):
        n = start + tl.arange(0, BLOCK)
        lanes += tl.load(row_loss + n, mask=n < rows, other=0.0)
    tl.store(loss, tl.sum(lanes, axis=0) * tl.load(scales))


@run_time
def rescale_kernel(
    source, s_inner, s_outer: tl.int64, s_stride: tl.int64, scaled, d_inner, d_outer: tl.int64, d_stride: tl.int64,
    width, upstream, upstream_stride, pending, asked, splits, blocks, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """scaled = source * upstream * pending, row by row. In place, a row whose factor is 1 is not touched."""
    n, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    factor = tl.load(upstream + n.to(tl.int64) * upstream_stride) * tl.load(pending)
    if has(asked, IN_PLACE) & (factor == 1):
        return
    s_row = row_at(source, n, s_inner, s_outer, s_stride, VECTOR)
    d_row = row_at(scaled, n, d_inner, d_outer, d_stride, VECTOR)
    fp16, wide = has(asked, STUDENT_FP16), has(asked, WIDE)
    for block in range(split * blocks, tl.minimum((split + 1) * blocks, tl.cdiv(width, LANES * VECTOR))):
        x = load_one_block(s_row, block, width, fp16, wide, LANES, VECTOR)
        store_block(d_row, block, factor * x, width, fp16, wide, LANES, VECTOR)
