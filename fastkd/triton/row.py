"""The mathematics of a row (DESIGN section 1) as Triton functions: running sums, terms, and from sums to the gradient.

Conventions, kept everywhere: -inf is a masked column, its exponential is exactly 0 and whatever it multiplies counts as
0; exponents are base 2 and relative to a maximum, y = (logit - maximum) * slope with slope = log2(e) / T; NaN is never
filtered out. A lane is one of the independent accumulators of a program; its tensors have the shape (LANES).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

# A constexpr stands behind the tensor that it multiplies: before it, the interpreter does not know what to do.
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
EPSILON = tl.constexpr(1.1920928955078125e-07)  # from 1 to the next float
NO_COLUMN = tl.constexpr(2147483647)

# Bits of `asked`: what one call asks for, and what it gives. Known at run time.
HARD = tl.constexpr(1)  # the cross-entropy, or its figures for the statistics
STATS = tl.constexpr(2)
LABELS = tl.constexpr(4)
WEIGHTS = tl.constexpr(8)
TEMPERATURES = tl.constexpr(16)
CHECKED = tl.constexpr(32)  # a label outside of the row spoils it
WIDE = tl.constexpr(64)  # every row begins, and ends, at a multiple of VECTOR columns
STUDENT_FP16 = tl.constexpr(128)  # of logits of 2 bytes
TEACHER_FP16 = tl.constexpr(256)


class Softening(NamedTuple):
    """What the exponents of a row have in common. slope = log2(e) / T."""

    temperature: tl.tensor
    slope: tl.tensor


class Piece(NamedTuple):
    """Sums over columns of a row, each relative to the piece's own largest logits. y_s, y_t: exponents at T."""

    largest_s: tl.tensor
    largest_t: tl.tensor
    sum_s: tl.tensor  # of 2^y: the softmax denominators
    sum_t: tl.tensor
    sum_hard: tl.tensor  # of 2^(T y_s): the student's denominator at T = 1
    dot_t: tl.tensor  # of 2^y_t (y_t - y_s)
    dot_s: tl.tensor  # of 2^y_s (y_s - y_t)
    linear_s: tl.tensor  # of y_s, for label smoothing
    columns: tl.tensor
    entropy_s: tl.tensor  # of 2^y y
    entropy_t: tl.tensor
    top_s: tl.tensor  # column of the largest logit, the lowest at a tie
    top_t: tl.tensor


class RowOptions(NamedTuple):
    """What the row is asked for; beta_rest = 1 - beta, by_t2 is 1 or 0."""

    beta: tl.tensor
    beta_rest: tl.tensor
    by_t2: tl.tensor
    kd_weight: tl.tensor
    ce_weight: tl.tensor
    label_smoothing: tl.tensor
    z_loss: tl.tensor


class Coefficients(NamedTuple):
    """The gradient of a column is (student + ratio (y_t - y_s)) 2^y_s + teacher 2^y_t + dlogq dlogq_i
    + hard 2^(T y_s) + constant, and `label` more at the label's column; dlogq_i in units of ln 2."""

    student: tl.tensor
    ratio: tl.tensor
    teacher: tl.tensor
    dlogq: tl.tensor
    hard: tl.tensor
    constant: tl.tensor
    label: tl.tensor


@triton.jit
def has(asked, BIT: tl.constexpr):
    return (asked & BIT) != 0


@triton.jit
def finite(reference):
    """A reference that can be subtracted: where all is masked, -inf - -inf would be NaN."""
    return tl.where(reference == float("-inf"), 0.0, reference)


@triton.jit
def weigh(weight, value):
    """weight * value, 0 where the weight is 0 even if the value is infinite."""
    return tl.where(weight > 0, weight * value, 0.0)


@triton.jit
def softcapped(x, cap):
    """cap tanh(x / cap), relative error of the tanh below 2e-7; 0 is no cap, -inf stays a mask."""
    u = x / tl.where(cap > 0, cap, 1.0)
    size = tl.abs(u)
    square = u * u
    p = -0.0056599886156618595 * square + 0.02059098891913891
    p = p * square + -0.05372106656432152
    p = p * square + 0.13331127166748047
    p = p * square + -0.3333325982093811
    near = u + u * square * p
    e = tl.exp2(size * (-2.0 * LOG2E))
    far = (1.0 - e) / (1.0 + e)
    tanh = tl.where(size > 0.625, tl.where(u > 0, far, -far), near)
    return tl.where((x == float("-inf")) | (cap == 0), x, cap * tanh)


