"""The reference: DESIGN section 1 in numpy, fp64 by default, value and hand-derived gradient.

Written from the formulas alone; it shares no code and no trick (online sums, powers, rescaling) with the backends.
`dtype=np.longdouble` serves the finite-difference check of the gradient.

Beside every result stands its *magnitude*: the sum of the absolute values of what was added up to get it, each term
times 1 + |log-probability|, because an exponent of size x carries a rounding error proportional to x. An fp32
computation of good quality errs by a few eps times the magnitude, whatever cancels; tolerances.py compares on that
scale.

Conventions: -inf is a mask, p = 0 or q = 0 contributes 0, a mask stays a mask under a softcap (derivative 1 there).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "total_variation",
    "skew_forward_kl",
    "skew_reverse_kl",
    "symmetric_kl",
)
# |p - q| below this times (p + q) (1 + |log|) is a tie that rounding may decide either way (64 fp32 eps)
_NEAR_TIE = 64 * 2.0**-24


class Reference(NamedTuple):
    """Results and their magnitudes. Leading shape `(...)`, gradient `(..., V)`; 0 at ignored rows."""

    loss: np.ndarray  # 0-d, or (...) for reduction="none"
    gradient: np.ndarray  # d(sum of upstream * loss) / d student
    kd: np.ndarray
    ce: np.ndarray
    student_entropy: np.ndarray
    teacher_entropy: np.ndarray
    top1_agreement: np.ndarray
    top1_unsure: np.ndarray  # rounding of the logits to fp32 may change the ranking
    loss_magnitude: np.ndarray
    gradient_magnitude: np.ndarray
    gradient_slack: np.ndarray  # absolute: total_variation beside a tie
    kd_magnitude: np.ndarray
    ce_magnitude: np.ndarray
    student_entropy_magnitude: np.ndarray
    teacher_entropy_magnitude: np.ndarray


class _Part(NamedTuple):
    """A part of the loss per row: value (R,), gradient with respect to the (softcapped) logits (R, V), magnitudes."""

    value: np.ndarray
    value_magnitude: np.ndarray
    gradient: np.ndarray
    gradient_magnitude: np.ndarray
    slack: np.ndarray


def _weighted(weight: np.ndarray, value: np.ndarray) -> np.ndarray:
    """weight * value, 0 where the weight is 0."""
    return np.where(weight > 0, weight * np.where(weight > 0, value, 0), 0)


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Along the last axis; -inf stays -inf."""
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


class _Direction(NamedTuple):
    """sum_i weight_i (log_a_i - log_b_i) as arrays per column, with the magnitude of each term."""

    term: np.ndarray
    magnitude: np.ndarray


def _direction(weight: np.ndarray, log_a: np.ndarray, log_b: np.ndarray) -> _Direction:
    term = _weighted(weight, log_a - log_b)
    # each log-sum-exp is at best good to 1 eps, also where it is 0
    spread = _weighted(weight, 2 + np.abs(log_a) + np.abs(log_b))
    return _Direction(term, spread + (1 + np.abs(np.where(weight > 0, log_a, 0))) * np.abs(term))


def _terms(divergence: str, beta: float, lp: np.ndarray, lq: np.ndarray) -> tuple[np.ndarray, ...]:
    """term, dlogq and their magnitudes, per column (the table of DESIGN section 1)."""
    p, q = np.exp(lp), np.exp(lq)
    size_p, size_q = p * (1 + np.abs(_finite(lp))), q * (1 + np.abs(_finite(lq)))
    if divergence == "forward_kl":
        d = _direction(p, lp, lq)
        return d.term, -p, d.magnitude, size_p
    if divergence == "reverse_kl":
        d = _direction(q, lq, lp)
        return d.term, d.term + q, d.magnitude, d.magnitude + size_q
    if divergence == "symmetric_kl":
        f, r = _direction(p, lp, lq), _direction(q, lq, lp)
        forward, reverse = _scaled(beta, f), _scaled(1 - beta, r)
        dlogq = reverse.term + (1 - beta) * q - beta * p
        size = reverse.magnitude + (1 - beta) * size_q + beta * size_p
        return forward.term + reverse.term, dlogq, forward.magnitude + reverse.magnitude, size
    if divergence == "total_variation":
        return 0.5 * np.abs(p - q), -0.5 * q * np.sign(p - q), 0.5 * (size_p + size_q), 0.5 * size_q
    if divergence == "jsd":
        lm = np.logaddexp(lp + np.log(beta), lq + np.log1p(-beta))
        f, r = _scaled(beta, _direction(p, lp, lm)), _scaled(1 - beta, _direction(q, lq, lm))
        return f.term + r.term, r.term, f.magnitude + r.magnitude, r.magnitude
    if divergence == "skew_forward_kl":
        lm = np.logaddexp(lp + np.log(beta), lq + np.log1p(-beta))
        d = _direction(p, lp, lm)
        share = (1 - beta) * _weighted(q, np.exp(np.where(q > 0, lp - lm, 0)))  # p q / m
        return d.term, -share, d.magnitude, share * (3 + np.abs(_finite(lp)) + np.abs(_finite(lq)))
    if divergence == "skew_reverse_kl":
        lm = np.logaddexp(lq + np.log(beta), lp + np.log1p(-beta))
        d = _direction(q, lq, lm)
        share = beta * _weighted(q, np.exp(np.where(q > 0, lq - lm, 0)))  # lambda q^2 / m
        return (
            d.term,
            d.term + q - share,
            d.magnitude,
            d.magnitude + size_q + share * (2 + np.abs(_finite(lq))),
        )
    raise ValueError(f"no reference for divergence {divergence!r}")


