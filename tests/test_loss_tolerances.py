"""The comparison itself must fail on a planted error: of every kind that a kernel can make, as small as it gets."""

from __future__ import annotations

import pytest
import torch
from inputs import BF16, FP16, FP32, Case, Inputs, Outcome, make_inputs, reference_of, run_backend
from reference import Reference
from tolerances import assert_close_to_reference

OPTIONS = {
    "divergence": "forward_kl",
    "temperature": 2.0,
    "ce_weight": 0.5,
    "return_stats": True,
    "backend": "eager",
}


def _solved(dtype: torch.dtype, regime: str = "ordinary") -> tuple[Outcome, Reference, Outcome]:
    inputs: Inputs = make_inputs(Case("planted errors", lead=(4,), vocab=1000, regime=regime, student_dtype=dtype))
    options = {**OPTIONS, "labels": inputs.labels}
    outcome, eager = run_backend(inputs, options), run_backend(inputs, options, in_fp32=True)
    assert_close_to_reference(outcome, reference_of(inputs, options), eager)
    return outcome, reference_of(inputs, options), eager


def _valid_row(expected: Reference) -> int:
    return int(expected.kd.argmax())


def _set(outcome: Outcome, place: tuple[int, int], value: torch.Tensor) -> Outcome:
    gradient = outcome.gradient.clone()
    gradient[place] = value
    return outcome._replace(gradient=gradient)


def _fails(outcome: Outcome, expected: Reference, eager: Outcome) -> None:
    with pytest.raises(AssertionError):
        assert_close_to_reference(outcome, expected, eager)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("column", [0, 500, 999])
class TestOneElement:
    def test_sign(self, dtype: torch.dtype, column: int) -> None:
        outcome, expected, eager = _solved(dtype)
        row = _valid_row(expected)
        _fails(_set(outcome, (row, column), -outcome.gradient[row, column]), expected, eager)

    def test_missing(self, dtype: torch.dtype, column: int) -> None:
        outcome, expected, eager = _solved(dtype)
        _fails(_set(outcome, (_valid_row(expected), column), torch.tensor(0.0)), expected, eager)

    def test_of_its_neighbour(self, dtype: torch.dtype, column: int) -> None:
        outcome, expected, eager = _solved(dtype)
        row = _valid_row(expected)
        _fails(_set(outcome, (row, column), outcome.gradient[row, column - 1]), expected, eager)

    def test_not_a_number(self, dtype: torch.dtype, column: int) -> None:
        outcome, expected, eager = _solved(dtype)
        _fails(_set(outcome, (_valid_row(expected), column), torch.tensor(float("nan"))), expected, eager)

    def test_few_units_in_the_last_place(self, dtype: torch.dtype, column: int) -> None:
        """Three units where the stored dtype decides; for fp32, 1e-4 of the element."""
        outcome, expected, eager = _solved(dtype)
        row = _valid_row(expected)
        relative = 1e-4 if dtype == FP32 else 3 * torch.finfo(dtype).eps
        _fails(_set(outcome, (row, column), outcome.gradient[row, column] * (1 + relative)), expected, eager)


def test_gradient_of_the_bf16_logits_must_not_be_computed_in_bf16() -> None:
    """What half of the field does: probabilities rounded to bf16 before they are subtracted."""
    inputs = make_inputs(Case("naive bf16", lead=(4,), vocab=1000, regime="near", student_dtype=BF16))
    options = {"temperature": 2.0, "backend": "eager"}
    eager, expected = run_backend(inputs, options, in_fp32=True), reference_of(inputs, options)
    q, p = (inputs.student / 2).softmax(-1), (inputs.teacher.to(BF16) / 2).softmax(-1)
    _fails(eager._replace(gradient=(2 * (q - p) / 4)), expected, eager)


def test_an_ignored_row_must_be_exactly_zero() -> None:
    outcome, expected, eager = _solved(FP32)
    row = int((expected.kd == 0).argmax())
    assert expected.kd[row] == 0
    _fails(_set(outcome, (row, 3), torch.tensor(1e-30)), expected, eager)


@pytest.mark.parametrize("relative", [3e-5, -3e-5, float("nan"), float("inf")])
def test_loss(relative: float) -> None:
    outcome, expected, eager = _solved(FP32)
    _fails(outcome._replace(loss=outcome.loss * (1 + relative)), expected, eager)


@pytest.mark.parametrize("name", ["kd", "ce", "student_entropy", "teacher_entropy", "top1_agreement"])
def test_statistics(name: str) -> None:
    outcome, expected, eager = _solved(FP32)
    row = _valid_row(expected)
    value = getattr(outcome.stats, name).clone()
    value[row] = 1 - value[row] if name == "top1_agreement" else value[row] * (1 + 1e-4)
    _fails(outcome._replace(stats=outcome.stats._replace(**{name: value})), expected, eager)


def test_a_finite_loss_where_the_reference_is_infinite() -> None:
    inputs = make_inputs(Case("infinite", lead=(4,), vocab=100, regime="masked_student"))
    options = {"backend": "eager"}
    eager, expected = run_backend(inputs, options), reference_of(inputs, options)
    assert_close_to_reference(eager, expected, eager)
    _fails(eager._replace(loss=torch.tensor(3e38)), expected, eager)
