"""Checks of the arguments that only the linear loss has, as those of checks.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import LOGIT_DTYPES, describe

_DTYPE_WORDS = "float32, bfloat16 or float16 (float64 with backend='eager')"


def _check_tensor(name: str, x: object, dim: int | None, shape: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor {shape}; got {type(x).__name__}")
    if hasattr(x, "full_tensor"):
        raise TypeError(
            f"{name} is a DTensor, of which this process holds a part, and the loss of a sparse teacher takes whole "
            "tensors only: call it inside the forward of the module that FSDP2 gathers them for, or pass "
            f"{name}.full_tensor()"
        )
    if x.dtype not in LOGIT_DTYPES and x.dtype != torch.float64:
        raise TypeError(f"{name} must be {_DTYPE_WORDS}; got {describe(x)}")
    if (dim is not None and x.dim() != dim) or x.dim() == 0:
        raise ValueError(f"{name} must have the shape {shape}; got {describe(x)}")


def _check_like(name: str, x: Tensor, like_name: str, like: Tensor, any_dtype: bool) -> None:
    if x.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name} ({like.device}); got {describe(x)}")
    if x.dtype != like.dtype and not any_dtype:
        raise TypeError(
            f"{name} must have the dtype of {like_name} ({describe(like)}), or be used under torch.autocast; "
            f"got {describe(x)}"
        )


def check_head(model: str, hidden: object, weight: object, bias: object, autocast: bool, least: int = 1) -> None:
    """Hidden states ``(..., H)``, weight ``(V, H)`` and bias ``(V)`` of ``model``: "student" or "teacher"."""
    _check_tensor(f"{model}_hidden", hidden, None, "(..., H)")
    _check_tensor(f"{model}_weight", weight, 2, "(V, H)")
    assert isinstance(hidden, Tensor) and isinstance(weight, Tensor)
    if weight.shape[0] < least or weight.shape[1] != hidden.shape[-1] or weight.shape[1] == 0:
        raise ValueError(
            f"{model}_weight must be (V, H) with V >= {least} and H = {hidden.shape[-1]}, the last dimension of "
            f"{model}_hidden; got {describe(weight)}"
        )
    _check_like(f"{model}_weight", weight, f"{model}_hidden", hidden, autocast)
    if bias is None:
        return
    _check_tensor(f"{model}_bias", bias, 1, "(V)")
    assert isinstance(bias, Tensor)
    if bias.shape[0] != weight.shape[0]:
        raise ValueError(f"{model}_bias must be (V) with V = {weight.shape[0]}; got {describe(bias)}")
    _check_like(f"{model}_bias", bias, f"{model}_weight", weight, autocast)


def check_teacher(hidden: object, weight: object, bias: object, logits: object, autocast: bool, least: int = 1) -> None:
    """Either hidden states and head, or logits; none of them requires grad."""
    if logits is None:
        if hidden is None or weight is None:
            raise TypeError(
                "the teacher must come as teacher_hidden and teacher_weight, or as teacher_logits; got "
                f"teacher_hidden={describe(hidden)}, teacher_weight={describe(weight)}, teacher_logits=None"
            )
        check_head("teacher", hidden, weight, bias, autocast, least)
    else:
        for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
            if x is not None:
                raise TypeError(f"teacher_logits come without teacher_{name}; got teacher_{name}={describe(x)}")
        _check_tensor("teacher_logits", logits, None, "(..., V)")
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias), ("logits", logits)):
        if isinstance(x, Tensor) and x.requires_grad:
            raise ValueError(
                f"teacher_{name} must not require grad (the loss has no gradient for the teacher); "
                f"pass teacher_{name}.detach()"
            )


def check_pair(
    student_hidden: Tensor, student_vocab: int, teacher: Tensor, teacher_vocab: int, vocab: str, least: int = 1
) -> None:
    """Leading shapes, devices and vocabularies of both models; ``teacher``: its hidden states or logits."""
    if student_hidden.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            "the teacher's hidden states or logits must agree with student_hidden in all but the last dimension; "
            f"got {tuple(teacher.shape)} and {tuple(student_hidden.shape)}"
        )
    if student_hidden.device != teacher.device:
        raise ValueError(
            f"the teacher must be on the device of student_hidden ({student_hidden.device}); got {describe(teacher)}"
        )
    if teacher_vocab < least:
        raise ValueError(f"teacher_logits must have a last dimension V >= {least}; got {describe(teacher)}")
    if vocab == "error" and student_vocab != teacher_vocab:
        raise ValueError(
            f"student and teacher have different vocabularies: {student_vocab} and {teacher_vocab} columns; make them "
            "equal, or pass vocab='truncate' to use the common prefix (for padded heads)"
        )


def _check_int(name: str, value: object, allowed: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be {allowed}; got {type(value).__name__}: {value!r}")
    if not value >= 1:
        raise ValueError(f"{name} must be {allowed}; got {value!r}")


def check_chunks(chunk_size: object, memory_budget: object) -> None:
    """``chunk_size``: "auto" or rows >= 1; ``memory_budget``: None or bytes >= 1, and only with "auto"."""
    if chunk_size != "auto":
        _check_int("chunk_size", chunk_size, "'auto' or a number of rows >= 1")
        if memory_budget is not None:
            raise ValueError(f"memory_budget needs chunk_size='auto'; got both, chunk_size={chunk_size!r}")
    if memory_budget is not None:
        _check_int("memory_budget", memory_budget, "None or a number of bytes >= 1")


def check_logits_dtype(logits_dtype: object, operands: torch.dtype) -> None:
    """None, float32, or the dtype of the operands of the products."""
    allowed = {torch.float32, operands} if operands != torch.float64 else {operands}
    if logits_dtype is not None and logits_dtype not in allowed:
        words = " or ".join(sorted(str(dtype).removeprefix("torch.") for dtype in allowed))
        raise ValueError(f"logits_dtype must be None, or {words} with {operands} hidden states; got {logits_dtype!r}")
