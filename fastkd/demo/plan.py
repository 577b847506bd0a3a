"""How much the demo does in the time it has: sizes from a measured pass, not from a guess about the machine."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

ROWS_PER_STEP = 4
MOST_ROWS = 100
FEWEST_ROWS = 24
ROWS_FOR_BOTH = 48  # with fewer rows the time goes into one regime rather than into two small ones


@dataclass
class Plan:
    """Sizes of the experiment.

    rows: unique training rows of the regime that reads its text several times.
    fresh: whether a second regime reads as many tokens of text that is new at every step.
    """

    rows: int
    epochs: int
    dev_rows: int
    test_rows: int
    seq_len: int
    kept_share: float
    fresh: bool


SMOKE = Plan(rows=8, epochs=2, dev_rows=4, test_rows=8, seq_len=128, kept_share=2 / 3, fresh=False)


@torch.no_grad()
def seconds_per_row(model: PreTrainedModel, accelerator: Accelerator, seq_len: int) -> float:
    """Best of five forward passes of the model over one batch, divided by its rows."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (ROWS_PER_STEP, seq_len), generator=generator).to(accelerator.device)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        with accelerator.autocast():
            model(input_ids=ids, use_cache=False)
        best = min(best, time.perf_counter() - began)
    return best / ROWS_PER_STEP


def expected_seconds(plan: Plan, forward: float) -> tuple[float, float]:
    """Seconds of the first and the second regime.

    Args:
        forward: seconds of the teacher's forward pass over one row. A training step costs 4.2 of them for the teacher
            and 3.0 for a student of two thirds of its depth (measured in bf16; less in fp32).
    """
    teacher_step, student_step = 4.2 * forward, 3.0 * forward
    student_rows = plan.epochs * plan.rows
    evaluations = (2 * (plan.epochs + 1) * plan.dev_rows + 3 * plan.test_rows) * forward
    cached = (student_rows if plan.fresh else plan.rows) + plan.dev_rows + plan.test_rows
    both = 2 * student_rows * student_step + evaluations
    return plan.rows * teacher_step + cached * forward + both, both


def make_plan(forward: float, seconds_left: float) -> Plan:
    """The largest experiment that is expected to fit.

    Args:
        forward: seconds of the teacher's forward pass over one row of 256 tokens.
        seconds_left: for both regimes with their evaluations.
    """
    for fresh, fewest in ((True, ROWS_FOR_BOTH), (False, FEWEST_ROWS)):
        for rows in range(MOST_ROWS, fewest - 1, -ROWS_PER_STEP):
            plan = Plan(rows, epochs=4, dev_rows=16, test_rows=48, seq_len=256, kept_share=2 / 3, fresh=fresh)
            reused, second = expected_seconds(plan, forward)
            if reused + second * fresh <= seconds_left:
                return plan
    return plan
