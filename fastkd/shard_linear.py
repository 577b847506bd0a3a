"""The linear loss with a rank's columns of both heads."""

from __future__ import annotations

import torch
from torch import Tensor

from .linear_chunks import Call, fused_linear
from .shard import VocabShard, group_of, misfit
from .shard_ops import tell_problem
from .stats import KDStats


def sharded_linear(call: Call, shard: VocabShard) -> tuple[Tensor, KDStats | None]:
    """As :func:`fastkd.linear_chunks.fused_linear`, by all ranks of the group together; every backend takes this way.
    call: with the heads as they were given."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError("vocab_shard exchanges sums between processes, which torch.func transforms cannot trace")
    named = {"student_weight": call.student_weight, "teacher_weight": call.teacher_weight}
    rows = {name: x.shape[0] for name, x in named.items() if x is not None}
    columns = {"teacher_logits": call.teacher_logits.shape[-1]} if call.teacher_logits is not None else {}
    group = group_of(shard).group_name
    problem = misfit(shard, rows, "rows") or misfit(shard, columns)
    if problem:
        tell_problem(call.student_hidden, call[7:17], call.backend, shard, group, problem)
    first = lambda x: None if x is None else x[: shard.width]  # noqa: E731
    logits = None if call.teacher_logits is None else call.teacher_logits[:, : shard.width]
    own = call._replace(
        teacher_weight=first(call.teacher_weight), teacher_bias=first(call.teacher_bias), teacher_logits=logits,
        start=shard.start, stop=shard.stop, group=group,
    )  # fmt: skip
    return fused_linear(own)
