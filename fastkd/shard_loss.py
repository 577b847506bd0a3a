"""The loss of a rank's columns of the vocabulary, from arguments that :func:`fastkd.kd_loss` has validated."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .ops import scalars_of
from .options import Options
from .shard import VocabShard, group_of, misfit
from .shard_ops import Call, map_of, run
from .stats import KDStats


def sharded_kd_loss(
    backend: str,
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    token_weights: Tensor | None,
    temperature: Tensor | None,
    num_items: Tensor | None,
    options: Options,
    shard: VocabShard,
) -> tuple[Tensor, KDStats | None]:
    """Same contract as :func:`fastkd.eager.eager_kd_loss`, by all ranks of the shard's group together."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError("vocab_shard exchanges sums between processes, which torch.func transforms cannot trace")
    o, tracing = options, torch.compiler.is_compiling()
    with_gradient = student_logits.requires_grad and torch.is_grad_enabled()
    inplace = o.inplace and with_gradient and not tracing and backend != "eager"
    call = Call(
        student_logits, teacher_logits, labels, token_weights, temperature, num_items, scalars_of(o), o.divergence,
        o.scale_by_t2, o.ignore_index, o.reduction, o.return_stats, backend, shard.start, shard.stop,
        group_of(shard).group_name, with_gradient,
    )  # fmt: skip
    sizes = {"student_logits": student_logits.shape[-1], "teacher_logits": teacher_logits.shape[-1]}
    problem = misfit(shard, sizes)
    if problem:
        map_of(call, call.options(), problem)  # raises, on the other ranks too
    if inplace:
        checks.check_inplace(student_logits, teacher_logits)
    loss, stats = run(call, inplace)
    return loss, KDStats(*stats.unbind(0)) if o.return_stats else None
