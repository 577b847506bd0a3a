"""The mathematics of a row with a sparse teacher (DESIGN section 1) as Triton functions. Conventions as in row.py; the
rest: every column that the teacher does not name; vectors over K hold the named ones, -inf where there is none.

What is asked for is known at run time: `hard` and `stats` say which sums are kept, `kind` what the divergence is."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .row import LN2, LOG2E, NO_COLUMN, finite, first_top, term_of, weigh

KL = tl.constexpr(0)  # beta of the forward direction, beta_rest of the reverse one
JSD = tl.constexpr(1)
TOTAL_VARIATION = tl.constexpr(2)
SKEW_FORWARD = tl.constexpr(3)
SKEW_REVERSE = tl.constexpr(4)
SAMPLED = tl.constexpr(5)  # forward_kl over draws


class StudentPiece(NamedTuple):
    """Sums over columns of the student; those of exponentials over the rest, relative to its largest logit."""

    largest: tl.tensor
    sum: tl.tensor  # of 2^y
    sum_hard: tl.tensor  # of 2^(T y)
    entropy: tl.tensor  # of 2^y y
    linear: tl.tensor  # of (logit - reference) as exponents, over all columns
    peak: tl.tensor  # of all columns
    top: tl.tensor  # column of the peak, the lowest at a tie


class StudentRow(NamedTuple):
    """The whole row, relative to its peak."""

    peak: tl.tensor
    sum: tl.tensor
    sum_hard: tl.tensor
    log2_sum: tl.tensor  # of the softmax denominator
    log2_rest: tl.tensor  # of the probability of the rest
    rest_shift: tl.tensor  # log2 of the factor from the rest's exponentials to the row's


class SparseGradient(NamedTuple):
    """The gradient of a column of the rest is of_e 2^y + hard 2^(T y) + constant with y relative to `largest`, and
    of_label more at the label's column."""

    largest: tl.tensor
    of_e: tl.tensor
    hard: tl.tensor
    constant: tl.tensor
    of_label: tl.tensor


@triton.jit
def empty_student(LANES: tl.constexpr):
    masked = tl.full([LANES], float("-inf"), tl.float32)
    zero = tl.zeros([LANES], tl.float32)
    return StudentPiece(masked, zero, zero, zero, zero, masked, tl.full([LANES], NO_COLUMN, tl.int32))


@triton.jit
def rebased_student(p, largest, soft, hard, stats):
    """The piece relative to a larger or equal logit."""
    shift = (p.largest - finite(largest)) * soft.slope
    scale = tl.exp2(shift)
    entropy, sum_hard = p.entropy, p.sum_hard
    if stats:  # an empty sum has nothing to shift; what is scaled to 0 stays 0 even if infinite
        moved = entropy + tl.where(p.sum == 0, 0.0, p.sum * shift)
        entropy = tl.where(scale == 0, 0.0, scale * moved)
    if hard:
        sum_hard = sum_hard * tl.exp2(soft.temperature * shift)
    return StudentPiece(largest, p.sum * scale, sum_hard, entropy, p.linear, p.peak, p.top)


@triton.jit
def with_student_block(p, s, rest, columns, width, reference, soft, hard, stats):
    """The piece and a block of later columns. s: logits (LANES, VECTOR), -inf at columns >= width; rest: s, and -inf at
    the named columns too."""
    largest = tl.maximum(p.largest, tl.max(rest, axis=1))
    peak, top, linear = p.peak, p.top, p.linear
    p = rebased_student(p, largest, soft, hard, stats)
    y = (rest - finite(largest)[:, None]) * soft.slope
    e = tl.exp2(y)
    sum_hard, entropy = p.sum_hard, p.entropy
    if stats:
        peak = tl.maximum(peak, tl.max(s, axis=1))
        top = tl.where(peak > p.peak, first_top(s, peak, columns), top)
        entropy += tl.sum(weigh(e, y), axis=1)
    if hard:
        linear += tl.sum(tl.where(columns < width, (s - reference) * soft.slope, 0.0), axis=1)
        sum_hard += tl.sum(tl.exp2(soft.temperature * y), axis=1)
    return StudentPiece(largest, p.sum + tl.sum(e, axis=1), sum_hard, entropy, linear, peak, top)


