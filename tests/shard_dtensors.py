"""DTensors as logits: cases, and what a rank computes of them. Tests are in test_shard.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from inputs import Case, Inputs, make_inputs
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fastkd import KDLoss


class DTensorCase(NamedTuple):
    """axes: of a mesh that many ranks wide in all, by what each shards: "v" the vocabulary, "r" rows, "-" nothing."""

    axes: str
    options: dict[str, Any]
    plain_labels: bool = False  # this rank's part instead of a DTensor


SOFT = {"temperature": True, "token_weights": True, "ce_weight": 0.5}
AXES = {"v": Shard(1), "r": Shard(0), "-": Replicate()}  # placements of logits (N, V)
CASES = {
    "vocabulary": DTensorCase("v", {**SOFT, "return_stats": True}),
    "vocabulary, jsd": DTensorCase("v", {"divergence": "jsd", "reduction": "sum"}),
    "rows": DTensorCase("r", {**SOFT, "divergence": "reverse_kl"}),
    "rows, labels of the rank": DTensorCase("r", {"ce_weight": 1.0, "num_items_in_batch": 7}, plain_labels=True),
    "rows and vocabulary": DTensorCase("rv", {**SOFT, "divergence": "jsd"}),
    "replicas and vocabulary": DTensorCase("-v", SOFT),
}
INPUTS = Case("uneven parts of rows and columns", lead=(5,), vocab=37)


def whole(case: DTensorCase) -> tuple[Inputs, dict[str, Any]]:
    """Inputs, and keywords with tensors in place, of the whole loss."""
    inputs, g = make_inputs(INPUTS), torch.Generator().manual_seed(5)
    keywords: dict[str, Any] = {"labels": inputs.labels, **case.options}
    if keywords.get("temperature") is True:
        keywords["temperature"] = 0.5 + 2 * torch.rand(5, generator=g)
    if keywords.get("token_weights") is True:
        keywords["token_weights"] = inputs.token_weights
    return inputs, keywords


def run_rank(case: DTensorCase, world: int) -> dict[str, Any] | None:
    """Loss and whole gradient; None where the mesh needs more ranks."""
    if len(case.axes) == 2 and world < 4:
        return None
    mesh = init_device_mesh("cpu", (world,) if len(case.axes) == 1 else (2, world // 2))
    logits = [AXES[axis] for axis in case.axes]
    per_token = [Shard(0) if axis == "r" else Replicate() for axis in case.axes]
    inputs, keywords = whole(case)
    student = distribute_tensor(inputs.student, mesh, logits).requires_grad_()
    teacher = distribute_tensor(inputs.teacher, mesh, logits)
    tensors = {k: distribute_tensor(v, mesh, per_token) for k, v in keywords.items() if isinstance(v, Tensor)}
    if case.plain_labels:
        tensors["labels"] = tensors["labels"].to_local()
    labels, temperature = tensors.pop("labels"), tensors.pop("temperature", None)
    items = keywords.get("num_items_in_batch")
    options = {k: v for k, v in case.options.items() if k not in ("temperature", "token_weights", "num_items_in_batch")}
    criterion = KDLoss(**options)
    result = criterion(student, teacher, labels, temperature=temperature, num_items_in_batch=items, **tensors)
    loss = result[0] if isinstance(result, tuple) else result
    loss.backward()
    gradient = student.grad
    assert isinstance(gradient, DTensor) and list(gradient.placements) == logits
    assert gradient.to_local().shape == student.to_local().shape
    return {"loss": loss.detach(), "gradient": gradient.full_tensor()}
