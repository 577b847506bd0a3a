"""The parts of a vocabulary shard's rows: the sweeps of an unsharded row, with the merged sums of all ranks as the one
piece of each row. fastkd/shard_ops.py exchanges between them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import shard_ops
from ..shard_eager import Piece, Row
from ..shard_rows import FIELDS, MIXED, as_integers, merge
from . import kernels, launch, pieces
from .kernels import CHANGING, block_columns, label_of, load_block, row_offset, softening_of, store_gradient, zero_row
from .ops import DEVICES
from .pieces import FIELDS as PIECE_FIELDS
from .pieces import merged_pieces
from .row import RowOptions, coefficients_of, gradient_of_block

# of a piece in memory, by their places there (pieces.py)
PLACES = {
    "largest_s": 0, "largest_t": 1, "sum_s": 2, "sum_t": 3, "sum_hard": 4, "dot_t": 5, "dot_s": 6, "linear_s": 7,
    "entropy_s": 9, "entropy_t": 10, "top_s": 11, "top_t": 12,
}  # fmt: skip
COLUMNS = 8
NOWHERE = 2**30  # a label that no column of a shard equals


@triton.jit(do_not_specialize=CHANGING)
def shard_gradient_kernel(
    student, s_inner, s_outer, s_stride, teacher, t_inner, t_outer, t_stride, gradient, d_inner, d_outer, d_stride,
    width, gradient_width, pieces, dlogq_sums, scales, labels, temperatures, rows, ignore_index, splits, blocks,
    temperature, student_softcap, teacher_softcap, beta, beta_rest, by_t2, kd_weight, ce_weight, label_smoothing,
    z_loss, DIVERGENCE: tl.constexpr, HARD: tl.constexpr, CAPPED: tl.constexpr, LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """The gradient of a shard's columns, given the whole row: reads 2 N V, writes N V. Programs (row, split)."""
    n, split = rows - 1 - tl.program_id(0) // splits, tl.program_id(0) % splits
    first = split * blocks
    last = tl.minimum(first + blocks, tl.cdiv(gradient_width, LANES * VECTOR))
    label = label_of(labels, n)
    d_row = gradient + row_offset(n, d_inner, d_outer, d_stride)
    if labels is not None:
        if label == ignore_index:
            zero_row(d_row, gradient_width, first, last, LANES, VECTOR)
            return
    soft = softening_of(temperature, temperatures, n)
    o = RowOptions(beta, beta_rest, by_t2, kd_weight, ce_weight, label_smoothing, z_loss)
    row = merged_pieces(pieces + n.to(tl.int64) * PIECE_FIELDS, 1, soft, DIVERGENCE, HARD, False)
    dlogq_sum, scale = tl.load(dlogq_sums + n), tl.load(scales + n)
    c = coefficients_of(row, dlogq_sum, scale, 0.0, o, soft, DIVERGENCE, HARD)
    s_row = student + row_offset(n, s_inner, s_outer, s_stride)
    t_row = teacher + row_offset(n, t_inner, t_outer, t_stride)
    for block in range(first, last):
        columns = block_columns(block, LANES, VECTOR)
        s = load_block(s_row, columns, width, student_softcap, CAPPED)
        t = load_block(t_row, columns, width, teacher_softcap, CAPPED)
        d = gradient_of_block(s, t, columns, row, c, label, o, soft, DIVERGENCE, HARD)
        store_gradient(d_row, d, s, columns, width, gradient_width, student_softcap, CAPPED)


