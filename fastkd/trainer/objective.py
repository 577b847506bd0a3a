"""One pass of the student and its loss against what a teacher has for the batch; logits exist only where they must."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from .. import KDLoss, KDStats, TopKTeacher, linear_kd_loss, linear_sparse_kd_loss, sparse_kd_loss
from ..cache import Head
from .heads import final_hidden


@dataclass
class Answer:
    """What a model has to say about a batch: logits, or hidden states and the head that makes logits of them.

    logits: ``(B, S, V)``. hidden: ``(B, S, H)``, with ``head``.
    """

    logits: Tensor | None = None
    hidden: Tensor | None = None
    head: Head | None = None


def ask_student(model: PreTrainedModel, head: Head | None, input_ids: Tensor, accelerator: Accelerator) -> Answer:
    """The student's answer; ``head``: its own, which the loss then applies, or None for its logits."""
    with accelerator.autocast():
        if head is None:
            return Answer(logits=model(input_ids=input_ids, use_cache=False).logits)
        return Answer(hidden=final_hidden(model, input_ids), head=head)


def distillation_loss(
    student: Answer,
    teacher: Answer | TopKTeacher,
    labels: Tensor,
    accelerator: Accelerator,
    *,
    num_items: int | None = None,
    with_stats: bool = False,
    **options: Any,
) -> tuple[Tensor, KDStats | None]:
    """The loss as its share of ``num_items`` predictions (None: their mean), and fastkd's per-token statistics.

    options: the fields of :class:`fastkd.trainer.config.LossConfig`.
    """
    options |= {"num_items_in_batch": num_items, "return_stats": with_stats}
    if isinstance(teacher, TopKTeacher):
        options.pop("vocab", None)  # a teacher of K columns has no width to truncate to
        result = _sparse(student, teacher, labels, accelerator, options)
    elif student.head is not None and teacher.head is not None:
        result = _linear(student, teacher, labels, accelerator, options)
    else:
        result = _dense(student, teacher, labels, accelerator, options)
    return result if isinstance(result, tuple) else (result, None)


def _sparse(student: Answer, teacher: TopKTeacher, labels: Tensor, accelerator: Accelerator, options: dict[str, Any]):
    if student.head is None:
        assert student.logits is not None
        inplace = is_head_output(student.logits)
        return sparse_kd_loss(student.logits, teacher, labels, inplace=inplace, **options)
    assert student.hidden is not None
    head = student.head
    with accelerator.autocast():
        return linear_sparse_kd_loss(
            student.hidden,
            head.weight,
            teacher,
            labels,
            student_bias=head.bias,
            student_softcap=head.softcap,
            **options,
        )


def _linear(student: Answer, teacher: Answer, labels: Tensor, accelerator: Accelerator, options: dict[str, Any]):
    assert student.hidden is not None and student.head is not None and teacher.head is not None
    ours, theirs = student.head, teacher.head
    with accelerator.autocast():
        return linear_kd_loss(
            student.hidden, ours.weight, teacher.hidden, theirs.weight, labels,
            student_bias=ours.bias, teacher_bias=theirs.bias,
            student_softcap=ours.softcap, teacher_softcap=theirs.softcap, **options,
        )  # fmt: skip


def _dense(student: Answer, teacher: Answer, labels: Tensor, accelerator: Accelerator, options: dict[str, Any]):
    assert student.logits is not None
    softcap, logits = None, teacher.logits
    if teacher.head is not None:
        assert teacher.hidden is not None
        softcap = teacher.head.softcap
        with accelerator.autocast(), torch.no_grad():
            logits = torch.nn.functional.linear(teacher.hidden, teacher.head.weight, teacher.head.bias)
    assert logits is not None
    shared = logits.data_ptr() == student.logits.data_ptr()  # hard labels alone: the student stands for the teacher
    options |= {"teacher_softcap": softcap, "inplace": is_head_output(student.logits) and not shared}
    num_items = options.pop("num_items_in_batch")
    return KDLoss(**options)(student.logits, logits, labels, num_items_in_batch=num_items)


def is_head_output(logits: Tensor) -> bool:
    """Whether the logits come straight out of a matrix product, which does not need them again in backward, so that
    their memory can take the gradient. A softcap after the head (tanh) does need them."""
    return logits.grad_fn is not None and logits.grad_fn.name().startswith(("UnsafeView", "Mm", "Addmm", "Linear"))