@triton.jit
def empty_piece(LANES: tl.constexpr):
    masked = tl.full([LANES], float("-inf"), tl.float32)
    zero = tl.zeros([LANES], tl.float32)
    column = tl.full([LANES], NO_COLUMN, tl.int32)
    return Piece(masked, masked, zero, zero, zero, zero, zero, zero, zero, zero, zero, column, column)


@triton.jit
def rebased_dot(dot, total, shift, scale):
    """sum 2^y (y - ..) where the reference of 2^y moves by log2(scale) and the bracket by `shift`."""
    # An empty sum has nothing to shift (and 0 * -inf would be NaN); what is scaled to 0 stays 0 even if infinite.
    moved = dot + tl.where(total == 0, 0.0, total * shift)
    return tl.where(scale == 0, 0.0, scale * moved)


@triton.jit
def rebased_hard(p, shift_s, soft):
    """linear_s and sum_hard"""
    linear_s = p.linear_s + tl.where(p.columns == 0, 0.0, p.columns * shift_s)
    return linear_s, p.sum_hard * tl.exp2(soft.temperature * shift_s)


@triton.jit
def rebased_dots(p, shift_s, shift_t, scale_s, scale_t, DIVERGENCE: tl.constexpr):
    """dot_t and dot_s"""
    dot_t, dot_s = p.dot_t, p.dot_s
    if DIVERGENCE == "forward_kl" or DIVERGENCE == "symmetric_kl":
        dot_t = rebased_dot(dot_t, p.sum_t, shift_t - shift_s, scale_t)
    if DIVERGENCE == "reverse_kl" or DIVERGENCE == "symmetric_kl":
        dot_s = rebased_dot(dot_s, p.sum_s, shift_s - shift_t, scale_s)
    return dot_t, dot_s


@triton.jit
def first_top(x, largest, columns):
    """Lowest column of each lane whose logit is the largest."""
    return tl.min(tl.where(x == largest[:, None], columns, NO_COLUMN), axis=1)


@triton.jit
def column_of(first, VECTOR: tl.constexpr):
    """(LANES, VECTOR) columns, from the first one of each lane."""
    return first[:, None] + tl.arange(0, VECTOR)[None, :]


@triton.jit
def with_block(p, s, t, first, width, soft, asked, DIVERGENCE: tl.constexpr, FULL: tl.constexpr):
    """The piece and a block of later columns. s, t: logits (LANES, VECTOR), -inf at columns >= width; first: (LANES)
    columns that the lanes begin with."""
    new_s = tl.maximum(p.largest_s, tl.max(s, axis=1))
    new_t = tl.maximum(p.largest_t, tl.max(t, axis=1))
    shift_s, shift_t = (p.largest_s - finite(new_s)) * soft.slope, (p.largest_t - finite(new_t)) * soft.slope
    scale_s, scale_t = tl.exp2(shift_s), tl.exp2(shift_t)
    y_s = (s - finite(new_s)[:, None]) * soft.slope
    y_t = (t - finite(new_t)[:, None]) * soft.slope
    e_s, e_t = tl.exp2(y_s), tl.exp2(y_t)
    dot_t, dot_s = rebased_dots(p, shift_s, shift_t, scale_s, scale_t, DIVERGENCE)
    if DIVERGENCE == "forward_kl" or DIVERGENCE == "symmetric_kl":
        dot_t += tl.sum(weigh(e_t, y_t - y_s), axis=1)
    if DIVERGENCE == "reverse_kl" or DIVERGENCE == "symmetric_kl":
        dot_s += tl.sum(weigh(e_s, y_s - y_t), axis=1)
    sum_hard, linear_s, seen = p.sum_hard, p.linear_s, p.columns
    if has(asked, HARD):
        linear_s, sum_hard = rebased_hard(p, shift_s, soft)
        left = width - first
        inside = tl.arange(0, s.shape[1])[None, :] < left[:, None]
        linear_s += tl.sum(tl.where(inside, y_s, 0.0), axis=1)
        # no sum over `inside`, which would not stay within a thread
        seen += tl.minimum(tl.maximum(left, 0), s.shape[1]).to(tl.float32)
        sum_hard += tl.sum(tl.exp2(soft.temperature * y_s), axis=1)
    entropy_s, entropy_t, top_s, top_t = p.entropy_s, p.entropy_t, p.top_s, p.top_t
    if FULL:
        if has(asked, STATS):
            entropy_s = rebased_dot(entropy_s, p.sum_s, shift_s, scale_s) + tl.sum(weigh(e_s, y_s), axis=1)
            entropy_t = rebased_dot(entropy_t, p.sum_t, shift_t, scale_t) + tl.sum(weigh(e_t, y_t), axis=1)
            columns = column_of(first, s.shape[1])
            top_s = tl.where(new_s > p.largest_s, first_top(s, new_s, columns), top_s)
            top_t = tl.where(new_t > p.largest_t, first_top(t, new_t, columns), top_t)
    sum_s, sum_t = p.sum_s * scale_s + tl.sum(e_s, axis=1), p.sum_t * scale_t + tl.sum(e_t, axis=1)
    return Piece(new_s, new_t, sum_s, sum_t, sum_hard, dot_t, dot_s, linear_s, seen, entropy_s, entropy_t, top_s, top_t)


