"""Logits that are DTensors: a mesh dimension may shard the vocabulary, others the rows. Of the linear loss, too, what
does not depend on where logits come from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import describe
from .shard import VocabShard


def is_dtensor(x: object) -> bool:
    """Without an import of what most callers have no use for."""
    return isinstance(x, Tensor) and hasattr(x, "full_tensor")


class Layout(NamedTuple):
    """How the rows and columns of the student's logits lie on a mesh."""

    mesh: Any
    placements: tuple[
        Any, ...
    ]  # of the logits, or of the hidden states, which no mesh dimension of the vocabulary shards
    vocab_dim: int | None  # mesh dimension that shards the vocabulary
    row_dims: tuple[int, ...]  # mesh dimensions that shard rows

    def per_token(self) -> tuple[Any, ...]:
        """Placements of what has one value a token."""
        from torch.distributed.tensor import Replicate

        return tuple(Replicate() if dim == self.vocab_dim else p for dim, p in enumerate(self.placements))

    def with_columns(self, last: int) -> tuple[Any, ...]:
        """Placements of logits, whose dimension ``last`` is the vocabulary."""
        from torch.distributed.tensor import Shard

        return tuple(Shard(last) if dim == self.vocab_dim else p for dim, p in enumerate(self.placements))

    def shard(self, vocab: int) -> VocabShard | None:
        """This rank's columns: equal parts, the last ones smaller or empty, as Shard cuts."""
        if self.vocab_dim is None:
            return None
        width = -(-vocab // self.mesh.size(self.vocab_dim))
        start = min(width * self.mesh.get_local_rank(self.vocab_dim), vocab)
        return VocabShard(start, min(start + width, vocab), self.mesh.get_group(self.vocab_dim))

    def add_up(self, x: Tensor) -> None:
        """x <- its sum over the ranks that have other rows."""
        for dim in self.row_dims:
            dist.all_reduce(x, group=self.mesh.get_group(dim))


def layout_of(student_logits: Any) -> Layout:
    """Raise TypeError for placements that the loss cannot take."""
    from torch.distributed.tensor import Replicate, Shard

    last = student_logits.dim() - 1
    vocab_dims: list[int] = []
    row_dims: list[int] = []
    for dim, placement in enumerate(student_logits.placements):
        if type(placement) is Replicate:
            continue
        if type(placement) is not Shard or (placement.dim == last and vocab_dims):
            raise TypeError(
                "student_logits, a DTensor, may be Replicate, Shard(-1) in one mesh dimension (its vocabulary) and "
                f"Shard of rows; got {student_logits.placements}"
            )
        (vocab_dims if placement.dim == last else row_dims).append(dim)
    vocab_dim = vocab_dims[0] if vocab_dims else None
    return Layout(student_logits.device_mesh, tuple(student_logits.placements), vocab_dim, tuple(row_dims))


def local_part(
    name: str, x: Any, layout: Layout, placements: tuple[Any, ...], like: str, lead: torch.Size | None = None
) -> Any:
    """This rank's part of a DTensor with these placements on the mesh of ``like``; anything else as it is, a local
    part. lead: what the whole tensor's shape must begin with: a part may fit on one rank and not on another."""
    if not is_dtensor(x):
        return x
    if x.device_mesh != layout.mesh or tuple(x.placements) != placements:
        raise ValueError(
            f"{name}, a DTensor, must lie on the mesh of {like} with the placements {placements}; got "
            f"{tuple(x.placements)} on {x.device_mesh}"
        )
    if lead is not None and x.shape[: len(lead)] != lead:
        raise ValueError(f"{name} must agree with {like} in its leading dimensions {tuple(lead)}; got {tuple(x.shape)}")
    if x.requires_grad:
        raise ValueError(f"{name} must not require grad; pass {name}.detach()")
    return x.to_local()


class _Whole(torch.autograd.Function):
    """The sum over ranks with other rows as value, the own part's gradient."""

    @staticmethod
    def forward(ctx, loss: Tensor, layout: Layout) -> Tensor:
        whole = loss.clone()
        layout.add_up(whole)
        return whole

    @staticmethod
    def backward(ctx, upstream: Tensor):
        return upstream, None


def _items(rows: Tensor, labels: Tensor | None, weights: Tensor | None, ignore_index: int, layout: Layout) -> Tensor:
    """0-d: the denominator of the mean over all ranks' rows."""
    lead = rows.shape[:-1]
    each = torch.ones(lead, dtype=torch.float32, device=rows.device) if weights is None else weights.float()
    if labels is not None:
        each = torch.where(labels != ignore_index, each, 0.0)
    total = each.sum()
    layout.add_up(total)
    return total


def with_items_of_all_rows(keywords: dict[str, Any], rows: Tensor, labels: Tensor | None, layout: Layout) -> None:
    """Sets num_items_in_batch where the mean is over rows of several ranks; all are those of this rank."""
    if layout.row_dims and keywords["reduction"] == "mean" and keywords["num_items_in_batch"] is None:
        weights, ignore = keywords["token_weights"], keywords["ignore_index"]
        keywords["num_items_in_batch"] = _items(rows, labels, weights, ignore, layout)


def of_all_rows(result: Any, reduction: str, layout: Layout) -> Any:
    """A loss function's result of this rank's rows, the reduced loss as that of all rows."""
    if not layout.row_dims or reduction == "none":
        return result
    loss, *stats = result if isinstance(result, tuple) else (result,)
    loss = _Whole.apply(loss, layout)
    return (loss, *stats) if stats else loss


def _check_teacher(teacher_logits: Any, student: Tensor, vocab: int) -> None:
    """As wide as the student, whose parts of a vocabulary of this size ``student`` is one of."""
    if is_dtensor(teacher_logits) and teacher_logits.shape[-1] != vocab:
        raise ValueError(
            "teacher_logits must have the vocabulary of student_logits where a mesh shards it; got "
            f"{teacher_logits.shape[-1]} and {vocab} columns"
        )
    if not is_dtensor(teacher_logits) and getattr(teacher_logits, "shape", None) != student.shape:
        raise ValueError(
            f"teacher_logits must be a DTensor like student_logits, or this rank's part {tuple(student.shape)}; "
            f"got {describe(teacher_logits)}"
        )


def kd_loss_of_dtensors(
    kd_loss: Callable[..., Any], student_logits: Any, teacher_logits: Any, labels: Any, keywords: dict[str, Any]
) -> Any:
    """kd_loss of this rank's part of DTensors, by kd_loss of plain tensors. keywords: its other arguments.

    A reduced loss is that of all rows, the same on every rank; losses and statistics per token are those of this rank's
    rows. The gradient of the student's logits is a DTensor of their placements.
    """
    if keywords["vocab_shard"] is not None:
        raise ValueError("vocab_shard must be None where student_logits is a DTensor, which says how it lies")
    if not is_dtensor(student_logits):
        raise TypeError(f"teacher_logits is a DTensor and student_logits is not; got {describe(student_logits)}")
    layout = layout_of(student_logits)
    vocab, lead, like = student_logits.shape[-1], student_logits.shape[:-1], "student_logits"
    student = student_logits.to_local(grad_placements=layout.placements)
    teacher = local_part("teacher_logits", teacher_logits, layout, layout.placements, like, lead)
    labels = local_part("labels", labels, layout, layout.per_token(), like, lead)
    for name in ("token_weights", "temperature"):
        keywords[name] = local_part(name, keywords[name], layout, layout.per_token(), like, lead)
    if layout.vocab_dim is not None:
        _check_teacher(teacher_logits, student, vocab)
    keywords["vocab_shard"] = layout.shard(vocab)
    with_items_of_all_rows(keywords, student, labels, layout)
    return of_all_rows(kd_loss(student, teacher, labels, **keywords), keywords["reduction"], layout)