class _Launch:
    """What the launches of a piece have in common."""

    def __init__(self, piece: Piece) -> None:
        o = piece.options
        self.student, self.teacher = launch.rows_or_copy(piece.student), launch.rows_or_copy(piece.teacher)
        self.device = piece.student.device
        self.rows, self.width = piece.student.shape[:-1].numel(), piece.shard.width
        self.block = launch.SWEEP_BLOCKS[piece.student.element_size()]
        self.split = self.split_of(self.width)
        self.inputs = (*self.student, *self.teacher)
        self.softening = (o.temperature, o.student_softcap or 0.0, o.teacher_softcap or 0.0)
        capped = o.student_softcap is not None or o.teacher_softcap is not None
        self.shape = {"CAPPED": capped, **launch.shape_of(self.block, self.device, capped or o.return_stats)}
        self.temperatures = None if piece.temperatures is None else piece.temperatures.float().contiguous()
        self.labels = piece.labels
        if piece.owned is not None and piece.labels is not None:
            self.labels = torch.where(piece.owned | (piece.labels < 0), piece.labels, NOWHERE)

    def split_of(self, columns: int) -> launch.Split:
        return launch.split_rows(self.rows, columns, self.block, launch.processors_of(self.device))

    def buffer(self, splits: int) -> Tensor:
        """(N, splits, FIELDS) of empty pieces."""
        made = torch.zeros(self.rows, splits, PIECE_FIELDS.value, device=self.device)
        made[..., :2] = -torch.inf
        return made

    def whole_rows(self, sums: dict[str, Tensor], splits: int, vocab: int) -> Tensor:
        """The merged sums of all ranks as the first piece of each row."""
        made = self.buffer(splits)
        for name, place in PLACES.items():
            if name in sums and not name.startswith("top"):
                made[:, 0, place] = sums[name]
        made[:, 0, COLUMNS] = vocab
        return made


def sums(piece: Piece) -> Tensor:
    """(F, N), in the order of FIELDS."""
    call, o = _Launch(piece), piece.options
    found = call.buffer(call.split.splits)
    one_sweep = o.divergence in MIXED
    if call.rows:
        with launch.on(call.device):
            kernels.sums_kernel[(call.rows * call.split.splits,)](
                *call.inputs, call.width, found, call.labels, call.temperatures, -1, *call.split, *call.softening,
                DIVERGENCE=o.divergence if one_sweep else "terms", HARD=piece.hard, STATS=o.return_stats, **call.shape,
            )  # fmt: skip
    t: Tensor | float = o.temperature if call.temperatures is None else call.temperatures
    by_place = found.permute(1, 2, 0)  # (splits, fields, N)
    parts = torch.stack([by_place[:, place] for place in PLACES.values()], 1)
    row = merge(parts, tuple(PLACES), t, by_place[:, COLUMNS])
    out = torch.zeros(len(FIELDS), call.rows, device=call.device)
    for number, name in enumerate(FIELDS):
        if name == "label" and piece.owned is not None:
            out[number] = torch.where(piece.owned, found[:, 0, pieces.LABEL_FIELD.value], torch.nan)
        elif name.startswith("top"):
            as_integers(out)[number] = row[name] + piece.shard.start
        elif name in row:
            out[number] = row[name]
    return out


def terms(piece: Piece, row: dict[str, Tensor]) -> Tensor:
    """(2, N): sums of term and dlogq over the piece."""
    call, o = _Launch(piece), piece.options
    whole = call.whole_rows(row, call.split.splits, piece.shard.width)
    out = torch.zeros(call.rows, call.split.splits, 2, device=call.device)
    if call.rows:
        with launch.on(call.device):
            kernels.terms_kernel[(call.rows * call.split.splits,)](
                *call.inputs, call.width, whole, out, call.labels, call.temperatures, -1, *call.split, *call.softening,
                o.beta, 1.0 - o.beta, DIVERGENCE=o.divergence, **call.shape,
            )  # fmt: skip
    return out.sum(1).t() * kernels.LN2.value


def gradient(piece: Piece, row: Row, into: Tensor | None) -> Tensor:
    """(..., C) in the student's dtype: over the student's logits where ``into`` is them."""
    call, o = _Launch(piece), piece.options
    if into is None:
        into = torch.empty_like(piece.student, memory_format=torch.contiguous_format)
    written = launch.view_as_rows(into)
    assert written is not None
    whole = call.whole_rows(row.sums, 1, row.vocab)
    split = call.split_of(into.shape[-1])
    if call.rows:
        dlogq = (row.dlogq / kernels.LN2.value).contiguous()
        with launch.on(call.device):
            shard_gradient_kernel[(call.rows * split.splits,)](
                *call.inputs, *written, call.width, into.shape[-1], whole, dlogq, row.scale.float().contiguous(),
                call.labels, call.temperatures, call.rows, -1, *split, *call.softening, o.beta, 1.0 - o.beta,
                1.0 if o.scale_by_t2 else 0.0, o.kd_weight, o.ce_weight, o.label_smoothing, o.z_loss,
                DIVERGENCE=o.divergence, HARD=piece.hard and o.ce_weight != 0, **call.shape,
            )  # fmt: skip
    return into


shard_ops.registered["triton"] = shard_ops.Parts(sums, terms, gradient, DEVICES)
