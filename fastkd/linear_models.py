"""Where the logits of a model come from in the linear loss: a head, or logits as they are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import counted
from .products import buffer, logits_dtype_for, project


class Model(NamedTuple):
    """Of one model."""

    weight: Tensor | None  # (V, H), cut to the common vocabulary
    bias: Tensor | None  # (V)
    logits: Tensor | None  # (N, V)
    vocab: int  # V
    dtype: torch.dtype  # of the operands
    logits_dtype: torch.dtype

    def counted(self) -> bool:
        """Whether the products with the weight can be counted ones (see counted.py). With a bias, which these cannot
        add, the logits would be rounded twice."""
        return self.weight is not None and self.bias is None and counted.serves(self.weight, self.logits_dtype)

    def buffer(self, rows: int, capacity: int = 0, teacher: bool = False) -> Tensor | None:
        """(rows, V) for the logits of a chunk; None where they are given."""
        if self.weight is None:
            return None
        return buffer((rows, self.vocab), self.logits_dtype, self.weight.device, capacity, teacher)

    def logits_of(self, hidden: Tensor, buffer: Tensor | None, rows: Tensor | None) -> Tensor:
        """(R, V), in the buffer if there is one, of hidden (R, H) in the operands' dtype; rows: how many of the R."""
        assert self.weight is not None
        if buffer is None:
            assert rows is not None
            return counted.project(hidden, self.weight, rows)
        logits = buffer[: hidden.shape[0]]
        project(logits, hidden, self.weight, self.bias)
        return logits


def model_of(
    weight: Tensor | None, bias: Tensor | None, logits: Tensor | None, vocab: int,
    autocast_dtype: torch.dtype | None, logits_dtype: torch.dtype | None,
) -> Model:  # fmt: skip
    """Operands cut to ``vocab`` columns; under autocast in its dtype, which copies the weight, as a layer does."""
    if logits is not None:
        return Model(None, None, logits[:, :vocab], vocab, logits.dtype, logits.dtype)
    assert weight is not None
    dtype = autocast_dtype if autocast_dtype and weight.dtype != torch.float64 else weight.dtype
    bias = None if bias is None else bias[:vocab]
    weight = weight[:vocab].to(dtype)
    return Model(weight, bias, None, vocab, dtype, logits_dtype_for(dtype, weight.device, logits_dtype))
