"""The reference itself: its gradient against finite differences, its values against torch's own losses in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import DIVERGENCES, reference

STEP = np.longdouble(1e-6)

OPTIONS = {
    "alone": {},
    "temperature": {"temperature": 2.5, "scale_by_t2": False},
    "per token": {"temperature": np.array([0.5, 1.0, 3.0]), "token_weights": np.array([0.2, 1.5, 3.0])},
    "hard": {"ce_weight": 0.7, "label_smoothing": 0.1, "z_loss": 0.01, "kd_weight": 0.3, "temperature": 3.0},
    "softcaps": {"student_softcap": 2.0, "teacher_softcap": 5.0, "ce_weight": 0.5, "temperature": 2.0},
    "ignored": {"ce_weight": 1.0, "labels": np.array([1, -100, 4]), "reduction": "sum"},
    "items": {"num_items_in_batch": 7, "ce_weight": 1.0},
    "upstream": {"reduction": "none", "upstream": np.array([1.0, -2.0, 0.5]), "ce_weight": 0.5},
    "truncate": {"teacher_columns": 4, "labels": np.array([0, 3, 2]), "ce_weight": 0.4},
}


def _problem(options: dict) -> tuple[np.ndarray, np.ndarray, dict]:
    rng = np.random.default_rng(3)
    options = dict(options)
    student, teacher = (
        2 * rng.standard_normal((3, 6)),
        2 * rng.standard_normal((3, options.pop("teacher_columns", 6))),
    )
    options.setdefault("labels", np.array([5, 0, 2]))
    return student.astype(np.longdouble), teacher.astype(np.longdouble), options


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradient_is_the_slope_of_the_value(divergence: str, options: dict) -> None:
    student, teacher, options = _problem(options)

    def solve(s: np.ndarray):
        return reference(s, teacher, divergence=divergence, beta=0.3, dtype=np.longdouble, **options)

    upstream = np.broadcast_to(np.asarray(options.get("upstream", 1.0)), solve(student).loss.shape)
    gradient = solve(student).gradient
    for place in np.ndindex(student.shape):
        up, down = student.copy(), student.copy()
        up[place] += STEP
        down[place] -= STEP
        slope = ((solve(up).loss - solve(down).loss) * upstream).sum() / (2 * STEP)
        assert abs(slope - gradient[place]) < 1e-9, place


def test_total_variation_has_no_slope_at_a_tie() -> None:
    x = np.array([[0.3, -1.0, 2.0]])
    assert (reference(x, x, divergence="total_variation").gradient == 0).all()


def _rows(seed: int, vocab: int = 11) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(4, vocab, generator=g, dtype=torch.float64) for _ in range(2))
    return student, teacher, torch.randint(vocab, (4,), generator=g)


def _torch_value(divergence: str, student: torch.Tensor, teacher: torch.Tensor, beta: float) -> torch.Tensor:
    """The divergences by torch's own F.kl_div, in the definition's words."""
    lq, lp = student.log_softmax(-1), teacher.log_softmax(-1)

    def kl(log_a, log_b):
        return F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)

    def mix(share):
        return (share * lp.exp() + (1 - share) * lq.exp()).log()

    return {
        "forward_kl": lambda: kl(lp, lq),
        "reverse_kl": lambda: kl(lq, lp),
        "symmetric_kl": lambda: beta * kl(lp, lq) + (1 - beta) * kl(lq, lp),
        "jsd": lambda: beta * kl(lp, mix(beta)) + (1 - beta) * kl(lq, mix(beta)),
        "total_variation": lambda: 0.5 * (lp.exp() - lq.exp()).abs().sum(-1),
        "skew_forward_kl": lambda: kl(lp, mix(beta)),
        "skew_reverse_kl": lambda: kl(lq, mix(1 - beta)),
    }[divergence]()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_values_are_those_of_torch(divergence: str) -> None:
    student, teacher, _ = _rows(1)
    ours = reference(student.numpy(), teacher.numpy(), divergence=divergence, beta=0.3, reduction="none").loss
    np.testing.assert_allclose(ours, _torch_value(divergence, student, teacher, 0.3).numpy(), rtol=1e-12)


def test_cross_entropy_is_that_of_torch() -> None:
    student, teacher, labels = _rows(2)
    labels[1] = -100
    ours = reference(
        student.numpy(), teacher.numpy(), labels.numpy(), kd_weight=0.0, ce_weight=1.0, label_smoothing=0.2
    )
    theirs = F.cross_entropy(student, labels, label_smoothing=0.2)
    np.testing.assert_allclose(ours.loss, theirs.numpy(), rtol=1e-13)


def test_hinton_factor_and_mean() -> None:
    """T^2 batchmean KL of the Hinton paper, as F.kl_div has it."""
    student, teacher, _ = _rows(3)
    lq, lp = (student / 3).log_softmax(-1), (teacher / 3).log_softmax(-1)
    theirs = 9 * F.kl_div(lq, lp, reduction="batchmean", log_target=True)
    np.testing.assert_allclose(reference(student.numpy(), teacher.numpy(), temperature=3.0).loss, theirs, rtol=1e-13)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_conventions_of_masks(divergence: str) -> None:
    """A column masked in both changes nothing; in one only, the bounded divergences stay finite."""
    student, teacher, _ = _rows(4)
    mask = np.zeros_like(student.numpy())
    mask[:, 2] = -np.inf
    s, t = student.numpy(), teacher.numpy()
    both = reference(s + mask, t + mask, divergence=divergence, beta=0.3)
    without = reference(np.delete(s, 2, 1), np.delete(t, 2, 1), divergence=divergence, beta=0.3)
    np.testing.assert_allclose(both.loss, without.loss, rtol=1e-12)
    np.testing.assert_allclose(np.delete(both.gradient, 2, 1), without.gradient, rtol=1e-10, atol=1e-14)
    assert (both.gradient[:, 2] == 0).all()
    student_masked = reference(s + mask, t, divergence=divergence, beta=0.3).loss
    teacher_masked = reference(s, t + mask, divergence=divergence, beta=0.3).loss
    assert np.isposinf(student_masked) == (divergence in ("forward_kl", "symmetric_kl"))
    assert np.isposinf(teacher_masked) == (divergence in ("reverse_kl", "symmetric_kl"))
