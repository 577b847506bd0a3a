"""The loss as a module that holds its configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import linear_checks
from .functional import kd_loss
from .linear import linear_kd_loss
from .linear_sparse import linear_sparse_kd_loss
from .options import Options, check_options
from .sparse import NOT_OPTIONS
from .stats import KDStats
from .topk import TopKTeacher


class KDLoss(nn.Module):
    """:func:`fastkd.kd_loss` with its options fixed at construction.

    Takes the scalar keywords of :func:`fastkd.kd_loss` (``divergence`` ... ``backend``); the tensors and
    ``num_items_in_batch`` go to the call. ``module.options`` may be replaced during training
    (``module.options = module.options._replace(beta=0.3)``).

    Raises:
        TypeError, ValueError: an option outside its range; the message names it.
    """

    def __init__(self, **options) -> None:
        super().__init__()
        unknown = sorted(set(options) - set(Options._fields))
        if unknown:
            raise TypeError(f"KDLoss got unknown options {unknown}; allowed: {', '.join(Options._fields)}")
        self.options = Options(**options)
        check_options(self.options)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        *,
        temperature: Tensor | float | None = None,
        token_weights: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, KDStats]:
        """Shapes and errors as in :func:`fastkd.kd_loss`; ``temperature`` overrides the module's for this call."""
        keywords = self.options._asdict()
        if temperature is not None:
            keywords["temperature"] = temperature
        return kd_loss(
            student_logits,
            teacher_logits,
            labels,
            token_weights=token_weights,
            num_items_in_batch=num_items_in_batch,
            **keywords,
        )

    def extra_repr(self) -> str:
        """The options that differ from their defaults."""
        return _differences(self.options)


def _differences(options: Options) -> str:
    defaults = Options()._asdict()
    return ", ".join(f"{name}={value!r}" for name, value in options._asdict().items() if value != defaults[name])


class _LinearLoss(nn.Module):
    """What the modules of the linear losses share: chunking and options; ``left_out``: options that the loss lacks."""

    left_out: tuple[str, ...]

    def __init__(
        self,
        *,
        chunk_size: int | str = "auto",
        memory_budget: int | None = None,
        logits_dtype: torch.dtype | None = None,
        **options,
    ) -> None:
        super().__init__()
        allowed = [name for name in Options._fields if name not in self.left_out]
        unknown = sorted(set(options) - set(allowed))
        if unknown:
            raise TypeError(f"{type(self).__name__} got unknown options {unknown}; allowed: {', '.join(allowed)}")
        linear_checks.check_chunks(chunk_size, memory_budget)
        self.chunk_size, self.memory_budget, self.logits_dtype = chunk_size, memory_budget, logits_dtype
        self.options = Options(**options)
        check_options(self.options)

    def _keywords(self, temperature: Tensor | float | None) -> dict[str, Any]:
        """Of the loss; ``temperature``, if given, in place of the module's."""
        keywords = {name: value for name, value in self.options._asdict().items() if name not in self.left_out}
        if temperature is not None:
            keywords["temperature"] = temperature
        chunking = ("chunk_size", "memory_budget", "logits_dtype")
        return {**{name: getattr(self, name) for name in chunking}, **keywords}

    def extra_repr(self) -> str:
        """The options that differ from their defaults."""
        own = [f"{name}={getattr(self, name)!r}" for name in ("memory_budget", "logits_dtype") if getattr(self, name)]
        size = [] if self.chunk_size == "auto" else [f"chunk_size={self.chunk_size!r}"]
        return ", ".join([*size, *own, *filter(None, [_differences(self.options)])])


class LinearKDLoss(_LinearLoss):
    """:func:`fastkd.linear_kd_loss` with its options fixed at construction.

    Takes ``chunk_size``, ``memory_budget``, ``logits_dtype`` and the scalar keywords of :func:`fastkd.linear_kd_loss`;
    tensors and ``num_items_in_batch`` go to the call. It owns no weights: those of both heads are arguments. With
    FSDP2, call it inside the forward of the module whose parameters the heads are.

    Raises:
        TypeError, ValueError: an option outside its range; the message names it.
    """

    left_out = ("inplace",)

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor | None = None,
        teacher_weight: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        temperature: Tensor | float | None = None,
        **tensors: Any,
    ) -> Tensor | tuple[Tensor, KDStats]:
        """Shapes and errors as in :func:`fastkd.linear_kd_loss`; ``temperature`` overrides the module's for this call,
        ``tensors`` are ``student_bias``, ``teacher_bias``, ``teacher_logits``, ``token_weights``,
        ``num_items_in_batch``."""
        keywords = self._keywords(temperature)
        return linear_kd_loss(
            student_hidden, student_weight, teacher_hidden, teacher_weight, labels, **keywords, **tensors
        )


class LinearSparseKDLoss(_LinearLoss):
    """:func:`fastkd.linear_sparse_kd_loss` with its options fixed at construction, as :class:`fastkd.LinearKDLoss`.

    Raises:
        TypeError, ValueError: an option outside its range; the message names it.
    """

    left_out = (*NOT_OPTIONS, "inplace")

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher: TopKTeacher,
        labels: Tensor | None = None,
        *,
        temperature: Tensor | float | None = None,
        **tensors: Any,
    ) -> Tensor | tuple[Tensor, KDStats]:
        """Shapes and errors as in :func:`fastkd.linear_sparse_kd_loss`; ``temperature`` overrides the module's for this
        call, ``tensors`` are ``student_bias``, ``token_weights``, ``num_items_in_batch``."""
        keywords = self._keywords(temperature)
        return linear_sparse_kd_loss(student_hidden, student_weight, teacher, labels, **keywords, **tensors)
