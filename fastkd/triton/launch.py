"""Host side of the Triton kernels: rows as strides, the shape of the launch by table, allocation, launches. Nothing
here waits for the device or reads a tensor that lives on it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import ends, kernels, pieces, row

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
# since a compiler left to itself may spill for an occupancy of its own choice.
PLAIN_REGISTERS, BUSY_REGISTERS = 80, 128
# The block that holds a whole row in registers, 8 columns a thread. Twice as many columns spill, whatever the threads.
RESIDENT_BLOCKS = {2: Block(lanes=512, vector=8, threads=512), 4: Block(lanes=1024, vector=4, threads=512)}
PROGRAMS_PER_PROCESSOR = 8  # below this many, rows are split


def resident_block(columns: int, item_size: int) -> Block | None:
    """The block that holds a whole row of so many columns; None where it has to be swept."""
    block = RESIDENT_BLOCKS.get(item_size)
    return block if block is not None and columns <= block.columns else None


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


def raw(rows: Rows) -> Rows:
    """Logits of 2 bytes as the kernels take them, whichever their dtype."""
    return rows._replace(data=rows.data.view(torch.int16)) if rows.data.element_size() == 2 else rows


def is_wide(rows: Rows, vector: int) -> bool:
    """Whether a block of any row begins at a multiple of `vector` elements, as far as 16 bytes can tell."""
    apart = rows.outer_stride % vector == 0 and rows.inner_stride % vector == 0
    return apart and rows.data.data_ptr() % min(16, vector * rows.data.element_size()) == 0


def asked_of(conditions: dict[tl.constexpr, bool]) -> int:
    """`asked` of the kernels."""
    return sum(bit.value for bit, given in conditions.items() if given)


def asked_of_rows(student: Rows, teacher: Rows, gradient: Rows | None, widths: tuple[int, ...], vector: int) -> int:
    """What `asked` says of the logits; widths: columns of the row and of its gradient."""
    rows = [student, teacher] if gradient is None else [student, teacher, gradient]
    wide = all(width % vector == 0 for width in widths) and all(is_wide(x, vector) for x in rows)
    fp16 = [x.data.dtype == torch.float16 for x in (student, teacher)]
    return asked_of({row.WIDE: wide, row.STUDENT_FP16: fp16[0], row.TEACHER_FP16: fp16[1]})


@functools.cache
def absent(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Stands for a tensor that is not there, and that `asked` keeps from being read."""
    return torch.empty(0, dtype=dtype, device=device)


