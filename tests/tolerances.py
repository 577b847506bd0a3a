"""When a result counts as equal to the reference.

Errors are measured relative to the reference's magnitude (reference.py), where cancellation cannot excuse anything.
The bound on an element is the sum of

    K times the largest error, on that scale, of the eager backend computing the same values in fp32,
    FLOOR fp32 eps, for inputs on which eager happens to be exact (one column, powers of two),
    the rounding of the stored result: half a unit in the last place of the *reference's own* value per rounding,
    what the reference calls undecidable (total_variation beside a tie), and one step of the smallest numbers: of the
    stored dtype, and of the exponentials, which may be 0 below 2^-126 (here 2^-110 of the largest magnitude).

bf16 and fp16 logits are exact in fp32 and all arithmetic is fp32, so only the last rounding depends on their dtype.
"""

from __future__ import annotations

import numpy as np
import torch
from inputs import Outcome, to_numpy
from reference import Reference

K = 4.0
EPS = 2.0**-24  # unit roundoff of fp32
FLOOR = 16.0
# half a unit in the last place, relative, and the step of the subnormals
_HALF_ULP = {
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
    torch.float64: 2.0**-53,
}
_STEP = {torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-24, torch.float64: 2.0**-126}
_UNDERFLOW = 2.0**-110


def relative_error(
    actual: np.ndarray, expected: np.ndarray, magnitude: np.ndarray, slack: np.ndarray | float = 0.0
) -> float:
    """Largest error on the scale of the magnitude, over the finite elements."""
    finite = np.isfinite(expected) & np.isfinite(magnitude) & (magnitude > 0)
    error = np.abs(actual - expected) - slack - _UNDERFLOW * np.max(magnitude, initial=0.0, where=finite)
    if not finite.any():
        return 0.0
    return float(np.max(np.where(finite, error, 0) / np.where(finite, magnitude, 1), initial=0.0))


def assert_close(
    name: str,
    actual: torch.Tensor,
    expected: np.ndarray,
    magnitude: np.ndarray,
    yardstick: torch.Tensor,
    *,
    slack: np.ndarray | float = 0.0,
    roundings: int = 1,
    step_factor: float = 1.0,
) -> None:
    """Raise AssertionError naming the worst element. Infinities must match; where the reference is NaN, anything
    that is not finite passes, in a gradient anything in a row that is not finite throughout. yardstick: eager's
    result in fp32. roundings: how often the result was stored. step_factor: what multiplied it after it was stored.
    """
    got, eager = to_numpy(actual), to_numpy(yardstick)
    assert got.shape == expected.shape, f"{name}: shape {got.shape}, expected {expected.shape}"
    if got.size == 0:
        return
    defined = np.isfinite(expected) & np.isfinite(magnitude)
    same_infinity = np.isinf(expected) & (got == expected)
    spoilt = ~np.isfinite(got)
    if name == "gradient":  # a row without a gradient says so somewhere
        spoilt = spoilt.any(-1, keepdims=True)
    undefined = np.isnan(expected) & spoilt
    with np.errstate(invalid="ignore"):
        unit = K * relative_error(eager, expected, magnitude, slack) + FLOOR * EPS
        stored = roundings * _HALF_ULP[actual.dtype] * np.abs(expected)
        largest = np.max(magnitude, initial=0.0, where=np.isfinite(magnitude))
        step = _STEP[actual.dtype] * (1 + step_factor) + _UNDERFLOW * largest
        bound = unit * magnitude + slack + stored * (1 + 2.0**-10) + step
        error = np.abs(got - expected)
        good = same_infinity | undefined | (defined & (error <= bound))
    if good.all():
        return
    with np.errstate(invalid="ignore", divide="ignore"):
        excess = np.where(good, 0, np.nan_to_num(error / bound, nan=np.inf, posinf=np.inf))
    worst = np.unravel_index(int(np.argmax(excess)), excess.shape)
    place = tuple(int(i) for i in worst)
    raise AssertionError(
        f"{name}{list(place)} = {got[worst]!r}, reference {expected[worst]!r}: error {error[worst]:.3g} is "
        f"{excess[worst]:.3g} times the bound {bound[worst]:.3g} (eager's own error {unit / EPS:.3g} eps after K and "
        f"floor); {np.count_nonzero(~good)} of {good.size} elements are off"
    )


def assert_close_to_reference(
    outcome: Outcome, expected: Reference, eager: Outcome, *, roundings: int = 1, step_factor: float = 1.0
) -> None:
    """Loss, gradient and statistics of an outcome. eager: the eager backend on the same values in fp32."""
    assert_close("loss", outcome.loss, expected.loss, expected.loss_magnitude, eager.loss)
    if outcome.gradient is not None:
        assert eager.gradient is not None
        assert_close(
            "gradient",
            outcome.gradient,
            expected.gradient,
            expected.gradient_magnitude,
            eager.gradient,
            slack=expected.gradient_slack,
            roundings=roundings,
            step_factor=step_factor,
        )
    if outcome.stats is None:
        return
    assert eager.stats is not None
    for name in ("kd", "ce", "student_entropy", "teacher_entropy"):
        value, magnitude = getattr(expected, name), getattr(expected, f"{name}_magnitude")
        assert_close(f"stats.{name}", getattr(outcome.stats, name), value, magnitude, getattr(eager.stats, name))
    sure = ~expected.top1_unsure
    agreement = to_numpy(outcome.stats.top1_agreement)
    assert (agreement[sure] == expected.top1_agreement[sure]).all(), "stats.top1_agreement"
