"""DTensors as hidden states and heads: cases, what a rank computes of them, what is refused. Tests are in
test_shard.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import linear_cases
import torch
import torch.nn.functional as F
from inputs import BF16
from shard_dtensors import AXES
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from fastkd import LinearKDLoss, linear_kd_loss


class LinearDTensorCase(NamedTuple):
    """axes: as of a DTensorCase."""

    axes: str
    options: dict[str, Any]
    dtype: torch.dtype = torch.float32
    teacher_logits: bool = False
    plain: bool = False  # this rank's parts of the teacher and of what has one value a token

    @property
    def inputs(self) -> linear_cases.Case:
        return linear_cases.Case(rows=9, hidden=8, teacher_hidden=5, vocab=37, dtype=self.dtype)


SOFT = {"temperature": 2.0, "ce_weight": 0.5, "chunk_size": 2}
PER_TOKEN = {"temperature": torch.linspace(0.5, 3, 9), "token_weights": torch.linspace(2, 0.25, 9)}
CASES = {
    "vocabulary": LinearDTensorCase("v", {**SOFT, **PER_TOKEN}),
    "vocabulary, jsd, logits": LinearDTensorCase("v", {**SOFT, "divergence": "jsd"}, teacher_logits=True),
    "vocabulary, parts of the rank": LinearDTensorCase("v", {**SOFT, "reduction": "sum"}, plain=True),
    "rows": LinearDTensorCase("r", {**SOFT, **PER_TOKEN, "divergence": "reverse_kl"}),
    "rows, logits of the rank": LinearDTensorCase("r", {"num_items_in_batch": 7}, teacher_logits=True, plain=True),
    "rows, a loss each": LinearDTensorCase("r", {**SOFT, "reduction": "none"}),
    "replicas": LinearDTensorCase("-", SOFT, BF16),
    "rows and vocabulary": LinearDTensorCase("rv", {**SOFT, **PER_TOKEN, "divergence": "jsd"}),
    "rows and vocabulary, logits": LinearDTensorCase("rv", SOFT, teacher_logits=True),
    "replicas and vocabulary": LinearDTensorCase("-v", SOFT, BF16),
}


def upstream(case: LinearDTensorCase) -> Tensor | None:
    """(N) where each row has its own."""
    return torch.linspace(-1, 2, 9) if case.options.get("reduction") == "none" else None


def run_rank(case: LinearDTensorCase, world: int) -> dict[str, Any] | None:
    """Loss and whole gradients; None where the mesh needs more ranks."""
    if len(case.axes) == 2 and world < 4:
        return None
    mesh = init_device_mesh("cpu", (world,) if len(case.axes) == 1 else (2, world // 2))
    problem = linear_cases.make_problem(case.inputs)
    rows = [Shard(0) if axis == "r" else Replicate() for axis in case.axes]
    head = [Shard(0) if axis == "v" else Replicate() for axis in case.axes]
    logits = [AXES[axis] for axis in case.axes]
    spread: Callable[..., Any] = lambda x, placements: None if x is None else distribute_tensor(x, mesh, placements)  # noqa: E731
    local = lambda x: x.to_local() if case.plain and isinstance(x, DTensor) else x  # noqa: E731
    kinds = (rows, head, head)
    student = [spread(x.detach(), kind).requires_grad_() for x, kind in zip(problem.student, kinds)]
    per_token = {k: local(spread(v, rows)) for k, v in case.options.items() if isinstance(v, Tensor)}
    teacher = dict(zip(("teacher_hidden", "teacher_weight", "teacher_bias"), map(spread, problem.teacher, kinds)))
    if case.teacher_logits:
        teacher = {"teacher_logits": spread(F.linear(*problem.teacher), logits)}
    teacher = {k: local(v) for k, v in teacher.items()}
    items = {k: v for k, v in case.options.items() if k == "num_items_in_batch"}
    criterion = LinearKDLoss(**{k: v for k, v in case.options.items() if k not in {*per_token, *items}})
    labels = local(spread(problem.labels, rows))
    loss = criterion(*student[:2], labels=labels, student_bias=student[2], **teacher, **per_token, **items)
    up = upstream(case)
    loss.backward(None if up is None else spread(up, rows).to_local())
    for x, kind in zip(student, kinds):
        assert list(x.grad.placements) == kind and x.grad.to_local().shape == x.to_local().shape
    if up is not None:
        loss = DTensor.from_local(loss.detach(), mesh, rows, shape=up.shape, stride=up.stride()).full_tensor()
    return {"loss": loss.detach(), "gradients": tuple(x.grad.full_tensor() for x in student)}


# --- what is refused: by every rank by itself, before anything is exchanged ------------------------------------------


def _arguments(world: int) -> dict[str, Any]:
    """A vocabulary on all ranks."""
    mesh, problem = init_device_mesh("cpu", (world,)), linear_cases.make_problem(linear_cases.Case(rows=4, vocab=12))
    (hidden, weight, bias), (teacher_hidden, teacher_weight, _) = problem.student, problem.teacher
    here = lambda x, placement: distribute_tensor(x.detach(), mesh, [placement])  # noqa: E731
    return {
        "student_hidden": here(hidden, Replicate()), "student_weight": here(weight, Shard(0)),
        "student_bias": here(bias, Shard(0)), "teacher_hidden": here(teacher_hidden, Replicate()),
        "teacher_weight": here(teacher_weight, Shard(0)), "labels": here(problem.labels.clamp(min=0), Replicate()),
    }  # fmt: skip


def _as(*placements: Any) -> Callable[[DTensor], DTensor]:
    """The same part of each rank, said to lie otherwise."""
    return lambda x: DTensor.from_local(x.to_local(), x.device_mesh, placements)


def _moved(placement: Any) -> Callable[[DTensor], DTensor]:
    return lambda x: x.redistribute(placements=[placement])


def _elsewhere(x: DTensor) -> DTensor:
    mesh = init_device_mesh("cpu", (x.device_mesh.size(), 1))
    return DTensor.from_local(x.to_local(), mesh, [*x.placements, Replicate()])


def _fsdp(x: DTensor) -> Any:
    """The head of a module whose parameters FSDP2 keeps in parts, outside of its forward."""
    head = torch.nn.Linear(12, 12, bias=False)
    return fully_shard(head, mesh=x.device_mesh).weight


def _of(rows: int, *shape: int) -> Callable[[DTensor], DTensor]:
    return lambda x: distribute_tensor(torch.ones(rows, *shape).to(x.dtype), x.device_mesh, x.placements)


_PLAIN = {f"student_{name}": DTensor.full_tensor for name in ("hidden", "weight", "bias")}
WRONG: dict[str, dict[str, Callable]] = {
    "weight Shard(1)": {"student_weight": _moved(Shard(1))},
    "weight Partial": {"student_weight": _as(Partial())},
    "hidden Shard(-1)": {"student_hidden": _moved(Shard(1))},
    "hidden Partial": {"student_hidden": _as(Partial())},
    "rows and vocabulary in one dimension": {"student_hidden": _moved(Shard(0))},
    "another mesh": {"student_weight": _elsewhere},
    "bias lies otherwise": {"student_bias": _moved(Replicate())},
    "bias of a part": {"student_bias": DTensor.to_local},
    "bias too short": {"student_bias": _of(11)},
    "hidden of this rank": {"student_hidden": DTensor.to_local},
    "weight of this rank": {"student_weight": DTensor.to_local},
    "head that FSDP2 shards": {**_PLAIN, "student_weight": _fsdp, "student_bias": lambda _: None},
    "only labels": {**_PLAIN, "teacher_hidden": DTensor.full_tensor, "teacher_weight": DTensor.full_tensor},
    "teacher's head lies otherwise": {"teacher_weight": _moved(Replicate())},
    "teacher's hidden lies otherwise": {"teacher_hidden": _moved(Shard(0))},
    "teacher's rows": {"teacher_hidden": _of(5, 20)},
    "teacher's vocabulary": {"teacher_weight": _of(13, 20)},
    "whole head of the teacher": {"teacher_weight": DTensor.full_tensor},
    "teacher trains": {"teacher_weight": lambda x: x.requires_grad_()},
    "labels lie otherwise": {"labels": _moved(Shard(0))},
    "labels too short": {"labels": _of(3)},
}


def refused(name: str, world: int) -> tuple[str, str]:
    """Type and words of the error; empty where there is none."""
    arguments = _arguments(world)
    arguments |= {key: change(arguments[key]) for key, change in WRONG[name].items()}
    try:
        linear_kd_loss(**arguments)
    except (TypeError, ValueError) as error:
        return type(error).__name__, str(error)
    return "", ""