def given(x: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    return absent(dtype, device) if x is None else x


class Rest(NamedTuple):
    """What a call's launches have in common besides its logits: `asked`, and the tensors that it may lack."""

    asked: int
    labels: Tensor
    weights: Tensor
    temperatures: Tensor
    num_items: Tensor


def _rest_of(call: Call) -> Rest:
    device = call.student.data.device
    asked = asked_of({
        row.HARD: call.needs_hard, row.STATS: call.with_stats, row.LABELS: call.labels is not None,
        row.CHECKED: call.labels is not None, row.WEIGHTS: call.weights is not None,
        row.TEMPERATURES: call.temperatures is not None,
    })  # fmt: skip
    floats = (given(x, torch.float32, device) for x in (call.weights, call.temperatures, call.num_items))
    return Rest(asked, given(call.labels, torch.int64, device), *floats)


def _options_of(call: Call) -> tuple[float, ...]:
    o = call.numbers
    by_t2 = 1.0 if call.scale_by_t2 else 0.0
    return o.beta, 1.0 - o.beta, by_t2, o.kd_weight, o.ce_weight, o.label_smoothing, o.z_loss


def _asked_in(call: Call, rest: Rest, block: Block) -> int:
    widths = (call.columns, call.columns if call.gradient is None else call.gradient_columns)
    return rest.asked | asked_of_rows(call.student, call.teacher, call.gradient, widths, block.vector)


def _written(call: Call) -> tuple[Rows, int]:
    """The gradient and its columns; none for the value alone."""
    return (call.student, 0) if call.gradient is None else (call.gradient, call.gradient_columns)


def _sweep(call: Call, rest: Rest, row_loss: Tensor, stats: Tensor, scales: Tensor) -> None:
    """The streaming kernels."""
    student, o = call.student.data, call.numbers
    block = SWEEP_BLOCKS[student.element_size()]
    processors = processors_of(student.device)
    split = split_rows(call.rows, call.columns, block, processors)
    programs = (call.rows * split.splits,)
    busy = call.capped or call.with_stats
    shape = {"FULL": busy, **shape_of(block, student.device, busy)}
    inputs = (*raw(call.student), *raw(call.teacher))
    asked = _asked_in(call, rest, block)
    softening = (o.temperature, o.student_softcap, o.teacher_softcap)
    buffer = student.new_empty((call.rows, split.splits, pieces.FIELDS.value), dtype=torch.float32)
    one_sweep = call.divergence in ONE_SWEEP
    kernels.sums_kernel[programs](
        *inputs, call.columns, buffer, rest.labels, rest.temperatures, call.ignore_index, asked, *split, *softening,
        DIVERGENCE=call.divergence if one_sweep else "terms", **shape,
    )  # fmt: skip
    terms = buffer
    if not one_sweep:
        terms = student.new_empty((call.rows, split.splits, 2), dtype=torch.float32)
        kernels.terms_kernel[programs](
            *inputs, call.columns, buffer, terms, rest.labels, rest.temperatures, call.ignore_index, asked, *split,
            *softening, *_options_of(call)[:2], DIVERGENCE=call.divergence, **shape,
        )  # fmt: skip
    gradient, columns = _written(call)
    last = split_rows(call.rows, columns, block, processors) if columns else Split(1, 0)
    kernels.gradient_kernel[(call.rows * last.splits,)](
        *inputs, *raw(gradient), call.columns, columns, buffer, terms, scales, row_loss, stats, rest.labels,
        rest.weights, rest.temperatures, call.rows, call.ignore_index, asked, *last, split.splits, *softening,
        *_options_of(call), DIVERGENCE=call.divergence, **shape,
    )  # fmt: skip


def _stay(call: Call, block: Block, rest: Rest, row_loss: Tensor, stats: Tensor, scales: Tensor) -> None:
    """The resident kernel."""
    o = call.numbers
    gradient, columns = _written(call)
    kernels.resident_kernel[(call.rows,)](
        *raw(call.student), *raw(call.teacher), *raw(gradient), call.columns, columns, scales, row_loss, stats,
        rest.labels, rest.weights, rest.temperatures, call.rows, call.ignore_index, _asked_in(call, rest, block),
        o.temperature, o.student_softcap, o.teacher_softcap, *_options_of(call), DIVERGENCE=call.divergence,
        **shape_of(block, call.student.data.device, busy=True),
    )  # fmt: skip


def one_program(device: torch.device) -> dict[str, int | bool]:
    return {"BLOCK": TOTAL_BLOCK, **_compiled_for(TOTAL_THREADS, BUSY_REGISTERS, device)}


def run_rows(call: Call, rows: Callable[[Tensor, Tensor | None, Tensor], None]) -> Outputs:
    """The scales, then what ``rows(row_loss, stats, scales)`` launches, then the total."""
    student, rest = call.student.data, _rest_of(call)
    new = functools.partial(student.new_empty, dtype=torch.float32)
    lead = student.shape[:-1]
    row_loss, scales, pending = new(lead), new((2,)), new(())
    stats = new((5, *lead)) if call.with_stats else new((0,))
    loss = row_loss if call.reduction == "none" else new(())
    # fp16 keeps the gradient of the sum: (q - p) / N would underflow before a loss scaler could save it
    asked = rest.asked | asked_of({
        ends.MEAN: call.reduction == "mean", ends.ITEMS: call.num_items is not None,
        ends.NORMALISED: student.dtype != torch.float16,
    })  # fmt: skip
    with on(student.device):
        ends.scale_kernel[(1,)](
            scales, pending, rest.labels, rest.weights, rest.num_items, call.rows, call.ignore_index, asked,
            **one_program(student.device),
        )  # fmt: skip
        if call.rows > 0:
            rows(row_loss, stats if call.with_stats else None, scales)
        if call.reduction != "none":
            ends.total_kernel[(1,)](loss, row_loss, scales, call.rows, **one_program(student.device))
    return Outputs(loss, pending, stats)


def run_loss(call: Call) -> Outputs:
    """Launches everything of one call; fills call.gradient where there is one."""
    widest = call.columns if call.gradient is None else call.gradient_columns
    block = resident_block(widest, call.student.data.element_size())
    rest = _rest_of(call)

    def rows(row_loss: Tensor, stats: Tensor | None, scales: Tensor) -> None:
        read = given(stats, torch.float32, row_loss.device)
        if block is None:
            _sweep(call, rest, row_loss, read, scales)
        else:
            _stay(call, block, rest, row_loss, read, scales)

    return run_rows(call, rows)


def run_rescale(source: Rows, scaled: Rows, upstream: Tensor, pending: Tensor) -> None:
    """scaled = source * upstream * pending; upstream is one number or one a row, fp32."""
    gradient = source.data
    rows, columns = gradient.numel() // gradient.shape[-1], gradient.shape[-1]
    if rows == 0:
        return
    block = SWEEP_BLOCKS[gradient.element_size()]
    split = split_rows(rows, columns, block, processors_of(gradient.device))
    asked = asked_of_rows(source, source, scaled, (columns,), block.vector)
    asked |= asked_of({ends.IN_PLACE: gradient.data_ptr() == scaled.data.data_ptr()})
    with on(gradient.device):
        ends.rescale_kernel[(rows * split.splits,)](
            *raw(source), *raw(scaled), columns, upstream, int(upstream.dim() > 0), pending, asked, *split,
            **shape_of(block, gradient.device, busy=False),
        )  # fmt: skip
