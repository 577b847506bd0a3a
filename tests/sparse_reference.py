"""The reference with a sparse teacher: DESIGN section 1, "Sparse teachers", in numpy, fp64, row by row.

Written from the formulas; of reference.py it takes the table of divergences, the cross-entropy and the bookkeeping of
magnitudes (what those are is said there).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from reference import (
    _NEAR_TIE,
    Reference,
    _cross_entropy,
    _direction,
    _entropy,
    _finite,
    _nothing_like,
    _Part,
    _per_row,
    _scaled_part,
    _Scatter,
    _softcap,
    _sum,
    _terms,
    _top1,
    _weighted,
    log_softmax,
)


class Teacher(NamedTuple):
    """A row of a TopKTeacher as numpy arrays without padding."""

    ids: np.ndarray
    logprobs: np.ndarray
    weights: np.ndarray | None
    tail: str
    temperature: float | None
    resolution: float


class _Outcomes(NamedTuple):
    """K + 1 outcomes, the rest last: logs of teacher and student, and the errors of the teacher's own mass."""

    lp: np.ndarray
    lq: np.ndarray
    lowest: float  # log p of the rest as the reverse direction takes it
    unsure: float  # magnitude of the rest's mass, a difference


def log_sum(x: np.ndarray) -> float:
    top = x.max(initial=-np.inf)
    return top if np.isneginf(top) else top + np.log(np.exp(x - top).sum())


def outcomes_of(teacher: Teacher, lq: np.ndarray, temperature: float) -> _Outcomes:
    """lq: (V,) log-softmax of the student."""
    rest = np.ones(len(lq), bool)
    rest[teacher.ids] = False
    lq_rest = log_sum(lq[rest])
    lp, left, unsure = teacher.logprobs, 0.0, 0.0
    if teacher.tail == "renormalize":
        softened = lp if teacher.temperature is None else lp * (teacher.temperature / temperature)
        lp = softened - log_sum(softened)
    else:
        p, top = np.exp(lp), int(lp.argmax()) if len(lp) else 0
        others = np.delete(p, top) if len(lp) else p
        left = (-np.expm1(lp[top]) if len(lp) else 1.0) - others.sum()
        unsure = (
            abs(left)
            + (2 - 2 * p[top] if len(lp) else 0)
            + (others * (1 + np.abs(np.log(np.maximum(others, 1e-300))))).sum()
        )
        if left < 0:
            lp, left, unsure = lp - np.log1p(-left), 0.0, 0.0
        if np.isneginf(lq_rest) and left <= teacher.resolution:
            left, unsure = 0.0, 0.0
    with np.errstate(divide="ignore"):
        lp_rest = np.log(left)
    lowest = max(lp_rest, np.log(teacher.resolution)) if teacher.tail == "bucket" else lp_rest
    return _Outcomes(np.append(lp, lp_rest), np.append(lq[teacher.ids], lq_rest), lowest, unsure)


def _outcome_terms(divergence: str, beta: float, o: _Outcomes) -> tuple[np.ndarray, ...]:
    """term, dlogq and their magnitudes per outcome."""
    share = {"forward_kl": 1.0, "reverse_kl": 0.0, "symmetric_kl": beta}.get(divergence)
    if share is None:
        value, dlogq, value_size, dlogq_size = _terms(divergence, beta, o.lp, o.lq)
    else:
        floored = np.append(o.lp[:-1], o.lowest)
        parts = [
            (share, _terms("forward_kl", beta, o.lp, o.lq)),
            (1 - share, _terms("reverse_kl", beta, floored, o.lq)),
        ]
        value, dlogq, value_size, dlogq_size = (sum(w * part[i] for w, part in parts if w) for i in range(4))
    logs = 2 + np.abs(_finite(o.lp[-1:])) + np.abs(_finite(o.lq[-1:]))
    of_log = 0.0
    if share is not None and share < 1 and np.exp(o.lowest) > 0:
        of_log = (1 - share) * np.exp(o.lq[-1]) / np.exp(o.lowest)  # q log p: an error of p counts q / p
    value_size[-1] += o.unsure * (logs[0] + of_log)
    dlogq_size[-1] += o.unsure * (logs[0] + of_log)
    return value, dlogq, value_size, dlogq_size


