"""The launch arithmetic of the CUDA kernels: what would run for a shape on a GPU. No GPU is needed to ask."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _C
from .checks import LOGIT_DTYPES

VARIANTS = ("warp", "block", "cluster", "streaming")


class Gpu(NamedTuple):
    """The limits that the arithmetic depends on; shared memory in bytes."""

    arch: int  # 10 * major + minor
    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int
    largest_cluster: int  # blocks: 16 from sm_90 on where the device takes such clusters, 8 or, before, 1


GPUS = {
    "a100": Gpu(80, 108, 163 << 10, 164 << 10, 1),
    "h100": Gpu(90, 132, 227 << 10, 228 << 10, 16),
    "b200": Gpu(100, 148, 227 << 10, 228 << 10, 16),
}


class Plan(NamedTuple):
    """How a call is launched. sweeps: reads of the logits from global memory, the gradient's included."""

    variant: str
    blocks: int
    threads: int  # a block
    cluster: int  # blocks
    splits: int  # blocks of a row that is streamed
    shared_bytes: int  # a block
    rows_per_block: int
    sweeps: int
    width: int  # columns of an access
    reason: str
    sparse: bool = False  # the student's logits alone are there

    def __str__(self) -> str:
        shape = f"{self.blocks} blocks of {self.threads} threads, {self.shared_bytes} bytes of shared memory each"
        parts = f", clusters of {self.cluster}" if self.cluster > 1 else ""
        parts += f", {self.splits} blocks a row" if self.splits > 1 else ""
        what = "the student's logits are" if self.sparse else "both logits are"
        reads = "once" if self.sweeps == 1 else f"{self.sweeps} times"
        return f"{self.variant}: {self.reason}; {shape}{parts}; {what} read {reads}"


def plan_loss(
    rows: int,
    vocab: int,
    gpu: Gpu,
    *,
    student_dtype: torch.dtype = torch.bfloat16,
    teacher_dtype: torch.dtype = torch.bfloat16,
    mixed_kl: bool = True,
    with_gradient: bool = True,
    aligned: bool = True,
    sparse: bool = False,
    shard: bool = False,
    wanted: str = "",
) -> Plan:
    """The plan for ``rows`` x ``vocab`` logits. mixed_kl: forward_kl, reverse_kl or symmetric_kl. aligned: rows of all
    tensors begin at the same place between two 16-byte boundaries. sparse: the teacher names columns, and only the
    student has logits. shard: ``vocab`` are the columns of one rank of several. wanted: the variant to take where a row
    fits it.

    Raises:
        ValueError: rows or vocab outside their range, a dtype that the kernels do not take, an unknown variant.
    """
    if rows < 0 or not 1 <= vocab < 2**31:
        raise ValueError(f"rows must be >= 0 and vocab in [1, 2**31); got {rows} and {vocab}")
    for name, dtype in (("student_dtype", student_dtype), ("teacher_dtype", teacher_dtype)):
        if dtype not in LOGIT_DTYPES:
            raise ValueError(f"{name} must be float32, bfloat16 or float16; got {str(dtype).removeprefix('torch.')}")
    if wanted and wanted not in VARIANTS:
        raise ValueError(f"wanted must be one of {', '.join(VARIANTS)} or empty; got {wanted!r}")
    teacher_bytes = (student_dtype if sparse else teacher_dtype).itemsize
    text = _C.cuda_plan(
        rows,
        vocab,
        student_dtype.itemsize,
        teacher_bytes,
        mixed_kl,
        with_gradient,
        aligned,
        sparse,
        shard,
        *gpu,
        wanted,
    )
    variant, *numbers, reason = text.split("\t")
    blocks, threads, cluster, splits, shared_bytes, rows_per_block, sweeps, width = map(int, numbers)
    return Plan(variant, blocks, threads, cluster, splits, shared_bytes, rows_per_block, sweeps, width, reason, sparse)


def gpu_of(device: torch.device) -> Gpu:
    """Limits of a device that is there. The largest cluster is the architecture's; the launch asks the driver."""
    p = torch.cuda.get_device_properties(device)
    arch = 10 * p.major + p.minor
    per_block = getattr(p, "shared_memory_per_block_optin", p.shared_memory_per_block)
    return Gpu(arch, p.multi_processor_count, per_block, p.shared_memory_per_multiprocessor, 16 if arch >= 90 else 1)


def plan_for(student_logits: Tensor, teacher_logits: Tensor | None, columns: int | None = None) -> Plan:
    """The plan of kd_loss with a one-sweep divergence for these logits, contiguous ones, with a gradient; of
    sparse_kd_loss where there are none of a teacher. columns: those of a rank's vocab_shard, at least one."""
    sparse = teacher_logits is None
    teacher = student_logits if teacher_logits is None else teacher_logits
    vocab = min(student_logits.shape[-1], teacher.shape[-1]) if columns is None else columns
    rows = student_logits.numel() // max(1, student_logits.shape[-1])
    return plan_loss(
        rows,
        vocab,
        gpu_of(student_logits.device),
        student_dtype=student_logits.dtype,
        teacher_dtype=teacher.dtype,
        sparse=sparse,
        shard=columns is not None,
    )
