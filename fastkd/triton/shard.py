"""The parts of a vocabulary shard's rows: the sweeps of an unsharded row, with the merged sums of all ranks as the one
piece of each row. fastkd/shard_ops.py exchanges between them."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import shard_ops
from ..shard_eager import Piece, Row
from ..shard_rows import FIELDS, MIXED, as_integers, merge
from . import kernels, launch, pieces
from .ops import DEVICES
from .pieces import FIELDS as PIECE_FIELDS
from .row import HARD, LABELS, STATS, TEMPERATURES, WEIGHTS

# of a piece in memory, by their places there (pieces.py)
PLACES = {
    "largest_s": 0, "largest_t": 1, "sum_s": 2, "sum_t": 3, "sum_hard": 4, "dot_t": 5, "dot_s": 6, "linear_s": 7,
    "entropy_s": 9, "entropy_t": 10, "top_s": 11, "top_t": 12,
}  # fmt: skip
COLUMNS = 8
NOWHERE = 2**30  # a label that no column of a shard equals


class _Launch:
    """What the launches of a piece have in common."""

    def __init__(self, piece: Piece) -> None:
        o = piece.options
        self.student, self.teacher = launch.rows_or_copy(piece.student), launch.rows_or_copy(piece.teacher)
        self.device = piece.student.device
        self.rows, self.width = piece.student.shape[:-1].numel(), piece.shard.width
        self.block = launch.SWEEP_BLOCKS[piece.student.element_size()]
        self.split = self.split_of(self.width)
        self.inputs = (*launch.raw(self.student), *launch.raw(self.teacher))
        self.softening = (float(o.temperature), float(o.student_softcap or 0), float(o.teacher_softcap or 0))
        busy = o.student_softcap is not None or o.teacher_softcap is not None or o.return_stats
        self.shape = {"FULL": busy, **launch.shape_of(self.block, self.device, busy)}
        self.temperatures = None if piece.temperatures is None else piece.temperatures.float().contiguous()
        self.per_row = launch.given(self.temperatures, torch.float32, self.device)
        labels = piece.labels
        if piece.owned is not None and labels is not None:
            labels = torch.where(piece.owned | (labels < 0), labels, NOWHERE)
        self.labels = launch.given(labels, torch.int64, self.device)
        self.given = launch.asked_of({
            LABELS: labels is not None, TEMPERATURES: self.temperatures is not None,
            STATS: o.return_stats,
        })  # fmt: skip

    def asked(self, hard: bool, gradient: launch.Rows | None = None, columns: int = 0) -> int:
        """A label outside of the shard, which is on another, does not spoil its row: no CHECKED."""
        rows = launch.asked_of_rows(self.student, self.teacher, gradient, (self.width, columns), self.block.vector)
        return self.given | rows | launch.asked_of({HARD: hard})

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
                *call.inputs, call.width, found, call.labels, call.per_row, -1, call.asked(piece.hard), *call.split,
                *call.softening, DIVERGENCE=o.divergence if one_sweep else "terms", **call.shape,
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


def terms(piece: Piece, sums: dict[str, Tensor]) -> Tensor:
    """(2, N): sums of term and dlogq over the piece."""
    call, o = _Launch(piece), piece.options
    whole = call.whole_rows(sums, call.split.splits, piece.shard.width)
    out = torch.zeros(call.rows, call.split.splits, 2, device=call.device)
    if call.rows:
        with launch.on(call.device):
            kernels.terms_kernel[(call.rows * call.split.splits,)](
                *call.inputs, call.width, whole, out, call.labels, call.per_row, -1, call.asked(False), *call.split,
                *call.softening, float(o.beta), 1.0 - o.beta, DIVERGENCE=o.divergence, **call.shape,
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
        dlogq = row.dlogq / kernels.LN2.value
        terms = torch.stack([torch.zeros_like(dlogq), dlogq], -1)  # as of one piece, whose value nobody asks for
        unused = torch.empty(call.rows, device=call.device)
        hard = piece.hard and o.ce_weight != 0
        asked = call.asked(hard, written, into.shape[-1]) | WEIGHTS.value
        with launch.on(call.device):
            kernels.gradient_kernel[(call.rows * split.splits,)](
                *call.inputs, *launch.raw(written), call.width, into.shape[-1], whole, terms,
                torch.ones(2, device=call.device), unused, unused, call.labels, row.scale.float().contiguous(),
                call.per_row, call.rows, -1, asked & ~STATS.value, *split, 1, *call.softening, float(o.beta),
                1.0 - o.beta, 1.0 if o.scale_by_t2 else 0.0, float(o.kd_weight), float(o.ce_weight),
                float(o.label_smoothing), float(o.z_loss), DIVERGENCE=o.divergence, **call.shape,
            )  # fmt: skip
    return into


shard_ops.registered["triton"] = shard_ops.Parts(sums, terms, gradient, DEVICES)
