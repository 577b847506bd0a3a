"""kd_loss and linear_kd_loss on two gloo processes: what their parts give is what one process gives for the whole
batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fastkd import KDLoss, LinearKDLoss

WORLD, ROWS, WIDTH, VOCAB = 2, 24, 8, 101
# rows of each rank and accumulation step: uneven, and one with no label at all
PARTS = [[slice(0, 9), slice(9, 11)], [slice(11, 12), slice(12, 24)]]


class Student(nn.Module):
    """A body, a head, and the loss inside the forward, where FSDP2 has gathered the head."""

    def __init__(self, linear: bool = True) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCAB)
        options = {"temperature": 2.0, "ce_weight": 0.5}
        self.criterion = LinearKDLoss(chunk_size=4, **options) if linear else KDLoss(**options)

    def forward(self, x: Tensor, teacher: Tensor, teacher_weight: Tensor, labels: Tensor, items: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x))
        if isinstance(self.criterion, KDLoss):
            loss = self.criterion(self.head(hidden), teacher @ teacher_weight.t(), labels, num_items_in_batch=items)
        else:
            head = (self.head.weight, teacher, teacher_weight, labels)
            loss = self.criterion(hidden, *head, student_bias=self.head.bias, num_items_in_batch=items)
        assert isinstance(loss, Tensor)
        return loss


def _batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs, the teacher's hidden states and head, labels of which the second part of rank 0 has none."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(VOCAB, (ROWS,), generator=g)
    labels[torch.rand(ROWS, generator=g) < 0.4] = -100
    labels[PARTS[0][1]] = -100
    x, teacher = torch.randn(ROWS, WIDTH, generator=g), torch.randn(ROWS, WIDTH, generator=g)
    return x, teacher, torch.randn(VOCAB, WIDTH, generator=g), labels


def _whole(linear: bool) -> dict[str, Tensor]:
    student, (x, teacher, weight, labels) = Student(linear), _batch()
    loss = student(x, teacher, weight, labels, (labels != -100).sum())
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in student.named_parameters() if p.grad is not None}}


def _items(rank: int, labels: Tensor) -> Tensor:
    """Tokens that count, over all ranks and accumulation steps: one small all-reduce of integers."""
    count = sum((labels[part] != -100).sum() for part in PARTS[rank])
    assert isinstance(count, Tensor)
    dist.all_reduce(count)
    return count


def _accumulate(student: nn.Module, rank: int, hold: Callable[[bool], None]) -> Tensor:
    """Gradients of this rank's parts; hold(last) says whether the next backward is the one that communicates."""
    x, teacher, weight, labels = _batch()
    items = _items(rank, labels)
    total = torch.zeros(())
    for number, part in enumerate(PARTS[rank]):
        hold(number == len(PARTS[rank]) - 1)
        # ranks are averaged: times their number makes it the sum, of which `items` has made the mean
        loss = WORLD * student(x[part], teacher[part], weight, labels[part], items)
        loss.backward()
        total += loss.detach() / WORLD
    dist.all_reduce(total)
    return total


def _ddp(rank: int, linear: bool) -> dict[str, Tensor]:
    student = DistributedDataParallel(Student(linear))
    reductions = []

    def count(_, bucket):
        reductions.extend(p.shape for p in bucket.parameters())
        summed = dist.all_reduce(bucket.buffer() / WORLD, async_op=True).get_future()
        return summed.then(lambda done: done.value()[0])

    student.register_comm_hook(None, count)

    def hold(last: bool) -> None:
        student.require_backward_grad_sync = last

    loss = _accumulate(student, rank, hold)
    assert reductions.count(torch.Size([VOCAB, WIDTH])) == 1, "the head's gradient reaches the reducer once"
    return {"loss": loss, **{name: p.grad for name, p in student.module.named_parameters() if p.grad is not None}}


def _fsdp2(rank: int, linear: bool) -> dict[str, Tensor]:
    student = fully_shard(Student(linear))
    loss = _accumulate(student, rank, student.set_requires_gradient_sync)
    assert student.head.weight.grad.to_local().shape[0] < VOCAB  # type: ignore[operator]
    gradients = {name: p.grad.full_tensor() for name, p in student.named_parameters() if p.grad is not None}
    return {"loss": loss, **gradients}


RUNS = {"ddp": _ddp, "fsdp2": _fsdp2}


def _process(rank: int, how: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        torch.save([RUNS[how](rank, linear) for linear in (True, False)], f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("how", RUNS)
def test_parts_of_ranks_and_steps_add_up_to_the_whole(how: str, tmp_path: Path) -> None:
    """num_items_in_batch over ranks and accumulation steps, with parts of unequal size, one of them without a label."""
    mp.spawn(_process, (how, str(tmp_path)), nprocs=WORLD)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    for number, linear in enumerate((True, False)):
        whole = _whole(linear)
        for result in results:
            assert result[number].keys() == whole.keys()
            for name, value in whole.items():
                message = lambda m, n=name, k=linear: f"{n}, linear {k}: {m}"  # noqa: E731
                torch.testing.assert_close(result[number][name], value, rtol=1e-5, atol=1e-7, msg=message)


def test_the_mean_of_each_part_would_not_add_up() -> None:
    """What num_items_in_batch is for: averages of parts of unequal size are not the average of the whole."""
    student, (x, teacher, weight, labels) = Student(), _batch()
    parts = [part for rank in PARTS for part in rank]
    means = [student(x[p], teacher[p], weight, labels[p], (labels[p] != -100).sum()) for p in parts]
    whole = student(x, teacher, weight, labels, (labels != -100).sum())
    assert abs(sum(means) / len(means) - whole) > 1e-2
    items = (labels != -100).sum()
    sums = [student(x[p], teacher[p], weight, labels[p], items) for p in parts]
    torch.testing.assert_close(torch.stack(sums).sum(), whole)
