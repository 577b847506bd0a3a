"""The public linear loss: hidden states and head weights in, never all logits at once."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, linear_checks
from .backends import select_backend
from .linear_chunks import Call, fused_linear
from .linear_dtensor import linear_kd_loss_of_dtensors
from .linear_eager import eager_linear
from .ops import scalars_of
from .options import Options, check_options
from .products import logits_dtype_for
from .shard import VocabShard
from .shard_dtensor import is_dtensor
from .shard_linear import sharded_linear
from .stats import KDStats


def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logits: Tensor | None = None,
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
    teacher_softcap: float | None = None,
    ignore_index: int = -100,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    vocab: str = "error",
    vocab_shard: VocabShard | None = None,
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, KDStats]:
    r"""The loss of :func:`fastkd.kd_loss` from hidden states: logits exist for one chunk of rows at a time.

    The same value and gradients as ``kd_loss(F.linear(student_hidden, student_weight, student_bias), ...)``. Forward
    computes the gradients of hidden states, weight and bias beside the value (four matrix products a chunk, two where
    no gradient is asked for), and backward only scales them.

    Args:
        student_hidden: ``(..., H)`` fp32, bf16 or fp16 (fp64 with the eager backend).
        student_weight: ``(V, H)``, same dtype, or any under ``torch.autocast``. May be shared with an embedding, may
            be computed from other tensors (a head with LoRA: pass the merged ``W + scale * B @ A``), may be frozen,
            which saves its product. A weight that FSDP2 shards must be passed where it is gathered: inside the forward
            of the module that owns it (elsewhere it is a DTensor beside plain hidden states, which is refused).
        teacher_hidden, teacher_weight: ``(..., H')`` and ``(V, H')``, of a dtype of their own, without gradient; H'
            may differ. ``teacher_weight`` may be ``student_weight.detach()``.
        labels: ``(...)`` int64. Tokens equal to ``ignore_index`` have no loss and gradient 0. On the CPU they are left
            out before the first product. On an accelerator their number is not known without waiting for it. On sm_90
            and sm_100, with bf16 hidden states, ``logits_dtype=torch.bfloat16`` and no bias, the products read it there
            and leave them out too (not yet measured on a GPU); elsewhere they cost their products: leave them out of
            the hidden states if they are many.
        student_bias, teacher_bias: ``(V)``.
        teacher_logits: ``(..., V)`` in place of ``teacher_hidden`` and ``teacher_weight``.
        chunk_size: rows of a chunk, or ``auto``: as many as ``memory_budget`` holds.
        memory_budget: bytes for the logits of a chunk, of both models. If not given, about 5 % of what all logits
            would take, between those of 512 rows and 224 MB, which where 512 rows take more than 256 MiB is what it
            is. Beside it the gradient of a 16-bit weight, accumulated in fp32 over the chunks, needs 2 bytes an
            element more than the gradient itself. On the CPU the memory lingers for the next call: the logits of both
            models, and where their rows are fewer than H the weight's gradient in turn with the student's.
        logits_dtype: float32, or the dtype of the hidden states. By default float32, except for bf16 on devices that
            cannot write the product of bf16 matrices as float32, the CPU among them: bfloat16 there, as in the model.
        vocab_shard: :class:`fastkd.VocabShard`: weights and biases (or ``teacher_logits``) hold this rank's columns of
            the vocabulary, and padding behind them; everything else is the same on every rank. One exchange of a few
            numbers a token, or two, as for :func:`fastkd.kd_loss`, in each chunk. The gradient of the hidden states is
            that of the whole vocabulary on every rank: forward adds up the ranks' parts (one all-reduce, N x H), as the
            backward of a column-parallel layer does, so do not reduce it again. The weight's and the bias's stay where
            their columns are. DTensors need no ``vocab_shard``: weights and biases may be ``Shard(0)`` in one mesh
            dimension, the vocabulary, with hidden states ``Replicate`` there and ``Shard`` of rows in others, where
            heads are ``Replicate``; ``teacher_logits`` are then ``Shard(-1)``. Loss and results per token as for
            :func:`fastkd.kd_loss`; gradients have the placements of what came, those of a head being summed over the
            ranks with other rows. The student's tensors are all DTensors or none; of the others, what is none is this
            rank's part.
        divergence ... backend: as for :func:`fastkd.kd_loss`. There is no ``inplace``: no logits of the caller's exist.

    Returns:
        As :func:`fastkd.kd_loss`. With ``reduction="none"`` the gradients depend on the upstream of each row: backward
        computes the logits again there, which makes six products in all.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or value; the message names it.
        RuntimeError: an explicit ``backend`` that cannot run, with the reason; a second derivative.
    """
    tensors = {
        "student_hidden": student_hidden, "student_weight": student_weight, "student_bias": student_bias,
        "teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight, "teacher_bias": teacher_bias,
        "teacher_logits": teacher_logits, "labels": labels, "token_weights": token_weights, "temperature": temperature,
    }  # fmt: skip
    if any(is_dtensor(x) for x in tensors.values()):
        keywords = {
            "chunk_size": chunk_size, "memory_budget": memory_budget, "logits_dtype": logits_dtype,
            "divergence": divergence, "beta": beta, "scale_by_t2": scale_by_t2, "kd_weight": kd_weight,
            "ce_weight": ce_weight, "label_smoothing": label_smoothing, "z_loss": z_loss,
            "student_softcap": student_softcap, "teacher_softcap": teacher_softcap, "ignore_index": ignore_index,
            "reduction": reduction, "num_items_in_batch": num_items_in_batch, "vocab": vocab,
            "vocab_shard": vocab_shard, "return_stats": return_stats, "backend": backend,
        }  # fmt: skip
        return linear_kd_loss_of_dtensors(linear_kd_loss, tensors, keywords)
    temperatures = temperature if isinstance(temperature, Tensor) else None
    options = Options(
        divergence, beta, 1.0 if isinstance(temperature, Tensor) else temperature, scale_by_t2, kd_weight, ce_weight,
        label_smoothing, z_loss, student_softcap, teacher_softcap, ignore_index, reduction, vocab, False,
        return_stats, backend, vocab_shard,
    )  # fmt: skip
    check_options(options)
    linear_checks.check_chunks(chunk_size, memory_budget)
    student = (student_hidden, student_weight, student_bias)
    teacher = (teacher_hidden, teacher_weight, teacher_bias, teacher_logits)
    autocast_dtype = _check_models(student, teacher, vocab, logits_dtype, vocab_shard is not None)
    per_token = flat_per_token(student_hidden, labels, token_weights, temperatures, ce_weight)
    num_items = None
    if num_items_in_batch is not None:
        num_items = checks.check_num_items(num_items_in_batch, reduction, student_hidden.device)
    sharded = vocab_shard is not None
    name = _backend(backend, student_hidden, teacher_hidden, teacher_logits, autocast_dtype, logits_dtype, sharded)
    head = teacher_logits.shape[-1] if teacher_weight is None else teacher_weight.shape[0]  # type: ignore[union-attr]
    if not (sharded or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()):
        checks.check_values_on_cpu(min(student_weight.shape[0], head), labels, temperatures, ignore_index)
    flat = lambda x: None if x is None else x.reshape(-1, x.shape[-1])  # noqa: E731
    rows = 0 if isinstance(chunk_size, str) else chunk_size
    call = Call(
        student_hidden.reshape(-1, student_hidden.shape[-1]), student_weight, student_bias, flat(teacher_hidden),
        teacher_weight, teacher_bias, flat(teacher_logits), *per_token, num_items, scalars_of(options), divergence,
        scale_by_t2, ignore_index, reduction, return_stats, name, autocast_dtype, logits_dtype, rows,
        memory_budget or 0, gradients_wanted(student),
    )  # fmt: skip
    if vocab_shard is not None:
        loss, stats = sharded_linear(call, vocab_shard)
    else:
        loss, stats = eager_linear(call, options) if name == "eager" else fused_linear(call)
    lead = student_hidden.shape[:-1]
    if reduction == "none":
        loss = loss.reshape(lead)
    return loss if stats is None else (loss, KDStats(*(x.reshape(lead) for x in stats)))


def gradients_wanted(student: tuple[Tensor | None, ...]) -> list[bool]:
    """Of hidden states, weight and bias."""
    return [x is not None and x.requires_grad and torch.is_grad_enabled() for x in student]


def _check_models(
    student: tuple, teacher: tuple, vocab: str, logits_dtype: torch.dtype | None, sharded: bool
) -> torch.dtype | None:
    """Both heads and their fit; returns the dtype of autocast, None where it is off."""
    student_hidden, student_weight, student_bias = student
    hidden, weight, bias, logits = teacher
    device = getattr(student_hidden, "device", torch.device("cpu")).type
    autocast_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    autocast = autocast_dtype is not None
    least = 0 if sharded else 1
    linear_checks.check_head("student", student_hidden, student_weight, student_bias, autocast, least)
    linear_checks.check_teacher(hidden, weight, bias, logits, autocast, least)
    source, teacher_vocab = (logits, logits.shape[-1]) if logits is not None else (hidden, weight.shape[0])
    vocab = "truncate" if sharded else vocab
    linear_checks.check_pair(student_hidden, student_weight.shape[0], source, teacher_vocab, vocab, least)
    dtype = student_hidden.dtype
    operands = autocast_dtype if autocast_dtype and dtype != torch.float64 else dtype
    linear_checks.check_logits_dtype(logits_dtype, operands)
    return autocast_dtype


def flat_per_token(
    hidden: Tensor, labels: Tensor | None, token_weights: Tensor | None, temperatures: Tensor | None, ce_weight: float
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The three, flattened to (N)."""
    if labels is None and ce_weight != 0:
        raise ValueError(f"ce_weight={ce_weight!r} needs labels; got labels=None")
    named = (("labels", labels), ("token_weights", token_weights), ("temperature", temperatures))
    for name, x in named:
        if x is not None:
            dtypes = (torch.int64,) if name == "labels" else checks.FLOATS
            checks.check_per_token(name, x, hidden, dtypes, like="student_hidden")
    flat = lambda x: None if x is None else x.reshape(-1)  # noqa: E731
    return flat(labels), flat(token_weights), flat(temperatures)


def _backend(backend, student_hidden, teacher_hidden, teacher_logits, autocast_dtype, logits_dtype, sharded) -> str:
    """Name of the backend that takes the logits that will be made."""

    def logits_like(hidden: Tensor) -> Tensor:
        operands = autocast_dtype if autocast_dtype and hidden.dtype != torch.float64 else hidden.dtype
        return hidden.new_empty(0, dtype=logits_dtype_for(operands, hidden.device, logits_dtype))

    teacher = logits_like(teacher_hidden) if teacher_logits is None else teacher_logits
    return select_backend(backend, logits_like(student_hidden), teacher, sharded)
