"""The per-token figures that ``return_stats=True`` adds."""

from __future__ import annotations

from typing import NamedTuple

import torch


class KDStats(NamedTuple):
    """Detached fp32 tensors of the labels' shape ``(...)``; 0 at ignored tokens. Entropies are in nats.

    kd: the divergence of the token, without T² and weights.
    ce: the cross-entropy of the token with label smoothing and z-loss; 0 without labels.
    student_entropy, teacher_entropy: of the distributions at the token's temperature.
    top1_agreement: 1.0 where both models rank the same token first (lowest index at a tie), else 0.0.
    """

    kd: torch.Tensor
    ce: torch.Tensor
    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor
    top1_agreement: torch.Tensor
