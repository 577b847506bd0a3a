"""A rank's part of the vocabulary: the argument ``vocab_shard`` and its checks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist


class VocabShard(NamedTuple):
    """The columns ``[start, stop)`` of the vocabulary that this rank holds of both models.

    The shards of the group's ranks cover the vocabulary without a gap and without an overlap; they may be of different
    width, and empty. Logits (or rows of a head) beyond ``stop - start`` are padding, whose gradient is 0.
    """

    start: int
    stop: int
    group: Any = None  # torch.distributed.ProcessGroup; None: the default group

    @property
    def width(self) -> int:
        """Columns that are no padding."""
        return self.stop - self.start


def check_vocab_shard(shard: object) -> None:
    """Raise TypeError or ValueError for anything but a VocabShard of integers 0 <= start <= stop; asks no group."""
    if not isinstance(shard, VocabShard):
        raise TypeError(f"vocab_shard must be None or a fastkd.VocabShard(start, stop, group); got {shard!r}")
    for name in ("start", "stop"):
        value = getattr(shard, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"vocab_shard.{name} must be an int; got {type(value).__name__}: {value!r}")
    if not 0 <= shard.start <= shard.stop:
        raise ValueError(f"vocab_shard must have 0 <= start <= stop; got start={shard.start}, stop={shard.stop}")
    if not dist.is_available():
        raise RuntimeError("vocab_shard needs torch.distributed, which this PyTorch was built without")
    if shard.group is not None and not isinstance(shard.group, dist.ProcessGroup):
        raise TypeError(
            "vocab_shard.group must be a torch.distributed.ProcessGroup that this process belongs to, or None for the "
            f"default group; got {type(shard.group).__name__}: {shard.group!r}"
        )


def group_of(shard: VocabShard) -> Any:
    """The process group of a checked shard.

    Raises:
        RuntimeError: there is none.
    """
    if shard.group is not None:
        return shard.group
    if not dist.is_initialized():
        raise RuntimeError(
            "vocab_shard has group=None, the default process group, which is not initialised: call "
            "torch.distributed.init_process_group first"
        )
    return dist.group.WORLD


def misfit(shard: VocabShard, sizes: dict[str, int], unit: str = "columns") -> str:
    """What is wrong with a rank's tensors of so many columns (or rows) each; "" where they hold the shard. Only this
    rank sees it, so it is told to the others before it is raised."""
    for name, size in sizes.items():
        if size < shard.width:
            return f"{name} has {size} {unit}, fewer than the {shard.width} of {words(shard)}"
    return ""


def words(shard: VocabShard) -> str:
    """For messages, which have no use for the group's address."""
    return f"vocab_shard=VocabShard({shard.start}, {shard.stop})"


def accumulator_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """fp32, or fp64 where anything is."""
    return torch.float64 if torch.float64 in dtypes else torch.float32
