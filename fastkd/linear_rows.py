"""Which rows of the linear loss are computed, and in which order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .counted import LEAST_ROWS


@dataclass(frozen=True)
class Selection:
    """Which rows are computed. CPU: the rows that are not ignored, by index. Elsewhere their number is not known
    without waiting for the device: all rows, of which the kernels skip the ignored ones; in order, where products read
    the number on the device, the ignored ones last."""

    index: Tensor | None  # (M) int64; None: all rows as they are
    ignored: Tensor | None  # (M) bool, where ignored rows are among those computed
    count: int  # M
    live: Tensor | None = None  # 0-d int64: the rows from here on are ignored; None: they are anywhere

    def take(self, x: Tensor, rows: slice) -> Tensor:
        """x[rows] of the selection, along the first dimension; a copy where rows were left out or moved."""
        return x[rows] if self.index is None else x.index_select(0, self.index[rows])

    def put(self, into: Tensor, rows: slice, values: Tensor, dim: int = 0) -> None:
        """The inverse of take, into (N, ...) or with dim=1 (., N)."""
        if self.index is None:
            into.narrow(dim, rows.start, rows.stop - rows.start).copy_(values)
        else:
            into.index_copy_(dim, self.index[rows], values.to(into.dtype))

    def live_of(self, rows: slice) -> Tensor | None:
        """(1) int32: how many of a chunk's rows its products must compute, LEAST_ROWS at least, where the device says
        it. What they compute beyond the live ones must be finite."""
        if self.live is None:
            return None
        most = rows.stop - rows.start
        return (self.live - rows.start).clamp(min(LEAST_ROWS, most), most).to(torch.int32).reshape(1)


def host_knows(values: Tensor) -> bool:
    """Whether their values can be looked at without waiting for a device."""
    return values.device.type == "cpu"


def select_rows(labels: Tensor | None, ignore_index: int, rows: int, in_order: bool) -> Selection:
    """The rows that must be computed; in_order: where their number is unknown to the host, ignored ones come last."""
    if labels is None:
        return Selection(None, None, rows)
    ignored = labels == ignore_index
    if not host_knows(labels):
        return _in_order(ignored, rows) if in_order else Selection(None, ignored, rows)
    if not ignored.any():
        return Selection(None, None, rows)
    index = (~ignored).nonzero().squeeze(1)
    return Selection(index, None, index.shape[0])


def _in_order(ignored: Tensor, rows: int) -> Selection:
    """A stable partition, of which the host learns nothing."""
    before, live = (~ignored).cumsum(0), (~ignored).sum()
    among_ignored = ignored.cumsum(0)
    place = torch.where(ignored, live + among_ignored, before) - 1
    row = torch.arange(rows, device=ignored.device)
    index = torch.empty_like(row).scatter_(0, place, row)
    return Selection(index, row >= live, rows, live)
