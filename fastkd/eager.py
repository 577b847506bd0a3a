"""The eager backend: DESIGN §1 written in differentiable torch ops, for any device and up to fp64.

It materialises what the kernels do not, so it is the fallback and the yardstick, not the fast path.
Gradients come from autograd, which makes it a check on the hand-derived ones of the kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .options import Options
from .stats import KDStats


def _where_positive(weight: Tensor, value: Tensor) -> Tensor:
    """``weight * value`` that is 0, with gradient 0, wherever ``weight`` is 0 (``value`` may be infinite there)."""
    return weight * torch.where(weight == 0, 0.0, value)


def _log_mixture(lp: Tensor, lq: Tensor, teacher_share: float) -> Tensor:
    """log(share p + (1 - share) q); 0 where both are 0, where nothing may use it."""
    absent = torch.isneginf(lp) & torch.isneginf(lq)
    a = torch.where(absent, torch.zeros_like(lp), lp)
    b = torch.where(absent, torch.zeros_like(lq), lq)
    share = torch.as_tensor(teacher_share, dtype=lp.dtype, device=lp.device)
    return torch.logaddexp(a + share.log(), b + torch.log1p(-share))


def divergence_terms(divergence: str, beta: float, lp: Tensor, lq: Tensor) -> Tensor:
    """term(lp, lq) of DESIGN §1 for every column; lp, lq: log-probabilities ``(..., V)`` of teacher and student."""
    p, q = lp.exp(), lq.exp()
    if divergence == "total_variation":
        return 0.5 * (p - q).abs() + 0.0 * (p * q)  # the sign of NaN is 0: the product keeps NaN in the gradient
    forward = lambda log_m: _where_positive(p, torch.where(p == 0, 0.0, lp) - log_m)  # noqa: E731
    reverse = lambda log_m: _where_positive(q, torch.where(q == 0, 0.0, lq) - log_m)  # noqa: E731
    if divergence == "forward_kl":
        return forward(torch.where(p == 0, 0.0, lq))
    if divergence == "reverse_kl":
        return reverse(torch.where(q == 0, 0.0, lp))
    if divergence == "symmetric_kl":
        directions = ((beta, forward, torch.where(p == 0, 0.0, lq)), (1 - beta, reverse, torch.where(q == 0, 0.0, lp)))
        # a direction of weight 0 is left out: it may be infinite
        return sum((w * kl(log_m) for w, kl, log_m in directions if w != 0), torch.zeros_like(lp))
    if divergence == "jsd":
        log_m = _log_mixture(lp, lq, beta)
        return beta * forward(log_m) + (1 - beta) * reverse(log_m)
    if divergence == "skew_forward_kl":
        return forward(_log_mixture(lp, lq, beta))
    if divergence == "skew_reverse_kl":
        return reverse(_log_mixture(lp, lq, 1 - beta))
    raise ValueError(f"divergence={divergence!r} is not known to the eager backend")


def divergence_slopes(divergence: str, beta: float, lp: Tensor, lq: Tensor) -> Tensor:
    """dlogq(lp, lq) of DESIGN §1 for every column, for where autograd does not reach: inside an operator."""
    p, q = lp.exp(), lq.exp()
    if divergence == "forward_kl":
        return -p
    if divergence == "total_variation":
        return -0.5 * q * torch.sign(p - q) + 0.0 * (p * q)
    own = torch.where(q == 0, 0.0, lq)
    if divergence in ("reverse_kl", "symmetric_kl"):
        share = 1.0 if divergence == "reverse_kl" else 1 - beta
        reverse = _where_positive(q, own - torch.where(q == 0, 0.0, lp) + 1)
        return (share * reverse if share else 0.0 * q) - (1 - share) * p
    log_m = _log_mixture(lp, lq, 1 - beta if divergence == "skew_reverse_kl" else beta)
    if divergence == "jsd":
        return (1 - beta) * _where_positive(q, own - log_m)
    if divergence == "skew_forward_kl":
        return -(1 - beta) * _where_positive(p, torch.exp(lq - log_m))
    return _where_positive(q, own - log_m + 1 - beta * torch.exp(lq - log_m))


def _cross_entropy(student: Tensor, labels: Tensor, options: Options) -> Tensor:
    """(...) cross-entropy at T = 1 with label smoothing and z-loss; student: ``(..., V)``, labels in range."""
    lse = student.logsumexp(-1)
    smoothing = options.label_smoothing
    ce = lse - (1 - smoothing) * student.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    if smoothing != 0:
        ce = ce - smoothing * student.mean(-1)
    return ce + options.z_loss * lse.square()


def entropy(log_probs: Tensor) -> Tensor:
    """In nats, along the last dimension."""
    return -_where_positive(log_probs.exp(), log_probs).sum(-1)


def softcapped(logits: Tensor, softcap: float | None) -> Tensor:
    """c tanh(logits / c); -inf stays a mask."""
    if softcap is None:
        return logits
    return torch.where(torch.isneginf(logits), logits, softcap * torch.tanh(logits / softcap))


def _reduce(loss: Tensor, weights: Tensor, options: Options, num_items: Tensor | None) -> Tensor:
    if options.reduction == "none":
        return loss
    total = loss.sum()
    if options.reduction == "sum":
        return total
    denominator = weights.sum() if num_items is None else num_items.to(total.dtype)
    return total / torch.where(denominator == 0, torch.ones_like(denominator), denominator)


def valid_rows(labels: Tensor | None, logits: Tensor, ignore_index: int) -> tuple[Tensor, Tensor | None]:
    """``(...)`` mask of the tokens that count, and the labels with a column in place of ``ignore_index``."""
    if labels is None:
        return torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device), None
    valid = labels != ignore_index
    return valid, torch.where(valid, labels, 0)


def row_temperature(temperature: Tensor | None, valid: Tensor, options: Options, dtype: torch.dtype) -> Tensor | float:
    """The option's float, or ``(..., 1)``."""
    if temperature is None:
        return options.temperature
    return torch.where(valid, temperature, 1.0).to(dtype).unsqueeze(-1)


