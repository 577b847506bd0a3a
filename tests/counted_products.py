"""The way that rows take on a GPU whose products read their number there, on the CPU: for tests.

What a GPU leaves unwritten is NaN here, and the operands must be such as its kernels take.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from fastkd import counted, linear_rows


class Products:
    """Stands for torch's grouped product of one group; ``rows``: of each call, how many it computed, of how many."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int]] = []
        self._real = counted.grouped_mm

    def __call__(self, left: Tensor, right: Tensor, *, offs: Tensor) -> Tensor:
        shapes = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in (left, right)]
        self._real(*shapes, offs=offs.to("meta"))  # refuses strides and dtypes that the kernels do not take
        assert all(x.data_ptr() % 16 == 0 for x in (left, right))
        over_rows = right.dim() == 2
        count, most = int(offs), left.shape[1] if over_rows else left.shape[0]
        assert offs.shape == (1,) and 1 <= count <= most
        self.rows.append((count, most))
        if over_rows:
            return torch.mm(left[:, :count], right[:count]).unsqueeze(0)
        columns = right.shape[2]  # NaN behind them, too; with AMX the CPU's product would multiply that by 0
        result = torch.full((most, -(-columns // 8) * 8), torch.nan, dtype=left.dtype)[:, :columns]
        result[:count] = torch.mm(left[:count].contiguous(), right[0])
        return result


@contextmanager
def rows_counted_on_device(everywhere: bool = True) -> Iterator[Products]:
    """In the block the CPU is a device that is not waited for. everywhere: its products read the number of rows."""
    products = Products()
    with (
        mock.patch.object(counted, "grouped_mm", products),
        mock.patch.object(counted, "DEVICE_TYPE", "cpu"),
        mock.patch.object(counted, "on_device", lambda device: everywhere),
        mock.patch.object(linear_rows, "host_knows", lambda values: False),
    ):
        yield products
