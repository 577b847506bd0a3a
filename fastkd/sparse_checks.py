"""Checks of the arguments that only a sparse teacher brings; those of values look at CPU tensors alone."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import describe, first_row
from .options import Options
from .topk import TopKTeacher, mass_limit

_UNDEFINED = {
    "renormalize": (
        ("reverse_kl", "symmetric_kl"),
        "the teacher is 0 outside its K ids, where KL(student||teacher) is infinite; use tail='bucket', "
        "forward_kl, jsd, total_variation or a skew divergence",
    ),
    "sampled": (
        ("reverse_kl", "symmetric_kl", "jsd", "total_variation", "skew_forward_kl", "skew_reverse_kl"),
        "it is not linear in the teacher's probabilities, so that draws give a biased value and gradient; use "
        "forward_kl, or tail='bucket'",
    ),
}


def check_teacher(teacher: object, student_logits: Tensor, like: str = "student_logits") -> None:
    """A :class:`fastkd.TopKTeacher` for these logits (or what ``like`` names): leading shape and device."""
    if not isinstance(teacher, TopKTeacher):
        raise TypeError(f"teacher must be a fastkd.TopKTeacher; got {type(teacher).__name__}")
    if teacher.ids.shape[:-1] != student_logits.shape[:-1]:
        raise ValueError(
            f"{like} and the teacher's ids must agree in all but the last dimension; "
            f"got {tuple(student_logits.shape)} and {tuple(teacher.ids.shape)}"
        )
    if teacher.ids.device != student_logits.device:
        raise ValueError(
            f"teacher must be on the device of {like} ({student_logits.device}); its ids are "
            f"{describe(teacher.ids)}; use teacher.to(device)"
        )


def check_combination(teacher: TopKTeacher, temperature: Tensor | None, options: Options) -> None:
    """Divergence and temperature must be defined for the tail."""
    undefined, why = _UNDEFINED.get(teacher.tail, ((), ""))
    one_sided = options.divergence == "symmetric_kl" and options.beta == 1  # the reverse direction is left out
    if options.divergence in undefined and not (one_sided and teacher.tail == "renormalize"):
        raise ValueError(f"divergence={options.divergence!r} is not defined for tail={teacher.tail!r}: {why}")
    if teacher.tail == "renormalize" or teacher.temperature is None:
        return
    if temperature is not None or teacher.temperature != options.temperature:
        got = "a tensor" if temperature is not None else f"{options.temperature!r}"
        raise ValueError(
            f"temperature is {got}, but the teacher's log-probabilities were taken at {teacher.temperature!r} and "
            f"tail={teacher.tail!r} cannot temper them: the normaliser needs the columns that are not there. Take them "
            "at the loss's temperature (and say so: TopKTeacher(..., temperature=...), or None for whatever the loss "
            "uses), or use tail='renormalize'"
        )


def check_teacher_values(teacher: TopKTeacher, vocab_size: int, valid: Tensor | None) -> None:
    """What only the values show: ids in range and distinct, log-probabilities that are some, a sum of at most 1. CPU
    alone; elsewhere a row with such values gets a NaN loss. valid: ``(...)``, rows that count; None: all."""
    if teacher.ids.device.type != "cpu":
        return
    ids, logprobs = teacher.ids, teacher.logprobs
    entry = ~((ids < 0) & torch.isneginf(logprobs))
    if valid is not None:
        entry &= valid.unsqueeze(-1)
    limit = mass_limit(logprobs.dtype)
    probabilities = torch.where(entry, logprobs.double(), float("-inf")).exp()
    _refuse(entry & ((ids < 0) | (ids >= vocab_size)), "ids", ids, f"is outside [0, {vocab_size}), and no padding "
            "(-1 with log-probability -inf)")  # fmt: skip
    _refuse(entry & ~(probabilities <= limit), "logprobs", logprobs, "is no log-probability")
    if teacher.weights is not None:
        finite = (teacher.weights >= 0) & torch.isfinite(teacher.weights)
        _refuse(entry & ~finite, "weights", teacher.weights, "must be a finite number >= 0")
    possible = (entry & (probabilities > 0)).any(-1)
    if teacher.tail != "sampled":
        _refuse_duplicates(ids, entry)
        mass = probabilities.sum(-1)
        _refuse(mass > limit, "logprobs", mass, "is the sum of its probabilities, above 1 by more than rounding")
    if teacher.tail != "bucket":
        missing = ~possible if valid is None else ~possible & valid
        if missing.any():
            row = first_row(missing)
            raise ValueError(f"ids{list(row)} names no column with a probability, which tail={teacher.tail!r} needs")


def _refuse(wrong: Tensor, name: str, values: Tensor, why: str) -> None:
    if wrong.any():
        place = first_row(wrong)
        raise ValueError(f"{name}{list(place)} of the teacher: {values[place].item()} {why}")


def _refuse_duplicates(ids: Tensor, entry: Tensor) -> None:
    ranked, order = torch.where(entry, ids.long(), -1 - torch.arange(ids.shape[-1])).sort(dim=-1, stable=True)
    again = (ranked[..., 1:] == ranked[..., :-1]) & (ranked[..., 1:] >= 0)
    if again.any():
        row = first_row(again)
        place = (*row[:-1], int(order[..., 1:][row]))
        raise ValueError(
            f"ids{list(place)} of the teacher: {int(ids[place])} stands twice in its row; "
            "only draws (tail='sampled') repeat"
        )