def _finite(x: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(x), x, 0)


def _scaled(factor: float, d: _Direction) -> _Direction:
    """A direction of weight 0 is left out: it may be infinite."""
    return (
        _Direction(factor * d.term, factor * d.magnitude)
        if factor
        else _Direction(np.zeros_like(d.term), np.zeros_like(d.term))
    )


def _distillation(s: np.ndarray, t: np.ndarray, divergence: str, beta: float, temperature: np.ndarray) -> _Part:
    """The divergence and its gradient; temperature (R, 1)."""
    lq, lp = log_softmax(s / temperature), log_softmax(t / temperature)
    p, q = np.exp(lp), np.exp(lq)
    term, dlogq, term_size, dlogq_size = _terms(divergence, beta, lp, lq)
    total, total_size = dlogq.sum(-1, keepdims=True), dlogq_size.sum(-1, keepdims=True)
    size_q = q * (1 + np.abs(_finite(lq)))
    gradient = (dlogq - _weighted(q, total + 0 * q)) / temperature
    magnitude = (dlogq_size + size_q * np.abs(total) + q * total_size) / temperature
    slack = np.zeros_like(gradient)
    if divergence == "total_variation":
        near = np.abs(p - q) <= _NEAR_TIE * (p + q) * (1 + np.abs(_finite(lp)) + np.abs(_finite(lq)))
        near &= ~(s == t).all(-1, keepdims=True)  # equal rows are ties in every arithmetic
        unsure = np.where(near, q, 0)
        slack = (unsure + q * unsure.sum(-1, keepdims=True)) / temperature
    # a row whose divergence is infinite has a gradient everywhere or nowhere
    gradient[np.isnan(gradient).any(-1)] = np.nan
    return _Part(term.sum(-1), term_size.sum(-1), gradient, magnitude, slack)


def _cross_entropy(s: np.ndarray, labels: np.ndarray, smoothing: float, z_loss: float) -> _Part:
    """lse - (1 - e) s_y - (e / V) sum s + z lse^2, at T = 1."""
    rows, vocab = np.arange(len(s)), s.shape[-1]
    top = s.max(-1)
    lse = top + np.log(np.exp(s - top[:, None]).sum(-1))
    h = np.exp(s - lse[:, None])
    uniform = s.sum(-1) / vocab if smoothing else np.zeros_like(lse)
    uniform_size = np.abs(s).sum(-1) / vocab if smoothing else np.zeros_like(lse)
    value = lse - (1 - smoothing) * s[rows, labels] - smoothing * uniform + z_loss * lse**2
    size = np.abs(lse) + 1 + (1 - smoothing) * np.abs(s[rows, labels]) + 2 * z_loss * lse**2
    size += 4 * smoothing * uniform_size  # a sum of V numbers of one sign, added up one after the other
    pull = 1 + 2 * z_loss * lse[:, None]
    gradient = h * pull - smoothing / vocab
    gradient[rows, labels] -= 1 - smoothing
    size_h = h * (1 + np.abs(_finite(s - lse[:, None])))
    magnitude = size_h * (1 + 4 * z_loss * np.abs(lse[:, None])) + smoothing / vocab
    magnitude[rows, labels] += 1 - smoothing
    return _Part(value, size, gradient, magnitude, np.zeros_like(gradient))


def _nothing_like(part: _Part) -> _Part:
    return _Part(*(np.zeros_like(x) for x in part))


def _scaled_part(factor: np.ndarray, part: _Part) -> _Part:
    """factor (R,) times a part; what has the factor 0 is left out: it may be infinite."""
    if not factor.any():
        return _nothing_like(part)
    return _Part(*(x * (factor if x.ndim == 1 else factor[:, None]) for x in part))


def _sum(a: _Part, b: _Part) -> _Part:
    return _Part(*(x + y for x, y in zip(a, b)))


