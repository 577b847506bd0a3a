"""Loss, gradient and statistics with a sparse teacher against the reference, over the whole table of cases."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from inputs import LAYOUTS, Outcome
from reference import Reference
from sparse_cases import SPARSE_CASES, TAILS, SparseCase, SparseInputs, options_of, run_sparse, sparse_reference_of
from tolerances import assert_close_to_reference

COMBINATIONS = [(tail, divergence) for tail, divergences in TAILS.items() for divergence in divergences]


class Problem:
    """A case with its options, and everything that does not depend on the backend."""

    def __init__(self, sparse: SparseCase, tail: str, divergence: str, everything: bool) -> None:
        self.case, self.inputs = sparse.case, SparseInputs(sparse, tail)
        self.options, self.upstream = options_of(self.inputs, divergence, everything)
        self.expected: Reference = sparse_reference_of(self.inputs, self.options, self.upstream)
        eager = {**self.options, "backend": "eager"}
        self.yardstick = run_sparse(self.inputs, eager, self.upstream, torch.float32)

    def run(self, **overrides) -> Outcome:
        return run_sparse(self.inputs, {**self.options, **overrides}, self.upstream)

    def check(self, outcome: Outcome, computed_in_forward: bool = True) -> None:
        """As test_loss.py: a gradient from forward is stored before the upstream, in fp16 also before 1/N."""
        factors = self.upstream if self.upstream is not None else torch.ones(1)
        step_factor = float(factors.abs().max()) if factors.numel() else 1.0
        twice = computed_in_forward and (self.upstream is not None or self.case.student_dtype == torch.float16)
        assert_close_to_reference(
            outcome, self.expected, self.yardstick, roundings=2 if twice else 1, step_factor=step_factor
        )


@functools.lru_cache(maxsize=2)
def problem_of(index: int, tail: str, divergence: str, everything: bool) -> Problem:
    return Problem(SPARSE_CASES[index], tail, divergence, everything)


def table(
    chosen: Callable[[SparseCase], bool] = lambda case: True, turn: tuple[int, ...] = (0, 1), of: int = 2
) -> Callable:
    """Every case with every tail and divergence whose turn it is: of `of` in a row, those at the places `turn`. The
    options alternate, so that any two of case, combination, options and backend meet in some test."""

    def over_the_table(test):
        found = [
            pytest.param(i, *combination, bool((i + place) % 2), id=f"{i}-{case.name}-{'-'.join(combination)}")
            for i, case in enumerate(SPARSE_CASES)
            for place, combination in enumerate(COMBINATIONS)
            if chosen(case) and (i + place) % of in turn
        ]
        return pytest.mark.parametrize("index,tail,divergence,everything", found)(test)

    return over_the_table


def _narrow(case: SparseCase) -> bool:
    return case.case.vocab < 10000


@table()
def test_native(index: int, tail: str, divergence: str, everything: bool, native: str) -> None:
    problem = problem_of(index, tail, divergence, everything)
    problem.check(problem.run(backend=native))


@table(lambda case: LAYOUTS[case.case.layout].inplace, turn=(0,), of=3)
def test_native_inplace(index: int, tail: str, divergence: str, everything: bool, native: str) -> None:
    problem = problem_of(index, tail, divergence, everything)
    problem.check(problem.run(backend=native, inplace=True))


@table(_narrow, turn=(0, 1), of=4)
def test_eager(index: int, tail: str, divergence: str, everything: bool) -> None:
    problem = problem_of(index, tail, divergence, everything)
    problem.check(problem.run(backend="eager"), computed_in_forward=False)


@table(_narrow, turn=(2, 3), of=4)
def test_eager_in_fp64_is_exact(index: int, tail: str, divergence: str, everything: bool) -> None:
    """The eager backend's formulas, to fp64 rounding: everything that fp32 noise could hide."""
    problem = problem_of(index, tail, divergence, everything)
    upstream = None if problem.upstream is None else problem.upstream.double()
    options = {**problem.options, "backend": "eager"}
    outcome = run_sparse(problem.inputs, options, upstream, torch.float64)
    ulps = 2.0**-53 / 2.0**-24  # the same bound with fp64 eps for fp32 eps
    expected = problem.expected
    scaled = Reference(*(x * ulps if name.endswith("magnitude") else x for name, x in expected._asdict().items()))
    scaled = scaled._replace(gradient_slack=expected.gradient_slack)
    exact = Outcome(torch.from_numpy(expected.loss), torch.from_numpy(expected.gradient), None)
    assert outcome.loss.dtype == torch.float64
    assert_close_to_reference(outcome._replace(stats=None), scaled, exact, roundings=4)
