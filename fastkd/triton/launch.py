"""Host side of the Triton kernels: rows as strides, the shape of the launch by table, allocation, launches. Nothing
here waits for the device or reads a tensor that lives on it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import ends, kernels, pieces

INTERPRETED = not isinstance(
    kernels.sums_kernel, triton.JITFunction
)  # the kernels are numpy: TRITON_INTERPRET was set at import
ONE_SWEEP = ("forward_kl", "reverse_kl", "symmetric_kl")  # their value needs no second sweep
TOTAL_BLOCK, TOTAL_THREADS = 4096, 256  # of the kernels with one program


class Rows(NamedTuple):
    """Rows of unit column stride on two levels of strides, in elements: `inner` rows per outer step."""

    data: Tensor
    inner: int
    outer_stride: int
    inner_stride: int


class Block(NamedTuple):
    """Columns that a program takes at a time, as lanes of `vector` neighbours, and the threads that do it."""

    lanes: int
    vector: int
    threads: int

    @property
    def columns(self) -> int:
        return self.lanes * self.vector


class Split(NamedTuple):
    """Programs per row, and the consecutive blocks that each takes."""

    splits: int
    blocks: int


class Scalars(NamedTuple):
    """The 8 numbers of the operators, in their order."""

    beta: float
    temperature: float
    kd_weight: float
    ce_weight: float
    label_smoothing: float
    z_loss: float
    student_softcap: float
    teacher_softcap: float


class Call(NamedTuple):
    """One call of the loss as the kernels see it. Per-row tensors are contiguous; gradient None: the value alone."""

    student: Rows
    teacher: Rows
    gradient: Rows | None
    rows: int
    columns: int  # the vocabulary that both models share
    gradient_columns: int
    labels: Tensor | None
    weights: Tensor | None
    temperatures: Tensor | None
    num_items: Tensor | None
    numbers: Scalars
    divergence: str
    scale_by_t2: bool
    ignore_index: int
    reduction: str
    with_stats: bool

    @property
    def needs_hard(self) -> bool:
        return self.labels is not None and (self.numbers.ce_weight != 0 or self.with_stats)

    @property
    def capped(self) -> bool:
        return self.numbers.student_softcap != 0 or self.numbers.teacher_softcap != 0


class Outputs(NamedTuple):
    loss: Tensor
    pending: Tensor
    stats: Tensor


def view_as_rows(x: Tensor) -> Rows | None:
    """The rows of x (..., V) on at most two levels of strides; None where that needs a copy."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return None
    levels: list[list[int]] = []  # [size, stride], innermost first
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1])):
        if size == 1:
            continue
        if levels and stride == levels[-1][0] * levels[-1][1]:
            levels[-1][0] *= size
        else:
            levels.append([size, stride])
    if len(levels) > 2:
        return None
    (inner, inner_stride), (_, outer_stride) = (*levels, [1, 0], [1, 0])[:2]
    return Rows(x, max(inner, 1), outer_stride, inner_stride)


def rows_or_copy(x: Tensor) -> Rows:
    rows = view_as_rows(x)
    if rows is None:
        rows = view_as_rows(x.contiguous())
    assert rows is not None
    return rows


# --- the shape of a launch: pure functions --------------------------------------------------------------------------

# Bytes of a student's logit -> block of the sweeps: one lane of 16 bytes of each model a thread, the sums of one lane
# in its registers. The sums of two spill on some architectures.
SWEEP_BLOCKS = {2: Block(lanes=256, vector=8, threads=256), 4: Block(lanes=256, vector=4, threads=256)}
# Registers a thread, of 65536 a multiprocessor: three programs of 256 threads, two with statistics or softcaps. Stated,
# since a compiler left to itself may spill for an occupancy of its own choice. In bf16 nothing was seen to spill at 72
# and 112 either; at 64 and 80 something does.
PLAIN_REGISTERS, BUSY_REGISTERS = 80, 128
# Columns of a row that stays in registers. Twice as many spill with jsd or with every option, whatever the threads.
MAX_RESIDENT = {2: 4096, 4: 4096}
RESIDENT_COLUMNS = 8  # per thread
MAX_RESIDENT_THREADS = 512
PROGRAMS_PER_PROCESSOR = 8  # below this many, rows are split


