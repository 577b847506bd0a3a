"""What the ranks of a vocabulary tell each other: once their map, then in each call the sums of their pieces.

Every message starts with a digest of what the ranks must have in common. Ranks that differ find another one there: on
the CPU an error, elsewhere NaN, since nothing waits for the device. Messages of different size would be worse (gloo
aborts, NCCL waits for its timeout). On the CPU, whose map is exchanged anew for every number of rows, such an exchange
therefore begins with a message of the size that a rank would send which sees nothing new.
"""

from __future__ import annotations

import functools
import hashlib
import json
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .shard import VocabShard, words

HEADER = 8  # bytes
_MAP_BYTES = 4096  # of a rank's description
_ROWS = "the exchange of the rows' sums"
_ANEW = (0x5A5A5A5A, 0x5A5A5A5A)  # in place of a digest: a rank asks for the map


class ShardMap(NamedTuple):
    """How the vocabulary lies on the ranks of a group."""

    vocab: int  # V
    widths: tuple[int, ...]  # columns of each rank

    def widths_on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(P, 1), made once a device."""
        return _widths_on(self, device, dtype)


@functools.lru_cache(maxsize=64)
def _widths_on(shard_map: ShardMap, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(shard_map.widths, dtype=dtype, device=device).unsqueeze(1)


# its name from torch 2.13 on, and before
_all_gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


class _State:
    """What a group remembers."""

    def __init__(self) -> None:
        self.maps: dict[tuple, ShardMap] = {}
        self.first_bytes = 0  # of the first message of the last call; 0: there was none


_states: weakref.WeakKeyDictionary[Any, _State] = weakref.WeakKeyDictionary()


def _state(group: Any) -> _State:
    if group not in _states:
        _states[group] = _State()
    return _states[group]


@contextmanager
def _named(group: Any, what: str) -> Iterator[None]:
    """Errors of a collective with what it was for."""
    try:
        yield
    except RuntimeError as error:
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        raise RuntimeError(
            f"vocab_shard: {what} failed on rank {rank} of the {world} of its group: a rank has ended, is late by "
            f"more than the group's timeout, or has called with other sizes ({error})"
        ) from error


def _gathered(group: Any, own: Tensor, what: str) -> Tensor:
    """(P, n) from each rank's (n)."""
    out = own.new_empty(dist.get_world_size(group) * own.shape[0])
    with _named(group, what):
        getattr(dist, _all_gather)(out, own, group=group)
    return out.view(-1, own.shape[0])


def add_up(group: Any, x: Tensor) -> None:
    """x <- its sum over the ranks, the same bits on each."""
    with _named(group, "the sum of the hidden states' gradients"):
        dist.all_reduce(x, group=group)


def _padded_json(description: dict[str, Any]) -> bytes:
    text = json.dumps(description).encode()
    if len(text) > _MAP_BYTES:  # of the one field without a bound
        description = {**description, "problem": str(description.get("problem", ""))[:512]}
        text = json.dumps(description).encode()
    return text.ljust(_MAP_BYTES)


def _map_of(descriptions: list[dict[str, Any]]) -> ShardMap:
    """The map of all ranks' descriptions; every rank raises the same error."""
    for number, one in enumerate(descriptions):
        if one["problem"]:
            raise ValueError(f"vocab_shard: rank {number} of the group: {one['problem']}")
    first = descriptions[0]
    for number, one in enumerate(descriptions):
        for name in first:
            if name not in ("start", "stop", "problem") and one.get(name) != first[name]:
                raise ValueError(
                    f"vocab_shard: the ranks of the group must call with the same {name}; got {first[name]!r} on rank "
                    f"0 and {one.get(name)!r} on rank {number}"
                )
    parts = sorted((one["start"], one["stop"], number) for number, one in enumerate(descriptions))
    at = 0
    for start, stop, number in parts:
        if start != at:
            kind = "leave a gap between" if start > at else "overlap in"
            everything = ", ".join(f"rank {k}: [{d['start']}, {d['stop']})" for k, d in enumerate(descriptions))
            raise ValueError(
                f"vocab_shard: the shards of the ranks must cover the vocabulary once; they {kind} columns "
                f"{min(start, at)} and {max(start, at)} (at rank {number}); got {everything}"
            )
        at = stop
    if at == 0:
        raise ValueError("vocab_shard: all ranks of the group have an empty shard; the vocabulary needs a column")
    return ShardMap(at, tuple(one["stop"] - one["start"] for one in descriptions))


