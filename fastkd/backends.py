"""Which backend computes: what is built, what would run for given tensors, and why not the others."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, ops
from .options import check_backend


class Explanation(NamedTuple):
    """The answer of :func:`explain`; prints as a small table."""

    backend: str  # the one that would run; "" if none
    reasons: dict[str, str]  # backend -> why it runs, would run, or does not

    def __repr__(self) -> str:
        lines = [f"{'->' if name == self.backend else '  '} {name:8} {why}" for name, why in self.reasons.items()]
        return "\n".join(lines)

    def __str__(self) -> str:
        return repr(self)


def _why_not_native(student_logits: Tensor, teacher_logits: Tensor) -> str | None:
    """Why the native operators cannot take these logits; None if they can."""
    if ops.load_error or ops.isa_error:
        return ops.load_error or ops.isa_error
    if student_logits.device.type not in ops.native_devices():
        return f"built for {', '.join(ops.native_devices())}; the logits are on {student_logits.device.type}"
    if torch._C._are_functorch_transforms_active():
        return "its autograd cannot be traced by torch.func transforms"
    for name, x in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        if x.dtype not in checks.LOGIT_DTYPES:
            return f"takes float32, bfloat16 and float16; {name} is {str(x.dtype).removeprefix('torch.')}"
    return None


def _forced_isa_is_missing(student_logits: Tensor) -> bool:
    """A forced instruction set is an order: where it cannot run, ``auto`` does not pass over it."""
    return bool(ops.isa_error) and student_logits.device.type == "cpu"


def _choose(backend: str, student_logits: Tensor, why_not_native: str | None) -> str:
    """The backend that computes; "" where none may."""
    if backend == "eager":
        return "eager"
    if why_not_native is None:
        return "native"
    return "" if backend == "native" or _forced_isa_is_missing(student_logits) else "eager"


def select_backend(backend: str, student_logits: Tensor, teacher_logits: Tensor) -> str:
    """The backend that computes these logits.

    Raises:
        RuntimeError: an explicit backend that cannot run.
        ValueError: FASTKD_CPU_ISA names an instruction set that does not run here.
    """
    why_not = None if backend == "eager" else _why_not_native(student_logits, teacher_logits)
    chosen = _choose(backend, student_logits, why_not)
    if chosen:
        return chosen
    if _forced_isa_is_missing(student_logits):
        raise ValueError(ops.isa_error)
    raise RuntimeError(f"backend='native' cannot run: {why_not}; use backend='auto' or 'eager'")


def explain(student_logits: Tensor, teacher_logits: Tensor, *, backend: str = "auto") -> Explanation:
    """Which backend :func:`fastkd.kd_loss` would use for these logits, and why not the others.

    Logits and ``backend`` as in :func:`fastkd.kd_loss`; nothing is computed. Print the result.

    Raises:
        ValueError: an unknown ``backend``.
    """
    check_backend(backend)
    why_not = _why_not_native(student_logits, teacher_logits)
    chosen = _choose(backend, student_logits, why_not)
    native = why_not or f"C++ kernels, {ops.cpu_isa()} on the CPU: one read of the logits, gradient in the same pass"
    reasons = {
        "native": native,
        "eager": "torch operations and autograd: any device, any dtype up to float64, some 20 N x V tensors of traffic",
    }
    if chosen == "native":
        reasons["eager"] += " (auto takes it where native cannot run)" if backend == "auto" else " (not asked for)"
    elif chosen == "eager" and why_not is None:
        reasons["native"] += " (not asked for)"
    return Explanation(chosen, reasons)


def backends() -> Explanation:
    """What is built on this machine: each backend with its devices, instruction sets, or the reason it is missing."""
    why_not = ops.load_error or ops.isa_error
    if why_not:
        native = f"not available: {why_not}"
    else:
        available = ", ".join(ops.cpu_isas())
        native = (
            f"{', '.join(ops.native_devices())}; instruction set {ops.cpu_isa()} (this machine runs: {available}; "
            "FASTKD_CPU_ISA forces one)"
        )
    runs = "" if ops.isa_error else "eager" if ops.load_error else "native"
    return Explanation(runs, {"native": native, "eager": "any device that torch has"})
