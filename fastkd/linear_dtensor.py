"""Hidden states and heads that are DTensors: a mesh dimension may shard the vocabulary, others the rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .checks import describe
from .shard_dtensor import Layout, is_dtensor, local_part, of_all_rows, with_items_of_all_rows

STUDENT = ("student_hidden", "student_weight", "student_bias")


def _check_student(tensors: dict[str, Any]) -> None:
    """The student's are DTensors, all of them: their layout says what the parts of anything else are."""
    given = {name: tensors[name] for name in STUDENT if tensors[name] is not None}
    plain = [name for name, x in given.items() if not is_dtensor(x)]
    if not plain:
        return
    first = next(name for name, x in tensors.items() if is_dtensor(x))
    gather = (
        f" If FSDP2 shards {first}, call the loss inside the forward of the module that gathers it, or pass "
        f"{first}.full_tensor()."
    )
    raise TypeError(
        f"{first} is a DTensor, and {' and '.join(plain)} not, so that it is not known which rows and columns this "
        f"process has.{gather if first.endswith(('weight', 'bias')) else ''} If a mesh shards the vocabulary or the "
        f"rows, pass {', '.join(given)} as DTensors on it: DTensor.from_local(hidden, mesh, [Replicate()]) makes one "
        "of hidden states that all its ranks have"
    )


def layout_of_head(hidden: Any, weight: Any) -> Layout:
    """Of the rows of ``hidden`` and the vocabulary of ``weight``; raises for placements that the loss cannot take."""
    from torch.distributed.tensor import Replicate, Shard

    if weight.device_mesh != hidden.device_mesh:
        raise ValueError(
            f"student_weight, a DTensor, must lie on the mesh of student_hidden, {hidden.device_mesh}; got "
            f"{weight.device_mesh}"
        )
    vocab_dims: list[int] = []
    row_dims: list[int] = []
    for dim, (of_hidden, of_weight) in enumerate(zip(hidden.placements, weight.placements)):
        if type(of_weight) is Shard and of_weight.dim == 0 and not vocab_dims:
            vocab_dims.append(dim)
        elif type(of_weight) is not Replicate:
            raise TypeError(
                "student_weight, a DTensor, may be Replicate, and Shard(0) in one mesh dimension (its vocabulary); got "
                f"{weight.placements}"
            )
        if type(of_hidden) is Shard and of_hidden.dim < hidden.dim() - 1:
            row_dims.append(dim)
        elif type(of_hidden) is not Replicate:
            raise TypeError(
                "student_hidden, a DTensor, may be Replicate and Shard of rows (not of its last dimension); got "
                f"{hidden.placements}"
            )
    if set(vocab_dims) & set(row_dims):
        raise ValueError(
            "a mesh dimension may shard the rows or the vocabulary, not both; got student_hidden with "
            f"{hidden.placements} and student_weight with {weight.placements}: gather one of them, "
            "student_weight.redistribute(placements=[Replicate()] * mesh.ndim) where FSDP2 shards it"
        )
    vocab_dim = vocab_dims[0] if vocab_dims else None
    return Layout(hidden.device_mesh, tuple(hidden.placements), vocab_dim, tuple(row_dims))


def _check_vocabularies(tensors: dict[str, Any], sharded: bool) -> None:
    """Of whole tensors, alike on every rank: parts may fit on one and not on another."""
    weight, bias = tensors["student_weight"], tensors["student_bias"]
    if bias is not None and weight.dim() == 2 and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"student_bias must be (V) with V = {weight.shape[0]}; got {tuple(bias.shape)}")
    part = weight.to_local().shape[0]
    for name, dim in (("teacher_weight", 0), ("teacher_bias", 0), ("teacher_logits", -1)):
        x = tensors[name]
        if sharded and isinstance(x, Tensor) and x.dim() > 0:  # else it is said where parts are checked
            expected, what = (weight.shape[0], "a DTensor") if is_dtensor(x) else (part, "this rank's part of it")
            if x.shape[dim] != expected:
                raise ValueError(
                    f"{name} must have the vocabulary of student_weight where a mesh shards it, {expected} columns as "
                    f"{what}; got {x.shape[dim]} in {describe(x)}"
                )


class _Summed(torch.autograd.Function):
    """A head as it is; its gradient summed over the ranks with other rows."""

    @staticmethod
    def forward(ctx, head: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return head.view_as(head)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        whole = gradient.clone(memory_format=torch.contiguous_format)
        ctx.layout.add_up(whole)
        return whole, None


def _student_parts(tensors: dict[str, Any], layout: Layout) -> list[Any]:
    """This rank's parts, whose gradients become DTensors with the placements of what came."""
    hidden, weight, bias = (tensors[name] for name in STUDENT)
    parts = [hidden.to_local(grad_placements=layout.placements)]
    for name, x in (("student_weight", weight), ("student_bias", bias)):
        if x is None:
            parts.append(None)
            continue
        if x.device_mesh != layout.mesh or tuple(x.placements) != tuple(weight.placements):
            raise ValueError(
                f"{name}, a DTensor, must lie on the mesh of student_weight with its placements "
                f"{tuple(weight.placements)}; got {tuple(x.placements)} on {x.device_mesh}"
            )
        part = x.to_local(grad_placements=x.placements)
        parts.append(_Summed.apply(part, layout) if layout.row_dims and part.requires_grad else part)
    return parts


def linear_kd_loss_of_dtensors(
    linear_kd_loss: Callable[..., Any], tensors: dict[str, Any], keywords: dict[str, Any]
) -> Any:
    """linear_kd_loss of this rank's parts of DTensors, by linear_kd_loss of plain tensors.

    tensors: all that have a vocabulary or rows, by name; what of the teacher and of the tokens is no DTensor is this
    rank's part. keywords: the other arguments. Results as for kd_loss of DTensors; the gradients are DTensors with the
    placements of the student's tensors, those of its head summed over the ranks with other rows.
    """
    if keywords["vocab_shard"] is not None:
        raise ValueError("vocab_shard must be None where student_weight is a DTensor, which says how it lies")
    _check_student(tensors)
    hidden, weight = tensors["student_hidden"], tensors["student_weight"]
    layout = layout_of_head(hidden, weight)
    sharded, like, lead = layout.vocab_dim is not None, "student_hidden", hidden.shape[:-1]
    _check_vocabularies(tensors, sharded)
    student = _student_parts(tensors, layout)
    parts = dict(zip(STUDENT, student))
    for name, x in tensors.items():
        if name in ("teacher_weight", "teacher_bias"):
            parts[name] = local_part(name, x, layout, tuple(weight.placements), like)
        elif name not in STUDENT:
            placements = layout.with_columns(hidden.dim() - 1) if name == "teacher_logits" else layout.placements
            parts[name] = local_part(name, x, layout, placements, like, lead)
    keywords = {**keywords, **parts, "vocab_shard": layout.shard(weight.shape[0])}
    with_items_of_all_rows(keywords, student[0], parts["labels"], layout)
    return of_all_rows(linear_kd_loss(**keywords), keywords["reduction"], layout)
