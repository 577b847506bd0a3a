"""How many rows a chunk has, and what a call allocates."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from inputs import BF16, FP32

from fastkd.linear_chunks import DEFAULT_BUDGET, chunk_rows, default_budget


@pytest.mark.parametrize(
    "rows,vocab,dtypes,budget,expected",
    [
        (4096, 49152, (FP32, FP32), DEFAULT_BUDGET, 512),  # 569 would fit
        (4096, 49152, (BF16, BF16), DEFAULT_BUDGET, 1024),  # 4 chunks
        (1239, 49152, (BF16, BF16), 512 * 49152 * 4, 512),  # 512, 512 and 215 rather than 3 times 416
        (4096, 128256, (FP32, FP32), DEFAULT_BUDGET, 208),  # 218 would fit: 20 chunks, evened out
        (4096, 128256, (BF16, BF16), 256 << 20, 512),
        (65536, 262144, (BF16, BF16), DEFAULT_BUDGET, 208),
        (100, 128256, (BF16, FP32), DEFAULT_BUDGET, 100),  # all fit
        (100, 1000, (FP32, FP32), 8000 * 99, 64),  # one row too many: two chunks
        (100, 1000, (FP32, FP32), 8000 * 15, 15),  # fewer than 16: no multiple of it
        (100, 1000, (FP32, FP32), 8000, 1),
        (100, 1000, (FP32, FP32), 1, 1),  # a row is the least
        (0, 1000, (FP32, FP32), 1, 1),
        (1, 1000, (FP32, FP32), 1 << 40, 1),
        (17, 1, (FP32, FP32), 8 * 16, 16),
    ],
)
def test_rows_of_a_chunk(rows, vocab, dtypes, budget, expected) -> None:
    assert chunk_rows(rows, vocab, dtypes, budget) == expected


@pytest.mark.parametrize(
    "rows,vocab,dtypes,accumulator,expected",
    [
        (4096, 128256, (FP32, FP32), 0, DEFAULT_BUDGET),  # 5 % of all logits would be 757 MB
        (1024, 49152, (FP32, FP32), 0, 512 * 49152 * 8),  # 5 % would be fewer than 512 rows
        (4096, 49152, (BF16, BF16), 0, int(0.36 * 4096 * 49152 * 2)),
        (4096, 49152, (BF16, BF16), 2 * 49152 * 576, 512 * 49152 * 4),
        (4096, 128256, (BF16, BF16), 2 * 128256 * 1024, 512 * 128256 * 4),  # 512 rows, in 256 MiB
        (4096, 262144, (BF16, BF16), 2 * 262144 * 1024, DEFAULT_BUDGET),  # 512 rows would be 537 MB
        (0, 1000, (FP32, FP32), 0, 512 * 8000),
    ],
)
def test_budget_if_none_is_given(rows, vocab, dtypes, accumulator, expected) -> None:
    assert default_budget(rows, vocab, dtypes, accumulator) == expected


def test_a_chunk_fits_the_budget_and_wastes_little() -> None:
    for rows in (1, 2, 15, 16, 17, 100, 1023, 4096):
        for most in (1, 2, 15, 16, 17, 33, 500, 511, 512, 1300):
            got = chunk_rows(rows, 1000, (FP32, BF16), 6000 * most)
            assert 1 <= got <= min(most, rows)
            if most >= 16:  # as few chunks as the multiples of 16 or 512 allow
                unit = 512 if most >= 512 else 16
                assert -(-rows // got) == -(-rows // min(rows, most if rows <= most else most // unit * unit))


MEASURED = """
import gc, json, sys
import torch
from pathlib import Path
from fastkd import linear_kd_loss

rows, hidden, vocab, dtype, teacher, options = json.loads(sys.argv[1])
torch.set_num_threads(2)
dtype = getattr(torch, dtype)
h = torch.randn(rows, hidden).to(dtype).requires_grad_()
w = (torch.randn(vocab, hidden) * 0.1).to(dtype).requires_grad_()
th, tw = torch.randn(rows, hidden).to(dtype), (torch.randn(vocab, hidden) * 0.1).to(dtype)
labels = torch.randint(vocab, (rows,))

def status(field):
    return next(int(x.split()[1]) * 1024 for x in open("/proc/self/status") if x.startswith(field))

def run(n):
    loss = linear_kd_loss(h[:n], w, th[:n], tw, labels[:n], ce_weight=1.0, **options)
    if loss.requires_grad:
        loss.backward()

with torch.set_grad_enabled(teacher != "no_grad"):
    run(8)  # libraries and thread pools
    h.grad = w.grad = None
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS:")
    run(rows)
print(status("VmHWM:") - before)
"""


def _peak(rows: int, hidden: int, vocab: int, dtype: str, mode: str = "grad", **options) -> int:
    """Bytes above the inputs at the peak of one call and its backward, in a process of its own."""
    arguments = json.dumps([rows, hidden, vocab, dtype, mode, options])
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}  # what is freed leaves the process
    command = [sys.executable, "-c", MEASURED, arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the high-water mark from /proc")
@pytest.mark.parametrize("dtype,size", [("float32", 4), ("bfloat16", 2)])
def test_peak_is_the_gradients_and_the_budget(dtype: str, size: int) -> None:
    """All logits of both models would be 512 or 256 MB; the budget is 16."""
    rows, hidden, vocab, budget = 2048, 64, 32000, 16_000_000
    weight = vocab * hidden
    accumulator = 4 * weight if dtype == "bfloat16" else 0  # beside the gradient, while it is rounded
    allowed = budget + size * (weight + rows * hidden) + accumulator + 16_000_000  # products, copies, scratch, pages
    peak = _peak(rows, hidden, vocab, dtype, memory_budget=budget)
    assert peak < allowed, f"{peak / 1e6:.0f} MB, allowed {allowed / 1e6:.0f}"
    assert peak < 0.06 * 7 * rows * vocab * size + size * weight * 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads the high-water mark from /proc")
def test_value_alone_needs_the_budget_alone() -> None:
    peak = _peak(2048, 64, 32000, "float32", "no_grad", memory_budget=16_000_000)
    assert peak < 16_000_000 + 8_000_000, f"{peak / 1e6:.0f} MB"


@pytest.mark.skipif(sys.platform != "linux", reason="reads the high-water mark from /proc")
def test_eager_keeps_no_logits_either() -> None:
    """Some 20 tensors of one chunk, not of all rows: those would be 6 GB."""
    peak = _peak(2048, 64, 32000, "float32", backend="eager", chunk_size=64)
    assert peak < 25 * 64 * 32000 * 4 + 3 * 32000 * 64 * 4, f"{peak / 1e6:.0f} MB"
