"""Bugs planted in the merge of the ranks' sums (fastkd/shard_rows.py), one at a time: cases of the loss must fail."""

from __future__ import annotations

import inspect
from types import ModuleType
from unittest import mock

import pytest
import shard_cases
from inputs import Case
from shard_cases import EVERYTHING, HARD, ShardCase
from shard_ranks import run_ranks

from fastkd import shard_ops, shard_rows

WORLD = 4
# What a merge is there for: maxima that differ from rank to rank, ranks with nothing, masks, ties.
CASES = [
    ShardCase(
        Case("ascending", lead=(3,), vocab=53, regime="ascending", temperature=3.0), {**HARD, **options}, plan, "eager"
    )
    for options, plan in (
        ({"divergence": "symmetric_kl", "label_smoothing": 0.1}, "uneven"),
        ({"divergence": "jsd"}, "even"),
    )
] + [
    ShardCase(Case("all options", lead=(2, 3)), {"divergence": "symmetric_kl", **EVERYTHING}, "last", "eager"),
    ShardCase(
        Case("masked_both", regime="masked_both", vocab=53), {**HARD, "divergence": "reverse_kl"}, "uneven", "eager"
    ),
    ShardCase(Case("tops tied", lead=(40,), vocab=6, regime="two_levels"), {"return_stats": True}, "uneven", "eager"),
]

MUTANTS = {  # old, which must occur once, and new
    "the student's entropy is not shifted": ('piece["entropy_s"] + _times(of_s, shift_s)', 'piece["entropy_s"]'),
    "the teacher's entropy is not shifted": ('piece["entropy_t"] + _times(of_t, shift_t)', 'piece["entropy_t"]'),
    "the teacher's dot product is not shifted": (
        'piece["dot_t"] + _times(of_t, shift_t - shift_s)', 'piece["dot_t"]',
    ),
    "the student's dot product is not shifted": (
        'piece["dot_s"] + _times(of_s, shift_s - shift_t)', 'piece["dot_s"]',
    ),
    "the denominators are not scaled": ("(scale_s * of_s).sum(0), (scale_t * of_t)", "of_s.sum(0), of_t"),
    "the power is shifted at T": ("torch.exp2(t * shift_s)", "torch.exp2(shift_s)"),
    "the linear sum is not shifted": (
        'piece["linear_s"] + _times(widths.expand_as(shift_s), shift_s)', 'piece["linear_s"]',
    ),
    "an empty piece is shifted": ("torch.where(amount == 0, 0.0, amount * shift)", "amount * shift"),
    "the highest column wins a tie": (
        "torch.where(held, column, torch.iinfo(column.dtype).max).amin(0)", "torch.where(held, column, -1).amax(0)",
    ),
    "the label's logit of another rank": (
        "torch.where(elsewhere, 0.0, label).sum(0)", "torch.where(elsewhere, 1.0, label).sum(0)",
    ),
}  # fmt: skip


def verdict(merge) -> str:
    """What the cases have to say about a merge; "" where they pass."""
    with mock.patch.object(shard_ops, "merge", merge):
        for case in CASES:
            shards = shard_cases.shards(case.plan, case.inputs.vocab, WORLD)
            ranks = run_ranks(lambda rank, case=case: shard_cases.run_rank(case, rank, WORLD), shards)
            try:
                shard_cases.assert_whole(case, ranks)
            except AssertionError as error:
                return f"{case.inputs.reason}: {error}"
    return ""


def test_without_a_bug() -> None:
    assert verdict(shard_rows.merge) == ""


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_caught(name: str) -> None:
    old, new = MUTANTS[name]
    source = inspect.getsource(shard_rows)
    assert source.count(old) == 1, f"shard_rows no longer has this once: {old}"
    mutant = ModuleType("fastkd.shard_rows_with_a_bug", shard_rows.__doc__)
    mutant.__package__ = shard_rows.__package__
    with mock.patch.dict("sys.modules", {mutant.__name__: mutant}):  # where its tuples look for their module
        exec(compile(source.replace(old, new), f"<{name}>", "exec"), mutant.__dict__)
    assert verdict(mutant.merge), "not caught"