class _Row(NamedTuple):
    value: float
    value_size: float
    gradient: np.ndarray
    gradient_size: np.ndarray
    slack: np.ndarray
    entropy: float
    entropy_size: float
    top: int
    top_unsure: bool


def _spread(ids: np.ndarray, named: np.ndarray, rest: float, shares: np.ndarray) -> np.ndarray:
    """(V,): of the named columns their own, of the others their share of the rest's."""
    out = shares * rest
    out[ids] = named
    return out


def _top_of(ids: np.ndarray, lp: np.ndarray) -> tuple[int, bool]:
    if not len(ids) or np.isneginf(lp.max()):
        return -1, False
    best = np.sort(ids[lp == lp.max()])[0]
    below = np.where(lp < lp.max(), lp, -np.inf).max(initial=-np.inf)
    return int(best), bool(lp.max() - below <= 1e-5 * max(1, abs(lp.max())))


def _bucket_row(teacher: Teacher, lq: np.ndarray, divergence: str, beta: float, temperature: float) -> _Row:
    """bucket and renormalize."""
    o = outcomes_of(teacher, lq, temperature)
    value, dlogq, value_size, dlogq_size = _outcome_terms(divergence, beta, o)
    q, lq_rest = np.exp(lq), o.lq[-1]
    shares = np.zeros_like(q) if np.isneginf(lq_rest) else np.exp(lq - lq_rest)
    shares[teacher.ids] = 0
    total, total_size = dlogq.sum(), dlogq_size.sum()
    size_q = q * (1 + np.abs(_finite(lq)))
    own = _spread(teacher.ids, dlogq[:-1], dlogq[-1] if shares.any() else 0.0, shares)
    size = _spread(teacher.ids, dlogq_size[:-1], dlogq_size[-1] if shares.any() else 0.0, shares)
    size += shares * np.abs(_finite(lq - _finite(lq_rest))) * np.abs(_finite(dlogq[-1]))
    gradient = (own - _weighted(q, total + 0 * q)) / temperature
    if np.isnan(gradient).any():
        gradient[:] = np.nan
    slack = np.zeros_like(q)
    if divergence == "total_variation":
        p_all, q_all = np.exp(o.lp), np.exp(o.lq)
        near = np.abs(p_all - q_all) <= _NEAR_TIE * (
            (p_all + q_all) * (1 + np.abs(_finite(o.lp)) + np.abs(_finite(o.lq)))
        )
        near[-1] |= abs(p_all[-1] - q_all[-1]) <= _NEAR_TIE * o.unsure
        unsure = np.where(near, q_all, 0)
        slack = (_spread(teacher.ids, unsure[:-1], unsure[-1], shares) + q * unsure.sum()) / temperature
    entropy, entropy_size = _entropy(o.lp[None])
    entropy_size = entropy_size + o.unsure * (2 + abs(_finite(o.lp[-1])))
    top, near_top = _top_of(teacher.ids, o.lp[:-1])
    magnitude = (size + size_q * abs(total) + q * total_size) / temperature
    return _Row(value.sum(), value_size.sum(), gradient, magnitude, slack, entropy[0], entropy_size[0], top, near_top)


def _sampled_row(teacher: Teacher, lq: np.ndarray, temperature: float) -> _Row:
    """sum over draws of w (lp - lq)."""
    drawn = ~np.isneginf(teacher.logprobs)
    ids, lp = teacher.ids[drawn], teacher.logprobs[drawn]
    w = np.full(len(ids), 1 / max(1, len(ids))) if teacher.weights is None else teacher.weights[drawn]
    d = _direction(w, lp, lq[ids])
    pulled = np.zeros_like(lq)
    np.add.at(pulled, ids, w)
    q = np.exp(lq)
    gradient = (w.sum() * q - pulled) / temperature
    size = (q * (2 + np.abs(_finite(lq))) * w.sum() + 2 * pulled) / temperature
    entropy = -(w * lp).sum()
    top, near = _top_of(ids, lp)
    return _Row(d.term.sum(), d.magnitude.sum() + (w * np.abs(_finite(lp - lq[ids]))).sum(), gradient, size,
                np.zeros_like(q), entropy, np.abs(w * lp).sum() * 2 + w.sum(), top, near)  # fmt: skip


