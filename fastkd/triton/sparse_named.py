"""The K + 1 outcomes of a row with a sparse teacher: the named columns gathered and joined to the sums of the rest, its
loss and statistics, the gradients of the named columns."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .row import LN2, NO_COLUMN, RowOptions, Softening, finite, softcapped, weigh
from .sparse_row import (
    SAMPLED,
    SparseGradient,
    hard_lse_of,
    outcome_term,
    rest_term,
    sparse_cross_entropy,
    student_row,
)

# What a call has, as bits of its `flags`
LABELS = tl.constexpr(1)
WEIGHTS = tl.constexpr(2)
TEMPERATURES = tl.constexpr(4)
STATS = tl.constexpr(8)
GRADIENT = tl.constexpr(16)
HARD = tl.constexpr(32)  # a cross-entropy, or its statistics


class Named(NamedTuple):
    """The entries of a row: pointers to `count` columns ascending (width or more where there is none), log2 p, weights
    of draws, and their gradients."""

    ids: tl.tensor
    log2_p: tl.tensor
    draws: tl.tensor
    gradient: tl.tensor
    count: tl.tensor


class Student(NamedTuple):
    """The student's row: where it is, its columns and what is done to its logits."""

    row: tl.tensor
    width: tl.tensor
    softcap: tl.tensor
    soft: Softening


class Task(NamedTuple):
    """What is asked for of every row."""

    options: RowOptions
    kind: tl.tensor
    lowest: tl.tensor  # log2 p of the rest is no lower in the reverse direction
    resolution: tl.tensor  # of the teacher's mass
    flags: tl.tensor


class Outcomes(NamedTuple):
    """Sums over the named columns."""

    value: tl.tensor
    dlogq: tl.tensor
    student_entropy: tl.tensor
    teacher_entropy: tl.tensor
    top: tl.tensor  # the teacher's best column


@triton.jit
def capped(x, softcap):
    x = x.to(tl.float32)
    if softcap != 0:
        x = softcapped(x, softcap)
    return x


@triton.jit
def logit_of(student, column):
    """0 where the row has no such column."""
    inside = (column >= 0) & (column < student.width)
    return capped(tl.load(student.row + column, mask=inside, other=0.0), student.softcap)


@triton.jit
def reference_of(student):
    """A logit of the row, that sums of all its logits are taken relative to; 0 where it is a mask."""
    x = logit_of(student, 0)
    return tl.where(x > float("-inf"), x, 0.0)


@triton.jit
def softening_at(n, temperature, temperatures, flags):
    temperature = tl.load(temperatures + n, mask=(flags & TEMPERATURES) != 0, other=temperature)
    return Softening(temperature, 1.4426950408889634 / temperature)  # log2(e) / T


@triton.jit
def label_at(n, labels, flags):
    """-1 where there is none."""
    return tl.load(labels + n, mask=(flags & LABELS) != 0, other=-1)


@triton.jit
def poison_at(n, label, rest_of, student, flags):
    """NaN for a row with a label, temperature or teacher out of range, else 0: nothing on the device can raise."""
    t = student.soft.temperature
    wrong = ((flags & LABELS) != 0) & ((label < 0) | (label >= student.width))
    wrong = wrong | (tl.where(t > 0, t, float("inf")) == float("inf"))
    return tl.where(wrong, float("nan"), 0.0), tl.load(rest_of + 2 * n.to(tl.int64) + 1)


@triton.jit
def named_logits(student, named, start, ENTRIES: tl.constexpr):
    """Places, columns and logits of ENTRIES entries from `start` on, -inf where there is none."""
    i = start + tl.arange(0, ENTRIES)
    column = tl.load(named.ids + i, mask=i < named.count, other=NO_COLUMN)
    s = tl.load(student.row + column, mask=column < student.width, other=float("-inf"))
    return i, column, capped(s, student.softcap)


@triton.jit
def teacher_of(named, i):
    log2_p = tl.load(named.log2_p + i, mask=i < named.count, other=float("-inf"))
    return log2_p, tl.load(named.draws + i, mask=i < named.count, other=0.0)


