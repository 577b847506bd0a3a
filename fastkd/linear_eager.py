"""The linear loss by torch operations and autograd: any device, up to fp64. Logits of a chunk are computed again in
backward instead of being kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .eager import eager_kd_loss
from .linear_chunks import DEFAULT_BUDGET, Call, chunk_rows
from .linear_models import Model
from .options import Options
from .sparse_eager import eager_sparse_kd_loss
from .stats import KDStats
from .topk import TopKTeacher


def _recomputed(function: Callable, *tensors: Tensor | TopKTeacher | None):
    """function(*tensors), called again in backward. torch.func transforms have no hooks for that: called once there."""
    if torch._C._are_functorch_transforms_active() or not torch.is_grad_enabled():
        return function(*tensors)
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)


def _logits(model: Model, hidden: Tensor) -> Tensor:
    assert model.weight is not None
    bias = None if model.bias is None else model.bias.to(model.logits_dtype)
    return F.linear(hidden.to(model.dtype).to(model.logits_dtype), model.weight.to(model.logits_dtype), bias)


def _rows(piece: slice, x: Tensor) -> Tensor:
    return x[piece]


def eager_linear(call: Call, options: Options, sparse: TopKTeacher | None = None) -> tuple[Tensor, KDStats | None]:
    """Loss and stats (N) of the arguments of the operator; scalars are taken from the options. sparse: the teacher,
    ``(N, K)``, where it has no logits."""
    with torch.autocast(call.student_hidden.device.type, enabled=False):
        return _run(call, options, sparse)


def _run(call: Call, options: Options, sparse: TopKTeacher | None) -> tuple[Tensor, KDStats | None]:
    (student, teacher), rows = call.models(), call.student_hidden.shape[0]
    each = options._replace(reduction="none", return_stats=True)

    def one(hidden, weight, bias, teacher_part, labels, token_weights, temperatures):
        if labels is not None:  # NaN in an ignored row times a gradient of 0 would be NaN
            hidden = hidden.masked_fill((labels == options.ignore_index).unsqueeze(1), 0.0)
        logits = _logits(student._replace(weight=weight, bias=bias), hidden)
        rest = (labels, token_weights, temperatures, None, each)
        if sparse is not None:
            loss, stats = eager_sparse_kd_loss(logits, teacher_part, *rest)
        else:
            teacher_part = teacher_part if teacher.weight is None else _logits(teacher, teacher_part)
            loss, stats = eager_kd_loss(logits, teacher_part, *rest)
        assert stats is not None
        return loss, torch.stack(stats)

    dtypes = (student.logits_dtype, teacher.logits_dtype)[: 2 if sparse is None else 1]
    step = call.chunk_size or chunk_rows(rows, student.vocab, dtypes, call.memory_budget or DEFAULT_BUDGET)
    source = call.teacher_hidden if teacher.logits is None else teacher.logits
    per_row = (source, call.labels, call.token_weights, call.temperatures)
    losses, stats = [], []
    for start in range(0, max(rows, 1), max(step, 1)):
        piece = slice(start, start + step)
        teacher_part, *others = (None if x is None else x[piece] for x in per_row)
        given = teacher_part if sparse is None else sparse.map(partial(_rows, piece))
        value, part = _recomputed(one, call.student_hidden[piece], student.weight, student.bias, given, *others)
        losses.append(value)
        stats.append(part)
    loss = torch.cat(losses)
    if options.reduction != "none":
        loss = loss.sum() / call.denominator().to(loss.dtype)
    return loss, KDStats(*torch.cat(stats, 1).unbind(0)) if options.return_stats else None
