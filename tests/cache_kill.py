"""A cache of made-up hidden states, written in child processes."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch import Tensor

from fastkd.cache import CacheWriter, Head, Spec
from fastkd.trainer.cache_teacher import main

V, H, S = 50, 8, 6
SPEC = Spec("hidden", "float16", H, V, model="m", tokenizer="t")
SHARD_ROWS = 4


def make_splits() -> dict[str, Tensor]:
    """Three shards of training rows, the last of them short, and one of held-out rows."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randint(V, (rows, S), generator=generator) for name, rows in (("train", 10), ("eval", 3))}


def make_head() -> Head:
    return Head(torch.randn(V, H, generator=torch.Generator().manual_seed(1)), torch.arange(V) / V, softcap=5.0)


def compute(split: str, first_row: int, ids: Tensor) -> dict[str, Tensor]:
    """Hidden states that say which split, row, position and token they are of."""
    rows = first_row + torch.arange(len(ids))[:, None, None].expand(len(ids), S, H)
    states = rows + torch.arange(S)[None, :, None] / 16 + ids[..., None] / 1024
    return {"hidden": states + 64 * (split == "eval")}


def make_writer(folder: Path) -> CacheWriter:
    return CacheWriter(folder, make_splits(), SPEC, head=make_head(), shard_rows=SHARD_ROWS)


def fill_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"a": 0}')


def write(folder: str) -> None:
    """The body of a child."""
    writer = make_writer(Path(folder))
    writer.open(fill_tokenizer)
    writer.run(compute)


def write_beside(folder: str, meeting: str, others: int) -> None:
    """As :func:`write`, and holds its first shard until ``others`` more processes hold one. Leaves the shards that it
    wrote in ``meeting``."""
    own, wrote = Path(meeting) / str(os.getpid()), []

    def slowly(split: str, first_row: int, ids: Tensor) -> dict[str, Tensor]:
        own.touch()
        deadline = time.monotonic() + 50
        while len(list(Path(meeting).iterdir())) <= others and time.monotonic() < deadline:
            time.sleep(0.005)
        wrote.append(f"{split} {first_row}")
        own.write_text("\n".join(wrote))
        return compute(split, first_row, ids)

    writer = make_writer(Path(folder))
    writer.open(fill_tokenizer)
    writer.run(slowly)


def cache_teacher_as(world: str, out: str, rank: int, port: int) -> None:
    """The body of process ``rank`` of two that a launcher started."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    flags = ["--teacher.path", f"{world}/teacher", "--data.train", f"{world}/train.txt", "--data.eval"]
    flags += [f"{world}/eval.txt", "--data.seq_len", "32", "--data.max_train_rows", "11", "--data.max_eval_rows", "4"]
    flags += [
        "--output_dir",
        out,
        "--shard_rows",
        "4",
        "--rows_per_batch",
        "3",
        "--device",
        "cpu",
        "--precision",
        "fp32",
    ]
    assert main(flags) == 0
