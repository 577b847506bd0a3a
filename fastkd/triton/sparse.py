"""Host side of the Triton kernels with a sparse teacher: the teacher's entries by torch operations, the launches, and
the operators torch.ops.fastkd.triton_sparse_forward and its twin in place."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import sparse_ops
from ..checks import check_values_on_cpu
from ..sparse_checks import check_teacher_values
from ..sparse_eager import entries_of, mass_left
from ..topk import TopKTeacher, mass_resolution
from . import launch, sparse_kernels, sparse_named, sparse_row
from .launch import Block, Call, Outputs, Rows, Scalars, rows_or_copy, view_as_rows
from .ops import DEVICES, _check, _per_row
from .sparse_plan import (
    FINISH_REGISTERS,
    ROW_REGISTERS,
    SPLIT_REGISTERS,
    WARP_ENTRIES,
    base_of,
    cache_of,
    plan_of,
    unit_of,
)

LOG2E = 1.4426950408889634
NO_COLUMN = 2**31 - 1
OPTIONS = ("beta", "beta_rest", "by_t2", "kd_weight", "ce_weight", "label_smoothing", "z_loss")

_ARGUMENTS = (
    "Tensor ids, Tensor logprobs, Tensor? weights, Tensor? labels, Tensor? token_weights, Tensor? temperatures, "
    "Tensor? num_items, Tensor scalars, str tail, str divergence, bool scale_by_t2, int ignore_index, str reduction, "
    "bool with_stats"
)
SCHEMAS = {
    "sparse_forward": f"(Tensor student_logits, {_ARGUMENTS}, bool with_gradient) -> (Tensor, Tensor, Tensor, Tensor)",
    "sparse_forward_": f"(Tensor(a!) student_logits, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
}


class Entries(NamedTuple):
    """The teacher's rows as sparse_kernels.py describes them."""

    ids: Tensor
    log2_p: Tensor
    weights: Tensor
    rest: Tensor


