"""A teacher that names K columns a token instead of all V."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from .checks import FLOATS, describe

Tail = Literal["bucket", "renormalize", "sampled"]
TAILS = ("bucket", "renormalize", "sampled")
PADDING = -1  # id of an entry that is none; its log-probability is -inf

_UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 2.0**-24}


def mass_resolution(dtype: torch.dtype) -> float:
    """To how much a sum of probabilities is known whose logarithms were stored as ``dtype`` (csrc/kernels agrees)."""
    return 8 * _UNIT_ROUNDOFF[dtype]


def mass_limit(dtype: torch.dtype) -> float:
    """A sum of probabilities above this is an error; up to it, rounding of a log-softmax over a large vocabulary."""
    return 1 + max(mass_resolution(dtype), 2.0**-13)


@dataclass(frozen=True, eq=False)
class TopKTeacher:
    """Log-probabilities of K columns a token, and what the others are taken for (DESIGN section 1).

    ids: ``(..., K)`` int64 or int32, in any order; -1 with log-probability -inf where a row has fewer than K.
    logprobs: ``(..., K)`` natural logarithms of the teacher's probabilities, normalised over the *whole* vocabulary.
    tail: ``bucket``: all other columns are one outcome, with the mass that is left; ``renormalize``: the teacher is 0
        there, and the K probabilities are divided by their sum; ``sampled``: the ids are draws, with replacement.
    weights: of each draw, ``sampled`` only; default 1 / number of draws, which is right for draws from the teacher
        itself. Draws from a proposal r have p / (r * number of draws). A distinct id with its count / number of draws
        stands for its draws.
    temperature: at which ``logprobs`` were taken (servers: 1). None: at the loss's own, whatever that is.
    """

    ids: Tensor
    logprobs: Tensor
    tail: Tail = "bucket"
    weights: Tensor | None = None
    temperature: float | None = 1.0

    def __post_init__(self) -> None:
        _check_choice(self.tail)
        _check_tensor("ids", self.ids, (torch.int64, torch.int32), None)
        _check_tensor("logprobs", self.logprobs, FLOATS, self.ids)
        if self.weights is not None:
            if self.tail != "sampled":
                raise ValueError(f"weights are those of draws, of tail='sampled'; got them with tail={self.tail!r}")
            _check_tensor("weights", self.weights, FLOATS, self.ids)
        t = self.temperature
        if t is not None and (isinstance(t, bool) or not isinstance(t, (int, float)) or not 0 < t < float("inf")):
            raise ValueError(f"temperature of a TopKTeacher must be None or a finite number > 0; got {t!r}")

    @property
    def k(self) -> int:
        """Entries a token."""
        return self.ids.shape[-1]

    def map(self, change: Callable[[Tensor], Tensor]) -> TopKTeacher:
        """The teacher with every tensor replaced by ``change(tensor)``: rows selected, reshaped, moved."""
        weights = None if self.weights is None else change(self.weights)
        return replace(self, ids=change(self.ids), logprobs=change(self.logprobs), weights=weights)

    def to(self, *args: Any, **kwargs: Any) -> TopKTeacher:
        """On another device, as ``Tensor.to(device, non_blocking=...)``."""
        return self.map(lambda x: x.to(*args, **kwargs))


def _check_choice(tail: object) -> None:
    if tail not in TAILS:
        raise ValueError(f"tail={tail!r} is not known; allowed: {', '.join(map(repr, TAILS))}")


def _check_tensor(name: str, x: object, dtypes: tuple[torch.dtype, ...], like: Tensor | None) -> None:
    words = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} of a TopKTeacher must be a {words} tensor (..., K); got {type(x).__name__}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} of a TopKTeacher must be {words}; got {describe(x)}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name} of a TopKTeacher must be (..., K) with K >= 1; got {describe(x)}")
    if like is not None and (x.shape != like.shape or x.device != like.device):
        raise ValueError(
            f"{name} of a TopKTeacher must have the shape and device of ids, {describe(like)}; got {describe(x)}"
        )
    if x.requires_grad:
        raise ValueError(
            f"{name} of a TopKTeacher must not require grad: the loss has no gradient for the teacher; detach it"
        )
