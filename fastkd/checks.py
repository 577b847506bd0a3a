"""Checks of the tensor arguments. Each error names the argument, what came and what is allowed; none reads a value
of a tensor that lives on an accelerator."""

from __future__ import annotations

import torch
from torch import Tensor

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_DTYPE_WORDS = "float32, bfloat16 or float16 (float64 with backend='eager')"


def describe(x: object) -> str:
    """dtype, shape and device of a tensor; the type of anything else."""
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)} on {x.device}"
    return type(x).__name__


def check_logits(student_logits: Tensor, teacher_logits: Tensor, vocab: str, least: int = 1) -> None:
    """Logits ``(..., V)`` of both models: floating point, same leading shape and device; teacher without gradient.
    ``least``: columns, 0 where other ranks have them."""
    for name, x in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor (..., V); got {type(x).__name__}")
        if x.dtype not in LOGIT_DTYPES and x.dtype != torch.float64:
            raise TypeError(f"{name} must be {_DTYPE_WORDS}; got {describe(x)}")
        if x.dim() == 0 or x.shape[-1] < least:
            raise ValueError(f"{name} must have a last dimension V >= {least}; got {describe(x)}")
    if teacher_logits.requires_grad:
        raise ValueError(
            "teacher_logits must not require grad (the loss has no gradient for the teacher); "
            "compute them under torch.no_grad() or pass teacher_logits.detach()"
        )
    if student_logits.shape[:-1] != teacher_logits.shape[:-1]:
        raise ValueError(
            "student_logits and teacher_logits must agree in all but the last dimension; "
            f"got {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    if vocab == "error" and student_logits.shape[-1] != teacher_logits.shape[-1]:
        raise ValueError(
            "student_logits and teacher_logits have different vocabularies: "
            f"{student_logits.shape[-1]} and {teacher_logits.shape[-1]} columns; make them equal, or pass "
            "vocab='truncate' to use the common prefix (for padded heads)"
        )
    if student_logits.device != teacher_logits.device:
        raise ValueError(
            "teacher_logits must be on the device of student_logits; "
            f"got {teacher_logits.device} and {student_logits.device}"
        )


def check_per_token(
    name: str, x: object, student_logits: Tensor, dtypes: tuple[torch.dtype, ...], like: str = "student_logits"
) -> None:
    """One value a token: shape ``(...)`` = leading shape of the logits (or of what ``like`` names), their device, no
    gradient."""
    words = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
    shape = tuple(student_logits.shape[:-1])
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a {words} tensor of shape {shape}; got {type(x).__name__}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must be {words}; got {describe(x)}")
    if x.shape != student_logits.shape[:-1]:
        raise ValueError(f"{name} must have one value a token, shape {shape}; got {describe(x)}")
    if x.device != student_logits.device:
        raise ValueError(f"{name} must be on the device of {like} ({student_logits.device}); got {describe(x)}")
    if x.requires_grad:
        raise ValueError(f"{name} must not require grad: the loss has no gradient for it; pass {name}.detach()")


def check_num_items(num_items_in_batch: object, reduction: str, device: torch.device) -> Tensor:
    """The external denominator of ``reduction='mean'`` as a 0-d fp32 tensor on ``device``."""
    name = "num_items_in_batch"
    if reduction != "mean":
        raise ValueError(f"{name} divides the sum of reduction='mean'; got it with reduction={reduction!r}")
    if isinstance(num_items_in_batch, Tensor):
        if num_items_in_batch.dim() != 0:
            raise ValueError(f"{name} must be an int or a 0-d tensor; got {describe(num_items_in_batch)}")
        if num_items_in_batch.requires_grad:
            raise ValueError(f"{name} must not require grad; pass {name}.detach()")
        return num_items_in_batch.to(device=device, dtype=torch.float32, non_blocking=True)
    if isinstance(num_items_in_batch, bool) or not isinstance(num_items_in_batch, (int, float, torch.SymInt)):
        raise TypeError(f"{name} must be an int or a 0-d tensor; got {type(num_items_in_batch).__name__}")
    if not num_items_in_batch > 0:
        raise ValueError(f"{name} must be > 0; got {num_items_in_batch}")
    return torch.full((), float(num_items_in_batch), dtype=torch.float32, device=device)


def first_row(mask: Tensor) -> tuple[int, ...]:
    """Index of the first True."""
    return tuple(int(i) for i in mask.nonzero()[0])


def check_values_on_cpu(vocab_size: int, labels: Tensor | None, temperature: Tensor | None, ignore_index: int) -> None:
    """Values that only a CPU tensor shows without a sync: labels in range, temperatures finite and > 0."""
    valid = None
    if labels is not None and labels.device.type == "cpu":
        valid = labels != ignore_index
        wrong = valid & ((labels < 0) | (labels >= vocab_size))
        if wrong.any():
            row = first_row(wrong)
            raise ValueError(
                f"labels{list(row)} = {int(labels[row])} is outside [0, {vocab_size}) "
                f"and is not ignore_index ({ignore_index})"
            )
    if temperature is not None and temperature.device.type == "cpu":
        wrong = ~((temperature > 0) & torch.isfinite(temperature))
        if valid is not None:
            wrong = wrong & valid
        if wrong.any():
            row = first_row(wrong)
            raise ValueError(f"temperature{list(row)} = {float(temperature[row])} must be a finite number > 0")


def check_inplace(student_logits: Tensor, teacher_logits: Tensor) -> None:
    """Refuse to overwrite ``student_logits`` where autograd would then be wrong, or where memory is shared."""
    why = None
    base = student_logits if student_logits._base is None else student_logits._base
    if base.is_leaf and base.requires_grad:
        why = "(a view of) a leaf that requires grad, whose value the optimizer still needs"
    elif _overlaps(student_logits):
        why = "expanded or overlapping: its rows share memory"
    elif _span_meets(student_logits, teacher_logits):
        why = "in one stretch of memory with teacher_logits"
    elif student_logits.stride(-1) != 1 and student_logits.shape[-1] > 1:
        why = f"strided by {student_logits.stride(-1)} in its last dimension, which must be contiguous"
    else:
        producer = _saving_producer(student_logits)
        if producer:
            why = f"the output of {producer}, which autograd still needs for its own backward"
    if why:
        raise ValueError(f"inplace=True would overwrite student_logits, but it is {why}; pass inplace=False")


def _overlaps(x: Tensor) -> bool:
    """True where two index tuples of ``x`` may name the same memory."""
    extent = 1  # elements from the first to the last one of the dimensions seen so far
    for stride, size in sorted(zip(x.stride(), x.shape)):
        if size > 1:
            if stride < extent:
                return True
            extent += stride * (size - 1)
    return False


def _span(x: Tensor) -> tuple[int, int]:
    """Addresses of the first byte of ``x`` and of the one behind its last."""
    last = sum(stride * (size - 1) for stride, size in zip(x.stride(), x.shape))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def _span_meets(a: Tensor, b: Tensor) -> bool:
    (a_begin, a_end), (b_begin, b_end) = _span(a), _span(b)
    return a.numel() > 0 and b.numel() > 0 and a_begin < b_end and b_begin < a_end


# Views and reshapes: nodes that hand a tensor on without copying it, so the producer behind them matters too.
_VIEW_NODES = ("View", "Reshape", "Slice", "Select", "Transpose", "Permute", "queeze", "Alias", "AsStrided")


def _saving_producer(x: Tensor) -> str | None:
    """Name of the autograd node that produced ``x`` and keeps its memory for its backward, if there is one."""
    node, storage = x.grad_fn, x.untyped_storage().data_ptr()
    while node is not None:
        for attribute in dir(node):
            if not attribute.startswith("_saved_"):
                continue
            saved = getattr(node, attribute)
            if isinstance(saved, Tensor) and saved.untyped_storage().data_ptr() == storage:
                return node.name()
        if not any(word in node.name() for word in _VIEW_NODES) or not node.next_functions:
            return None
        node = node.next_functions[0][0]
    return None
