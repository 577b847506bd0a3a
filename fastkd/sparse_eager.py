"""The eager backend with a sparse teacher: DESIGN section 1, "Sparse teachers", in differentiable torch operations."""

from __future__ import annotations

import torch
from torch import Tensor

from .eager import divergence_terms, entropy, loss_of_rows, row_temperature, softcapped, valid_rows
from .options import Options
from .stats import KDStats
from .topk import TopKTeacher, mass_limit, mass_resolution

_NEG_INF = float("-inf")


def entries_of(teacher: TopKTeacher, vocab: int, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ids ``(..., K)`` that can be gathered, the mask of those that are entries, and ``(...)`` rows that are wrong:
    what a look at the values would refuse, where a look would wait for the device."""
    ids, logprobs = teacher.ids.long(), teacher.logprobs
    entry = ~((ids < 0) & torch.isneginf(logprobs)) & valid.unsqueeze(-1)
    in_range = (ids >= 0) & (ids < vocab)
    limit = mass_limit(logprobs.dtype)
    p = torch.where(entry, logprobs.double(), _NEG_INF).exp()
    wrong = (entry & (~in_range | ~(p <= limit))).any(-1)
    if teacher.weights is not None:
        wrong = wrong | (entry & ~((teacher.weights >= 0) & torch.isfinite(teacher.weights))).any(-1)
    if teacher.tail != "sampled":
        ranked = torch.where(entry, ids, -1 - torch.arange(ids.shape[-1], device=ids.device)).sort(-1).values
        wrong = wrong | ((ranked[..., 1:] == ranked[..., :-1]) & (ranked[..., 1:] >= 0)).any(-1) | (p.sum(-1) > limit)
    if teacher.tail != "bucket":
        wrong = wrong | ~(p > 0).any(-1)
    entry = entry & in_range
    return torch.where(entry, ids, 0), entry, wrong & valid


def _masked_log_sum(logs: Tensor, absent: Tensor) -> Tensor:
    """log of the sum of exponentials of the columns that are not absent; -inf, without a gradient, where all are."""
    logs = logs.masked_fill(absent, _NEG_INF)
    empty = torch.isneginf(logs).all(-1)
    total = torch.where(empty.unsqueeze(-1), 0.0, logs).logsumexp(-1)
    return torch.where(empty, _NEG_INF, total)


def mass_left(lp: Tensor) -> Tensor:
    """1 - sum p over the last dimension, below 0 where rounding made the sum larger: by the largest p, whose part of
    the difference is exact, and the others."""
    largest, at = lp.double().max(-1, keepdim=True)
    others = lp.double().exp().scatter(-1, at, 0.0)
    return (-torch.expm1(largest) - others.sum(-1, keepdim=True)).squeeze(-1)


def _outcomes(teacher: TopKTeacher, lp: Tensor, lq_rest: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """log p of the K ids, of the rest, and the latter as the reverse direction takes it. lp: -inf at no entry."""
    nothing = torch.full_like(lq_rest, _NEG_INF)
    if teacher.tail == "renormalize":
        softened = lp if teacher.temperature is None else lp * (teacher.temperature / t)
        return torch.log_softmax(softened, -1), nothing, nothing
    left, resolution = mass_left(lp), mass_resolution(teacher.logprobs.dtype)
    lp = torch.where((left < 0).unsqueeze(-1), torch.log_softmax(lp, -1), lp)
    absent = torch.isneginf(lq_rest) & (left <= resolution)
    lp_rest = torch.where(absent, 0.0, left.clamp(min=0)).log().to(lp.dtype)
    lowest = torch.as_tensor(resolution, dtype=lp.dtype).log()
    return lp, lp_rest, torch.maximum(lp_rest, lowest.to(lp.device))


def _divergence(options: Options, lp: Tensor, lp_rest: Tensor, lowest: Tensor, lq: Tensor, lq_rest: Tensor) -> Tensor:
    """(...) D over K + 1 outcomes."""
    named = divergence_terms(options.divergence, options.beta, lp, lq).sum(-1)
    if options.divergence not in ("reverse_kl", "symmetric_kl"):
        return named + divergence_terms(options.divergence, options.beta, lp_rest, lq_rest)
    forward = 0.0 if options.divergence == "reverse_kl" else options.beta
    rest = named
    if forward != 0:
        rest = rest + forward * divergence_terms("forward_kl", 0.5, lp_rest, lq_rest)
    if forward != 1:
        rest = rest + (1 - forward) * _reverse_term(lowest, lq_rest)
    return rest


def _reverse_term(lp: Tensor, lq: Tensor) -> Tensor:
    """q (lq - lp), 0 where q is 0."""
    q = lq.exp()
    return q * torch.where(q == 0, 0.0, lq - lp)


def _sampled(teacher: TopKTeacher, lp: Tensor, lq: Tensor, entry: Tensor) -> tuple[Tensor, Tensor]:
    """The expectations over the draws of lp - lq and of -lp, ``(...)``. A draw of probability 0 was never drawn."""
    drawn = entry & ~torch.isneginf(lp)
    if teacher.weights is None:
        weights = drawn.to(lp.dtype) / drawn.sum(-1, keepdim=True).clamp(min=1)
    else:
        weights = torch.where(drawn, teacher.weights, 0.0).to(lp.dtype)
    lp = torch.where(drawn, lp, 0.0)
    drawn = weights > 0
    return (weights * torch.where(drawn, lp - lq, 0.0)).sum(-1), -(weights * lp).sum(-1)


def eager_sparse_kd_loss(
    student_logits: Tensor,
    teacher: TopKTeacher,
    labels: Tensor | None,
    token_weights: Tensor | None,
    temperature: Tensor | None,
    num_items: Tensor | None,
    options: Options,
) -> tuple[Tensor, KDStats | None]:
    """Arguments as validated by :func:`fastkd.sparse_kd_loss`; results as of :func:`fastkd.eager.eager_kd_loss`."""
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    valid, labels = valid_rows(labels, student_logits, options.ignore_index)
    student = torch.where(valid.unsqueeze(-1), student_logits.to(dtype), 0.0)
    student = softcapped(student, options.student_softcap)
    t = row_temperature(temperature, valid, options, dtype)
    ids, entry, wrong = entries_of(teacher, student.shape[-1], valid)
    spoilt = torch.where(wrong, float("nan"), 1.0).to(dtype)
    lq_all = torch.log_softmax(student / t, -1) * spoilt.unsqueeze(-1)
    lq = torch.where(entry, lq_all.gather(-1, ids), _NEG_INF)
    lp = torch.where(entry, teacher.logprobs.to(dtype), _NEG_INF)
    if teacher.tail == "sampled":
        kd, teacher_entropy = _sampled(teacher, lp, lq, entry)
    else:
        vocab = student.shape[-1]  # a column more, for what is no entry
        named = torch.zeros((*valid.shape, vocab + 1), dtype=torch.bool, device=student.device)
        named = named.scatter(-1, torch.where(entry, ids, vocab), True)[..., :vocab]
        lq_rest = _masked_log_sum(lq_all, named)
        lp, lp_rest, lowest = _outcomes(teacher, lp, lq_rest, t)
        kd = _divergence(options, lp, lp_rest, lowest, lq, lq_rest)
        teacher_entropy = entropy(torch.cat([lp, lp_rest.unsqueeze(-1)], -1))
    kd = kd * spoilt
    reduced, ce = loss_of_rows(student, kd, labels, valid, token_weights, t, num_items, options)
    if not options.return_stats:
        return reduced, None
    with torch.no_grad():
        agree = (lq_all.argmax(-1) == _top_id(ids, lp)).to(dtype)
        rows = (kd.detach(), ce.detach(), entropy(lq_all.detach()), teacher_entropy, agree)
        return reduced, KDStats(*(torch.where(valid, row, 0.0).float() for row in rows))


def _top_id(ids: Tensor, lp: Tensor) -> Tensor:
    """(...) the id of the largest log-probability, the lowest at a tie; -1 where there is no entry."""
    largest = lp.amax(-1, keepdim=True)
    top = torch.where((lp == largest) & ~torch.isneginf(lp), ids, torch.iinfo(torch.int64).max).amin(-1)
    return torch.where(torch.isneginf(largest.squeeze(-1)), -1, top)