@triton.jit
def collapsed_student(p, soft, hard, stats):
    """One piece of scalars from the pieces of the lanes, in an order that depends on their number alone."""
    largest = tl.max(p.largest, axis=0)
    r = rebased_student(p, largest, soft, hard, stats)
    zero = tl.full([], 0.0, tl.float32)
    sum_hard, entropy, linear, peak, top = zero, zero, zero, zero, tl.full([], 0, tl.int32)
    if stats:
        entropy, peak = tl.sum(r.entropy, axis=0), tl.max(p.peak, axis=0)
        top = tl.min(tl.where(p.peak == peak, p.top, NO_COLUMN), axis=0)
    if hard:
        sum_hard, linear = tl.sum(r.sum_hard, axis=0), tl.sum(r.linear, axis=0)
    return StudentPiece(largest, tl.sum(r.sum, axis=0), sum_hard, entropy, linear, peak, top)


@triton.jit
def student_row(rest, peak, named_sum, named_hard, soft):
    """named_sum, named_hard: sums of exponentials over the named columns, relative to the peak."""
    shift = (rest.largest - finite(peak)) * soft.slope
    total = rest.sum * tl.exp2(shift) + named_sum
    hard = rest.sum_hard * tl.exp2(soft.temperature * shift) + named_hard
    log2_sum = tl.log2(total)
    return StudentRow(peak, total, hard, log2_sum, tl.log2(rest.sum) + shift - log2_sum, shift)


@triton.jit
def outcome_term(log2_p, weight, log2_q, lowest, o, kind):
    """term and dlogq of an outcome in units of ln 2; the reverse direction takes log2 p no lower than `lowest`. A
    direction of weight 0 is left out: it may be infinite. What is no entry has log2 p = log2 q = -inf and weight 0, and
    adds nothing."""
    p, q = tl.exp2(log2_p), tl.exp2(log2_q)
    if kind == KL:
        forward = weigh(p, log2_p - log2_q)
        reverse = weigh(q, log2_q - tl.maximum(log2_p, lowest))
        forward = tl.where(o.beta == 0, 0.0, o.beta * forward)
        reverse = tl.where(o.beta_rest == 0, 0.0, o.beta_rest * reverse)
        value, dlogq = forward + reverse, reverse + (o.beta_rest * q - o.beta * p) * LOG2E
    elif kind == JSD:
        value, dlogq = term_of(p, q, log2_p - log2_q, o.beta, o.beta_rest, "jsd")
    elif kind == TOTAL_VARIATION:
        value, dlogq = term_of(p, q, log2_p - log2_q, o.beta, o.beta_rest, "total_variation")
    elif kind == SKEW_FORWARD:
        value, dlogq = term_of(p, q, log2_p - log2_q, o.beta, o.beta_rest, "skew_forward_kl")
    elif kind == SKEW_REVERSE:
        value, dlogq = term_of(p, q, log2_p - log2_q, o.beta, o.beta_rest, "skew_reverse_kl")
    else:
        value, dlogq = weigh(weight, log2_p - log2_q), weight * -LOG2E
    return value, dlogq


@triton.jit
def rest_term(mass, resolution, lowest, row, o, kind):
    """Of the rest as one outcome, and its share of the teacher's entropy; mass: of the teacher there."""
    log2_p = tl.log2(mass)
    # a mass that cannot be told from 0 where the student has none
    log2_p = tl.where((row.log2_rest == float("-inf")) & (mass <= resolution), float("-inf"), log2_p)
    value, dlogq = outcome_term(log2_p, mass, row.log2_rest, lowest, o, kind)
    return value, dlogq, -weigh(tl.exp2(log2_p), log2_p)


@triton.jit
def hard_lse_of(row):
    return tl.log2(row.sum_hard) * LN2 + row.peak


@triton.jit
def sparse_cross_entropy(row, linear, reference, width, label_logit, o, soft):
    """At T = 1, with label smoothing and z-loss; linear: see StudentPiece."""
    log2_hard, t = tl.log2(row.sum_hard), soft.temperature
    ce = (log2_hard - t * ((label_logit - finite(row.peak)) * soft.slope)) * LN2
    mean = linear / width + (reference - finite(row.peak)) * soft.slope
    smooth = (1.0 - o.label_smoothing) * ce + o.label_smoothing * ((log2_hard - t * mean) * LN2)
    ce = tl.where(o.label_smoothing == 0, ce, smooth)
    lse = hard_lse_of(row)
    return ce + tl.where(o.z_loss == 0, 0.0, o.z_loss * lse * lse)
