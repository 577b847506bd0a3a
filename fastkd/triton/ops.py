"""The operators torch.ops.fastkd.triton_*: the schemas of csrc/torch/library.cpp on the Triton kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import ops
from ..checks import LOGIT_DTYPES, check_values_on_cpu
from ..divergence import SPECS
from .launch import INTERPRETED, Call, Rows, Scalars, rows_or_copy, run_loss, run_rescale, view_as_rows

_ARGUMENTS = (
    "Tensor teacher_logits, Tensor? labels, Tensor? token_weights, Tensor? temperatures, Tensor? num_items, "
    "Tensor scalars, str divergence, bool scale_by_t2, int ignore_index, str reduction, bool with_stats"
)
SCHEMAS = {
    "forward": f"(Tensor student_logits, {_ARGUMENTS}, bool with_gradient) -> (Tensor, Tensor, Tensor, Tensor)",
    "forward_": f"(Tensor(a!) student_logits, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    "rescale": "(Tensor gradient, Tensor upstream, Tensor pending) -> Tensor",
    "rescale_": "(Tensor(a!) gradient, Tensor upstream, Tensor pending) -> ()",
}
DEVICES = ("cpu",) if INTERPRETED else ("cuda", "xpu")  # ROCm calls itself cuda


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def _per_row(name: str, x: Tensor | None, dtype: torch.dtype, rows: int) -> Tensor | None:
    """x as contiguous `dtype` with one value per row of the logits."""
    if x is None:
        return None
    _check(x.numel() == rows, f"{name} must have one value a row: {rows}; got {x.numel()}")
    _check(dtype != torch.int64 or x.dtype == dtype, f"{name} must be int64")
    return x.to(dtype).contiguous()


def _call(student: Rows, gradient: Rows | None, teacher_logits: Tensor, *arguments) -> Call:
    labels, weights, temperatures, num_items, scalars, divergence, by_t2, ignore_index, reduction, stats = arguments
    student_logits = student.data
    for name, x in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        _check(x.dtype in LOGIT_DTYPES, f"{name} must be float32, bfloat16 or float16")
        _check(x.dim() >= 1 and x.shape[-1] >= 1, f"{name} must be (..., V) with V >= 1")
    rows = student_logits.numel() // student_logits.shape[-1]
    _check(
        rows == teacher_logits.numel() // teacher_logits.shape[-1],
        "student_logits and teacher_logits must have equally many rows",
    )
    _check(teacher_logits.device == student_logits.device, "both logits must be on one device")
    _check(divergence in SPECS, f"divergence '{divergence}' is not known")
    _check(reduction in ("mean", "sum", "none"), f"reduction '{reduction}' is not known; allowed: mean, sum, none")
    # on the CPU whatever the logits' device: reading it waits for nothing
    _check(scalars.device.type == "cpu" and scalars.numel() == 8, "scalars must be 8 float64 numbers on the CPU")
    numbers = Scalars(*scalars.tolist())
    _check(numbers.ce_weight == 0 or labels is not None, "ce_weight needs labels")
    columns = min(student_logits.shape[-1], teacher_logits.shape[-1])
    check_values_on_cpu(columns, labels, temperatures, ignore_index)  # on a device the row becomes NaN
    floats = torch.float32
    return Call(
        student, rows_or_copy(teacher_logits), gradient, rows, columns, student_logits.shape[-1],
        _per_row("labels", labels, torch.int64, rows), _per_row("token_weights", weights, floats, rows),
        _per_row("temperature", temperatures, floats, rows), _per_row("num_items_in_batch", num_items, floats, 1),
        numbers, divergence, by_t2, ignore_index, reduction, stats,
    )  # fmt: skip


def _forward(student_logits: Tensor, teacher_logits: Tensor, *arguments):
    *shared, with_gradient = arguments
    gradient = student_logits.new_empty(student_logits.shape if with_gradient else (0,))
    rows = rows_or_copy(gradient) if with_gradient else None
    out = run_loss(_call(rows_or_copy(student_logits), rows, teacher_logits, *shared))
    return out.loss, gradient, out.pending, out.stats


def _forward_inplace(student_logits: Tensor, teacher_logits: Tensor, *arguments):
    student = view_as_rows(student_logits)
    if student is None:
        raise RuntimeError("student_logits cannot be overwritten: its rows are not addressable by two strides")
    return tuple(run_loss(_call(student, student, teacher_logits, *arguments)))


def _factors(gradient: Tensor, upstream: Tensor, pending: Tensor) -> tuple[Tensor, Tensor]:
    rows = gradient.numel() // gradient.shape[-1] if upstream.dim() > 0 else 1
    factor, common = (
        _per_row(name, x, torch.float32, count)
        for name, x, count in (("upstream", upstream, rows), ("pending", pending, 1))
    )
    assert factor is not None and common is not None
    return factor, common


def _rescale(gradient: Tensor, upstream: Tensor, pending: Tensor) -> Tensor:
    scaled = gradient.new_empty(gradient.shape)
    run_rescale(rows_or_copy(gradient), rows_or_copy(scaled), *_factors(gradient, upstream, pending))
    return scaled


def _rescale_inplace(gradient: Tensor, upstream: Tensor, pending: Tensor) -> None:
    rows = view_as_rows(gradient)
    if rows is None:
        raise RuntimeError("gradient cannot be scaled in place: its rows are not addressable by two strides")
    run_rescale(rows, rows, *_factors(gradient, upstream, pending))


def _register() -> None:
    functions: tuple[Callable, ...] = (_forward, _forward_inplace, _rescale, _rescale_inplace)
    for (word, schema), function in zip(SCHEMAS.items(), functions):
        torch.library.define(f"fastkd::triton_{word}", schema)
        torch.library.impl(f"fastkd::triton_{word}", DEVICES, function)
    ops.register_backend("triton", "triton_")


_register()
