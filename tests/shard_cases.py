"""Cases of the vocabulary-parallel loss: inputs, options, and how the vocabulary lies on the ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import linear_cases
import torch
from counted_products import rows_counted_on_device
from inputs import BF16, FP16, FP64, IGNORE, Case, Inputs, Outcome, make_inputs, reference_of, run_backend
from reference import DIVERGENCES
from tolerances import assert_close_to_reference
from torch import Tensor

from fastkd import KDStats, VocabShard

NAN = float("nan")


@dataclass(frozen=True)
class ShardCase:
    """options: of kd_loss; "temperature", "token_weights": True stands for a tensor, one value a token."""

    inputs: Case
    options: dict[str, Any]
    plan: str = "uneven"
    backend: str = "auto"
    ignored: str = "some"  # "all": every label

    @property
    def name(self) -> str:
        options = "+".join(f"{v:g}" if isinstance(v, float) else str(v) for v in self.options.values())
        return f"{self.backend} {self.plan} {self.inputs.reason} {self.inputs.vocab} {options}".replace(" ", "-")


def bounds(plan: str, vocab: int, world: int) -> list[tuple[int, int]]:
    """[start, stop) of each rank."""
    if plan == "even":  # of a padded vocabulary: the last ranks may have fewer columns, or none
        width = -(-vocab // world)
        return [(min(rank * width, vocab), min((rank + 1) * width, vocab)) for rank in range(world)]
    if plan == "uneven":  # the last ranks have two columns each
        late = [max(vocab // 3 + 1, vocab - 2 * (world - k)) for k in range(2, world)]
        cuts = [0, vocab // 3 + 1, *late, vocab]
    elif plan == "last":  # one rank has everything
        cuts = [0] * world + [vocab]
    else:
        assert plan == "first"
        cuts = [0] + [vocab] * world
    cuts = [min(max(cut, 0), vocab) for cut in cuts]
    return list(pairwise(cuts))


def shards(plan: str, vocab: int, world: int) -> list[tuple[int, int]]:
    """The same in the order of ranks: backwards for uneven parts, which the loss may not care about."""
    parts = bounds(plan, vocab, world)
    return parts[::-1] if plan == "uneven" else parts


def cut(x: Tensor, part: tuple[int, int], padding: int) -> Tensor:
    """Memory whose columns but the last two are a rank's own and padding behind them, all but its own NaN."""
    own = x[..., part[0] : part[1]]
    return torch.cat([own, torch.full((*x.shape[:-1], padding + 2), NAN, dtype=x.dtype)], -1)


@dataclass
class Problem:
    """What a case means: the whole inputs, and the keywords with tensors in place."""

    inputs: Inputs
    keywords: dict[str, Any]
    upstream: Tensor | None = None
    parts: list[tuple[int, int]] = field(default_factory=list)


def make_problem(case: ShardCase, world: int) -> Problem:
    """The same in every process."""
    inputs = make_inputs(case.inputs)
    labels = torch.full_like(inputs.labels, -100) if case.ignored == "all" else inputs.labels
    g = torch.Generator().manual_seed(7)
    keywords = {"labels": labels, "temperature": case.inputs.temperature, **case.options, "backend": case.backend}
    if keywords["temperature"] is True:
        keywords["temperature"] = 0.5 + 2 * torch.rand(case.inputs.lead, generator=g)
    if keywords.get("token_weights") is True:
        keywords["token_weights"] = inputs.token_weights
    upstream = torch.randn(case.inputs.lead, generator=g) if keywords.get("reduction") == "none" else None
    return Problem(inputs, keywords, upstream, shards(case.plan, case.inputs.vocab, world))


