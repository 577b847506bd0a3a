"""The public loss function: validation, choice of the backend, the docstring."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from . import checks
from .backends import select_backend
from .eager import eager_kd_loss
from .ops import fused_kd_loss
from .options import Options, check_options
from .shard import VocabShard, check_vocab_shard
from .shard_dtensor import is_dtensor, kd_loss_of_dtensors
from .shard_loss import sharded_kd_loss
from .stats import KDStats


@functools.lru_cache(maxsize=1024, typed=True)  # typed: True must not pass where 1 did
def _check_options_cached(*options: Any) -> None:
    check_options(Options(*options))


def _check(options: Options) -> None:
    if torch.compiler.is_compiling():
        return check_options(options)
    try:
        return _check_options_cached(*options)
    except TypeError:  # unhashable: check_options says which argument it is
        return check_options(options)


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    scale_by_t2: bool = True,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    ignore_index: int = -100,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    vocab: str = "error",
    inplace: bool = False,
    vocab_shard: VocabShard | None = None,
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, KDStats]:
    r"""Knowledge-distillation loss of Hinton et al. (2015, arXiv:1503.02531, section 2), with its gradient.

    For each token, with ``q = softmax(student/T)`` and ``p = softmax(teacher/T)``::

        loss = token_weight * (kd_weight * T**2 * D(p, q) + ce_weight * CE(student, label))

    Args:
        student_logits: ``(..., V)`` fp32, bf16 or fp16 (fp64 with the eager backend). Rows may be strided.
        teacher_logits: ``(..., V)``, same leading shape and device, dtype of its own, must not require grad.
        labels: ``(...)`` int64. Tokens equal to ``ignore_index`` are left out: their logits are not read by the
            native backend and their gradient is exactly 0. Not shifted here: align them with the logits first.
        divergence: ``forward_kl`` KL(p||q), ``reverse_kl`` KL(q||p), ``symmetric_kl``, ``jsd``,
            ``total_variation``, ``skew_forward_kl``, ``skew_reverse_kl`` (DistiLLM, arXiv:2402.03898).
        beta: weight of the teacher in the mixture of ``jsd`` and ``skew_forward_kl``, of the student in that of
            ``skew_reverse_kl``, in (0, 1); weight of the forward direction in ``symmetric_kl``, in [0, 1].
        temperature: divides the logits of both models in D; a number, or a ``(...)`` tensor, one per token.
        scale_by_t2: multiply D by T² (per token), which keeps its gradient comparable with that of CE.
        kd_weight, ce_weight: weights of the two parts. CE is at T = 1 and needs ``labels``.
        label_smoothing: in [0, 1), as in ``torch.nn.functional.cross_entropy``.
        z_loss: adds ``z_loss * logsumexp(student)**2`` to CE.
        student_softcap, teacher_softcap: ``c * tanh(logits / c)`` first, each model its own c.
        token_weights: ``(...)`` floating point weight of each token.
        reduction: ``mean`` is the sum over tokens divided by the sum of the weights of the tokens that are not
            ignored (their number without weights), or by ``num_items_in_batch``; ``sum``; ``none``.
        num_items_in_batch: int or 0-d tensor, the denominator of ``mean`` over accumulation steps and ranks.
        vocab: ``error`` refuses vocabularies of different size, ``truncate`` uses the common prefix; columns
            beyond it get gradient 0.
        inplace: overwrite ``student_logits`` with its gradient instead of allocating one; nothing may read the logits
            afterwards, and what autograd saved of them before raises in backward. Ignored where no gradient is asked
            for, by the eager backend, and inside ``torch.compile``, which plans memory itself.
        vocab_shard: :class:`fastkd.VocabShard`, this rank's columns ``[start, stop)`` of a vocabulary that the ranks of
            a process group share: ``student_logits`` and ``teacher_logits`` hold those, and padding behind them; the
            other arguments are the same on every rank (labels are columns of the whole vocabulary), and so are loss and
            statistics, bit by bit. One all-gather of a few numbers a token, two for the divergences that are no
            Kullback-Leibler divergence of the two models; none in backward. DTensors need no ``vocab_shard``: with
            ``Shard(-1)`` for the vocabulary and ``Shard`` for rows the loss is that of the whole tensors on every rank,
            results per token are those of the rank's rows, and the gradient has the placements of the logits.
        return_stats: also return :class:`fastkd.KDStats` from the same pass.
        backend: ``auto``, ``native``, ``triton`` or ``eager``; see :func:`fastkd.explain`.

    Returns:
        The loss, fp32 (fp64 for fp64 logits): 0-d, or ``(...)`` with ``reduction="none"``; with ``return_stats`` the
        pair ``(loss, stats)``. With no token left the mean is 0 and still has a graph. A student logit of −inf where
        the teacher has probability makes ``forward_kl`` +inf.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or value; the message names it; shards with
            a gap or an overlap, on every rank. Labels and
            per-token temperatures are checked by value on the CPU only, so that no accelerator is waited for: there
            a wrong one makes the loss and the gradient of its row NaN.
        RuntimeError: an explicit ``backend`` that cannot run, with the reason; a second derivative. With
            ``vocab_shard``, on every rank: one that has ended, that is late by more than its group's timeout, or that
            called with other arguments (on accelerators, where no call waits for a look, NaN after the first call).
    """
    if is_dtensor(student_logits) or is_dtensor(teacher_logits):
        keywords = {
            "divergence": divergence, "beta": beta, "temperature": temperature, "scale_by_t2": scale_by_t2,
            "kd_weight": kd_weight, "ce_weight": ce_weight, "label_smoothing": label_smoothing, "z_loss": z_loss,
            "student_softcap": student_softcap, "teacher_softcap": teacher_softcap, "ignore_index": ignore_index,
            "token_weights": token_weights, "reduction": reduction, "num_items_in_batch": num_items_in_batch,
            "vocab": vocab, "inplace": inplace, "vocab_shard": vocab_shard, "return_stats": return_stats,
            "backend": backend,
        }  # fmt: skip
        return kd_loss_of_dtensors(kd_loss, student_logits, teacher_logits, labels, keywords)
    temperatures = temperature if isinstance(temperature, Tensor) else None
    options = Options(
        divergence, beta, 1.0 if isinstance(temperature, Tensor) else temperature, scale_by_t2, kd_weight, ce_weight,
        label_smoothing, z_loss, student_softcap, teacher_softcap, ignore_index, reduction, vocab, inplace,
        return_stats, backend,
    )  # fmt: skip
    _check(options)
    sharded = vocab_shard is not None
    if sharded:
        check_vocab_shard(vocab_shard)
    checks.check_logits(student_logits, teacher_logits, "truncate" if sharded else vocab, 0 if sharded else 1)
    if labels is not None:
        checks.check_per_token("labels", labels, student_logits, (torch.int64,))
    elif ce_weight != 0:
        raise ValueError(f"ce_weight={ce_weight!r} needs labels; got labels=None")
    if token_weights is not None:
        checks.check_per_token("token_weights", token_weights, student_logits, checks.FLOATS)
    if temperatures is not None:
        checks.check_per_token("temperature", temperatures, student_logits, checks.FLOATS)
    num_items = None
    if num_items_in_batch is not None:
        num_items = checks.check_num_items(num_items_in_batch, reduction, student_logits.device)
    name = select_backend(backend, student_logits, teacher_logits, sharded)
    tensors = (student_logits, teacher_logits, labels, token_weights, temperatures, num_items)
    if vocab_shard is not None:
        loss, stats = sharded_kd_loss(name, *tensors, options, vocab_shard)
        return loss if stats is None else (loss, stats)
    if name == "eager" and not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()):
        vocab_size = min(student_logits.shape[-1], teacher_logits.shape[-1])
        checks.check_values_on_cpu(vocab_size, labels, temperatures, ignore_index)
    loss, stats = eager_kd_loss(*tensors, options) if name == "eager" else fused_kd_loss(name, *tensors, options)
    return loss if stats is None else (loss, stats)