@triton.jit
def collapsed(p, soft, asked, DIVERGENCE: tl.constexpr, FULL: tl.constexpr):
    """One piece of scalars from the pieces of the lanes, in an order that depends on their number alone."""
    largest_s, largest_t = tl.max(p.largest_s, axis=0), tl.max(p.largest_t, axis=0)
    shift_s = (p.largest_s - finite(largest_s)) * soft.slope
    shift_t = (p.largest_t - finite(largest_t)) * soft.slope
    scale_s, scale_t = tl.exp2(shift_s), tl.exp2(shift_t)
    zero, no_column = tl.full([], 0.0, tl.float32), tl.full([], 0, tl.int32)
    sum_hard, dot_t, dot_s, linear_s, columns, entropy_s, entropy_t = zero, zero, zero, zero, zero, zero, zero
    top_s, top_t = no_column, no_column
    of_t, of_s = rebased_dots(p, shift_s, shift_t, scale_s, scale_t, DIVERGENCE)
    if DIVERGENCE == "forward_kl" or DIVERGENCE == "symmetric_kl":
        dot_t = tl.sum(of_t, axis=0)
    if DIVERGENCE == "reverse_kl" or DIVERGENCE == "symmetric_kl":
        dot_s = tl.sum(of_s, axis=0)
    if has(asked, HARD):
        linear_lanes, hard_lanes = rebased_hard(p, shift_s, soft)
        sum_hard, linear_s = tl.sum(hard_lanes, axis=0), tl.sum(linear_lanes, axis=0)
        columns = tl.sum(p.columns, axis=0)
    if FULL:
        if has(asked, STATS):
            entropy_s = tl.sum(rebased_dot(p.entropy_s, p.sum_s, shift_s, scale_s), axis=0)
            entropy_t = tl.sum(rebased_dot(p.entropy_t, p.sum_t, shift_t, scale_t), axis=0)
            top_s = tl.min(tl.where(p.largest_s == largest_s, p.top_s, NO_COLUMN), axis=0)
            top_t = tl.min(tl.where(p.largest_t == largest_t, p.top_t, NO_COLUMN), axis=0)
    sum_s, sum_t = tl.sum(p.sum_s * scale_s, axis=0), tl.sum(p.sum_t * scale_t, axis=0)
    return Piece(
        largest_s, largest_t, sum_s, sum_t, sum_hard, dot_t, dot_s, linear_s, columns, entropy_s, entropy_t,
        top_s, top_t,
    )  # fmt: skip


@triton.jit
def mixture(log2_ratio, share, rest):
    """log2(p / m), log2(m / q) and q / m of m = share p + rest q. One exponential of -|log2_ratio| and one log of a
    number in [min(share, rest), 1]: nothing underflows before its logarithm is taken."""
    # A masked column has an infinite ratio and the probability 0; a large finite one makes their product 0. NaN, where
    # both models are masked, becomes any number: both probabilities are 0 there.
    ratio = tl.where(log2_ratio > -1e30, tl.where(log2_ratio < 1e30, log2_ratio, 1e30), -1e30)
    above, below = tl.where(ratio > 0, ratio, 0.0), tl.where(ratio > 0, 0.0, ratio)
    smaller_over_larger = tl.exp2(below - above)
    own, other = tl.where(ratio > 0, share, rest), tl.where(ratio > 0, rest, share)
    m_over_larger = own + other * smaller_over_larger
    log2_m = tl.log2(m_over_larger)
    q_over_m = tl.where(ratio > 0, smaller_over_larger, 1.0) / m_over_larger
    return below - log2_m, above + log2_m, q_over_m


