"""Every option of the loss by itself, value and gradient of each backend against the reference."""

from __future__ import annotations

import pytest
import torch
from inputs import BF16, CHUNK, FP16, FP32, Case, Inputs, make_inputs, reference_of, run_backend
from reference import DIVERGENCES
from tolerances import assert_close_to_reference

BACKENDS = ("native", "eager")
LEAD = (3, 4)
ROWS = 12


def _per_token(low: float, high: float, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.linspace(low, high, ROWS).view(LEAD).to(dtype)


# name -> keywords; LABELS and WEIGHTS are replaced by those of the case
LABELS, WEIGHTS = "labels of the case", "weights of the case"
OPTIONS = {
    "scale_by_t2 off": {"temperature": 3.0, "scale_by_t2": False},
    "kd_weight": {"kd_weight": 2.5, "temperature": 2.0},
    "kd_weight 0": {"kd_weight": 0.0, "ce_weight": 1.0, "labels": LABELS},
    "ce_weight": {"ce_weight": 1.5, "labels": LABELS},
    "labels only select rows": {"labels": LABELS},
    "label_smoothing": {"ce_weight": 1.0, "label_smoothing": 0.3, "labels": LABELS, "temperature": 2.0},
    "z_loss": {"ce_weight": 1.0, "z_loss": 0.05, "labels": LABELS, "temperature": 0.5},
    "ce without its parts at odd T": {"ce_weight": 1.0, "labels": LABELS, "temperature": 5.0},
    "student_softcap": {"student_softcap": 4.0},
    "teacher_softcap": {"teacher_softcap": 4.0, "temperature": 2.0},
    "softcaps far above the logits": {"student_softcap": 1e4, "teacher_softcap": 1e4},
    "softcaps far below the logits": {
        "student_softcap": 0.05, "teacher_softcap": 0.05, "ce_weight": 1.0, "labels": LABELS,
    },
    "softcaps and all of cross-entropy": {
        "student_softcap": 5.0, "teacher_softcap": 30.0, "ce_weight": 0.7, "label_smoothing": 0.1, "z_loss": 0.01,
        "labels": LABELS, "temperature": 3.0,
    },
    "temperature per token": {"temperature": _per_token(0.3, 9.0), "ce_weight": 1.0, "labels": LABELS},
    "temperature per token in bf16": {"temperature": _per_token(0.5, 4.0, BF16)},
    "integer temperatures per token": {
        "temperature": 1.0 + torch.arange(ROWS).view(LEAD) % 5, "ce_weight": 1.0, "labels": LABELS,
    },
    "temperature per token without T^2": {"temperature": _per_token(0.3, 9.0), "scale_by_t2": False},
    "temperature as an int": {"temperature": 3},
    "token_weights": {"token_weights": WEIGHTS},
    "token_weights with labels": {"token_weights": WEIGHTS, "labels": LABELS, "ce_weight": 1.0},
    "token_weights of which some are 0": {
        "token_weights": torch.arange(ROWS).view(LEAD).float() % 3, "reduction": "sum",
    },
    "token_weights all 0": {"token_weights": torch.zeros(LEAD)},
    "token_weights in fp16": {"token_weights": _per_token(0.5, 2.0, FP16)},
    "sum": {"reduction": "sum", "labels": LABELS, "ce_weight": 0.5},
    "none": {"reduction": "none", "labels": LABELS, "ce_weight": 0.5},
    "num_items_in_batch": {"num_items_in_batch": 77, "labels": LABELS, "token_weights": WEIGHTS},
    "num_items_in_batch as a tensor": {"num_items_in_batch": torch.tensor(77), "labels": LABELS},
    "another ignore_index": {"ignore_index": 3, "labels": torch.arange(ROWS).view(LEAD) % 5, "ce_weight": 1.0},
    "ignore_index within the vocabulary": {"ignore_index": 0, "labels": torch.arange(ROWS).view(LEAD) % 2},
}  # fmt: skip


def _keywords(options: dict, inputs: Inputs) -> dict:
    given = {LABELS: inputs.labels, WEIGHTS: inputs.token_weights}
    return {k: given[v] if isinstance(v, str) and v in given else v for k, v in options.items()}


def _check(case: Case, options: dict, inplace: bool = False) -> None:
    inputs = make_inputs(case)
    options = {"return_stats": True, **_keywords(options, inputs)}
    upstream = _per_token(-1.0, 2.0) if options.get("reduction") == "none" else None
    expected = reference_of(inputs, options, upstream)
    eager = run_backend(inputs, {**options, "backend": "eager"}, upstream=upstream, in_fp32=True)
    actual = run_backend(inputs, {**options, "inplace": inplace}, upstream=upstream)
    rounded_twice = case.student_dtype == FP16 or upstream is not None
    assert_close_to_reference(actual, expected, eager, roundings=2 if rounded_twice else 1, step_factor=2.0)


@pytest.mark.parametrize("backend", ["native", "native inplace", "eager"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_option(options: dict, dtype: torch.dtype, backend: str, native: str) -> None:
    case = Case("options", lead=LEAD, vocab=45, student_dtype=dtype, teacher_dtype=dtype)
    _check(case, {**options, "backend": backend.split()[0]}, inplace="inplace" in backend)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_option_across_chunks(options: dict, divergence: str, native: str) -> None:
    """The same with every divergence and rows of more than one chunk."""
    case = Case("options", lead=LEAD, vocab=CHUNK + 21, regime="late_top")
    _check(case, {**options, "divergence": divergence, "backend": native})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta", [1e-3, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("divergence", ["jsd", "skew_forward_kl", "skew_reverse_kl", "symmetric_kl"])
@pytest.mark.parametrize("regime", ["ordinary", "disagreeing", "masked_teacher", "masked_student"])
def test_beta(regime: str, divergence: str, beta: float, backend: str, native: str) -> None:
    _check(
        Case("beta", lead=LEAD, vocab=45, regime=regime),
        {"divergence": divergence, "beta": beta, "backend": backend},
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("regime", ["ordinary", "masked_student", "masked_teacher"])
def test_ends_of_symmetric_kl(regime: str, beta: float, backend: str, native: str) -> None:
    """At an end the direction of weight 0 is left out, also where it is infinite."""
    options = {"divergence": "symmetric_kl", "beta": beta, "backend": backend}
    _check(Case("ends", lead=LEAD, vocab=45, regime=regime), options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_survive_a_softcap(backend: str, native: str) -> None:
    for regime in ("masked_both", "masked_student", "masked_teacher"):
        for divergence in ("jsd", "forward_kl"):
            options = {
                "student_softcap": 5.0,
                "teacher_softcap": 7.0,
                "divergence": divergence,
                "backend": backend,
            }
            _check(Case("masks", lead=LEAD, vocab=45, regime=regime), options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_part_of_weight_zero_is_left_out(backend: str, native: str) -> None:
    """kd_weight = 0 is pure cross-entropy, also where the divergence would be infinite."""
    inputs = make_inputs(Case("weight 0", lead=LEAD, vocab=45, regime="masked_teacher"))
    options = {
        "divergence": "reverse_kl",
        "kd_weight": 0.0,
        "ce_weight": 1.0,
        "labels": inputs.labels,
        "backend": backend,
    }
    outcome = run_backend(inputs, options)
    valid = inputs.labels != -100
    expected = torch.nn.functional.cross_entropy(inputs.student[valid], inputs.labels[valid])
    torch.testing.assert_close(outcome.loss, expected)
    assert outcome.gradient.isfinite().all()
