"""The launch arithmetic of the CUDA kernels: a table over GPU, dtype, vocabulary and rows, and what holds of any."""

from __future__ import annotations

import pytest
import torch

from fastkd import ops
from fastkd.cli import main

if ops.load_error:
    pytest.skip(ops.load_error, allow_module_level=True)

from fastkd.cuda import GPUS, Plan, plan_loss

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# gpu, rows, vocab, student, teacher -> variant, cluster, sweeps of forward_kl, sweeps of jsd
TABLE = [
    ("h100", 8192, 128256, BF16, BF16, "cluster", 8, 1, 1),
    ("h100", 8192, 151936, BF16, BF16, "cluster", 16, 1, 1),
    ("h100", 8192, 262144, BF16, BF16, "cluster", 16, 1, 1),
    ("h100", 8192, 32000, BF16, BF16, "cluster", 2, 1, 1),
    ("h100", 8192, 50257, FP16, FP16, "cluster", 4, 1, 1),
    ("h100", 8192, 128256, FP32, FP32, "cluster", 16, 1, 1),
    ("h100", 8192, 262144, FP32, FP32, "cluster", 16, 1, 1),
    ("h100", 8192, 128256, BF16, FP32, "cluster", 16, 1, 1),
    ("h100", 8192, 1 << 20, FP32, FP32, "streaming", 1, 2, 3),
    ("h100", 1, 1 << 20, BF16, BF16, "streaming", 1, 2, 3),
    ("h100", 8192, 1000, BF16, BF16, "warp", 1, 1, 1),
    ("h100", 8192, 10, FP32, FP32, "warp", 1, 1, 1),
    ("h100", 8192, 1, FP32, FP32, "warp", 1, 1, 1),
    ("h100", 0, 128256, BF16, BF16, "streaming", 1, 2, 3),
    ("b200", 8192, 128256, BF16, BF16, "cluster", 8, 1, 1),
    ("a100", 8192, 32000, BF16, BF16, "block", 1, 1, 1),
    ("a100", 8192, 40000, BF16, BF16, "block", 1, 1, 1),
    ("a100", 8192, 128256, BF16, BF16, "streaming", 1, 2, 3),
    ("a100", 8192, 32000, FP32, FP32, "streaming", 1, 2, 3),
    ("a100", 8192, 1000, BF16, BF16, "warp", 1, 1, 1),
]


@pytest.mark.parametrize(
    "row", TABLE, ids=[f"{g}-{n}x{v}-{s}-{t}".replace("torch.", "") for g, n, v, s, t, *_ in TABLE]
)
def test_table(row: tuple) -> None:
    gpu, rows, vocab, student, teacher, variant, cluster, sweeps, sweeps_of_jsd = row
    dtypes = {"student_dtype": student, "teacher_dtype": teacher}
    plan = plan_loss(rows, vocab, GPUS[gpu], **dtypes)
    assert (plan.variant, plan.cluster, plan.sweeps) == (variant, cluster, sweeps), plan
    assert plan_loss(rows, vocab, GPUS[gpu], **dtypes, mixed_kl=False).sweeps == sweeps_of_jsd


def _check(plan: Plan, gpu: str, rows: int, vocab: int, bytes_a_column: int) -> None:
    limits = GPUS[gpu]
    assert 32 <= plan.threads <= 512 and plan.threads % 32 == 0
    assert plan.shared_bytes <= limits.shared_per_block
    assert plan.cluster in (1, 2, 4, 8, 16) and plan.cluster <= limits.largest_cluster
    if plan.variant == "warp":
        assert plan.blocks * plan.rows_per_block >= rows and plan.threads == 32 * plan.rows_per_block
        assert plan.shared_bytes >= plan.rows_per_block * vocab // plan.width * plan.width * bytes_a_column
    elif plan.variant == "streaming":
        assert plan.blocks == rows * plan.splits and plan.splits >= 1
    else:
        assert plan.blocks == rows * plan.cluster
        assert plan.cluster * plan.shared_bytes >= vocab // plan.width * plan.width * bytes_a_column


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("wanted", ["", "warp", "block", "cluster", "streaming"])
def test_every_plan_can_be_launched(gpu: str, wanted: str) -> None:
    """Blocks within the limits of the device and of the kernels, shared memory for every column."""
    for vocab in (1, 2, 7, 1023, 1024, 1025, 4096, 32001, 50257, 128256, 151936, 262144, 1 << 20, 2**31 - 1):
        for rows in (1, 2, 33, 8192):
            for student, teacher in ((BF16, BF16), (FP32, FP32), (BF16, FP32), (FP32, FP16)):
                for aligned in (True, False):
                    dtypes = {"student_dtype": student, "teacher_dtype": teacher}
                    plan = plan_loss(rows, vocab, GPUS[gpu], **dtypes, aligned=aligned, wanted=wanted)
                    _check(plan, gpu, rows, vocab, student.itemsize + teacher.itemsize)
                    assert aligned or plan.variant == "streaming"
                    assert plan.width == (8 if aligned and student == teacher == BF16 else 4)


