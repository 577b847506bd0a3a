"""The public loss with a sparse teacher, as function and module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import checks, sparse_checks
from .backends import select_backend
from .options import Options, check_options
from .sparse_eager import eager_sparse_kd_loss
from .sparse_ops import fused_sparse_kd_loss
from .stats import KDStats
from .topk import TopKTeacher

NOT_OPTIONS = ("teacher_softcap", "vocab", "vocab_shard")  # of the teacher's logits, which are not here


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def sparse_kd_loss(
    student_logits: Tensor,
    teacher: TopKTeacher,
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
    ignore_index: int = -100,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    inplace: bool = False,
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, KDStats]:
    r"""Knowledge-distillation loss against a teacher that names K columns a token, with its gradient.

    Cross-entropy, weights, reduction and every other keyword are those of :func:`fastkd.kd_loss`; what the divergence
    compares is a matter of ``teacher.tail``:

    * ``bucket``: K + 1 outcomes, the ids and all other columns as one. Every divergence.
    * ``renormalize``: the teacher's K probabilities over their sum, 0 elsewhere, and the student over all V columns.
      ``reverse_kl`` and ``symmetric_kl`` (unless ``beta=1``) are infinite there and raise.
    * ``sampled``: the expectation of ``log p - log q`` over draws: an unbiased value and gradient of ``forward_kl``
      (Anshumann et al. 2025, arXiv:2503.16870), and of nothing else; the others raise.

    Args:
        student_logits: ``(..., V)`` fp32, bf16 or fp16 (fp64 with the eager backend). Rows may be strided.
        teacher: :class:`fastkd.TopKTeacher` with ``(..., K)`` tensors. ``renormalize`` tempers what it is given
            (``p**(1/T)`` over its sum is exact for the K ids); ``bucket`` and ``sampled`` need log-probabilities taken
            at ``temperature``, since the normaliser of a tempered teacher includes the columns that are not there.
        labels: ``(...)`` int64, as in :func:`fastkd.kd_loss`. Rows of the teacher at ignored tokens are not read.

    Returns:
        As :func:`fastkd.kd_loss`. In the statistics the teacher's entropy is that of what is compared (of ``sampled``
        its unbiased estimate), and it ranks its most probable id first.

    Raises:
        TypeError, ValueError: as :func:`fastkd.kd_loss`; a divergence or temperature that is not defined for the tail,
            with the reason; on the CPU also values of the teacher: ids outside the vocabulary or twice in a row (draws
            may repeat), probabilities that sum above 1 by more than rounding, naming the row and the value. On an
            accelerator nothing waits for a look at values: the loss and gradient of such a row are NaN.
        RuntimeError: an explicit ``backend`` that cannot run, with the reason; a second derivative.
    """
    temperatures = temperature if isinstance(temperature, Tensor) else None
    options = Options(
        divergence, beta, 1.0 if isinstance(temperature, Tensor) else temperature, scale_by_t2, kd_weight, ce_weight,
        label_smoothing, z_loss, student_softcap, None, ignore_index, reduction, "error", inplace, return_stats,
        backend,
    )  # fmt: skip
    check_options(options)
    checks.check_logits(student_logits, _detached(student_logits), "error")
    sparse_checks.check_teacher(teacher, student_logits)
    if labels is not None:
        checks.check_per_token("labels", labels, student_logits, (torch.int64,))
    elif ce_weight != 0:
        raise ValueError(f"ce_weight={ce_weight!r} needs labels; got labels=None")
    if token_weights is not None:
        checks.check_per_token("token_weights", token_weights, student_logits, checks.FLOATS)
    if temperatures is not None:
        checks.check_per_token("temperature", temperatures, student_logits, checks.FLOATS)
    sparse_checks.check_combination(teacher, temperatures, options)
    num_items = None
    if num_items_in_batch is not None:
        num_items = checks.check_num_items(num_items_in_batch, reduction, student_logits.device)
    name = select_backend(backend, student_logits, teacher)
    if name == "eager" and not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()):
        vocab = student_logits.shape[-1]
        checks.check_values_on_cpu(vocab, labels, temperatures, ignore_index)
        sparse_checks.check_teacher_values(teacher, vocab, None if labels is None else labels != ignore_index)
    tensors = (student_logits, teacher, labels, token_weights, temperatures, num_items)
    if name == "eager":
        loss, stats = eager_sparse_kd_loss(*tensors, options)
    else:
        loss, stats = fused_sparse_kd_loss(name, *tensors, options)
    return loss if stats is None else (loss, stats)


class SparseKDLoss(nn.Module):
    """:func:`fastkd.sparse_kd_loss` with its options fixed at construction, as :class:`fastkd.KDLoss`.

    Raises:
        TypeError, ValueError: an option outside its range; the message names it.
    """

    def __init__(self, **options) -> None:
        super().__init__()
        allowed = [name for name in Options._fields if name not in NOT_OPTIONS]
        unknown = sorted(set(options) - set(allowed))
        if unknown:
            raise TypeError(f"SparseKDLoss got unknown options {unknown}; allowed: {', '.join(allowed)}")
        self.options = Options(**options)
        check_options(self.options)

    def forward(
        self,
        student_logits: Tensor,
        teacher: TopKTeacher,
        labels: Tensor | None = None,
        *,
        temperature: Tensor | float | None = None,
        token_weights: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, KDStats]:
        """Shapes and errors as in :func:`fastkd.sparse_kd_loss`; ``temperature`` overrides the module's for once."""
        keywords = {name: value for name, value in self.options._asdict().items() if name not in NOT_OPTIONS}
        if temperature is not None:
            keywords["temperature"] = temperature
        return sparse_kd_loss(
            student_logits,
            teacher,
            labels,
            token_weights=token_weights,
            num_items_in_batch=num_items_in_batch,
            **keywords,
        )

    def extra_repr(self) -> str:
        """The options that differ from their defaults."""
        defaults = Options()
        return ", ".join(
            f"{name}={value!r}" for name, value in self.options._asdict().items() if value != getattr(defaults, name)
        )
