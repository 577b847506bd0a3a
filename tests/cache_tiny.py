"""Caches of the tiny teacher, and a tiny model that scales its logits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from trainer_tiny import make_config, make_tokenizer
from transformers import GraniteConfig, GraniteForCausalLM

from fastkd.cache import TeacherCache
from fastkd.trainer.cache_teacher import CacheConfig, SourceConfig, cache_teacher
from fastkd.trainer.config import DataConfig


def make_data(world: Path, max_train_rows: int | None = 11, max_eval_rows: int | None = 4) -> DataConfig:
    """Text of the tiny world, as :func:`trainer_tiny.make_config` has it."""
    data = make_config(world, world).data
    data.max_train_rows, data.max_eval_rows = max_train_rows, max_eval_rows
    return data


def make_cache(
    world: Path,
    out: Path,
    teacher: Path | None = None,
    max_train_rows: int | None = 11,
    max_eval_rows: int | None = 4,
    eval: bool = True,
    **changes: Any,
) -> TeacherCache:
    """Shards of 4 rows, made 3 at a time. ``changes``: settings of the command."""
    data = make_data(world, max_train_rows, max_eval_rows)
    if not eval:
        data.eval = []
    source = SourceConfig(str(teacher or world / "teacher"))
    settings = {"device": "cpu", "precision": "fp32", "shard_rows": 4, "rows_per_batch": 3, **changes}
    with open(os.devnull, "w") as nowhere:
        return TeacherCache(cache_teacher(CacheConfig(source, data, str(out), **settings), Console(file=nowhere)))


def granite(folder: Path) -> Path:
    """A model that scales its logits, which no head of ours says."""
    config = GraniteConfig(
        num_hidden_layers=2, hidden_size=32, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=300, logits_scaling=3.0, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    GraniteForCausalLM(config).save_pretrained(folder)
    make_tokenizer(folder)
    return folder
