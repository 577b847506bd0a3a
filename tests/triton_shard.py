"""The Triton kernels of a vocabulary shard, compiled for GPUs that are not here (plugin triton_driver): spills,
registers, and accesses of 16 bytes to what a row is long. Run by test_shard.py in a process of its own."""

from __future__ import annotations

import pytest
import torch
import triton_driver
from triton_compiled import resources_of

from fastkd.ops import scalars_of
from fastkd.options import Options
from fastkd.shard import VocabShard
from fastkd.shard_eager import Piece, Row
from fastkd.triton import shard

V, N = 32064, 2
SUMS = ("largest_s", "largest_t", "sum_s", "sum_t", "dot_t", "dot_s", "sum_hard")


def _launched(divergence: str, dtype: torch.dtype) -> list[triton_driver.Launch]:
    """What the three parts of a piece launch, with a cross-entropy."""
    triton_driver.launches.clear()
    o = Options(divergence=divergence, ce_weight=0.5, temperature=2.0, label_smoothing=0.1)
    student, teacher = (torch.zeros(N, V, dtype=dtype) for _ in range(2))
    labels = torch.zeros(N, dtype=torch.int64)
    piece = Piece(student, teacher, labels, labels == 0, None, scalars_of(o), o, VocabShard(0, V), True)
    row = {name: torch.ones(N) for name in SUMS}
    shard.sums(piece)
    if divergence == "jsd":
        shard.terms(piece, row)
    shard.gradient(piece, Row(row, None, torch.ones(N), torch.ones(N), torch.ones(N), 4 * V), None)
    return list(triton_driver.launches)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("divergence,dtype", [("symmetric_kl", torch.bfloat16), ("jsd", torch.float32)])
def test_no_spill_and_wide_accesses(divergence: str, dtype: torch.dtype, target: str) -> None:
    triton_driver.compile_for(target)
    launched = _launched(divergence, dtype)
    names = ["sums_kernel", *(["terms_kernel"] if divergence == "jsd" else []), "shard_gradient_kernel"]
    assert [x.name for x in launched] == names
    for x in launched:
        resources = resources_of(x.compiled)
        assert resources.spilled == 0, x.name
        assert resources.loads >= 2, x.name
        assert resources.registers <= 96, x.name
        if x.name == "shard_gradient_kernel":
            assert resources.stores >= 1