@triton.jit
def term_of(p, q, log2_ratio, beta, rest, DIVERGENCE: tl.constexpr):
    """term(lp, lq) and dlogq = d term / d lq of a column in units of ln 2; log2_ratio = log2(p / q)."""
    if DIVERGENCE == "total_variation":
        # 0 at a tie, which the rounding of the two denominators must not turn into a side; NaN is no tie
        size = tl.abs(p - q)
        tie = (p + q) * (4.0 * EPSILON) > size
        dlogq = tl.where(p - q > 0, q * (-0.5 * LOG2E), q * (0.5 * LOG2E))
        value, dlogq = tl.where(tie, 0.0, size * (0.5 * LOG2E)), tl.where(tie, 0.0, dlogq)
    elif DIVERGENCE == "jsd":
        log2_p_over_m, log2_m_over_q, q_over_m = mixture(log2_ratio, beta, rest)
        dlogq = -rest * q * log2_m_over_q
        value = beta * p * log2_p_over_m + dlogq
    elif DIVERGENCE == "skew_forward_kl":
        log2_p_over_m, log2_m_over_q, q_over_m = mixture(log2_ratio, beta, rest)
        value, dlogq = p * log2_p_over_m, -rest * p * q_over_m * LOG2E
    else:
        tl.static_assert(DIVERGENCE == "skew_reverse_kl")
        log2_p_over_m, log2_m_over_q, q_over_m = mixture(log2_ratio, rest, beta)
        value = -q * log2_m_over_q
        dlogq = value + q * (1.0 - beta * q_over_m) * LOG2E
    return value, dlogq


@triton.jit
def terms_of_block(s, t, row, soft, beta, rest, DIVERGENCE: tl.constexpr):
    """term and dlogq of each column of a block, and its 2^y_s. row: the sums over the whole row."""
    y_s, y_t = (s - finite(row.largest_s)) * soft.slope, (t - finite(row.largest_t)) * soft.slope
    e_s = tl.exp2(y_s)
    p, q = tl.exp2(y_t) * (1.0 / row.sum_t), e_s * (1.0 / row.sum_s)
    log2_ratio = y_t - y_s + (tl.log2(row.sum_s) - tl.log2(row.sum_t))
    value, dlogq = term_of(p, q, log2_ratio, beta, rest, DIVERGENCE)
    return value, dlogq, e_s, y_s


@triton.jit
def reverse_kl_of(row):
    return (row.dot_s / row.sum_s - (tl.log2(row.sum_s) - tl.log2(row.sum_t))) * LN2


@triton.jit
def zero_unless_nan(row):
    """0, or NaN where a logit of the row is NaN or +inf: added to whatever might not carry it."""
    return 0.0 * (row.sum_s + row.sum_t)


@triton.jit
def divergence_of(row, term_sum, o, DIVERGENCE: tl.constexpr):
    """The divergence in nats. A direction of weight 0 is left out: it may be infinite."""
    if DIVERGENCE == "forward_kl" or DIVERGENCE == "symmetric_kl":
        forward = (row.dot_t / row.sum_t - (tl.log2(row.sum_t) - tl.log2(row.sum_s))) * LN2
    if DIVERGENCE == "forward_kl":
        value = forward
    elif DIVERGENCE == "reverse_kl":
        value = reverse_kl_of(row)
    elif DIVERGENCE == "symmetric_kl":
        reverse = tl.where(o.beta_rest == 0, 0.0, o.beta_rest * reverse_kl_of(row))
        value = tl.where(o.beta == 0, 0.0, o.beta * forward) + reverse
    else:
        value = term_sum * LN2 + zero_unless_nan(row)
    return value


@triton.jit
def hard_lse(row):
    """ln sum exp of the student's logits at T = 1."""
    return tl.log2(row.sum_hard) * LN2 + row.largest_s