def run_rank(case: ShardCase, rank: int, world: int, device: str = "cpu") -> dict[str, Any]:
    """Loss, gradient and statistics of a rank, brought to the CPU."""
    from fastkd import kd_loss

    problem = make_problem(case, world)
    keywords = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in problem.keywords.items()}
    part = problem.parts[rank]
    padding = (rank + 1) % 3 if case.plan != "even" else 0
    if part[0] == part[1] and rank % 2:
        padding = 3
    base = cut(problem.inputs.student, part, padding).to(device).requires_grad_()
    student = (base * 1 if keywords.get("inplace") else base)[..., :-2]
    teacher = cut(problem.inputs.teacher, part, padding + rank).to(device)[..., :-2]  # with a padding of its own
    result = kd_loss(student, teacher, vocab_shard=VocabShard(*part), **keywords)
    loss, stats = result if isinstance(result, tuple) else (result, None)
    upstream = None if problem.upstream is None else problem.upstream.to(device)
    (gradient,) = torch.autograd.grad(loss, base, upstream)
    found = {"loss": loss.detach(), "gradient": gradient, "stats": None if stats is None else torch.stack(stats)}
    return {name: None if x is None else x.cpu() for name, x in found.items()}


def bits_of(x: Tensor) -> Tensor:
    return x.reshape(-1).view(torch.uint8)


def assert_whole(case: ShardCase, ranks: list[dict[str, Any]]) -> None:
    """What the ranks found is the loss of the whole vocabulary, in fp64: the same bits on every rank; padding, which is
    NaN, is unread and has gradient 0."""
    problem = make_problem(case, len(ranks))
    for rank in ranks[1:]:
        assert torch.equal(bits_of(rank["loss"]), bits_of(ranks[0]["loss"]))
        assert ranks[0]["stats"] is None or torch.equal(bits_of(rank["stats"]), bits_of(ranks[0]["stats"]))
    parts = []
    for number, rank in sorted(enumerate(ranks), key=lambda pair: problem.parts[pair[0]]):
        width = problem.parts[number][1] - problem.parts[number][0]
        assert rank["gradient"].dtype == case.inputs.student_dtype
        assert (rank["gradient"][..., width:] == 0).all(), f"padding of rank {number}"
        parts.append(rank["gradient"][..., :width])
    gradient = torch.cat(parts, -1)
    assert (gradient[problem.keywords["labels"] == IGNORE] == 0).all()
    stats = None if ranks[0]["stats"] is None else KDStats(*ranks[0]["stats"])
    options = {k: v for k, v in problem.keywords.items() if k != "inplace"}
    expected = reference_of(problem.inputs, options, problem.upstream)
    eager = run_backend(problem.inputs, {**options, "backend": "eager"}, upstream=problem.upstream, in_fp32=True)
    assert_close_to_reference(Outcome(ranks[0]["loss"], gradient, stats), expected, eager, roundings=2)


EVERYTHING = {
    "ce_weight": 0.5, "label_smoothing": 0.1, "z_loss": 0.01, "student_softcap": 8.0, "teacher_softcap": 5.0,
    "temperature": True, "token_weights": True, "beta": 0.3, "return_stats": True,
}  # fmt: skip
HARD = {"ce_weight": 0.5, "return_stats": True}
REGIMES = ("masked_both", "masked_student", "masked_teacher", "identical", "flat", "huge", "disagreeing", "exact_zeros")


