"""Products of bf16 matrices whose number of rows is read on the device, so that the host need not wait to know it.

They are torch's grouped products with one group, whose end is the number. What they leave out they neither read nor
write: rows of a result beyond the number hold whatever was in memory. Shapes: hidden (R, H), weight (V, H), logits and
their gradient (R, V), rows (1) int32 on the device, 1 <= rows <= R.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

DEVICE_TYPE = "cuda"  # that may have them
ALIGNED = 8  # elements of 16 bytes: row strides are multiples of it
LEAST_ROWS = 8  # a product of no rows: some of torch's kernels leave its result unwritten, some refuse it


def on_device(device: torch.device) -> bool:
    """Whether torch has a kernel that reads the number there. Its substitutes copy it to the host and wait."""
    if device.type != DEVICE_TYPE or torch.version.hip or sys.platform == "win32":
        return False
    major, _ = torch.cuda.get_device_capability(device)
    version = tuple(int(x) for x in torch.__version__.split(".")[:2])
    return major == 9 or (major == 10 and version >= (2, 13))


def possible(hidden: Tensor, dtype: torch.dtype, logits_dtype: torch.dtype) -> bool:
    """Whether hidden states (N, H), ``dtype`` as operands, qualify: what the ranks of a group have in common."""
    width, device = hidden.shape[1], hidden.device
    return device.type == DEVICE_TYPE and dtype == logits_dtype == torch.bfloat16 and width % ALIGNED == 0


def serves(weight: Tensor, logits_dtype: torch.dtype) -> bool:
    """Whether the products with this weight can be counted."""
    if weight.shape[0] == 0 or not possible(weight, weight.dtype, logits_dtype) or not on_device(weight.device):
        return False
    return weight.stride(1) == 1 and weight.stride(0) % ALIGNED == 0 and weight.data_ptr() % 16 == 0


def project(hidden: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """hidden @ weight.T, (R, V)."""
    return grouped_mm(hidden, weight.unsqueeze(0).transpose(1, 2), offs=rows)


def hidden_gradient(gradient: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """gradient @ weight, (R, H)."""
    return grouped_mm(gradient, weight.unsqueeze(0), offs=rows)


def product_over_rows(left: Tensor, right: Tensor, rows: Tensor) -> Tensor:
    """left[:, :rows] @ right[:rows]; left (M, R), right (R, H)."""
    return grouped_mm(left, right, offs=rows).squeeze(0)
