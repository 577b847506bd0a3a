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

from . import counted, ops

CPU_PIECE, PIECE = 2048, 16384  # columns of the vocabulary
WIDE = 1024  # H from which the CPU's products of the hidden states' gradient take twice the columns
TURNED_PAD = 16  # floats after a row of a turned part: at a stride of 64 KiB its columns would meet in one cache set
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


def pieces(vocab: int, device: torch.device, on_cpu: int = CPU_PIECE) -> Iterator[slice]:
    """Slices that cover ``range(vocab)``; on_cpu: their columns on the CPU."""
    step = on_cpu if device.type == "cpu" else PIECE
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


def _product(left: Tensor, right: Tensor, free: Tensor | None) -> Tensor:
    """left @ right, in the memory of ``free`` where that is contiguous, of their dtype and large enough."""
    rows, columns = left.shape[0], right.shape[1]
    if free is None or free.dtype != left.dtype or not free.is_contiguous() or free.numel() < rows * columns:
        return torch.mm(left, right)
    return torch.mm(left, right, out=free.view(-1)[: rows * columns].view(rows, columns))


def _add_product(total: Tensor, left: Tensor, right: Tensor, free: Tensor | None, rows: Tensor | None = None) -> None:
    """total (fp32) += left @ right, of as many of the rows that are summed over as ``rows`` says (see counted.py)."""
    if rows is not None:
        total.add_(counted.product_over_rows(left, right, rows))
    elif left.dtype == total.dtype:
        total.addmm_(left, right)
    elif _writes_fp32(total.device):
        total.add_(torch.mm(left, right, out_dtype=total.dtype))
    else:
        _add(total, _product(left, right, free))


if not ops.load_error:
    for _name in ("linear_add_", "linear_turn_"):
        torch.library.register_fake(f"fastkd::{_name}", lambda _changed, _given: None)


def _has_kernels(device: torch.device) -> bool:
    """Whether the extension can serve what stands between the products."""
    return device.type == "cpu" and not (ops.load_error or ops.isa_error)


def buffer(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, capacity: int, teacher: bool) -> Tensor:
    """Uninitialised; on the CPU in memory of at least ``capacity`` bytes that lingers for the next call."""
    if not _has_kernels(device) or dtype == torch.float64:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.ops.fastkd.linear_memory(torch.empty(0, dtype=dtype), *shape, capacity, teacher)


def _by_kernels(x: Tensor) -> bool:
    """Whether the extension adds to x and turns it."""
    return x.dtype == torch.float32 and _has_kernels(x.device)


def _add(total: Tensor, product: Tensor) -> None:
    """total (R, C) fp32 += product (R, C) of 16 bits, which torch would first widen into memory: twice the time."""
    if _by_kernels(total) and product.dtype == torch.bfloat16:
        torch.ops.fastkd.linear_add_(total, product)
    else:
        total.add_(product)


def _turn(result: Tensor, part: Tensor) -> None:
    """result (V, H) <- part (H, V).T, rounded."""
    if _by_kernels(part):
        torch.ops.fastkd.linear_turn_(result, part)
    else:
        result.copy_(part.t())


def _put_product(out: Tensor, left: Tensor, right: Tensor, free: Tensor | None, rows: Tensor | None = None) -> None:
    """out <- left @ right, likewise."""
    if rows is not None:
        out.copy_(counted.product_over_rows(left, right, rows))
    elif left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    elif _writes_fp32(out.device) and out.dtype == torch.float32:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        out.copy_(_product(left, right, free))


def _operands(gradient: Tensor, other: torch.dtype) -> torch.dtype:
    """Dtype of the products with the gradient: the 16-bit one of weight or hidden where the result is fp32 anyway; on
    the CPU that of the gradient, widened for fp16, whose products could exceed 65504."""
    if _writes_fp32(gradient.device):
        return other
    return torch.float32 if gradient.dtype == torch.float16 else gradient.dtype