def _cases(backend: str) -> list[ShardCase]:
    case = lambda inputs, options, plan="uneven", **more: ShardCase(inputs, options, plan, backend, **more)  # noqa: E731
    found = []
    for number, divergence in enumerate(DIVERGENCES):
        plan = ("uneven", "even", "last", "first")[number % 4]
        named = {"divergence": divergence}
        found.append(case(Case("all options", lead=(2, 3)), {**named, **EVERYTHING}, plan))
        found.append(case(Case("nothing but the divergence", vocab=50, temperature=1.0), named, "even"))
        for offset, regime in enumerate(REGIMES):
            if (number + offset) % 2 == 0 or regime in ("masked_student", "masked_teacher"):
                found.append(case(Case(regime, regime=regime, vocab=53), {**named, **HARD}))
    blocks = Case("several blocks on each rank", lead=(2,), vocab=3 * 2048 + 5, regime="ascending", temperature=3.0)
    wide = Case("bf16, few long rows", lead=(2,), vocab=32001, student_dtype=BF16, teacher_dtype=BF16)
    fp16 = Case("fp16: gradient of the sum", student_dtype=FP16, teacher_dtype=FP16, lead=(5,))
    found += [
        case(blocks, {**HARD, "label_smoothing": 0.1}),
        case(blocks, {**HARD, "divergence": "jsd"}, "even"),
        case(wide, {**HARD, "divergence": "skew_reverse_kl"}, "even"),
        case(wide, {"divergence": "symmetric_kl", "ce_weight": 1.0}, "uneven"),
        case(fp16, HARD),
        case(fp16, {**HARD, "reduction": "none"}),
        case(Case("mixed", student_dtype=BF16, lead=(4,)), {**HARD, "reduction": "sum"}),
        case(Case("T = 0.7", temperature=0.7, lead=(4,)), {**HARD, "num_items_in_batch": 7, "scale_by_t2": False}),
        case(Case("upstream of each row", lead=(3, 2)), {**EVERYTHING, "reduction": "none", "divergence": "jsd"}),
        case(Case("in place", lead=(3, 4), vocab=33), {**HARD, "inplace": True}),
        case(Case("in place, bf16", student_dtype=BF16, vocab=70), {"divergence": "reverse_kl", "inplace": True}),
        case(Case("cross-entropy alone"), {"kd_weight": 0.0, "ce_weight": 1.0, "return_stats": True}),
        case(Case("tops tied across ranks", lead=(40,), vocab=6, regime="two_levels"), {"return_stats": True}),
        case(Case("no row", lead=(0,)), HARD),
        case(Case("no row that counts"), {**HARD, "divergence": "jsd"}, ignored="all"),
        case(Case("one column for all ranks", vocab=1), HARD, "even"),
        case(Case("one row, no leading dimension", lead=()), HARD),
    ]
    return found


@dataclass(frozen=True)
class LinearShardCase:
    """options: of linear_kd_loss."""

    inputs: linear_cases.Case
    options: dict[str, Any]
    plan: str = "uneven"
    teacher_logits: bool = False
    frozen: bool = False  # the student's head
    counted: str = ""  # ranks whose products read the number of rows on the device: "all", "even", "" (the CPU's way)


def linear_shard_cases() -> dict[str, LinearShardCase]:
    """By name."""
    linear = lambda options, plan="uneven", more=None, **fields: LinearShardCase(  # noqa: E731
        linear_cases.Case(rows=13, vocab=101, **fields), options, plan, **(more or {})
    )
    soft = {"temperature": 2.0, "ce_weight": 0.5, "chunk_size": 4}
    narrow = {"dtype": BF16, "bias": False, "hidden": 16, "teacher_hidden": 8}
    return {
        "chunks": linear({**soft, "return_stats": True, "label_smoothing": 0.1}),
        "jsd": linear({**soft, "divergence": "jsd"}, "even"),
        "one rank has all": linear(soft, "last"),
        "bf16": linear({**soft, "divergence": "reverse_kl"}, dtype=BF16),
        "fp16": linear({**soft, "chunk_size": "auto"}, dtype=FP16),
        "upstream of each row": linear({**soft, "reduction": "none"}),
        "logits of the teacher": linear({**soft, "reduction": "sum"}, more={"teacher_logits": True}),
        "frozen head": linear({**soft, "num_items_in_batch": 5}, more={"frozen": True}),
        "no bias, fp64": linear(soft, dtype=FP64, bias=False),
        "rows counted": linear({**soft, "chunk_size": 9, "divergence": "jsd"}, more={"counted": "all"}, **narrow),
        "rows counted by some": linear({**soft, "reduction": "none"}, more={"counted": "even"}, **narrow),
        "rows counted, one rank has all": linear(soft, "last", more={"counted": "all"}, **narrow),
    }


