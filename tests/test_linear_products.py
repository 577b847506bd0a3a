"""What the extension does between the matrix products of the linear loss: sums, transposes, and memory that lingers."""

from __future__ import annotations

import sys

import pytest
import torch
from inputs import BF16, FP16, FP32, FP64
from test_lingering import mapped
from torch import Tensor
from torch.library import opcheck

import fastkd
from fastkd import ops
from fastkd.products import buffer

CPU = torch.device("cpu")
SPECIAL = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 3e38, 1e-40, 65504.0, 65520.0]
SHAPES = [(1, 1), (2, 15), (16, 16), (17, 31), (576, 2048), (3, 4099), (0, 5), (5, 0)]


def _special(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(rows, columns)
    flat = x.view(-1)[: len(SPECIAL)]
    flat.copy_(torch.tensor(SPECIAL[: len(flat)]))
    return x.to(dtype)


@pytest.mark.parametrize("rows,columns", SHAPES)
def test_a_product_is_added_as_torch_adds_it(rows: int, columns: int, native: str) -> None:
    total = torch.randn(rows, columns + 3)
    product = _special(rows, columns, BF16)
    expected = total[:, :columns] + product
    beside = total[:, columns:].clone()
    torch.ops.fastkd.linear_add_(total[:, :columns], product)
    torch.testing.assert_close(total[:, :columns], expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(total[:, columns:], beside)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("rows,columns", SHAPES)
def test_a_sum_is_transposed_and_rounded_as_torch_does(rows: int, columns: int, dtype: torch.dtype, native) -> None:
    part = _special(columns, rows, FP32)
    result = torch.zeros(rows, columns + 2, dtype=dtype)
    torch.ops.fastkd.linear_turn_(result[:, :columns], part)
    # the processor's own conversion to bf16 takes a subnormal number for 0
    tiny = torch.finfo(FP32).tiny if dtype == BF16 else 0
    torch.testing.assert_close(result[:, :columns], part.t().to(dtype), rtol=0, atol=tiny, equal_nan=True)
    assert (result[:, columns:] == 0).all()


def test_opcheck(native: str) -> None:
    total, product = torch.randn(5, 40), torch.randn(5, 40).to(BF16)
    opcheck(torch.ops.fastkd.linear_add_.default, (total, product))
    opcheck(torch.ops.fastkd.linear_turn_.default, (torch.zeros(40, 5, dtype=BF16), total))


@pytest.mark.parametrize(
    "name,arguments,message",
    [
        ("add", (torch.zeros(2, 3), torch.zeros(2, 3)), "product must be a matrix"),
        ("add", (torch.zeros(2, 3, dtype=BF16), torch.zeros(2, 3, dtype=BF16)), "total must be a matrix"),
        ("add", (torch.zeros(2, 3), torch.zeros(3, 2, dtype=BF16)), "product must have the shape of total"),
        ("add", (torch.zeros(3, 2).t(), torch.zeros(2, 3, dtype=BF16)), "total must have unit column stride"),
        ("turn", (torch.zeros(2, 3), torch.zeros(2, 3)), "sum must have the shape of result.T"),
        ("turn", (torch.zeros(2, 3, dtype=FP64), torch.zeros(3, 2)), "result must be float32, bfloat16 or float16"),
        ("turn", (torch.zeros(2, 3), torch.zeros(3, 2, dtype=FP64)), "sum must be a matrix"),
    ],
)
def test_bad_matrices(name: str, arguments: tuple, message: str, native: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.fastkd, f"linear_{name}_")(*arguments)


def test_buffers_have_what_they_are_asked_for(native: str) -> None:
    for dtype in (FP32, BF16, FP16, FP64):
        for shape in ((0, 7), (3, 0), (5, 9), (700, 1000)):
            x = buffer(shape, dtype, CPU, 2_000_000, teacher=False)
            assert x.shape == shape and x.dtype == dtype and x.is_contiguous()
            x.fill_(1)


@pytest.mark.skipif(
    sys.platform != "linux" or torch.__version__ < "2.11", reason="lingers on Linux, with torch >= 2.11"
)
def test_logits_and_a_weights_gradient_take_turns_in_memory_that_lingers(native: str) -> None:
    """The rounded gradient lies where the student's logits were; freed, it is where the next call's will be."""
    rows, hidden, vocab = 96, 64, 9000
    ops.release_lingering_memory()
    weight = torch.randn(vocab, hidden).to(BF16).requires_grad_()
    x, teacher, teacher_weight = (torch.randn(n, hidden).to(BF16) for n in (rows, rows, vocab))

    def gradient(scale: float) -> Tensor:
        loss = fastkd.linear_kd_loss(x * scale, weight, teacher, teacher_weight, chunk_size=32)
        (found,) = torch.autograd.grad(loss, weight)
        return found

    first = gradient(1.0)
    kept, logits = first.clone(), 32 * vocab * 2
    assert ops.release_lingering_memory() == mapped(logits), "the teacher's logits; the gradient is in use"
    address = first.data_ptr()
    other = gradient(2.0)
    assert other.data_ptr() != address and torch.equal(first, kept), "one that is alive is left alone"
    del first, other
    again = gradient(1.0)
    assert torch.equal(again, kept)
    del again
    lingering = ops.release_lingering_memory()
    assert lingering == mapped(logits) + mapped(vocab * hidden * 2)
