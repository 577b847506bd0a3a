"""The operators torch.ops.fastkd.sparse_* and the loss built on them; autograd and rescaling are those of ops.py."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, ops, sparse_checks
from .options import Options
from .stats import KDStats
from .topk import TopKTeacher

registered: dict[str, ops.Operators] = {}


def _check_shapes(student_logits, ids, logprobs):
    torch._check(student_logits.shape[:-1] == ids.shape[:-1], lambda: "ids differ from the logits in leading shape")
    torch._check(ids.shape == logprobs.shape, lambda: "logprobs must have the shape of ids")


def _fake_forward(student_logits, ids, logprobs, *arguments):
    *_, reduction, with_stats, with_gradient = arguments
    _check_shapes(student_logits, ids, logprobs)
    loss, pending, stats = ops.fake_outputs(student_logits, reduction, with_stats)
    return loss, student_logits.new_empty(student_logits.shape if with_gradient else (0,)), pending, stats


def _fake_forward_inplace(student_logits, ids, logprobs, *arguments):
    *_, reduction, with_stats = arguments
    _check_shapes(student_logits, ids, logprobs)
    return ops.fake_outputs(student_logits, reduction, with_stats)


def register_backend(name: str, forward: str, rescale: str) -> None:
    """Fake kernels and autograd for fastkd::<forward> and its twin in place; enters them. A backend has them on every
    device where it has the dense ones."""
    registered[name] = ops.register_operators(forward, rescale, _fake_forward, _fake_forward_inplace, 16)


if not ops.load_error:
    register_backend("native", "sparse_forward", "kd_rescale")


def fused_sparse_kd_loss(
    backend: str,
    student_logits: Tensor,
    teacher: TopKTeacher,
    labels: Tensor | None,
    token_weights: Tensor | None,
    temperature: Tensor | None,
    num_items: Tensor | None,
    options: Options,
) -> tuple[Tensor, KDStats | None]:
    """Same contract as :func:`fastkd.sparse_eager.eager_sparse_kd_loss`, by the operators of a registered backend."""
    o = options
    scalars = ops.scalars_of(o, last=teacher.temperature or 0.0)
    arguments = (
        teacher.ids.long(), teacher.logprobs, teacher.weights, labels, token_weights, temperature, num_items, scalars,
        teacher.tail, o.divergence, o.scale_by_t2, o.ignore_index, o.reduction, o.return_stats,
    )  # fmt: skip
    tracing = torch.compiler.is_compiling()
    if o.inplace and student_logits.requires_grad and torch.is_grad_enabled() and not tracing:
        checks.check_inplace(student_logits, teacher.logprobs)
    try:
        loss, stats = ops.run(registered[backend], student_logits, arguments, o.inplace)
    except RuntimeError:
        if not tracing:  # the operator knows only RuntimeError; this says which value of which argument it was
            vocab = student_logits.shape[-1]
            checks.check_values_on_cpu(vocab, labels, temperature, o.ignore_index)
            sparse_checks.check_teacher_values(teacher, vocab, None if labels is None else labels != o.ignore_index)
        raise
    return loss, KDStats(*stats.unbind(0)) if o.return_stats else None