def loss_of_rows(
    student: Tensor,
    kd: Tensor,
    labels: Tensor | None,
    valid: Tensor,
    token_weights: Tensor | None,
    t: Tensor | float,
    num_items: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """The reduced loss, and the cross-entropy ``(...)``. student: softcapped ``(..., V)``; kd: divergence ``(...)``."""
    t_squared = t.squeeze(-1) ** 2 if isinstance(t, Tensor) else t * t
    loss = torch.where(torch.zeros_like(valid), student.amax(-1), 0.0)  # 0 with a graph, whatever is left out below
    if options.kd_weight != 0:  # else left out: it may be infinite
        loss = options.kd_weight * (kd * t_squared if options.scale_by_t2 else kd)
    ce = torch.zeros_like(kd)
    if labels is not None and (options.ce_weight != 0 or options.return_stats):
        ce = _cross_entropy(student, labels, options)
    if options.ce_weight != 0:
        loss = loss + options.ce_weight * ce
    weights = valid.to(kd.dtype) if token_weights is None else torch.where(valid, token_weights.to(kd.dtype), 0.0)
    loss = torch.where(valid, weights * loss, 0.0)
    return _reduce(loss, weights, options, num_items), ce


def eager_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    token_weights: Tensor | None,
    temperature: Tensor | None,
    num_items: Tensor | None,
    options: Options,
) -> tuple[Tensor, KDStats | None]:
    """Arguments as validated by :func:`fastkd.kd_loss`. Returns the reduced loss (fp32, or fp64 for fp64 logits)
    and, with ``return_stats``, the statistics. ``temperature``: ``(...)`` per token, or None for the option's float.
    """
    dtype = torch.promote_types(torch.promote_types(student_logits.dtype, teacher_logits.dtype), torch.float32)
    vocab = min(student_logits.shape[-1], teacher_logits.shape[-1])
    student, teacher = student_logits[..., :vocab].to(dtype), teacher_logits[..., :vocab].to(dtype)
    valid, labels = valid_rows(labels, student, options.ignore_index)
    # ignored rows may hold NaN: replaced before any arithmetic, so that their gradient is exactly 0
    student = softcapped(torch.where(valid.unsqueeze(-1), student, 0.0), options.student_softcap)
    teacher = softcapped(torch.where(valid.unsqueeze(-1), teacher, 0.0), options.teacher_softcap)

    t = row_temperature(temperature, valid, options, dtype)
    lq, lp = torch.log_softmax(student / t, -1), torch.log_softmax(teacher / t, -1)
    kd = divergence_terms(options.divergence, options.beta, lp, lq).sum(-1)
    reduced, ce = loss_of_rows(student, kd, labels, valid, token_weights, t, num_items, options)
    if not options.return_stats:
        return reduced, None
    with torch.no_grad():
        agree = (lq.argmax(-1) == lp.argmax(-1)).to(dtype)
        rows = (kd.detach(), ce.detach(), entropy(lq.detach()), entropy(lp.detach()), agree)
        return reduced, KDStats(*(torch.where(valid, row, 0.0).float() for row in rows))
