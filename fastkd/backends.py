"""Which backend computes: what is built, what would run for given tensors, and why not the others."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from . import checks, ops, shard_ops
from .options import check_backend
from .shard import VocabShard, check_vocab_shard
from .topk import TopKTeacher

T = TypeVar("T")
Teacher = Tensor | TopKTeacher
_TRITON_DEVICES = ("cuda", "xpu")  # ROCm calls itself cuda


class Explanation(NamedTuple):
    """The answer of :func:`explain`; prints as a small table."""

    backend: str  # the one that would run; "" if none
    reasons: dict[str, str]  # backend -> why it runs, would run, or does not

    def __repr__(self) -> str:
        lines = [f"{'->' if name == self.backend else '  '} {name:8} {why}" for name, why in self.reasons.items()]
        return "\n".join(lines)

    def __str__(self) -> str:
        return repr(self)


def _why_not_these_logits(student_logits: Tensor, teacher_logits: Teacher) -> str | None:
    """What no backend with operators can take, wherever the logits are."""
    if torch._C._are_functorch_transforms_active():
        return "its autograd cannot be traced by torch.func transforms"
    logits = {"student_logits": student_logits}
    if isinstance(teacher_logits, Tensor):
        logits["teacher_logits"] = teacher_logits
    for name, x in logits.items():
        if x.dtype not in checks.LOGIT_DTYPES:
            return f"takes float32, bfloat16 and float16; {name} is {str(x.dtype).removeprefix('torch.')}"
    return None


def _why_not_native(student_logits: Tensor, teacher_logits: Teacher) -> str | None:
    """Why the native operators cannot take these logits; None if they can."""
    device = student_logits.device.type
    if ops.load_error or (ops.isa_error and device == "cpu"):
        return ops.load_error or ops.isa_error
    if device not in ops.native_devices() or (device == "cuda" and torch.version.hip):
        return (
            f"built for {', '.join(ops.native_devices())}; the logits are on {'ROCm' if device == 'cuda' else device}"
        )
    return _why_not_these_logits(student_logits, teacher_logits)


def _constant(function: Callable[[], T]) -> Callable[[], T]:
    """What a trace may take as it is found: torch.compiler.assume_constant_result, which imports Triton itself."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def _triton_is_missing() -> str:
    """Why Triton cannot be used at all; "" where it is installed. Imports nothing."""
    return "" if importlib.util.find_spec("triton") else "Triton is not installed: pip install triton"


@_constant
def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def _import_triton() -> str:
    try:
        importlib.import_module("fastkd.triton")
    except Exception as error:  # whatever a Triton of another version raises
        return f"its kernels could not be loaded ({type(error).__name__}: {error})"
    return ""


@_constant
def _load_triton() -> str:
    """Imports the kernels, which registers their operators. Returns why that failed, or ""."""
    return _import_triton()


def _why_not_triton(student_logits: Tensor, teacher_logits: Teacher) -> str | None:
    """Why the Triton operators cannot take these logits; None if they can. Imports Triton if nothing else forbids."""
    missing = _triton_is_missing()
    if missing:
        return missing
    device = student_logits.device.type
    if device == "cpu":
        if not _interpreting():
            return (
                "compiles for GPUs; logits on the CPU only in its interpreter (TRITON_INTERPRET=1), which is for tests"
            )
    elif device not in _TRITON_DEVICES:
        return f"runs on {', '.join(_TRITON_DEVICES)}; the logits are on {device}"
    elif _interpreting():
        return "TRITON_INTERPRET is set, and the interpreter takes logits on the CPU"
    return _why_not_these_logits(student_logits, teacher_logits) or _load_triton() or None


_REASONS = {"native": _why_not_native, "triton": _why_not_triton}  # best first


def _why_not_one(name: str, student_logits: Tensor, teacher_logits: Teacher, sharded: bool) -> str | None:
    """Why a backend with operators cannot take these logits, or None. sharded: they are columns of a vocabulary."""
    why_not = _REASONS[name](student_logits, teacher_logits)
    if why_not is None and sharded:
        parts, device = shard_ops.registered.get(name), student_logits.device.type
        built = parts.devices if parts is not None and parts.devices is not None else ()
        if device not in built:
            why_not = f"its kernels for vocab_shard are built for {', '.join(built) or 'no device'}; not for {device}"
    return why_not


def _why_not(student_logits: Tensor, teacher_logits: Teacher, sharded: bool) -> dict[str, str | None]:
    """Of the backends with operators, best first: why each cannot take these logits, or None."""
    return {name: _why_not_one(name, student_logits, teacher_logits, sharded) for name in _REASONS}


def _forced_isa_is_missing(student_logits: Tensor) -> bool:
    """A forced instruction set is an order: where it cannot run, ``auto`` does not pass over it."""
    return bool(ops.isa_error) and student_logits.device.type == "cpu"


def _choose(
    backend: str, student_logits: Tensor, teacher_logits: Teacher, sharded: bool = False
) -> tuple[str, str | None]:
    """The backend that computes and None, or "" and why none may."""
    if backend == "eager":
        return "eager", None
    if backend == "triton":
        why_not = _why_not_one("triton", student_logits, teacher_logits, sharded)
        return ("triton", None) if why_not is None else ("", why_not)
    why_not = _why_not_one("native", student_logits, teacher_logits, sharded)
    if why_not is None:
        return "native", None
    if backend == "native" or _forced_isa_is_missing(student_logits):
        return "", why_not
    # the interpreter is chosen by name alone: it is there to check the kernels, not to be fast
    on_device = student_logits.device.type != "cpu"
    triton = on_device and _why_not_one("triton", student_logits, teacher_logits, sharded) is None
    return ("triton" if triton else "eager"), None


