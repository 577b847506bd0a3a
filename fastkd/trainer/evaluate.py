"""Held-out figures of a student beside its teacher, row by row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from ..cache import Head
from .data import Rows, shifted_labels
from .objective import Answer, ask_student, distillation_loss
from .teacher import Teacher


@dataclass
class Evaluation:
    """Means over the predictions of each row, ``(R,)`` fp64 on the CPU.

    nll: cross-entropy with the next token, nats.
    kl: KL(teacher||student), nats, at temperature 1; against K columns, at theirs and with their tail.
    agreement: share of positions where both rank the same token first.
    """

    nll: Tensor
    kl: Tensor
    agreement: Tensor

    def means(self) -> dict[str, float]:
        """Mean over the rows; rows are equally long."""
        return {
            "nll": self.nll.mean().item(),
            "kl": self.kl.mean().item(),
            "agreement": self.agreement.mean().item(),
        }


@torch.no_grad()
def evaluate(
    student: PreTrainedModel,
    head: Head | None,
    teacher: Teacher,
    rows: Rows,
    split: str,
    accelerator: Accelerator,
    rows_per_batch: int,
    vocab: str = "error",
) -> Evaluation:
    """Run a student over held-out rows.

    Args:
        student: left in the mode (train or eval) it was in.
        head: the student's, or None where its logits are not its head's (:func:`fastkd.trainer.heads.find_head`).
        teacher: has ``split``.
        rows: ``R`` rows of ``S`` tokens, ``S - 1`` predictions each.
        rows_per_batch: rows in one forward pass.
        vocab: as in :func:`fastkd.kd_loss`.
    """
    was_training = student.training
    student.eval()
    parts = []
    for indices in torch.arange(len(rows)).split(rows_per_batch):
        input_ids = rows.input_ids[indices].to(accelerator.device)
        answer = ask_student(student, head if teacher.takes_hidden else None, input_ids, accelerator)
        _, stats = distillation_loss(
            answer,
            teacher.batch(split, indices, input_ids),
            shifted_labels(input_ids),
            accelerator,
            with_stats=True,
            temperature=teacher.temperature or 1.0,
            ce_weight=1.0,
            vocab=vocab,
        )
        assert stats is not None
        parts.append(torch.stack([stats.ce, stats.kd, stats.top1_agreement]).double().sum(-1).cpu())
    student.train(was_training)
    sums = torch.cat(parts, dim=1) / (rows.input_ids.shape[1] - 1)
    return Evaluation(*sums)


@torch.no_grad()
def evaluate_teacher(
    teacher: Teacher, rows: Rows, split: str, accelerator: Accelerator, rows_per_batch: int
) -> Evaluation | None:
    """The teacher against itself: its nll, a KL of 0, an agreement of 1. None where it names K columns only, which need
    not have the next token. Arguments as in :func:`evaluate`."""
    sums = []
    for indices in torch.arange(len(rows)).split(rows_per_batch):
        input_ids = rows.input_ids[indices].to(accelerator.device)
        answer = teacher.batch(split, indices, input_ids)
        if not isinstance(answer, Answer):
            return None
        labels = shifted_labels(input_ids)
        _, stats = distillation_loss(answer, answer, labels, accelerator, with_stats=True, ce_weight=1.0)
        assert stats is not None
        sums.append(stats.ce.double().sum(-1).cpu())
    nll = torch.cat(sums) / (rows.input_ids.shape[1] - 1)
    return Evaluation(nll, torch.zeros_like(nll), torch.ones_like(nll))