def sparse_reference(
    student: np.ndarray,
    teachers: list[Teacher | None],
    labels: np.ndarray | None = None,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: object = 1.0,
    scale_by_t2: bool = True,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    student_softcap: float | None = None,
    ignore_index: int = -100,
    token_weights: object = None,
    reduction: str = "mean",
    num_items_in_batch: float | None = None,
    upstream: object = 1.0,
) -> Reference:
    """Arguments as of `fastkd.sparse_kd_loss`; teachers: one a row, in row order."""
    lead, columns, rows = student.shape[:-1], student.shape[-1], int(np.prod(student.shape[:-1], dtype=int))
    flat = None if labels is None else np.asarray(labels).reshape(rows)
    valid = np.ones(rows, bool) if flat is None else flat != ignore_index
    scatter = _Scatter(lead, valid, np.float64)
    s, cap_slope = _softcap(np.asarray(student, np.float64).reshape(rows, columns)[valid], student_softcap)
    w = _per_row(1.0 if token_weights is None else token_weights, rows, np.float64)[valid]
    temp = _per_row(temperature, rows, np.float64)[valid]
    up = _per_row(upstream, rows, np.float64)[valid]
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        found = []
        lq = log_softmax(s / temp[:, None]) if len(s) else s
        for row, teacher in enumerate(t for t, counts in zip(teachers, valid) if counts):
            assert teacher is not None
            t = float(temp[row])
            sampled = teacher.tail == "sampled"
            found.append(_sampled_row(teacher, lq[row], t) if sampled
                         else _bucket_row(teacher, lq[row], divergence, beta, t))  # fmt: skip
        column = lambda name: np.array([getattr(r, name) for r in found], np.float64)  # noqa: E731
        table = lambda name: np.array([getattr(r, name) for r in found]).reshape(len(found), columns)  # noqa: E731
        kd = _Part(column("value"), column("value_size"), table("gradient"), table("gradient_size"), table("slack"))
        ce = _nothing_like(kd)
        if flat is not None:
            ce = _cross_entropy(s, flat[valid], label_smoothing, z_loss)
        factor = kd_weight * (temp**2 if scale_by_t2 else np.ones_like(temp))
        total = _sum(_scaled_part(factor, kd), _scaled_part(np.full_like(temp, ce_weight), ce))
        student_entropy, student_entropy_size = _entropy(lq) if len(s) else (temp, temp)
        top_s, near_s = _top1(s)
    denominator = 1.0
    if reduction == "mean":
        denominator = w.sum() if num_items_in_batch is None else num_items_in_batch
        denominator = 1.0 if denominator == 0 else denominator
    reduced = reduction != "none"
    row_loss, row_size = scatter(w * total.value), scatter(np.abs(w) * total.value_magnitude)
    outer = (w * up / denominator)[:, None]
    return Reference(
        loss=np.asarray(row_loss.sum() / denominator) if reduced else row_loss,
        gradient=scatter(outer * cap_slope * total.gradient, columns),
        kd=scatter(kd.value),
        ce=scatter(ce.value),
        student_entropy=scatter(student_entropy),
        teacher_entropy=scatter(column("entropy")),
        top1_agreement=scatter((top_s == column("top")).astype(float)),
        top1_unsure=scatter((near_s | (column("top_unsure") > 0)).astype(float)) > 0,
        loss_magnitude=np.asarray(row_size.sum() / denominator) if reduced else row_size,
        gradient_magnitude=scatter(np.abs(outer) * total.gradient_magnitude, columns),
        gradient_slack=scatter(np.abs(outer) * total.slack, columns),
        kd_magnitude=scatter(kd.value_magnitude),
        ce_magnitude=scatter(ce.value_magnitude),
        student_entropy_magnitude=scatter(student_entropy_size),
        teacher_entropy_magnitude=scatter(column("entropy_size")),
    )
