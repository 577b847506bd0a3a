"""Memory of one loss and gradient beside models, hidden states and their gradients, for many tokens and large
vocabularies: computed, from what `fastkd bench` measured per N x V element. Run: python bench/memory_table.py"""

from __future__ import annotations

import csv
from pathlib import Path

import torch

from fastkd.linear_chunks import default_budget

RESULTS = Path(__file__).resolve().parent / "results"
TOKENS, VOCABS = (8192, 16384, 32768, 65536), (128256, 262144)
HIDDEN, TOPK = 4096, 64  # of the student; columns that a sparse teacher names
BF16, FP32 = torch.bfloat16, torch.float32
SPARSE_ENTRY = 8 + 4  # bytes of an id and a log-probability


def measured_multiple(provider: str) -> float:
    """Peak above the logits in N x V tensors of bf16, as `fastkd bench` measured it on the CPU."""
    with (RESULTS / "default-bfloat16.csv").open() as lines:
        (row,) = (row for row in csv.DictReader(lines) if row["provider"] == provider)
    return float(row["peak_nv"])


def linear_bytes(tokens: int, vocab: int, models: int) -> int:
    """linear_kd_loss (2 models) or linear_sparse_kd_loss (1): the logits of a chunk, and the fp32 sum of the gradients
    of a bf16 weight."""
    accumulator = vocab * HIDDEN * FP32.itemsize
    return default_budget(tokens, vocab, (BF16,) * models, accumulator) + accumulator


def row_of(tokens: int, vocab: int) -> list[float]:
    """GB: logits of both models and naive's tensors; with kd_loss, fresh and in place; sparse in place; linear."""
    logits, named = tokens * vocab * BF16.itemsize, tokens * TOPK * SPARSE_ENTRY
    return [
        x / 1e9
        for x in (
            (2 + measured_multiple("naive")) * logits,
            (2 + measured_multiple("fastkd")) * logits,
            (2 + measured_multiple("fastkd-inplace")) * logits,
            logits + named,
            linear_bytes(tokens, vocab, 2),
            linear_bytes(tokens, vocab, 1) + named,
        )
    ]


def table() -> list[str]:
    """The README's table, a line a row."""
    lines = [
        "| tokens × V | naive | `kd_loss` | in place | `sparse_kd_loss` in place | `linear_kd_loss` "
        "| `linear_sparse_kd_loss` |",
        "|---|---|---|---|---|---|---|",
    ]
    for vocab in VOCABS:
        for tokens in TOKENS:
            cells = (f"{x:.1f}" for x in row_of(tokens, vocab))
            lines.append(f"| {tokens // 1024}k × {vocab} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
