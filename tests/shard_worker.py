"""What a process of a group does in tests/test_shard.py: all cases, the bytes it sends, the errors it gets."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import shard_cases
import shard_dtensors
import shard_linear_dtensors
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from fastkd import VocabShard, kd_loss

TIMEOUT = 5.0  # seconds that a group waits for a rank
V, N = 24, 6


class Collectives(TorchDispatchMode):
    """(name, bytes that this rank gives, bytes that it gets) of every collective in the block."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int, int]] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace == "c10d":
            sizes = [sum(x.nbytes for x in _tensors(argument)) for argument in arguments]
            found = [size for size in sizes if size]
            self.seen.append((function._schema.name.removeprefix("c10d::"), found[-1], found[0]))
        return function(*arguments, **(keywords or {}))


def _tensors(x: Any) -> list[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        return [x]
    return [t for part in x for t in _tensors(part)] if isinstance(x, (list, tuple)) else []


def _logits(rank: int, world: int, columns: int | None = None, rows: int = N) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(3)
    width = V // world if columns is None else columns
    student, teacher = (torch.randn(rows, width, generator=g) for _ in range(2))
    return student.requires_grad_(), teacher, torch.randint(V, (rows,), generator=g)


def _even(rank: int, world: int, group: Any = None) -> VocabShard:
    return VocabShard(rank * (V // world), (rank + 1) * (V // world), group)


def traffic(rank: int, world: int) -> dict[str, Any]:
    """Collectives of the second call of each kind, which is the steady state, and of its backward."""
    found = {}
    for name, options in {
        "forward_kl": {}, "jsd": {"divergence": "jsd"}, "total_variation": {"divergence": "total_variation"},
        "reverse_kl": {"divergence": "reverse_kl"}, "symmetric_kl": {"divergence": "symmetric_kl"},
        "skew_forward_kl": {"divergence": "skew_forward_kl"}, "skew_reverse_kl": {"divergence": "skew_reverse_kl"},
        "everything": {"ce_weight": 0.5, "label_smoothing": 0.1, "return_stats": True, "divergence": "symmetric_kl"},
    }.items():  # fmt: skip
        student, teacher, labels = _logits(rank, world)
        for number in range(2):
            with Collectives() as forward:
                t = 1.0 + number  # a number that differs from call to call is the steady state too
                out = kd_loss(student, teacher, labels, temperature=t, vocab_shard=_even(rank, world), **options)
            with Collectives() as backward:
                (out[0] if isinstance(out, tuple) else out).backward()
        found[name] = {"rows": N, "forward": forward.seen, "backward": backward.seen}
    return found


# --- errors: each on a group of its own, which is of no use afterwards ---------------------------------------------


def _first_call(**differing: Callable[[int, int], Any]) -> Callable:
    """The first call of a group, with arguments that depend on the rank."""

    def call(rank: int, world: int, group: Any) -> None:
        given = {name: of_rank(rank, world) for name, of_rank in differing.items()}
        student, teacher, labels = _logits(rank, world, given.pop("columns", None), given.pop("rows", N))
        start, stop = given.pop("shard", _even(rank, world)[:2])
        kd_loss(student, teacher, labels, vocab_shard=VocabShard(start, stop, group), **given)

    return call


def _later_call(**differing: Callable[[int, int], Any]) -> Callable:
    """The same after a call in which all agreed."""

    def call(rank: int, world: int, group: Any) -> None:
        _first_call()(rank, world, group)
        _first_call(**differing)(rank, world, group)

    return call


def _late(rank: int, world: int, group: Any) -> None:
    if rank == 1:
        time.sleep(TIMEOUT + 2)
    _first_call()(rank, world, group)


def _gap(rank: int, world: int) -> tuple[int, int]:
    start, stop = _even(rank, world)[:2]
    return (start + 1, stop) if rank == 1 else (start, stop)


def _overlap(rank: int, world: int) -> tuple[int, int]:
    start, stop = _even(rank, world)[:2]
    return (start - 1, stop - 1) if rank == 1 else (start, stop)


ERRORS: dict[str, Callable] = {
    "gap": _first_call(shard=_gap),
    "overlap": _first_call(shard=_overlap),
    "nothing": _first_call(shard=lambda r, w: (0, 0)),
    "columns": _first_call(columns=lambda r, w: V // w - (r == 1)),
    "rows": _first_call(rows=lambda r, w: N + (r == 1)),
    "divergence": _first_call(divergence=lambda r, w: "jsd" if r == 1 else "forward_kl"),
    "temperature": _first_call(temperature=lambda r, w: 1.0 + (r == 1)),
    "backend": _first_call(backend=lambda r, w: "eager" if r == 1 else "native"),
    "temperature later": _later_call(temperature=lambda r, w: 1.0 + (r == 1)),
    "more rows later": _later_call(rows=lambda r, w: N + 100 * (r == 1)),
    "fewer rows later": _later_call(rows=lambda r, w: N - (r == 1)),
    "divergence later": _later_call(divergence=lambda r, w: "jsd" if r == 1 else "forward_kl"),
    "columns later": _later_call(columns=lambda r, w: V // w - (r == 1)),
    "late": _late,
}


def _refused(call: Callable, rank: int, world: int, group: Any) -> tuple[str, str, float]:
    begin = time.monotonic()
    try:
        call(rank, world, group)
    except (ValueError, RuntimeError) as error:
        return type(error).__name__, str(error), time.monotonic() - begin
    return "", "", time.monotonic() - begin


def _after_a_death(rank: int, world: int, group: Any, save: Callable) -> tuple[str, str, float]:
    """The last rank ends after a first call in which all took part."""
    _first_call()(rank, world, group)
    if rank == world - 1:
        save()
        os._exit(0)
    return _refused(_first_call(), rank, world, group)


def work(rank: int, world: int, folder: str) -> None:
    """Everything; the results of the rank go into a file."""
    faulthandler.enable()
    faulthandler.dump_traceback_later(120, exit=True)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    results: dict[str, Any] = {"cases": {}, "errors": {}}
    for name, case in shard_cases.cases(world).items():
        results["cases"][name] = shard_cases.run_rank(case, rank, world)
    for name, linear in shard_cases.linear_shard_cases().items():
        results["cases"][f"linear {name}"] = shard_cases.run_linear_rank(linear, rank, world)
    for name, of_mesh in shard_dtensors.CASES.items():
        results["cases"][f"DTensor {name}"] = shard_dtensors.run_rank(of_mesh, world)
    for name, of_heads in shard_linear_dtensors.CASES.items():
        results["cases"][f"linear DTensor {name}"] = shard_linear_dtensors.run_rank(of_heads, world)
    results["refused"] = {name: shard_linear_dtensors.refused(name, world) for name in shard_linear_dtensors.WRONG}
    results["traffic"] = traffic(rank, world)
    patient = timedelta(seconds=TIMEOUT)
    groups = {name: dist.new_group(timeout=patient) for name in [*ERRORS, "death"]}
    for name, call in ERRORS.items():
        results["errors"][name] = _refused(call, rank, world, groups[name])
        dist.barrier()  # of the patient default group: the next one begins at the same time everywhere
    save = lambda: torch.save(results, Path(folder) / f"{rank}.pt")  # noqa: E731
    results["errors"]["death"] = _after_a_death(rank, world, groups["death"], save)
    save()
    os._exit(0)  # a group that lost a rank cannot be left in order


def main(world: int, folder: str) -> None:
    """Forks the ranks, so that torch is imported once; nothing has run in this process that a fork could break."""
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=work, args=(rank, world, folder)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(150)
        if process.is_alive():
            process.kill()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
