"""The Triton kernels with a sparse teacher, compiled for GPUs that are not here, by test_triton_sparse.py: no spill,
few registers, rows read and written 16 bytes at a time."""

from __future__ import annotations

import pytest
import torch
import triton_driver
from triton_compiled import WIDE, Launch, _limit, resources_of, target  # noqa: F401

from fastkd.triton import launch, sparse

ROWS, K = 2, 64


def _loss(divergence: str, tail: str, dtype: torch.dtype, busy: bool) -> list[Launch]:
    """What one call launches. busy: every option that is compiled in at once."""
    triton_driver.launches.clear()
    student = torch.zeros(ROWS, WIDE, dtype=dtype)
    ids = torch.arange(K).expand(ROWS, K).contiguous()
    logprobs = torch.full((ROWS, K), -10.0)
    per_row = torch.ones(ROWS) if busy else None
    numbers = launch.Scalars(0.5, 2.0, 1.0, 0.5, 0.1, 1e-3, 20.0 if busy else 0.0, 2.0)
    sparse._forward(
        student, ids, logprobs, None, torch.zeros(ROWS, dtype=torch.int64), per_row, per_row, None,
        torch.tensor(numbers, dtype=torch.float64), tail, divergence, True, -100, "mean", busy, True,
    )  # fmt: skip
    return list(triton_driver.launches)


@pytest.mark.parametrize(
    "divergence,tail,dtype,busy",
    [("jsd", "bucket", torch.bfloat16, False), ("symmetric_kl", "bucket", torch.float32, True),
     ("forward_kl", "sampled", torch.float16, True)],
    ids=["jsd-bf16-plain", "symmetric_kl-fp32-busy", "sampled-fp16-busy"],
)  # fmt: skip
def test_resources(divergence: str, tail: str, dtype: torch.dtype, busy: bool, target: str) -> None:  # noqa: F811
    kernels = {x.name: x for x in _loss(divergence, tail, dtype, busy)}
    assert {"sparse_sums_kernel", "sparse_finish_kernel", "sparse_gradient_kernel"} <= kernels.keys()
    for name, x in kernels.items():
        if not name.startswith("sparse_"):
            continue
        found = resources_of(x.compiled)
        assert found.spilled == 0, (name, target, found)
        assert found.registers <= _limit(target, busy or name == "sparse_finish_kernel"), (name, target, found)
        assert found.loads >= 1 or name == "sparse_finish_kernel", (name, target, found)
        assert found.stores >= 1 or name != "sparse_gradient_kernel", (name, target, found)