def agree(
    group: Any, shard: VocabShard, device: torch.device, structure: tuple, common: dict[str, Any], problem: str = ""
) -> ShardMap:
    """The map of the group, exchanged at the first call of its ``structure`` (which decides what is sent later) and
    remembered with the group. ``common`` must be equal on all ranks; ``problem``: what this rank would raise.

    Raises, on every rank of the group:
        ValueError: a gap, an overlap, a difference, or the problem of a rank.
        RuntimeError: a rank that does not answer within the group's timeout.
    """
    state = _state(group)
    rows = common["rows"] if device.type == "cpu" else 0  # an accelerator would wait for the exchange
    key = (shard.start, shard.stop, device.type, device.index, rows, *structure)
    if key in state.maps and not problem:
        return state.maps[key]
    if problem and state.maps and device.type != "cpu":  # the others do not ask for the map again
        raise ValueError(f"vocab_shard: {problem}")
    if state.first_bytes and device.type == "cpu":
        own = torch.zeros(state.first_bytes, dtype=torch.uint8)
        _headed(own, _ANEW)
        try:
            _check_headers(group, shard, common, _gathered(group, own, _ROWS))
        except RuntimeError as error:
            if problem:  # this rank knows better
                raise ValueError(f"vocab_shard: {problem}") from error
            raise
    description = {**common, "start": shard.start, "stop": shard.stop, "problem": problem}
    text = torch.frombuffer(bytearray(_padded_json(description)), dtype=torch.uint8).to(device)
    everything = _gathered(group, text, "the exchange of the shards' map").cpu()
    state.maps[key] = _map_of([json.loads(bytes(row.tolist())) for row in everything])
    return state.maps[key]


def _headed(message: Tensor, digest: tuple[int, int]) -> None:
    """Writes the header of a message, without a copy from the host."""
    for i, word in enumerate(digest):
        message[i * 4 : i * 4 + 4].view(torch.int32).fill_(word)


def _check_headers(group: Any, shard: VocabShard, common: dict[str, Any], messages: Tensor) -> Tensor | None:
    """messages (P, bytes). 0-d off the CPU: whether all have one header."""
    headers = messages[:, :HEADER]
    same = (headers == headers[0]).all()
    if messages.device.type != "cpu":
        return same
    if not same:
        raise RuntimeError(_differing(group, words(shard), common))
    return None


def _differing(group: Any, own: str, common: dict[str, Any]) -> str:
    settings = ", ".join(f"{name}={value!r}" for name, value in common.items())
    return (
        f"vocab_shard: the ranks of the group called with different arguments; rank {dist.get_rank(group)} had {own}, "
        f"{settings}"
    )


@functools.lru_cache(maxsize=256)
def _digest(text: str) -> tuple[int, int]:
    digest = hashlib.blake2b(text.encode(), digest_size=HEADER).digest()
    first, second = (int.from_bytes(digest[i : i + 4], "little", signed=True) for i in (0, 4))
    return first, second


def gather(
    group: Any, shard: VocabShard, common: dict[str, Any], rows: Tensor, first: bool
) -> tuple[Tensor, Tensor | None]:
    """(P, F, N) of each rank's (F, N), in the order of ranks; and, off the CPU, 0-d: whether their digests agree.
    first: of the call.

    Raises:
        RuntimeError: ranks that called with other arguments (on the CPU), that have ended or do not answer in time.
    """
    own = torch.empty(HEADER + rows.nbytes, dtype=torch.uint8, device=rows.device)
    _headed(own, _digest(json.dumps(common)))
    own[HEADER:].view(rows.dtype).copy_(rows.reshape(-1))
    if first:
        _state(group).first_bytes = own.shape[0]
    everything = _gathered(group, own, _ROWS)
    alike = _check_headers(group, shard, common, everything)
    return everything.view(rows.dtype)[:, HEADER // rows.itemsize :].unflatten(1, rows.shape), alike
