"""Paired differences between models on the same held-out rows, with error bars that respect the documents."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

RESAMPLES = 10_000


@dataclass
class Difference:
    """Mean over the rows of a - b, and half the width of its 95 % interval."""

    mean: float
    half_width: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0."""
        return abs(self.mean) > self.half_width

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ±{self.half_width:.3f}"


def paired_difference(a: Tensor, b: Tensor, document: Tensor, seed: int = 0) -> Difference:
    """Cluster bootstrap of the paired difference: documents, not rows, are drawn again with replacement.

    Args:
        a, b: ``(R,)`` a figure of two models on the same rows.
        document: ``(R,)`` the document of each row; rows of one document are not independent.

    Returns:
        The mean and 1.96 standard deviations of the bootstrap distribution; an infinite width with one document only.
    """
    difference = (a - b).double().numpy()
    _, cluster = np.unique(document.numpy(), return_inverse=True)
    sums = np.bincount(cluster, weights=difference)
    sizes = np.bincount(cluster)
    if len(sums) < 2:
        return Difference(float(difference.mean()), float("inf"))
    drawn = np.random.default_rng(seed).integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    return Difference(float(difference.mean()), float(1.96 * means.std()))