def _softcap(x: np.ndarray, cap: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Capped logits and the derivative of the cap."""
    if cap is None:
        return x, np.ones_like(x)
    u = np.tanh(x / cap)
    masked = np.isneginf(x)
    return np.where(masked, x, cap * u), np.where(masked, 1, 1 - u * u)


def _entropy(log_probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    d = _direction(np.exp(log_probs), log_probs, np.zeros_like(log_probs))
    return -d.term.sum(-1), d.magnitude.sum(-1)


def _top1(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest index of the largest logit, and whether the next smaller logit is so close that fp32 may rank it first."""
    if not len(x):
        return np.zeros(0, int), np.zeros(0, bool)
    top = x.max(-1)
    below = np.where(x < top[:, None], x, -np.inf).max(-1)
    return x.argmax(-1), top - below <= 1e-5 * np.maximum(1, np.abs(top))


def _statistics(s: np.ndarray, t: np.ndarray, temperature: np.ndarray, scatter: _Scatter) -> dict[str, np.ndarray]:
    """The fields of Reference that depend on the (softcapped) logits alone."""
    (student, student_size), (teacher, teacher_size) = (_entropy(log_softmax(x / temperature[:, None])) for x in (s, t))
    (top_s, near_s), (top_t, near_t) = _top1(s), _top1(t)
    return {
        "student_entropy": scatter(student),
        "teacher_entropy": scatter(teacher),
        "student_entropy_magnitude": scatter(student_size),
        "teacher_entropy_magnitude": scatter(teacher_size),
        "top1_agreement": scatter((top_s == top_t).astype(float)),
        "top1_unsure": scatter((near_s | near_t).astype(float)) > 0,
    }


def _per_row(value: object, rows: int, dtype: type) -> np.ndarray:
    array = np.asarray(value, dtype)
    return np.full(rows, array, dtype) if array.ndim == 0 else array.reshape(rows)


class _Scatter:
    """Places results of the rows that count into arrays over all rows, 0 elsewhere."""

    def __init__(self, lead: tuple[int, ...], valid: np.ndarray, dtype: type) -> None:
        self.lead, self.valid, self.dtype = lead, valid, dtype

    def __call__(self, rows: np.ndarray, columns: int | None = None) -> np.ndarray:
        extra = () if columns is None else (columns,)
        out = np.zeros((len(self.valid), *extra), self.dtype)
        width = () if columns is None else (slice(rows.shape[-1]),)
        out[(self.valid, *width)] = rows
        return out.reshape((*self.lead, *extra))


def reference(
    student: np.ndarray,
    teacher: np.ndarray,
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
    teacher_softcap: float | None = None,
    ignore_index: int = -100,
    token_weights: object = None,
    reduction: str = "mean",
    num_items_in_batch: float | None = None,
    upstream: object = 1.0,
    dtype: type = np.float64,
) -> Reference:
    """Arguments as in `fastkd.kd_loss`, as numpy arrays `(..., V)`; unequal vocabularies are truncated.

    upstream: gradient of the final scalar with respect to the loss, a number or, for reduction="none", `(...)`.
    """
    lead, columns, rows = student.shape[:-1], student.shape[-1], int(np.prod(student.shape[:-1], dtype=int))
    vocab = min(columns, teacher.shape[-1])
    flat_labels = None if labels is None else np.asarray(labels).reshape(rows)
    valid = np.ones(rows, bool) if flat_labels is None else flat_labels != ignore_index
    scatter = _Scatter(lead, valid, dtype)
    raw = np.asarray(student, dtype).reshape(rows, columns)[valid, :vocab]
    s, cap_slope = _softcap(raw, student_softcap)
    t, _ = _softcap(np.asarray(teacher, dtype).reshape(rows, teacher.shape[-1])[valid, :vocab], teacher_softcap)
    w = _per_row(1.0 if token_weights is None else token_weights, rows, dtype)[valid]
    temp = _per_row(temperature, rows, dtype)[valid]
    up = _per_row(upstream, rows, dtype)[valid]

    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        kd = _distillation(s, t, divergence, dtype(beta), temp[:, None])
        ce = _nothing_like(kd)
        if flat_labels is not None:
            ce = _cross_entropy(s, flat_labels[valid], dtype(label_smoothing), dtype(z_loss))
        kd_factor = kd_weight * (temp**2 if scale_by_t2 else np.ones_like(temp))
        total = _sum(_scaled_part(kd_factor, kd), _scaled_part(np.full_like(temp, ce_weight), ce))
        statistics = _statistics(s, t, temp, scatter)
    denominator = 1.0
    if reduction == "mean":
        denominator = w.sum() if num_items_in_batch is None else num_items_in_batch
        denominator = 1.0 if denominator == 0 else denominator
    row_loss, row_size = scatter(w * total.value), scatter(np.abs(w) * total.value_magnitude)
    reduced = reduction != "none"
    # 1 - tanh^2 loses digits where it is small: its error is relative to 1, so the magnitude leaves it out
    outer = (w * up / denominator)[:, None]
    return Reference(
        loss=np.asarray(row_loss.sum() / denominator) if reduced else row_loss,
        gradient=scatter(outer * cap_slope * total.gradient, columns),
        kd=scatter(kd.value),
        ce=scatter(ce.value),
        loss_magnitude=np.asarray(row_size.sum() / denominator) if reduced else row_size,
        gradient_magnitude=scatter(np.abs(outer) * total.gradient_magnitude, columns),
        gradient_slack=scatter(np.abs(outer) * total.slack, columns),
        kd_magnitude=scatter(kd.value_magnitude),
        ce_magnitude=scatter(ce.value_magnitude),
        **statistics,
    )