@pytest.mark.parametrize("gpu", GPUS)
def test_one_row_fills_the_gpu(gpu: str) -> None:
    plan = plan_loss(1, 1 << 20, GPUS[gpu])
    assert plan.blocks >= GPUS[gpu].multiprocessors, plan


def test_slices_are_small_enough_for_neighbours() -> None:
    """Two or three blocks share a multiprocessor: one loads while another computes and stores."""
    for vocab in (32000, 128256, 151936, 262144):
        plan = plan_loss(8192, vocab, GPUS["h100"])
        assert 2 * (plan.shared_bytes + 1024) <= GPUS["h100"].shared_per_multiprocessor, plan


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"vocab in \[1, 2\*\*31\); got 5 and 0"):
        plan_loss(5, 0, GPUS["h100"])
    with pytest.raises(ValueError, match="teacher_dtype must be float32, bfloat16 or float16; got float64"):
        plan_loss(5, 5, GPUS["h100"], teacher_dtype=torch.float64)
    with pytest.raises(ValueError, match="wanted must be one of warp, block"):
        plan_loss(5, 5, GPUS["h100"], wanted="clusters")


def test_the_command_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpu", "h100", "--vocab", "128256"]) == 0
    printed = capsys.readouterr().out
    assert "cluster of 8 blocks" in printed and "the other divergences" in printed
    assert main(["plan", "--dtype", "float7"]) == 2
    assert "float7" in capsys.readouterr().err


# gpu, rows, vocab, student -> variant, cluster, sweeps: a row is half as long, and a byte a chunk more
SPARSE = [
    ("h100", 8192, 128256, BF16, "cluster", 4, 1),
    ("h100", 8192, 262144, BF16, "cluster", 8, 1),
    ("h100", 8192, 262144, FP32, "cluster", 16, 1),
    ("h100", 8192, 1000, BF16, "block", 1, 1),
    ("h100", 8192, 1, FP32, "block", 1, 1),
    ("h100", 1, 1 << 20, BF16, "streaming", 1, 2),
    ("a100", 8192, 64000, BF16, "block", 1, 1),
    ("a100", 8192, 128256, BF16, "streaming", 1, 2),
    ("a100", 8192, 2**31 - 1, FP32, "streaming", 1, 2),
]


@pytest.mark.parametrize("row", SPARSE, ids=[f"{g}-{n}x{v}-{s}".replace("torch.", "") for g, n, v, s, *_ in SPARSE])
def test_sparse_table(row: tuple) -> None:
    gpu, rows, vocab, student, variant, cluster, sweeps = row
    plan = plan_loss(rows, vocab, GPUS[gpu], student_dtype=student, sparse=True, mixed_kl=False)
    assert (plan.variant, plan.cluster, plan.sweeps) == (variant, cluster, sweeps), plan
    assert plan.shared_bytes <= GPUS[gpu].shared_per_block
    chunks = vocab // (16 // student.itemsize)
    parts = plan.splits if variant == "streaming" else plan.cluster
    held = 0 if variant == "streaming" else 16
    assert plan.shared_bytes >= -(-chunks // parts) * (held + 1)
    assert "the student's logits are read" in str(plan)
