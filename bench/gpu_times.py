"""Worker: times of the loss with its gradient on a CUDA device, beside a copy of one N x V tensor in the same turns.

CUDA events round each run, after the second-level cache has been flushed by a fill that is long enough for the host to
be ahead of the device. Rates count what the task must move (3 N V; 2 for the value and the copy) and, for fastkd, what
its plan moves.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from gpu_worker import work
from torch import Tensor

import fastkd
from fastkd import cuda

ROWS, VOCABS = 8192, (128256, 32000, 151936, 262144)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ROUNDS, WARM_UP = 20, 3
FLUSH_BYTES = 1 << 30
OPTIONS = {"temperature": 2.0, "ce_weight": 1.0}
GOALS = {"warp": 0.85, "block": 0.85, "cluster": 0.85, "streaming": 0.80}  # of copy bandwidth, by bytes moved


@dataclass
class Problem:
    """A leaf and a teacher (rows, vocab). scratch: what in place overwrites."""

    rows: int
    vocab: int
    dtype: torch.dtype
    student: Tensor = field(init=False)
    teacher: Tensor = field(init=False)
    labels: Tensor = field(init=False)
    scratch: Tensor = field(init=False)
    trigger: Tensor = field(init=False)  # makes the head's output require grad

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        make = lambda: torch.randn(self.rows, self.vocab, device="cuda", dtype=self.dtype).mul_(3)  # noqa: E731
        self.student, self.teacher = make().requires_grad_(), make()
        self.labels = torch.randint(self.vocab, (self.rows,), device="cuda")
        self.scratch = torch.empty_like(self.teacher)
        self.trigger = torch.zeros((), device="cuda", requires_grad=True)

    @property
    def tensor_bytes(self) -> int:
        return self.rows * self.vocab * self.dtype.itemsize


def naive_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    t = OPTIONS["temperature"]
    kd = F.kl_div(F.log_softmax(student / t, -1), F.softmax(teacher / t, -1), reduction="batchmean")
    return t * t * kd + F.cross_entropy(student, labels)


def _loss(p: Problem, student: Tensor, **options) -> Tensor:
    loss = fastkd.kd_loss(student, p.teacher, p.labels, **OPTIONS, **options)
    assert isinstance(loss, Tensor)
    return loss


def _inplace(p: Problem) -> None:
    _loss(p, _Head.apply(p.trigger, p.scratch), backend="native", inplace=True).backward()


class _Head(torch.autograd.Function):
    """A head that costs nothing: its output is no leaf, as in place needs it."""

    @staticmethod
    def forward(ctx, trigger: Tensor, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return None, None


@torch.no_grad()
def _value(p: Problem) -> None:
    _loss(p, p.student, backend="native")


@dataclass(frozen=True)
class Provider:
    """moves: N x V tensors that the task must move. prepare is not timed."""

    run: Callable[[Problem], object]
    moves: int = 3
    prepare: Callable[[Problem], object] = lambda p: None


def _fused(backend: str, factor: float = 1.0) -> Callable[[Problem], None]:
    def run(p: Problem) -> None:
        loss = _loss(p, p.student, backend=backend)
        (loss if factor == 1.0 else factor * loss).backward()

    return run


def _compiled() -> Callable[[Problem], None]:
    compiled = torch.compile(naive_loss, dynamic=False)
    return lambda p: compiled(p.student, p.teacher, p.labels).backward()


def providers(group: str) -> dict[str, Callable[[], Provider]]:
    """Made one by one, when their turn comes."""
    copy = {"copy": lambda: Provider(lambda p: p.scratch.copy_(p.teacher), 2)}
    if group == "others":
        return copy | {
            "naive": lambda: Provider(lambda p: naive_loss(p.student, p.teacher, p.labels).backward()),
            "compile": lambda: Provider(_compiled()),
        }
    ours = {
        "fastkd": lambda: Provider(_fused("native")),
        "fastkd-inplace": lambda: Provider(_inplace, 3, lambda p: p.scratch.copy_(p.student.detach())),
        "fastkd-value": lambda: Provider(_value, 2),
    }
    if group == "streaming":
        return copy | ours
    return (
        copy
        | ours
        | {
            "fastkd-scaled": lambda: Provider(_fused("native", 2.0)),  # upstream 2: a sweep over the gradient more
            "triton": lambda: Provider(_fused("triton")),
        }
    )


def fitting_rows(vocab: int, dtype: torch.dtype) -> int:
    """ROWS, halved until student, teacher, gradient and scratch fit beside the flush."""
    free, _ = torch.cuda.mem_get_info()
    rows = ROWS
    while rows > 1 and 4.5 * rows * vocab * dtype.itemsize + FLUSH_BYTES > 0.95 * free:
        rows //= 2
    return rows


def once(provider: Provider, p: Problem, flush: Tensor) -> float:
    """Milliseconds of one run."""
    p.student.grad = None
    provider.prepare(p)
    flush.zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    provider.run(p)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def extra_bytes(provider: Provider, p: Problem) -> int:
    """Peak of one run above what was allocated before it."""
    p.student.grad = None
    provider.prepare(p)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    provider.run(p)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        f"p{share}": round(ordered[min(len(ordered) - 1, share * len(ordered) // 100)], 5) for share in (20, 50, 80)
    }


def moved(p: Problem, provider: str, group: str) -> dict[str, Any]:
    """The plan of fastkd's kernels, and the N x V tensors that it moves."""
    if not provider.startswith("fastkd"):
        return {}
    with_gradient = provider != "fastkd-value"
    wanted = "streaming" if group == "streaming" else ""
    plan = cuda.plan_loss(
        p.rows, p.vocab, cuda.gpu_of(p.student.device), student_dtype=p.dtype, teacher_dtype=p.dtype,
        with_gradient=with_gradient, wanted=wanted,
    )  # fmt: skip
    tensors = 2 * plan.sweeps + with_gradient + (2 if provider == "fastkd-scaled" else 0)
    return {"variant": plan.variant, "plan": str(plan), "tensors_moved": tensors}


