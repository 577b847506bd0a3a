"""The public linear loss with a sparse teacher: the chunk loop of linear_kd_loss, the divergence of sparse_kd_loss."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, linear_checks, sparse_checks
from .backends import select_backend
from .linear import flat_per_token, gradients_wanted
from .linear_chunks import Call, fused_linear
from .linear_eager import eager_linear
from .ops import scalars_of
from .options import Options, check_options
from .products import logits_dtype_for
from .stats import KDStats
from .topk import TopKTeacher


def linear_sparse_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: TopKTeacher,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    chunk_size: int | str = "auto",
    memory_budget: int | None = None,
    logits_dtype: torch.dtype | None = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    scale_by_t2: bool = True,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    student_softcap: float | None = None,
    ignore_index: int = -100,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, KDStats]:
    r"""The loss of :func:`fastkd.sparse_kd_loss` from hidden states: logits exist for one chunk of rows at a time.

    Args:
        student_hidden, student_weight, student_bias, chunk_size, memory_budget, logits_dtype: as in
            :func:`fastkd.linear_kd_loss`; the budget is that of the student's logits alone.
        teacher: ``(..., K)``, as in :func:`fastkd.sparse_kd_loss`, with its conditions on divergence and temperature.

    Returns and raises as those two.
    """
    temperatures = temperature if isinstance(temperature, Tensor) else None
    options = Options(
        divergence, beta, 1.0 if isinstance(temperature, Tensor) else temperature, scale_by_t2, kd_weight, ce_weight,
        label_smoothing, z_loss, student_softcap, None, ignore_index, reduction, "error", False, return_stats, backend,
    )  # fmt: skip
    check_options(options)
    linear_checks.check_chunks(chunk_size, memory_budget)
    device = getattr(student_hidden, "device", torch.device("cpu")).type
    autocast_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    linear_checks.check_head("student", student_hidden, student_weight, student_bias, autocast_dtype is not None)
    operands = autocast_dtype if autocast_dtype and student_hidden.dtype != torch.float64 else student_hidden.dtype
    linear_checks.check_logits_dtype(logits_dtype, operands)
    sparse_checks.check_teacher(teacher, student_hidden, "student_hidden")
    per_token = flat_per_token(student_hidden, labels, token_weights, temperatures, ce_weight)
    sparse_checks.check_combination(teacher, temperatures, options)
    num_items = None
    if num_items_in_batch is not None:
        num_items = checks.check_num_items(num_items_in_batch, reduction, student_hidden.device)
    logits_like = student_hidden.new_empty(0, dtype=logits_dtype_for(operands, student_hidden.device, logits_dtype))
    name = select_backend(backend, logits_like, teacher)
    if not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()):
        vocab = student_weight.shape[0]
        checks.check_values_on_cpu(vocab, labels, temperatures, ignore_index)
        sparse_checks.check_teacher_values(teacher, vocab, None if labels is None else labels != ignore_index)
    flat = teacher.map(lambda x: x.reshape(-1, x.shape[-1]))
    call = Call(
        student_hidden.reshape(-1, student_hidden.shape[-1]), student_weight, student_bias, None, None, None, None,
        *per_token, num_items, scalars_of(options, last=teacher.temperature or 0.0), divergence, scale_by_t2,
        ignore_index, reduction, return_stats, name, autocast_dtype, logits_dtype,
        0 if isinstance(chunk_size, str) else chunk_size, memory_budget or 0,
        gradients_wanted((student_hidden, student_weight, student_bias)), flat.ids.long(), flat.logprobs, flat.weights,
        flat.tail,
    )  # fmt: skip
    loss, stats = eager_linear(call, options, flat) if name == "eager" else fused_linear(call)
    lead = student_hidden.shape[:-1]
    if reduction == "none":
        loss = loss.reshape(lead)
    return loss if stats is None else (loss, KDStats(*(x.reshape(lead) for x in stats)))