@triton.jit
def joined(rest, student, named, ENTRIES: tl.constexpr):
    """The whole row, from the sums of the rest and the named logits."""
    soft = student.soft
    peaks = tl.full([ENTRIES], float("-inf"), tl.float32)
    for start in range(0, named.count, ENTRIES):
        _i, _column, s = named_logits(student, named, start, ENTRIES)
        peaks = tl.maximum(peaks, s)
    peak = tl.maximum(rest.largest, tl.max(peaks, axis=0))
    sums, hards = tl.zeros([ENTRIES], tl.float32), tl.zeros([ENTRIES], tl.float32)
    for start in range(0, named.count, ENTRIES):
        _i, _column, s = named_logits(student, named, start, ENTRIES)
        y = (s - finite(peak)) * soft.slope
        sums += tl.exp2(y)
        hards += tl.exp2(soft.temperature * y)
    return student_row(rest, peak, tl.sum(sums, axis=0), tl.sum(hards, axis=0), soft)


@triton.jit
def entropy_part(log2_q):
    return -weigh(tl.exp2(log2_q), log2_q)


@triton.jit
def named_outcomes(row, student, named, task, ENTRIES: tl.constexpr):
    values, dlogqs = tl.zeros([ENTRIES], tl.float32), tl.zeros([ENTRIES], tl.float32)
    of_student, of_teacher = tl.zeros([ENTRIES], tl.float32), tl.zeros([ENTRIES], tl.float32)
    best, tops = tl.full([ENTRIES], float("-inf"), tl.float32), tl.full([ENTRIES], NO_COLUMN, tl.int32)
    for start in range(0, named.count, ENTRIES):
        i, column, s = named_logits(student, named, start, ENTRIES)
        log2_p, weight = teacher_of(named, i)
        log2_q = (s - finite(row.peak)) * student.soft.slope - row.log2_sum
        value, dlogq = outcome_term(log2_p, weight, log2_q, float("-inf"), task.options, task.kind)
        values += tl.where(column < student.width, value, 0.0)
        dlogqs += tl.where(column < student.width, dlogq, 0.0)
        of_student += entropy_part(log2_q)
        of_teacher -= weigh(tl.where(task.kind == SAMPLED, weight, tl.exp2(log2_p)), log2_p)
        tops = tl.where(log2_p > best, column, tops)
        best = tl.maximum(best, log2_p)
    top = tl.min(tl.where(best == tl.max(best, axis=0), tops, NO_COLUMN), axis=0)
    return Outcomes(
        tl.sum(values, axis=0), tl.sum(dlogqs, axis=0), tl.sum(of_student, axis=0), tl.sum(of_teacher, axis=0), top
    )


@triton.jit
def write_sparse_stats(at, apart, kd, ce, rest, row, named, rest_entropy, spoilt):
    """The five figures of a row, `apart` (int64) apart."""
    log2_q = rest.entropy / tl.where(rest.sum > 0, rest.sum, 1.0) + row.rest_shift - row.log2_sum
    of_rest = tl.where(rest.sum > 0, -tl.exp2(row.log2_rest) * log2_q, 0.0)
    tl.store(at, kd)
    tl.store(at + apart, ce)
    tl.store(at + 2 * apart, (of_rest + named.student_entropy) * LN2 + spoilt)
    tl.store(at + 3 * apart, (rest_entropy + named.teacher_entropy) * LN2)
    tl.store(at + 4 * apart, (rest.top == named.top).to(tl.float32))


@triton.jit
def ignore_sparse_row(n, rows, row_loss, stats, flags):
    tl.store(row_loss + n, 0.0)
    if (flags & STATS) != 0:
        for i in tl.static_range(5):
            tl.store(stats + n + i * rows.to(tl.int64), 0.0)


