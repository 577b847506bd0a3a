"""Regression cases for pytest-benchmark: `pytest bench --benchmark-only --benchmark-compare`."""

from __future__ import annotations

import pytest
import torch

import fastkd

SHAPES = [(32, 10), (4096, 10), (1, 128256), (32, 128256)]


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=[f"{n}x{v}" for n, v in SHAPES])
def test_loss_and_gradient(benchmark, shape: tuple[int, int], dtype: torch.dtype, divergence: str) -> None:
    student = (3 * torch.randn(shape)).to(dtype).requires_grad_()
    teacher = (3 * torch.randn(shape)).to(dtype)
    labels = torch.randint(0, shape[1], shape[:1])

    def step() -> None:
        student.grad = None
        loss = fastkd.kd_loss(student, teacher, labels, divergence=divergence, temperature=2.0, ce_weight=1.0)
        loss.backward()

    benchmark(step)
    assert student.grad is not None and student.grad.isfinite().all()