def select_backend(backend: str, student_logits: Tensor, teacher_logits: Teacher, sharded: bool = False) -> str:
    """The backend that computes these logits; ``sharded``: they are a rank's columns of the vocabulary.

    Raises:
        RuntimeError: an explicit backend that cannot run.
        ValueError: FASTKD_CPU_ISA names an instruction set that does not run here.
    """
    chosen, why_not = _choose(backend, student_logits, teacher_logits, sharded)
    if chosen:
        return chosen
    if backend != "triton" and _forced_isa_is_missing(student_logits):
        raise ValueError(ops.isa_error)
    raise RuntimeError(f"backend={backend!r} cannot run: {why_not}; use backend='auto' or 'eager'")


def _native_words(student_logits: Tensor, teacher_logits: Teacher, shard: VocabShard | None) -> str:
    if shard is not None and shard.width == 0:
        return "no kernel: this rank has no column"
    dense = teacher_logits if isinstance(teacher_logits, Tensor) else None
    if student_logits.device.type == "cuda":
        from .cuda import plan_for  # which needs the extension

        return f"CUDA kernels, {plan_for(student_logits, dense, shard.width if shard is not None else None)}"
    if shard is not None:
        return (
            f"C++ kernels, {ops.cpu_isa()} on the CPU: a read of the logits before each exchange, one for the gradient"
        )
    read = "one read of the student's logits" if dense is None else "one read of the logits"
    return f"C++ kernels, {ops.cpu_isa()} on the CPU: {read}, gradient in the same pass"


def explain(
    student_logits: Tensor, teacher_logits: Teacher, *, backend: str = "auto", vocab_shard: VocabShard | None = None
) -> Explanation:
    """Which backend :func:`fastkd.kd_loss` would use for these logits, and why not the others; with a
    :class:`fastkd.TopKTeacher` in place of the teacher's, what :func:`fastkd.sparse_kd_loss` would.

    Logits, ``backend`` and ``vocab_shard`` as in :func:`fastkd.kd_loss`; nothing is computed, no other rank is asked.
    Print the result.

    Raises:
        ValueError: an unknown ``backend``.
    """
    check_backend(backend)
    sharded = vocab_shard is not None
    if sharded:
        check_vocab_shard(vocab_shard)
    chosen, _ = _choose(backend, student_logits, teacher_logits, sharded)
    why_not = _why_not(student_logits, teacher_logits, sharded)
    can = {
        "native": why_not["native"] or _native_words(student_logits, teacher_logits, vocab_shard),
        "triton": "Triton kernels: the gradient in forward, one program a row or several; compiled at first use",
        "eager": "torch operations and autograd: any device, any dtype up to float64, some 20 N x V tensors of traffic",
    }
    reasons = {name: why_not.get(name) or words for name, words in can.items()}
    for name in can:
        if name == chosen or why_not.get(name):
            continue
        ahead = backend == "auto" and list(can).index(name) > list(can).index(chosen or name)
        reasons[name] += f" (auto takes it where {chosen} cannot run)" if ahead else " (not asked for)"
    return Explanation(chosen, reasons)


def _cuda_built() -> str:
    """Whether the extension has CUDA kernels, and whether anything runs them here."""
    architectures = ops.cuda_architectures()
    if not architectures:
        return "no CUDA kernels: built without a CUDA toolkit, or with FASTKD_CUDA=0 (FASTKD_CUDA=1 insists on them)"
    if torch.cuda.is_available():
        state = f"{torch.cuda.device_count()} device(s) here"
    else:
        state = "no CUDA device or driver here" if torch.version.cuda else "this PyTorch was built without CUDA"
    return f"CUDA kernels for sm_{architectures.replace(', ', ', sm_')}; {state}"


def backends() -> Explanation:
    """What is built on this machine: each backend with its devices, instruction sets, or the reason it is missing."""
    why_not = ops.load_error or ops.isa_error
    if why_not:
        native = f"not available: {why_not}"
    else:
        available = ", ".join(ops.cpu_isas())
        native = (
            f"{', '.join(ops.native_devices())}; instruction set {ops.cpu_isa()} (this machine runs: {available}; "
            f"FASTKD_CPU_ISA forces one); {_cuda_built()}"
        )
    missing = _triton_is_missing()
    triton = f"not available: {missing}" if missing else f"{', '.join(_TRITON_DEVICES)} (CUDA, ROCm, Intel)"
    runs = "" if ops.isa_error else "eager" if ops.load_error else "native"
    native_parts = shard_ops.registered.get("native")
    sharded = {
        "native": ", ".join((native_parts and native_parts.devices) or ()) or "no device",
        "triton": ", ".join(_TRITON_DEVICES),  # registered when it is first used
        "eager": "any device",
    }
    words = {"native": native, "triton": triton, "eager": "any device that torch has"}
    for name, on in sharded.items():
        if not words[name].startswith("not available"):
            words[name] += f"; vocab_shard: {on}"
    return Explanation(runs, words)
