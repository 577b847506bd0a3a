"""The matrix products of the linear loss: in which dtype, on which device, in which pieces.

Shapes: hidden (R, H), weight (V, H), logits and their gradient (R, V). Vocabularies are taken in pieces: on the CPU so
small that a piece of the weight's gradient is added while it is still in the cache.

Where a product of 16-bit operands can be written as fp32 (CUDA) it is. The CPU's cannot: there it is made in the dtype
of the logits, so that fp32 logits widen a 16-bit weight piece by piece, and bf16 ones round each product once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CPU_PIECE, PIECE = 2048, 16384  # columns of the vocabulary
TURNED_PIECE = 256  # columns that are rounded and transposed at a time
OWN_MAPPING = 32 << 20  # bytes from which glibc gives a block its own mapping, and its memory back when it is freed


def _writes_fp32(device: torch.device) -> bool:
    """Whether products of 16-bit operands can be written as fp32."""
    return device.type == "cuda"


def logits_dtype_for(dtype: torch.dtype, device: torch.device, asked: torch.dtype | None) -> torch.dtype:
    """Dtype of logits that come from hidden states of ``dtype``. fp16 alone, which cannot hold every logit's
    gradient, is widened on every device."""
    if asked == torch.float32 and dtype != torch.float64:
        return torch.float32
    if asked == dtype or dtype.itemsize >= 4:
        return dtype
    return torch.float32 if dtype == torch.float16 or _writes_fp32(device) else dtype


def pieces(vocab: int, device: torch.device) -> Iterator[slice]:
    """Slices that cover ``range(vocab)``."""
    step = CPU_PIECE if device.type == "cpu" else PIECE
    return (slice(start, min(start + step, vocab)) for start in range(0, vocab, step))


def project(logits: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """logits <- hidden @ weight.T + bias."""
    widen = hidden.dtype != logits.dtype and _writes_fp32(logits.device)
    left = hidden if widen else hidden.to(logits.dtype)
    whole = weight.dtype == left.dtype  # nothing to widen piece by piece
    for piece in (slice(0, weight.shape[0]),) if whole else pieces(weight.shape[0], weight.device):
        right, out = weight[piece].to(left.dtype).t(), logits[:, piece]
        if widen:
            torch.mm(left, right, out_dtype=logits.dtype, out=out)
        elif bias is None:
            torch.mm(left, right, out=out)
        else:
            torch.addmm(bias[piece].to(left.dtype), left, right, out=out)
        if widen and bias is not None:
            out.add_(bias[piece])


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total (fp32) += left @ right."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif _writes_fp32(total.device):
        total.add_(torch.mm(left, right, out_dtype=total.dtype))
    else:
        total.add_(torch.mm(left, right))


def _put_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out <- left @ right."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    elif _writes_fp32(out.device) and out.dtype == torch.float32:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.mm(left, right))


def _operands(gradient: Tensor, other: torch.dtype) -> torch.dtype:
    """Dtype of the products with the gradient: the 16-bit one of weight or hidden where the result is fp32 anyway; on
    the CPU that of the gradient, widened for fp16, whose products could exceed 65504."""
    if _writes_fp32(gradient.device):
        return other
    return torch.float32 if gradient.dtype == torch.float16 else gradient.dtype


def hidden_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """gradient @ weight as fp32 (R, H), fp64 where the gradient is; gradient: (R, V)."""
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    total = gradient.new_zeros(gradient.shape[0], weight.shape[1], dtype=dtype)
    dtype = _operands(gradient, weight.dtype)
    for piece in pieces(weight.shape[0], weight.device):
        _add_product(total, gradient[:, piece].to(dtype), weight[piece].to(dtype))
    return total


def _beyond(columns: int, size: int) -> tuple[int, int]:
    """Start and length of what lies beyond ``columns`` in ``range(size)``."""
    start = min(max(columns, 0), size)
    return start, size - start


class WeightGradient:
    """Sum of ``gradient.T @ hidden`` over chunks of rows, in fp32.

    For a 16-bit weight the sum lies in parts, each freed as soon as it has been rounded into the result. A single chunk
    needs no sum: its product is the result. Where the products are bf16 (the CPU) the parts are (H, rows of V): of the
    two ways to write a piece's product, hidden.T @ gradient takes half the time of its transpose.
    """

    def __init__(self, weight: Tensor, result_dtype: torch.dtype, logits_dtype: torch.dtype, chunks: int) -> None:
        self.shape, self.result_dtype, self.device = weight.shape, result_dtype, weight.device
        self.turned = chunks > 1 and logits_dtype == torch.bfloat16 and not _writes_fp32(self.device)
        self.dtype = torch.promote_types(result_dtype, torch.float32) if chunks > 1 else result_dtype
        self.parts: list[Tensor] = []  # made by the first chunk
        unit, (rows, width) = CPU_PIECE if self.device.type == "cpu" else PIECE, self.shape
        self.part_rows = max(1, rows)
        if self.turned or self.dtype != result_dtype:
            self.part_rows = -(-OWN_MAPPING // (4 * width * unit)) * unit

    def add(self, gradient: Tensor, hidden: Tensor) -> None:
        """gradient (R, V'), hidden (R, H); V' <= V: the rows of the weight beyond it get 0."""
        dtype = _operands(gradient, hidden.dtype)
        hidden = hidden.to(dtype)
        if self.turned:
            hidden = hidden.t().contiguous()
        product = _add_product if self.parts else _put_product
        parts = self.parts or self._new_parts(gradient.shape[1])
        for number, part in enumerate(parts):
            columns = gradient[:, number * self.part_rows : (number + 1) * self.part_rows]
            for piece in pieces(columns.shape[1], self.device):
                if self.turned:
                    product(part[:, piece], hidden, columns[:, piece])
                else:
                    product(part[piece], columns[:, piece].to(dtype).t(), hidden)
        self.parts = parts

    def _new_parts(self, columns: int) -> list[Tensor]:
        """Memory that the first product fills: written once, where zeros would be written twice."""
        parts = []
        rows, width = self.shape
        for start in range(0, rows, self.part_rows):
            part = torch.empty(min(self.part_rows, rows - start), width, dtype=self.dtype, device=self.device)
            part = part.view(part.shape[::-1]) if self.turned else part
            part.narrow(1 if self.turned else 0, *_beyond(columns - start, min(self.part_rows, rows - start))).zero_()
            parts.append(part)
        return parts

    def result(self) -> Tensor:
        """The sum in the result's dtype; the parts are gone afterwards."""
        if not self.parts:
            return torch.zeros(self.shape, dtype=self.result_dtype, device=self.device)
        if self.dtype == self.result_dtype and not self.turned:
            return self.parts.pop()
        whole = torch.empty(self.shape, dtype=self.result_dtype, device=self.device)
        for start in reversed(range(0, self.shape[0], self.part_rows)):
            self._put(whole[start : start + self.part_rows], self.parts.pop())
        return whole

    def _put(self, into: Tensor, part: Tensor) -> None:
        if not self.turned:
            into.copy_(part)
            return
        step = TURNED_PIECE if self.result_dtype != torch.float32 else part.shape[1]  # a copy turns one dtype at a time
        for start in range(0, part.shape[1], step):
            into[start : start + step].copy_(part[:, start : start + step].to(self.result_dtype).t())