def hidden_gradient(gradient: Tensor, weight: Tensor, free: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
    """gradient @ weight as fp32 (R, H), fp64 where the gradient is; gradient: (R, V); free: memory for products. With
    ``rows`` bf16, and only so many of them (see counted.py)."""
    if rows is not None:
        return counted.hidden_gradient(gradient, weight, rows)
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    total = gradient.new_zeros(gradient.shape[0], weight.shape[1], dtype=dtype)
    dtype = _operands(gradient, weight.dtype)
    for piece in pieces(weight.shape[0], weight.device, CPU_PIECE if weight.shape[1] < WIDE else 2 * CPU_PIECE):
        _add_product(total, gradient[:, piece].to(dtype), weight[piece].to(dtype), free)
    return total


def _beyond(columns: int, size: int) -> tuple[int, int]:
    """Start and length of what lies beyond ``columns`` in ``range(size)``."""
    start = min(max(columns, 0), size)
    return start, size - start


class WeightGradient:
    """Sum of ``gradient.T @ hidden`` over chunks of rows, in fp32.

    For a 16-bit weight the sum lies in parts, each freed as soon as it has been rounded into the result. A single chunk
    needs no sum: its product is the result. Where the products are bf16 (the CPU) the parts are (H, rows of V): of the
    two ways to write a piece's product, hidden.T @ gradient takes half the time of its transpose. ``by_count``: the
    products are counted ones.
    """

    def __init__(
        self,
        weight: Tensor,
        result_dtype: torch.dtype,
        logits_dtype: torch.dtype,
        chunks: int,
        by_count: bool = False,
    ) -> None:
        self.shape, self.result_dtype, self.device = weight.shape, result_dtype, weight.device
        rounded = logits_dtype == torch.bfloat16 and not _writes_fp32(self.device)
        self.turned = chunks > 1 and rounded and not by_count
        self.dtype = torch.promote_types(result_dtype, torch.float32) if chunks > 1 else result_dtype
        self.parts: list[Tensor] = []  # made by the first chunk
        unit, (rows, width) = CPU_PIECE if self.device.type == "cpu" else PIECE, self.shape
        self.part_rows = max(1, rows)
        if self.turned or self.dtype != result_dtype:
            self.part_rows = -(-OWN_MAPPING // (4 * width * unit)) * unit

    def add(self, gradient: Tensor, hidden: Tensor, free: Tensor | None = None, rows: Tensor | None = None) -> None:
        """gradient (R, V'), hidden (R, H); V' <= V: the rows of the weight beyond it get 0. free: as above; rows: how
        many of the R are added, where products are counted."""
        dtype = _operands(gradient, hidden.dtype)
        hidden = hidden.to(dtype)
        if self.turned:
            hidden = hidden.t().contiguous()
        product = _add_product if self.parts else _put_product
        parts = self.parts or self._new_parts(gradient.shape[1])
        for number, part in enumerate(parts):
            columns = gradient[:, number * self.part_rows : (number + 1) * self.part_rows]
            for piece in pieces(columns.shape[1], self.device, 2 * CPU_PIECE):
                if self.turned:
                    product(part[:, piece], hidden, columns[:, piece], free)
                else:
                    product(part[piece], columns[:, piece].to(dtype).t(), hidden, free, rows)
        self.parts = parts

    def _new_parts(self, columns: int) -> list[Tensor]:
        """Memory that the first product fills: written once, where zeros would be written twice."""
        parts = []
        rows, width = self.shape
        for start in range(0, rows, self.part_rows):
            count = min(self.part_rows, rows - start)
            shape = (width, count + TURNED_PAD) if self.turned else (count, width)
            part = torch.empty(shape, dtype=self.dtype, device=self.device)
            part = part[:, :count] if self.turned else part
            part.narrow(1 if self.turned else 0, *_beyond(columns - start, count)).zero_()
            parts.append(part)
        return parts

    @property
    def rounded_bytes(self) -> int:
        """Of the result where the sum is rounded into memory of its own, else 0."""
        own = self.turned or self.dtype != self.result_dtype
        return self.shape.numel() * self.result_dtype.itemsize if own else 0

    def result(self, in_buffer: bool) -> Tensor:
        """The sum in the result's dtype; the parts are gone afterwards. in_buffer: the student's buffer was made for
        the result too, and is free now."""
        if not self.parts:
            return torch.zeros(self.shape, dtype=self.result_dtype, device=self.device)
        if self.dtype == self.result_dtype and not self.turned:
            return self.parts.pop()
        if in_buffer:
            whole = buffer((self.shape[0], self.shape[1]), self.result_dtype, self.device, 0, teacher=False)
        else:
            whole = torch.empty(self.shape, dtype=self.result_dtype, device=self.device)
        for start in range(0, self.shape[0], self.part_rows):  # from the start, which the logits have touched
            rows, part = whole[start : start + self.part_rows], self.parts.pop(0)
            _turn(rows, part) if self.turned else rows.copy_(part)
            del part  # its memory, before the next rows are touched
        return whole
