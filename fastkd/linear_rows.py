"""Which rows of the linear loss are computed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Selection:
    """Which rows are computed. CPU: the rows that are not ignored, by index. Elsewhere their number is not known
    without waiting for the device: all rows, of which the kernels skip the ignored ones."""

    index: Tensor | None  # (M) int64; None: all rows
    ignored: Tensor | None  # (N) bool, where ignored rows are among those computed
    count: int

    def take(self, x: Tensor, rows: slice) -> Tensor:
        """x[rows] of the selection, along the first dimension; a copy where rows were left out."""
        return x[rows] if self.index is None else x.index_select(0, self.index[rows])

    def put(self, into: Tensor, rows: slice, values: Tensor, dim: int = 0) -> None:
        """The inverse of take, into (N, ...) or with dim=1 (., N)."""
        if self.index is None:
            into.narrow(dim, rows.start, rows.stop - rows.start).copy_(values)
        else:
            into.index_copy_(dim, self.index[rows], values.to(into.dtype))


def select_rows(labels: Tensor | None, ignore_index: int, rows: int) -> Selection:
    """The rows that must be computed."""
    if labels is None:
        return Selection(None, None, rows)
    ignored = labels == ignore_index
    if labels.device.type != "cpu":
        return Selection(None, ignored, rows)
    if not ignored.any():
        return Selection(None, None, rows)
    index = (~ignored).nonzero().squeeze(1)
    return Selection(index, None, index.shape[0])
