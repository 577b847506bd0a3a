"""Random shapes, strides, offsets, dtypes and options against the reference: what no table thought of."""

from __future__ import annotations

import math

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from inputs import BF16, FP16, FP32, LAYOUTS, REGIMES, Case, make_inputs, reference_of, run_backend
from reference import DIVERGENCES
from tolerances import assert_close_to_reference

RANK = {"sequence_first": 2, "permuted": 3, "columns_first": 1, "expanded": 1, "every_other": None, "shifted": None}
DTYPES = st.sampled_from([FP32, BF16, FP16])
PROFILE = settings(
    max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@st.composite
def leads(draw, layout: str) -> tuple[int, ...]:
    """Leading shapes of at most 40 rows; some layouts fix the number of dimensions."""
    rank = RANK.get(layout, "any")
    if isinstance(rank, int):
        return tuple(draw(st.integers(1, 4)) for _ in range(rank))
    least = 1 if rank is None else 0
    return tuple(draw(st.lists(st.integers(0 if rank == "any" else 1, 5), min_size=least, max_size=2)))


VOCABS = st.one_of(st.integers(1, 70), st.integers(2030, 2070), st.integers(4090, 4100))
TEMPERATURES = st.one_of(
    st.sampled_from([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]), st.floats(0.1, 20.0, allow_nan=False)
)


@st.composite
def problems(draw) -> tuple[Case, dict, int, bool]:
    """A case, the keywords of kd_loss, a seed for the numbers, and whether to overwrite the logits."""
    layout, teacher_layout = draw(st.sampled_from(sorted(LAYOUTS))), draw(st.sampled_from(["contiguous", "padded"]))
    lead = draw(leads(layout))
    if not lead and layout != "padded":
        layout = "contiguous"
    vocab = draw(VOCABS)
    truncate = draw(st.booleans())
    case = Case(
        "drawn", lead, vocab, draw(st.sampled_from(sorted(REGIMES))), draw(TEMPERATURES), draw(DTYPES), draw(DTYPES),
        layout, teacher_layout, draw(st.integers(max(1, vocab - 9), vocab + 9)) if truncate else None,
    )  # fmt: skip
    # a divergence of 1e5 has gradients that fp16 cannot hold
    assume(case.student_dtype != FP16 or case.regime not in ("huge", "two_levels"))
    masked = case.regime.startswith("masked")
    some = st.one_of(st.none(), st.floats(1.0, 50.0))
    options = {
        "divergence": draw(st.sampled_from(DIVERGENCES)),
        "beta": draw(st.floats(0.01, 0.99)),
        "temperature": case.temperature,
        "scale_by_t2": draw(st.booleans()),
        "kd_weight": draw(st.floats(0.125, 2.0)),
        "student_softcap": draw(some),
        "teacher_softcap": draw(some),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "vocab": "truncate",
        "return_stats": draw(st.booleans()),
    }
    if draw(st.booleans()):
        options["ce_weight"] = draw(st.one_of(st.just(0.0), st.floats(0.01, 2.0)))
        options["label_smoothing"] = 0.0 if masked else draw(st.sampled_from([0.0, 0.1, 0.5]))
        options["z_loss"] = draw(st.sampled_from([0.0, 1e-3]))
    return case, options, draw(st.integers(0, 2**31)), draw(st.booleans())


def _with_tensors(options: dict, inputs, extra: int) -> dict:
    """Labels where the cross-entropy needs them, weights and per-token temperatures by the bits of `extra`."""
    options = dict(options)
    if "ce_weight" in options or extra & 1:
        options["labels"] = inputs.labels
    if extra & 2:
        options["token_weights"] = inputs.token_weights
    if extra & 4:
        options["temperature"] = (options["temperature"] * inputs.token_weights).clamp(0.1, 20.0)
    if extra & 8 and options["reduction"] == "mean":
        options["num_items_in_batch"] = 13
    return options


@PROFILE
@given(problems())
def test_native_is_the_reference(problem) -> None:
    case, options, seed, inplace = problem
    inputs = make_inputs(case, seed)
    options = _with_tensors(options, inputs, seed % 16)
    upstream = torch.linspace(-1, 2, max(1, math.prod(case.lead)))[: math.prod(case.lead)].view(case.lead)
    upstream = upstream if options["reduction"] == "none" else None
    expected = reference_of(inputs, options, upstream)
    eager = run_backend(inputs, {**options, "backend": "eager"}, upstream=upstream, in_fp32=True)
    may_overwrite = inplace and LAYOUTS[case.layout].inplace
    outcome = run_backend(inputs, {**options, "inplace": may_overwrite}, upstream=upstream)
    assert_close_to_reference(outcome, expected, eager, roundings=2, step_factor=2.0)
