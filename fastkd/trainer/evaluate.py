"""Held-out figures of a student beside its teacher, row by row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

import fastkd

from .data import Rows, shifted_labels
from .teacher import Teacher


@dataclass
class Evaluation:
    """Means over the predictions of each row, ``(R,)`` fp64 on the CPU.

    nll: cross-entropy with the next token, nats.
    kl: KL(teacher||student) at temperature 1, nats.
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
        teacher: gives logits for ``split``.
        rows: ``R`` rows of ``S`` tokens, ``S - 1`` predictions each.
        rows_per_batch: rows in one forward pass.
        vocab: as in :func:`fastkd.kd_loss`.
    """
    was_training = student.training
    student.eval()
    parts = []
    for indices in torch.arange(len(rows)).split(rows_per_batch):
        input_ids = rows.input_ids[indices].to(accelerator.device)
        with accelerator.autocast():
            student_logits = student(input_ids=input_ids, use_cache=False).logits
        _, stats = fastkd.kd_loss(
            student_logits,
            teacher.logits(split, indices, input_ids),
            shifted_labels(input_ids),
            ce_weight=1.0,
            vocab=vocab,
            return_stats=True,
        )
        parts.append(torch.stack([stats.ce, stats.kd, stats.top1_agreement]).double().sum(-1).cpu())
    student.train(was_training)
    sums = torch.cat(parts, dim=1) / (rows.input_ids.shape[1] - 1)
    return Evaluation(*sums)


@torch.no_grad()
def evaluate_teacher(teacher: Teacher, rows: Rows, split: str, rows_per_batch: int) -> Evaluation:
    """The teacher against itself: its nll, a KL of 0, an agreement of 1. Arguments as in :func:`evaluate`."""
    sums = []
    for indices in torch.arange(len(rows)).split(rows_per_batch):
        input_ids = rows.input_ids[indices].to(teacher.accelerator.device)
        logits = teacher.logits(split, indices, input_ids)
        _, stats = fastkd.kd_loss(logits, logits, shifted_labels(input_ids), ce_weight=1.0, return_stats=True)
        sums.append(stats.ce.double().sum(-1).cpu())
    nll = torch.cat(sums) / (rows.input_ids.shape[1] - 1)
    return Evaluation(nll, torch.zeros_like(nll), torch.ones_like(nll))
