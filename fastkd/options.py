"""Scalar options of the loss: one immutable record, validated once."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from .divergence import SPECS, beta_is_allowed
from .shard import VocabShard, check_vocab_shard

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS = ("mean", "sum", "none")
VOCAB_POLICIES = ("error", "truncate")
BACKENDS = ("auto", "native", "triton", "eager")


class Options(NamedTuple):
    """Options of :func:`fastkd.kd_loss` that are not tensors, in its own names and defaults."""

    divergence: str = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    scale_by_t2: bool = True
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    student_softcap: float | None = None
    teacher_softcap: float | None = None
    ignore_index: int = -100
    reduction: str = "mean"
    vocab: str = "error"
    inplace: bool = False
    return_stats: bool = False
    backend: str = "auto"
    vocab_shard: VocabShard | None = None


_INF = float("inf")
# name -> (test, what is allowed). Chained comparisons are False for NaN, and symbolic floats survive them.
_NUMBERS = {
    "temperature": (lambda x: 0 < x < _INF, "a finite number > 0, or a tensor with one per token"),
    "kd_weight": (lambda x: 0 <= x < _INF, "a finite number >= 0"),
    "ce_weight": (lambda x: 0 <= x < _INF, "a finite number >= 0"),
    "label_smoothing": (lambda x: 0 <= x < 1, "a number in [0, 1)"),
    "z_loss": (lambda x: 0 <= x < _INF, "a finite number >= 0"),
}


def _is_number(x: object) -> bool:
    return isinstance(x, (int, float, torch.SymFloat, torch.SymInt)) and not isinstance(x, bool)


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known; allowed: {', '.join(map(repr, allowed))}")


def check_backend(backend: object) -> None:
    """Raise ValueError for a backend of unknown name."""
    _check_choice("backend", backend, BACKENDS)


def _check_numbers(options: Options) -> None:
    for name, (is_allowed, allowed) in _NUMBERS.items():
        value = getattr(options, name)
        if not _is_number(value):
            raise TypeError(f"{name} must be {allowed}; got {type(value).__name__}: {value!r}")
        if not is_allowed(value):
            raise ValueError(f"{name} must be {allowed}; got {value!r}")
    for name in ("student_softcap", "teacher_softcap"):
        value = getattr(options, name)
        if value is None:
            continue
        if not _is_number(value):
            raise TypeError(f"{name} must be None or a finite number > 0; got {type(value).__name__}: {value!r}")
        if not 0 < value < _INF:
            raise ValueError(f"{name} must be None or a finite number > 0; got {value!r}")


def check_options(options: Options) -> None:
    """Raise TypeError or ValueError, naming the argument, for any option outside its range."""
    _check_choice("divergence", options.divergence, tuple(SPECS))
    _check_choice("reduction", options.reduction, REDUCTIONS)
    _check_choice("vocab", options.vocab, VOCAB_POLICIES)
    check_backend(options.backend)
    _check_numbers(options)
    if not _is_number(options.beta):
        raise TypeError(f"beta must be a number; got {type(options.beta).__name__}: {options.beta!r}")
    if not beta_is_allowed(options.divergence, options.beta):
        allowed = SPECS[options.divergence].beta_range
        raise ValueError(f"beta must lie in {allowed} for divergence={options.divergence!r}; got {options.beta!r}")
    if isinstance(options.ignore_index, bool) or not isinstance(options.ignore_index, (int, torch.SymInt)):
        raise TypeError(f"ignore_index must be an int; got {type(options.ignore_index).__name__}")
    if options.vocab_shard is not None:
        check_vocab_shard(options.vocab_shard)
    for name in ("scale_by_t2", "inplace", "return_stats"):
        if not isinstance(getattr(options, name), bool):
            raise TypeError(f"{name} must be a bool; got {type(getattr(options, name)).__name__}")