@triton.jit
def gradient_of_named(row, student, named, label, of_q, of_dlogq, gradient, task, ENTRIES: tl.constexpr):
    """Writes the gradients of the named columns. of_q, of_dlogq: what 2^y and dlogq count for."""
    soft = student.soft
    for start in range(0, named.count, ENTRIES):
        i, column, s = named_logits(student, named, start, ENTRIES)
        log2_p, weight = teacher_of(named, i)
        y = (s - finite(row.peak)) * soft.slope
        _value, dlogq = outcome_term(
            log2_p, weight, y - row.log2_sum, float("-inf"), task.options, task.kind
        )  # fmt: skip
        d = of_q * tl.exp2(y) + tl.where(task.options.kd_weight == 0, 0.0, of_dlogq * dlogq) + gradient.constant
        d += gradient.hard * tl.exp2(soft.temperature * y) + tl.where(column == label, gradient.of_label, 0.0)
        if student.softcap != 0:  # the chain rule is 1 - (s / cap)^2; a mask is left as it is
            u = s / student.softcap
            d *= tl.where(s == float("-inf"), 1.0, 1.0 - u * u)
        tl.store(named.gradient + i, d, mask=i < named.count)


@triton.jit
def finish_sparse_row(
    n, rows, rest, student, named, label, reference, task, rest_of, scales, weights, row_loss, stats,
    ENTRIES: tl.constexpr,
):  # fmt: skip
    """Writes loss and statistics of a row and the gradients of its named columns; returns what the others' need."""
    o, flags, soft = task.options, task.flags, student.soft
    row = joined(rest, student, named, ENTRIES)
    outcomes = named_outcomes(row, student, named, task, ENTRIES)
    poison, spoilt = poison_at(n, label, rest_of, student, flags)
    spoilt += 0.0 * row.sum  # or NaN
    poison += spoilt
    mass = tl.load(rest_of + 2 * n.to(tl.int64))
    value, dlogq_rest, rest_entropy = rest_term(mass, task.resolution, task.lowest, row, o, task.kind)
    dlogq_sum = outcomes.dlogq + dlogq_rest
    kd = (outcomes.value + value) * LN2 + spoilt
    squared = tl.where(o.by_t2 != 0, soft.temperature * soft.temperature, 1.0)
    loss = tl.where(o.kd_weight == 0, 0.0, o.kd_weight * squared * kd)  # a part of weight 0 may be infinite
    ce, hard_weight = tl.full([], 0.0, tl.float32), tl.full([], 0.0, tl.float32)
    if (flags & HARD) != 0:
        ce = sparse_cross_entropy(row, rest.linear, reference, student.width, logit_of(student, label), o, soft)
        loss += tl.where(o.ce_weight == 0, 0.0, o.ce_weight * ce)
        hard_weight += o.ce_weight
    token = tl.load(weights + n, mask=(flags & WEIGHTS) != 0, other=1.0)
    tl.store(row_loss + n, token * loss + poison)
    if (flags & STATS) != 0:
        write_sparse_stats(stats + n, rows.to(tl.int64), kd, ce, rest, row, outcomes, rest_entropy, spoilt)
    scale = token * tl.load(scales + 1)
    of_dlogq = scale * o.kd_weight * tl.where(o.by_t2 != 0, soft.temperature, 1.0 / soft.temperature) * LN2
    of_q = tl.where(o.kd_weight == 0, 0.0, spoilt - of_dlogq * dlogq_sum / row.sum)
    weight = scale * hard_weight
    hard = tl.where(weight == 0, 0.0, weight * (1.0 + 2.0 * o.z_loss * hard_lse_of(row)) / row.sum_hard)
    constant = poison - weight * o.label_smoothing / student.width
    of_label = -weight * (1.0 - o.label_smoothing)
    own = tl.where(rest.sum > 0, of_dlogq * dlogq_rest / tl.where(rest.sum > 0, rest.sum, 1.0), 0.0)
    of_e = of_q * tl.exp2(row.rest_shift) + tl.where(o.kd_weight == 0, 0.0, own)
    if (flags & GRADIENT) != 0:
        relative_to_peak = SparseGradient(row.peak, of_e, hard, constant, of_label)
        gradient_of_named(row, student, named, label, of_q, of_dlogq, relative_to_peak, task, ENTRIES)
    return SparseGradient(rest.largest, of_e, hard * tl.exp2(soft.temperature * row.rest_shift), constant, of_label)