def _distinct(ids: Tensor, log2_p: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draws of one column as one, at its first place of the ascending ``ids``: their weights add up, and what they add
    to the loss. Sums of runs are differences of running sums, in fp64."""
    k = ids.shape[-1]
    drawn = ids < NO_COLUMN
    head = drawn & torch.cat([torch.ones_like(drawn[:, :1]), ids[:, 1:] != ids[:, :-1]], -1)
    place = torch.arange(k, device=ids.device).expand_as(ids)
    # one behind the last of the run that begins here: where the next one begins
    after = torch.where(head | ~drawn, place, k).flip(-1).cummin(-1).values.flip(-1)
    end = torch.cat([after[:, 1:], after.new_full((len(ids), 1), k)], -1)

    def run_sums(x: Tensor) -> Tensor:
        running = torch.cat([x.new_zeros(len(x), 1), x.cumsum(-1)], -1)
        return running.gather(-1, end) - running[:, :-1]

    w = torch.where(drawn, weights, 0.0).double()
    total, value = run_sums(w), run_sums(w * torch.where(drawn, log2_p, 0.0).double())
    mean = torch.where(total > 0, value / torch.where(total > 0, total, 1.0), log2_p.double())
    kept = torch.where(head, ids, NO_COLUMN)
    order = kept.argsort(dim=-1, stable=True)
    log2_p = torch.where(head, mean, float("-inf")).float()
    return kept.gather(-1, order), log2_p.gather(-1, order), torch.where(head, total, 0.0).float().gather(-1, order)


def prepare(teacher: TopKTeacher, vocab: int, valid: Tensor, temperature: Tensor | float) -> Entries:
    """Of flat tensors (rows, K); temperature: of each row, or of all. Nothing is asked of the device."""
    ids, entry, wrong = entries_of(teacher, vocab, valid)
    sampled = teacher.tail == "sampled"
    lp = torch.where(entry, teacher.logprobs.float(), float("-inf"))
    weights = torch.zeros_like(lp)
    mass = torch.zeros_like(lp[:, 0])
    if sampled:
        entry = entry & ~torch.isneginf(lp)
        count = entry.sum(-1, keepdim=True).clamp(min=1)
        weights = (entry / count if teacher.weights is None else torch.where(entry, teacher.weights, 0.0)).float()
    elif teacher.tail == "renormalize":
        slope = 1.0 if teacher.temperature is None else teacher.temperature / temperature
        lp = torch.log_softmax(lp * (slope.unsqueeze(-1) if isinstance(slope, Tensor) else slope), -1)
    else:
        left = mass_left(lp)
        lp = torch.where((left < 0).unsqueeze(-1), torch.log_softmax(lp, -1), lp)
        mass = left.clamp(min=0).float()
    keys = torch.where(entry, ids, NO_COLUMN).int()
    order = keys.argsort(dim=-1, stable=True)
    keys, log2_p, weights = keys.gather(-1, order), (lp * LOG2E).gather(-1, order), weights.gather(-1, order)
    if sampled:
        keys, log2_p, weights = _distinct(keys, log2_p, weights)
    poison = torch.where(wrong, float("nan"), 0.0)
    return Entries(keys.contiguous(), log2_p.contiguous(), weights.contiguous(), torch.stack([mass, poison], -1))


def _offsets(ids: Tensor, blocks: int, columns: int) -> Tensor:
    """(rows, blocks + 1): where each block's entries begin."""
    starts = torch.arange(blocks + 1, device=ids.device, dtype=torch.int64) * columns
    starts = starts.clamp(max=NO_COLUMN).int().expand(len(ids), -1).contiguous()
    return torch.searchsorted(ids, starts, out_int32=True)


def _arguments_of_teacher(call: Call, teacher: TopKTeacher, block: Block) -> dict[str, Any]:
    o, device = call.numbers, call.student.data.device
    valid = torch.ones(call.rows, dtype=torch.bool, device=device)
    if call.labels is not None:
        valid = call.labels != call.ignore_index
    entries = prepare(teacher, call.columns, valid, o.temperature if call.temperatures is None else call.temperatures)
    row_blocks = -(-call.columns // block.columns)
    resolution = mass_resolution(teacher.logprobs.dtype)
    return {
        "ids": entries.ids, "log2_ps": entries.log2_p, "draws": entries.weights, "rest_of": entries.rest,
        "offsets": _offsets(entries.ids, row_blocks, block.columns), "row_blocks": row_blocks, "k": teacher.k,
        "kind": _kind_of(call, teacher), "resolution": resolution,
        "lowest": math.log2(resolution) if teacher.tail == "bucket" else float("-inf"),
    }  # fmt: skip


def _arguments_of_call(call: Call, row_loss: Tensor, stats: Tensor | None, scales: Tensor, unit: int) -> dict[str, Any]:
    """A tensor that is not there is replaced by one of its dtype, which is not read."""
    beta, beta_rest, *others = launch._options_of(call)
    beta, beta_rest = {"forward_kl": (1.0, 0.0), "reverse_kl": (0.0, 1.0)}.get(call.divergence, (beta, beta_rest))
    return {
        **_rows_in_units("student", "s", call.student, unit),
        **_rows_in_units("gradient", "d", call.gradient or call.student, unit),
        "width": call.columns // unit, "UNIT": unit, "rows": call.rows, "scales": scales, "row_loss": row_loss,
        "stats": row_loss if stats is None else stats,
        "labels": scales.view(torch.int64) if call.labels is None else call.labels,
        "weights": scales if call.weights is None else call.weights,
        "temperatures": scales if call.temperatures is None else call.temperatures,
        "ignore_index": call.ignore_index, "flags": _flags_of(call), "temperature": call.numbers.temperature,
        "softcap": call.numbers.student_softcap, **dict(zip(OPTIONS, (beta, beta_rest, *others))),
    }  # fmt: skip


class _Launches:
    """The kernels of one call, given what they ask for by the names of their parameters."""

    def __init__(self, call: Call, teacher: TopKTeacher, row_loss: Tensor, stats: Tensor | None, scales: Tensor):
        self.call, self.device = call, call.student.data.device
        self.new = functools.partial(row_loss.new_empty, dtype=torch.float32)
        unit = unit_of(call.student, call.gradient, call.columns)
        self.plan = plan_of(
            call.rows, call.columns, call.student.data.element_size(), unit, call.gradient is not None,
            (launch.processors_of(self.device), cache_of(self.device)),
        )  # fmt: skip
        self.arguments = {
            **_arguments_of_call(call, row_loss, stats, scales, unit),
            **_arguments_of_teacher(call, teacher, self.plan.block),
            "named": scales if call.gradient is None else self.new((call.rows, teacher.k)),
        }

    def run(self, kernel: Any, programs: int, threads: int, registers: int, **more: Any) -> None:
        given = {**self.arguments, **more}
        compiled_for = launch._compiled_for(threads, registers, self.device)
        kernel[(programs,)](**{name: given[name] for name in kernel.arg_names}, **compiled_for)

    def whole_rows(self) -> None:
        block = self.plan.block
        self.run(
            sparse_kernels.sparse_row_kernel, self.plan.programs, block.threads, ROW_REGISTERS, LANES=block.lanes,
            VECTOR=block.vector, RESIDENT=self.plan.resident, ENTRIES=block.threads,
        )  # fmt: skip

    def split_rows(self) -> None:
        call, block, split = self.call, self.plan.block, self.plan.split
        parts = {
            "pieces": self.new((call.rows, split.splits, sparse_kernels.PIECE.value)), "splits": split.splits,
            "blocks": split.blocks, "states": self.new((call.rows, sparse_kernels.STATE.value)),
        }  # fmt: skip
        sweep = {"LANES": block.lanes, "VECTOR": block.vector, **parts}
        programs = call.rows * split.splits
        self.run(sparse_kernels.sparse_sums_kernel, programs, block.threads, SPLIT_REGISTERS, **sweep)
        self.run(sparse_kernels.sparse_finish_kernel, call.rows, 32, FINISH_REGISTERS, ENTRIES=WARP_ENTRIES, **parts,
                 **_rows_in_units("student", "s", call.student, 1), width=call.columns)  # fmt: skip
        if call.gradient is not None:
            self.run(sparse_kernels.sparse_gradient_kernel, programs, block.threads, SPLIT_REGISTERS,
                     ENTRIES=block.threads, **sweep)  # fmt: skip


def _rows_in_units(name: str, letter: str, rows: Rows, unit: int) -> dict[str, Any]:
    base, start = base_of(rows)
    return {
        name: base, f"{letter}_start": start, f"{letter}_inner": rows.inner,
        f"{letter}_outer": rows.outer_stride // unit, f"{letter}_stride": rows.inner_stride // unit,
    }  # fmt: skip


def _flags_of(call: Call) -> int:
    has = {
        sparse_named.LABELS: call.labels is not None, sparse_named.WEIGHTS: call.weights is not None,
        sparse_named.TEMPERATURES: call.temperatures is not None, sparse_named.STATS: call.with_stats,
        sparse_named.GRADIENT: call.gradient is not None, sparse_named.HARD: call.needs_hard,
    }  # fmt: skip
    return sum(flag.value for flag, there in has.items() if there)


def _kind_of(call: Call, teacher: TopKTeacher) -> int:
    kinds = {
        "jsd": sparse_row.JSD, "total_variation": sparse_row.TOTAL_VARIATION,
        "skew_forward_kl": sparse_row.SKEW_FORWARD, "skew_reverse_kl": sparse_row.SKEW_REVERSE,
    }  # fmt: skip
    return (sparse_row.SAMPLED if teacher.tail == "sampled" else kinds.get(call.divergence, sparse_row.KL)).value


def _rows_of(call: Call, teacher: TopKTeacher, row_loss: Tensor, stats: Tensor | None, scales: Tensor) -> None:
    launches = _Launches(call, teacher, row_loss, stats, scales)
    if launches.plan.programs:
        launches.whole_rows()
    else:
        launches.split_rows()


def run_sparse(call: Call, teacher: TopKTeacher) -> Outputs:
    """Launches everything of one call; fills call.gradient where there is one."""
    return launch.run_rows(call, functools.partial(_rows_of, call, teacher))


def _teacher_of(student: Tensor, ids: Tensor, logprobs: Tensor, weights: Tensor | None, tail: str, taken_at: float):
    rows = student.numel() // student.shape[-1]
    _check(ids.dim() == student.dim() and ids.shape[-1] >= 1 and ids.numel() // ids.shape[-1] == rows,
           "ids must be (..., K) with K >= 1 and the leading shape of student_logits")  # fmt: skip
    _check(ids.device == student.device == logprobs.device, "ids and logprobs must be on the device of the logits")
    flat = [None if x is None else x.reshape(-1, ids.shape[-1]) for x in (ids, logprobs, weights)]
    return TopKTeacher(flat[0], flat[1], tail, weights=flat[2], temperature=taken_at or None)  # type: ignore[arg-type]


def _flat_row(name: str, x: Tensor | None, dtype: torch.dtype, rows: int) -> Tensor | None:
    x = _per_row(name, x, dtype, rows)
    return None if x is None else x.reshape(-1)


def _call(student: Rows, gradient: Rows | None, ids, logprobs, weights, labels, token_weights, temperatures, num_items,
          scalars, tail, divergence, by_t2, ignore_index, reduction, stats) -> tuple[Call, TopKTeacher]:  # fmt: skip
    logits = student.data
    _check(scalars.device.type == "cpu" and scalars.numel() == 8, "scalars must be 8 float64 numbers on the CPU")
    *numbers, taken_at = scalars.tolist()
    options = Scalars._make([*numbers, 0.0])
    _check(options.ce_weight == 0 or labels is not None, "ce_weight needs labels")
    rows, columns = logits.numel() // logits.shape[-1], logits.shape[-1]
    teacher = _teacher_of(logits, ids, logprobs, weights, tail, taken_at)
    check_values_on_cpu(columns, labels, temperatures, ignore_index)  # on a device the row becomes NaN
    valid = None if labels is None else labels.reshape(-1) != ignore_index
    check_teacher_values(teacher, columns, valid)
    call = Call(
        student, student, gradient, rows, columns, columns, _flat_row("labels", labels, torch.int64, rows),
        _flat_row("token_weights", token_weights, torch.float32, rows),
        _flat_row("temperature", temperatures, torch.float32, rows),
        _flat_row("num_items_in_batch", num_items, torch.float32, 1),
        options, divergence, by_t2, ignore_index, reduction, stats,
    )  # fmt: skip
    return call, teacher


def _forward(student_logits: Tensor, *arguments):
    *shared, with_gradient = arguments
    gradient = student_logits.new_empty(student_logits.shape if with_gradient else (0,))
    rows = rows_or_copy(gradient) if with_gradient else None
    out = run_sparse(*_call(rows_or_copy(student_logits), rows, *shared))
    return out.loss, gradient, out.pending, out.stats


def _forward_inplace(student_logits: Tensor, *arguments):
    student = view_as_rows(student_logits)
    if student is None:
        raise RuntimeError("student_logits cannot be overwritten: its rows are not addressable by two strides")
    return tuple(run_sparse(*_call(student, student, *arguments)))


def _register() -> None:
    for (word, schema), function in zip(SCHEMAS.items(), (_forward, _forward_inplace)):
        torch.library.define(f"fastkd::triton_{word}", schema)
        torch.library.impl(f"fastkd::triton_{word}", DEVICES, function)
    sparse_ops.register_backend("triton", "triton_sparse_forward", "triton_rescale")


_register()