def rated(row: dict[str, Any], p: Problem, moves: int, copy_rate: float) -> dict[str, Any]:
    """GB/s of the task, and shares of the copy's bandwidth: of what the task must move, of what is moved."""
    rate = moves * p.tensor_bytes / row["p50"] / 1e6
    row |= {"gb_s": round(rate, 1), "share": round(rate / copy_rate, 4)}
    if "tensors_moved" in row:
        row["share_moved"] = round(rate / copy_rate * row["tensors_moved"] / moves, 4)
        goal = GOALS[row["variant"]]
        if row["provider"] in ("fastkd", "fastkd-inplace"):
            row |= {"goal": goal, "reached": row["share_moved"] >= goal}
    return row


def measure(vocab: int, dtype: str, group: str) -> dict[str, Any]:
    """Rows of all providers of a group at one shape; an error (out of memory, say) is a row too."""
    os.environ["FASTKD_CUDA_VARIANT"] = "streaming" if group == "streaming" else ""
    gc.collect()
    torch.cuda.empty_cache()
    p = Problem(fitting_rows(vocab, DTYPES[dtype]), vocab, DTYPES[dtype])
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    ready, rows = {}, {}
    for name, make in providers(group).items():
        rows[name] = {"provider": name, "rows": p.rows, "vocab": vocab, "dtype": dtype, "group": group}
        try:
            provider = make()
            for _ in range(WARM_UP):
                once(provider, p, flush)
            rows[name] |= {"peak": extra_bytes(provider, p), **moved(p, name, group)}
            ready[name] = provider
        except Exception as error:  # the others can still be timed
            rows[name]["error"] = f"{type(error).__name__}: {error}"[:200]
            p.student.grad = None
            torch.cuda.empty_cache()
    times: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(ROUNDS):  # in turns, so that a clock that moves hits all alike
        for name, provider in ready.items():
            times[name].append(once(provider, p, flush))
    for name in ready:
        rows[name] |= percentiles(times[name])
    copy_rate = 2 * p.tensor_bytes / rows["copy"]["p50"] / 1e6
    for name, provider in ready.items():
        rows[name]["peak_nv"] = round(rows[name]["peak"] / p.tensor_bytes, 3)
        rated(rows[name], p, provider.moves, copy_rate)
    return {"results": list(rows.values())}


def jobs() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    for group in ("ours", "streaming", "others"):
        for dtype in DTYPES:
            for vocab in VOCABS:
                yield f"{group}/{dtype}/{vocab}", lambda a=(vocab, dtype, group): measure(*a)


if __name__ == "__main__":
    work(jobs())