def resident_block(columns: int, item_size: int) -> Block | None:
    """The block that holds a whole row of so many columns; None where it has to be swept."""
    if columns > MAX_RESIDENT[item_size]:
        return None
    vector = 16 // item_size
    lanes = max(32, 1 << max(0, -(-columns // vector) - 1).bit_length())
    return Block(lanes, vector, min(MAX_RESIDENT_THREADS, max(32, lanes * vector // RESIDENT_COLUMNS)))


def split_rows(rows: int, columns: int, block: Block, processors: int) -> Split:
    """How many programs share a row, so that few rows still fill the device."""
    blocks = -(-columns // block.columns)
    wanted = max(1, -(-PROGRAMS_PER_PROCESSOR * processors // max(rows, 1)))
    each = -(-blocks // min(wanted, blocks, pieces.MAX_PIECES.value))
    return Split(-(-blocks // each), each)


@functools.cache
def processors_of(device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    properties = torch.get_device_module(device).get_device_properties(device)
    return getattr(properties, "multi_processor_count", 0) or getattr(properties, "max_compute_units", 64)


@functools.cache
def threads_per_warp(device: torch.device) -> int:
    """64 where a wavefront of AMD's data-centre GPUs is the warp."""
    if device.type != "cuda" or torch.version.hip is None:
        return 32
    return getattr(torch.cuda.get_device_properties(device), "warp_size", 64)


@functools.cache
def limits_registers(device: torch.device) -> bool:
    """Whether Triton's compiler for the device takes a limit of registers: NVIDIA's alone."""
    return device.type == "cuda" and torch.version.hip is None


def _compiled_for(threads: int, registers: int, device: torch.device) -> dict[str, int | bool]:
    """Options of the compiler. Products and sums are fused whatever Triton's default is, and it asks for no choice."""
    options: dict[str, int | bool] = {"num_warps": max(1, threads // threads_per_warp(device))}
    if limits_registers(device):
        options["maxnreg"] = registers
    return {**options, "enable_fp_fusion": True}


def shape_of(block: Block, device: torch.device, busy: bool) -> dict[str, int | bool]:
    """busy: with what the sweeps have more registers for."""
    registers = BUSY_REGISTERS if busy else PLAIN_REGISTERS
    return {"LANES": block.lanes, "VECTOR": block.vector, **_compiled_for(block.threads, registers, device)}


# --- launches -------------------------------------------------------------------------------------------------------


def on(device: torch.device) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def _flat(rows: Rows | None) -> tuple:
    return (None, 1, 0, 0) if rows is None else tuple(rows)


def _options_of(call: Call) -> tuple[float, ...]:
    o = call.numbers
    by_t2 = 1.0 if call.scale_by_t2 else 0.0
    return o.beta, 1.0 - o.beta, by_t2, o.kd_weight, o.ce_weight, o.label_smoothing, o.z_loss


def _sweep(call: Call, row_loss: Tensor, stats: Tensor | None, scales: Tensor) -> None:
    """The streaming kernels."""
    student, o = call.student.data, call.numbers
    block = SWEEP_BLOCKS[student.element_size()]
    processors = processors_of(student.device)
    split = split_rows(call.rows, call.columns, block, processors)
    programs = (call.rows * split.splits,)
    shape = shape_of(block, student.device, call.capped or call.with_stats)
    inputs = (*call.student, *call.teacher)
    softening = (o.temperature, o.student_softcap, o.teacher_softcap)
    buffer = student.new_empty((call.rows, split.splits, pieces.FIELDS.value), dtype=torch.float32)
    one_sweep = call.divergence in ONE_SWEEP
    kernels.sums_kernel[programs](
        *inputs, call.columns, buffer, call.labels, call.temperatures, call.ignore_index, *split, *softening,
        DIVERGENCE=call.divergence if one_sweep else "terms", HARD=call.needs_hard, STATS=call.with_stats,
        CAPPED=call.capped, **shape,
    )  # fmt: skip
    terms = None
    if not one_sweep:
        terms = student.new_empty((call.rows, split.splits, 2), dtype=torch.float32)
        kernels.terms_kernel[programs](
            *inputs, call.columns, buffer, terms, call.labels, call.temperatures, call.ignore_index, *split,
            *softening, *_options_of(call)[:2], DIVERGENCE=call.divergence, CAPPED=call.capped, **shape,
        )  # fmt: skip
    last = Split(1, 0)
    if call.gradient is not None:
        last = split_rows(call.rows, call.gradient_columns, block, processors)
    kernels.gradient_kernel[(call.rows * last.splits,)](
        *inputs, *_flat(call.gradient), call.columns, call.gradient_columns, buffer, terms, scales, row_loss, stats,
        call.labels, call.weights, call.temperatures, call.rows, call.ignore_index, *last, split.splits, *softening,
        *_options_of(call), DIVERGENCE=call.divergence, HARD=call.needs_hard, CAPPED=call.capped, **shape,
    )  # fmt: skip


def _stay(call: Call, block: Block, row_loss: Tensor, stats: Tensor | None, scales: Tensor) -> None:
    """The resident kernel."""
    o = call.numbers
    kernels.resident_kernel[(call.rows,)](
        *call.student, *call.teacher, *_flat(call.gradient), call.columns, call.gradient_columns, scales, row_loss,
        stats, call.labels, call.weights, call.temperatures, call.rows, call.ignore_index, o.temperature,
        o.student_softcap, o.teacher_softcap, *_options_of(call), DIVERGENCE=call.divergence, HARD=call.needs_hard,
        CAPPED=call.capped, **shape_of(block, call.student.data.device, busy=True),
    )  # fmt: skip


def run_rows(call: Call, rows: Callable[[Tensor, Tensor | None, Tensor], None]) -> Outputs:
    """The scales, then what ``rows(row_loss, stats, scales)`` launches, then the total."""
    student = call.student.data
    new = functools.partial(student.new_empty, dtype=torch.float32)
    lead = student.shape[:-1]
    row_loss, scales, pending = new(lead), new((2,)), new(())
    stats = new((5, *lead)) if call.with_stats else new((0,))
    loss = row_loss if call.reduction == "none" else new(())
    # fp16 keeps the gradient of the sum: (q - p) / N would underflow before a loss scaler could save it
    normalised = student.dtype != torch.float16
    one_program = {"BLOCK": TOTAL_BLOCK, **_compiled_for(TOTAL_THREADS, BUSY_REGISTERS, student.device)}
    with on(student.device):
        ends.scale_kernel[(1,)](
            scales, pending, call.labels, call.weights, call.num_items, call.rows, call.ignore_index,
            MEAN=call.reduction == "mean", NORMALISED=normalised, **one_program,
        )  # fmt: skip
        if call.rows > 0:
            rows(row_loss, stats if call.with_stats else None, scales)
        if call.reduction != "none":
            ends.total_kernel[(1,)](loss, row_loss, scales, call.rows, **one_program)
    return Outputs(loss, pending, stats)


def run_loss(call: Call) -> Outputs:
    """Launches everything of one call; fills call.gradient where there is one."""
    widest = call.columns if call.gradient is None else call.gradient_columns
    block = resident_block(widest, call.student.data.element_size())
    rows = functools.partial(_sweep, call) if block is None else functools.partial(_stay, call, block)
    return run_rows(call, rows)


def run_rescale(source: Rows, scaled: Rows, upstream: Tensor, pending: Tensor) -> None:
    """scaled = source * upstream * pending; upstream is one number or one a row, fp32."""
    gradient = source.data
    rows, columns = gradient.numel() // gradient.shape[-1], gradient.shape[-1]
    if rows == 0:
        return
    block = SWEEP_BLOCKS[gradient.element_size()]
    split = split_rows(rows, columns, block, processors_of(gradient.device))
    with on(gradient.device):
        ends.rescale_kernel[(rows * split.splits,)](
            *source, *scaled, columns, upstream, int(upstream.dim() > 0), pending, *split,
            INPLACE=source.data.data_ptr() == scaled.data.data_ptr(), **shape_of(block, gradient.device, busy=False),
        )  # fmt: skip
