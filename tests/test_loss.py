"""Loss, gradient and statistics of every backend against the reference, over the whole table of cases."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from cases import CASES
from inputs import LAYOUTS, Case, Inputs, Outcome, make_inputs, reference_of, run_backend
from reference import DIVERGENCES, Reference
from tolerances import assert_close_to_reference

NARROW = [case for case in CASES if case.vocab < 40000]  # enough where the width does not matter


def options_of(case: Case, inputs: Inputs, divergence: str, everything: bool) -> tuple[dict, torch.Tensor | None]:
    """Keywords of kd_loss and the upstream gradient: the divergence alone, or with every other option at once."""
    options = {
        "divergence": divergence,
        "temperature": case.temperature,
        "return_stats": True,
        **case.options,
    }
    if not everything:
        return options, None
    masked = case.regime.startswith("masked")  # smoothing averages over all logits: +inf by definition
    options |= {
        "labels": inputs.labels,
        "token_weights": inputs.token_weights,
        "beta": 0.2,
        "kd_weight": 0.7,
        "ce_weight": 0.6,
        "label_smoothing": 0.0 if masked else 0.1,
        "z_loss": 1e-3,
        "reduction": "none",
    }
    return options, torch.linspace(-1, 2, max(1, inputs.labels.numel()))[: inputs.labels.numel()].view(case.lead)


class Problem:
    """A case with its options, and everything that does not depend on the backend."""

    def __init__(self, case: Case, divergence: str, everything: bool) -> None:
        self.case, self.inputs = case, make_inputs(case)
        self.options, self.upstream = options_of(case, self.inputs, divergence, everything)
        self.expected: Reference = reference_of(self.inputs, self.options, self.upstream)
        eager = {**self.options, "backend": "eager"}
        self.yardstick = run_backend(self.inputs, eager, upstream=self.upstream, in_fp32=True)

    def run(self, **overrides) -> Outcome:
        return run_backend(self.inputs, {**self.options, **overrides}, upstream=self.upstream)

    def check(self, outcome: Outcome, computed_in_forward: bool = True) -> None:
        """A gradient from forward is stored before the upstream, in fp16 also before 1/N, and rounded again after."""
        factors = self.upstream if self.upstream is not None else torch.ones(1)
        step_factor = float(factors.abs().max()) if factors.numel() else 1.0
        stored_early = computed_in_forward and (self.upstream is not None or self.case.student_dtype == torch.float16)
        assert_close_to_reference(
            outcome,
            self.expected,
            self.yardstick,
            roundings=2 if stored_early else 1,
            step_factor=step_factor,
        )


@functools.lru_cache(maxsize=2)
def problem_of(index: int, divergence: str, everything: bool) -> Problem:
    return Problem(CASES[index], divergence, everything)


def table(chosen: Callable[[Case], bool] = lambda case: True) -> Callable:
    """Every chosen case, divergence and set of options; the identifiers say what the case is."""
    indices = [i for i, case in enumerate(CASES) if chosen(case)]

    def over_the_table(test):
        test = pytest.mark.parametrize("everything", [False, True], ids=["alone", "everything"])(test)
        test = pytest.mark.parametrize("divergence", DIVERGENCES)(test)
        return pytest.mark.parametrize("index", indices, ids=[f"{i}-{CASES[i].name}" for i in indices])(test)

    return over_the_table


@table()
def test_native(index: int, divergence: str, everything: bool, native: str) -> None:
    problem = problem_of(index, divergence, everything)
    problem.check(problem.run(backend=native))


@table(lambda case: LAYOUTS[case.layout].inplace)
def test_native_inplace(index: int, divergence: str, everything: bool, native: str) -> None:
    problem = problem_of(index, divergence, everything)
    problem.check(problem.run(backend=native, inplace=True))


@table()
def test_eager(index: int, divergence: str, everything: bool) -> None:
    """Against its own fp32 errors this is no test of fp32 arithmetic; it is one of formulas, dtypes and layouts."""
    problem = problem_of(index, divergence, everything)
    problem.check(problem.run(backend="eager"), computed_in_forward=False)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("case", NARROW, ids=[case.name for case in NARROW])
def test_eager_in_fp64_is_exact(case: Case, divergence: str) -> None:
    """The eager backend's formulas, to fp64 rounding: everything that fp32 noise could hide."""
    inputs = make_inputs(case)
    options, upstream = options_of(case, inputs, divergence, everything=True)
    options = {**options, "backend": "eager", "token_weights": inputs.token_weights.double()}
    wide = inputs._replace(student_base=inputs.student_base.double(), teacher=inputs.teacher.double())
    expected = reference_of(wide, options, upstream)
    outcome = run_backend(wide, options, upstream=None if upstream is None else upstream.double())
    ulps = 2.0**-53 / 2.0**-24  # the same bound with fp64 eps for fp32 eps
    scaled = Reference(*(x * ulps if name.endswith("magnitude") else x for name, x in expected._asdict().items()))
    scaled = scaled._replace(gradient_slack=expected.gradient_slack)
    exact = Outcome(torch.from_numpy(expected.loss), torch.from_numpy(expected.gradient), None)
    assert outcome.loss.dtype == torch.float64
    assert_close_to_reference(outcome._replace(stats=None), scaled, exact, roundings=4)