@triton.jit
def cross_entropy_of(row, label_logit, o, soft):
    """At T = 1, with label smoothing and z-loss."""
    log2_hard, t = tl.log2(row.sum_hard), soft.temperature
    ce = (log2_hard - t * ((label_logit - finite(row.largest_s)) * soft.slope)) * LN2
    uniform = (log2_hard - t * row.linear_s / row.columns) * LN2
    smooth = (1.0 - o.label_smoothing) * ce + o.label_smoothing * uniform
    ce = tl.where(o.label_smoothing == 0, ce, smooth)
    lse = hard_lse(row)
    return ce + tl.where(o.z_loss == 0, 0.0, o.z_loss * lse * lse)


@triton.jit
def coefficients_of(row, dlogq_sum, scale, poison, o, soft, asked, DIVERGENCE: tl.constexpr):
    """scale: the factor of the row's loss in the total. poison: 0, or NaN for a row whose arguments are wrong."""
    t = soft.temperature
    zero = 0.0 * scale
    student, ratio, teacher, dlogq = zero, zero, zero, zero
    weight = scale * o.kd_weight * tl.where(o.by_t2 != 0, t, 1.0 / t)
    if DIVERGENCE == "forward_kl" or DIVERGENCE == "symmetric_kl":
        share = weight if DIVERGENCE == "forward_kl" else weight * o.beta
        student += share / row.sum_s
        teacher -= share / row.sum_t
    if DIVERGENCE == "reverse_kl" or DIVERGENCE == "symmetric_kl":
        share = weight if DIVERGENCE == "reverse_kl" else weight * o.beta_rest
        reverse = share / row.sum_s
        ratio = -reverse * LN2
        log2_ratio = tl.log2(row.sum_s) - tl.log2(row.sum_t)
        # a direction of weight 0 is left out: it may be infinite
        student -= tl.where(share == 0, 0.0, reverse * (reverse_kl_of(row) + log2_ratio * LN2))
    if not (DIVERGENCE == "forward_kl" or DIVERGENCE == "reverse_kl" or DIVERGENCE == "symmetric_kl"):
        dlogq = weight * LN2
        student = zero_unless_nan(row) - dlogq * dlogq_sum / row.sum_s
    # so is the whole divergence
    left_out = o.kd_weight == 0
    student, ratio = tl.where(left_out, 0.0, student), tl.where(left_out, 0.0, ratio)
    teacher, dlogq = tl.where(left_out, 0.0, teacher), tl.where(left_out, 0.0, dlogq)
    hard, constant, label = zero, zero, zero
    if has(asked, HARD):
        weight = scale * o.ce_weight
        hard = tl.where(weight == 0, 0.0, weight * (1.0 + 2.0 * o.z_loss * hard_lse(row)) / row.sum_hard)
        constant = -weight * o.label_smoothing / row.columns
        label = -weight * (1.0 - o.label_smoothing)
    return Coefficients(student, ratio, teacher, dlogq, hard, constant + poison, label)


@triton.jit
def gradient_of_block(s, t, first, row, c, label, o, soft, asked, DIVERGENCE: tl.constexpr):
    """d loss / d (softcapped) student logits of a block."""
    if DIVERGENCE == "forward_kl" or DIVERGENCE == "reverse_kl" or DIVERGENCE == "symmetric_kl":
        y_s, y_t = (s - finite(row.largest_s)) * soft.slope, (t - finite(row.largest_t)) * soft.slope
        e_s = tl.exp2(y_s)
        if DIVERGENCE == "forward_kl":
            d = c.student * e_s + c.teacher * tl.exp2(y_t)
        else:
            # a ratio of weight 0 may be infinite
            d = weigh(e_s, c.student + tl.where(c.ratio == 0, 0.0, c.ratio * (y_t - y_s)))
        if DIVERGENCE == "symmetric_kl":
            d += c.teacher * tl.exp2(y_t)
    else:
        _value, dlogq, e_s, y_s = terms_of_block(s, t, row, soft, o.beta, o.beta_rest, DIVERGENCE)
        d = c.student * e_s + c.dlogq * dlogq
    if has(asked, HARD):
        at_label = tl.arange(0, s.shape[1])[None, :] == (label.to(tl.int32) - first)[:, None]
        d += c.hard * tl.exp2(soft.temperature * y_s) + tl.where(at_label, c.label, 0.0)
    return d + c.constant