def run_linear_rank(case: LinearShardCase, rank: int, world: int) -> dict[str, Any]:
    """Loss and gradients of a rank: of the whole hidden states, of its rows of the head."""
    if not case.counted:
        return _run_linear_rank(case, rank, world)
    with rows_counted_on_device(everywhere=case.counted == "all" or rank % 2 == 0) as products:
        result = _run_linear_rank(case, rank, world)
    part = shards(case.plan, case.inputs.vocab, world)[rank]
    assert bool(products.rows) == (part[1] > part[0] and (case.counted == "all" or rank % 2 == 0))
    return result


def _run_linear_rank(case: LinearShardCase, rank: int, world: int) -> dict[str, Any]:
    from fastkd import linear_kd_loss

    problem = linear_cases.make_problem(case.inputs)
    part = shards(case.plan, case.inputs.vocab, world)[rank]
    hidden, weight, bias = problem.student
    own = lambda x, more: cut(x.detach().movedim(0, -1), part, more).movedim(-1, 0)  # noqa: E731
    row_major = lambda x: x.contiguous() if case.counted else x  # noqa: E731
    padded = lambda x, more: None if x is None else row_major(own(x, more))  # noqa: E731
    weight, bias = (x if x is None else x.requires_grad_(not case.frozen) for x in (padded(weight, 1), padded(bias, 1)))
    teacher_hidden, teacher_weight, teacher_bias = problem.teacher
    given = {
        "teacher_hidden": teacher_hidden, "teacher_weight": padded(teacher_weight, 2),
        "teacher_bias": padded(teacher_bias, 2),
    }  # fmt: skip
    if case.teacher_logits:
        given = {"teacher_logits": cut(torch.nn.functional.linear(*problem.teacher), part, 3)}
    result = linear_kd_loss(
        hidden, weight, labels=problem.labels, student_bias=bias, vocab_shard=VocabShard(*part), **given, **case.options
    )
    loss, stats = result if isinstance(result, tuple) else (result, None)
    leaves = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]
    gradients = torch.autograd.grad(loss, leaves, linear_upstream(case))
    return {"loss": loss.detach(), "gradients": gradients, "stats": stats if stats is None else torch.stack(stats)}


def linear_upstream(case: LinearShardCase) -> Tensor | None:
    """(N) where each row has its own."""
    if case.options.get("reduction") != "none":
        return None
    return torch.randn(case.inputs.rows, generator=torch.Generator().manual_seed(11))


def _triton_cases() -> list[ShardCase]:
    """Fewer: the interpreter is slow, and one kernel and the host's side are all that differs from an unsharded row."""
    blocks = Case("two blocks on a rank", lead=(2,), vocab=4 * 2048 + 5, regime="late_top", temperature=3.0)
    found = [
        ShardCase(Case("all options", lead=(2, 3)), {"divergence": divergence, **EVERYTHING}, backend="triton")
        for divergence in DIVERGENCES
    ]
    found += [
        ShardCase(blocks, {**HARD, "label_smoothing": 0.1}, "last", "triton"),
        ShardCase(blocks, {**HARD, "divergence": "jsd"}, "even", "triton"),
        ShardCase(Case("no cross-entropy", regime="masked_both", vocab=53), {}, "uneven", "triton"),
        ShardCase(
            Case("in place, bf16", student_dtype=BF16, vocab=70), {"divergence": "reverse_kl", "inplace": True},
            "even", "triton",
        ),
        ShardCase(Case("fp16", student_dtype=FP16, teacher_dtype=FP16, lead=(5,)), HARD, "first", "triton"),
        ShardCase(Case("no row", lead=(0,)), HARD, "even", "triton"),
    ]  # fmt: skip
    return found


def cases(world: int) -> dict[str, ShardCase]:
    """By name."""
    found = _cases("eager") + _cases("native") + (_triton_cases() if world == 2 and find_spec("triton") else [])
    found.append(ShardCase(Case("fp64", student_dtype=FP64, teacher_dtype=FP64), EVERYTHING, backend="auto"))
    return {case.name: case for case in found}
