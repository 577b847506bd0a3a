"""The table of inputs that every backend must get right, each row with its reason, and how a row becomes tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from reference import Reference, reference
from torch import Tensor

import fastkd

CHUNK = 2048  # columns that the CPU kernel takes at a time
IGNORE = -100
NEG_INF = float("-inf")
FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


# --- regimes: (generator, lead, vocab) -> student, teacher in fp32 ------------------------------------------------


def _noise(g: torch.Generator, lead: tuple[int, ...], vocab: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*lead, vocab, generator=g)


def _ordinary(g, lead, vocab):
    return _noise(g, lead, vocab), _noise(g, lead, vocab)


def _near(g, lead, vocab):
    teacher = _noise(g, lead, vocab)
    return teacher + _noise(g, lead, vocab, 0.02), teacher


def _peaked(g, lead, vocab):
    """Both certain of the same column, which differs from row to row."""
    student, teacher = _ordinary(g, lead, vocab)
    peak = torch.randint(vocab, (*lead, 1), generator=g)
    return student.scatter(-1, peak, 30.0), teacher.scatter(-1, peak, 35.0)


def _disagreeing(g, lead, vocab):
    """Each certain of a column to which the other gives next to nothing (log-probability about -60)."""
    student, teacher = _ordinary(g, lead, vocab)
    peak = torch.randint(vocab, (*lead, 1), generator=g)
    return student.scatter(-1, peak, 60.0), teacher.scatter(-1, (peak + max(1, vocab // 2)) % vocab, 60.0)


def _exact_zeros(g, lead, vocab):
    """Probabilities that underflow to exactly 0 in fp32, in alternating columns of the two models."""
    student, teacher = _ordinary(g, lead, vocab)
    odd = torch.arange(vocab) % 2 == 1
    deep = torch.full((), -400.0)
    return torch.where(odd, student, deep), torch.where(odd & (torch.arange(vocab) % 3 > 0), deep, teacher)


def _mask(x: Tensor, columns: Tensor) -> Tensor:
    return x.masked_fill(columns, NEG_INF)


def _masked_both(g, lead, vocab):
    """The last third, a lone column and, where the row is long, the whole first chunk are masked in both."""
    student, teacher = _ordinary(g, lead, vocab)
    columns = torch.arange(vocab) >= vocab - vocab // 3
    columns[vocab // 2] = vocab > 2
    if vocab > 2 * CHUNK:
        columns[:CHUNK] = True
    return _mask(student, columns), _mask(teacher, columns)


def _masked_student(g, lead, vocab):
    student, teacher = _ordinary(g, lead, vocab)
    columns = torch.arange(vocab) % 5 == 2
    if vocab > 2 * CHUNK:
        columns[CHUNK : 2 * CHUNK] = True
    return _mask(student, columns), teacher


def _masked_teacher(g, lead, vocab):
    student, teacher = _ordinary(g, lead, vocab)
    columns = torch.arange(vocab) % 5 == 2
    if vocab > 2 * CHUNK:
        columns[:CHUNK] = True
    return student, _mask(teacher, columns)


def _identical(g, lead, vocab):
    student = _noise(g, lead, vocab)
    return student, student.clone()


def _flat(g, lead, vocab):
    """Every column a tie: the lowest index is the top."""
    return torch.full((*lead, vocab), 1.5), torch.full((*lead, vocab), -2.25)


def _huge(g, lead, vocab):
    student, teacher = (2e4 * torch.rand(*lead, vocab, generator=g) - 1e4 for _ in range(2))
    return student, teacher


def _two_levels(g, lead, vocab):
    """Logits of exactly +-1e4: many equal tops per row."""
    student, teacher = (torch.randint(2, (*lead, vocab), generator=g) * 2e4 - 1e4 for _ in range(2))
    return student, teacher


def _offset(g, lead, vocab):
    """A common offset of 1e4 in the student alone changes nothing but the rounding of the input."""
    student, teacher = _ordinary(g, lead, vocab)
    return student + 1e4, teacher


def _ascending(g, lead, vocab):
    """The running maximum of the student moves in every chunk; that of the teacher never does."""
    ramp = torch.linspace(-20, 20, vocab)
    student, teacher = (_noise(g, lead, vocab, 0.5) for _ in range(2))
    return student + ramp, teacher - ramp


def _late_top(g, lead, vocab):
    """Far larger logits in the very last columns: a tail that is dropped changes everything."""
    student, teacher = _ordinary(g, lead, vocab)
    student[..., -1] += 25
    teacher[..., -1] += 20
    teacher[..., -2 % vocab] += 22
    return student, teacher


REGIMES: dict[str, Callable] = {
    "ordinary": _ordinary,
    "near": _near,
    "peaked": _peaked,
    "disagreeing": _disagreeing,
    "exact_zeros": _exact_zeros,
    "masked_both": _masked_both,
    "masked_student": _masked_student,
    "masked_teacher": _masked_teacher,
    "identical": _identical,
    "flat": _flat,
    "huge": _huge,
    "two_levels": _two_levels,
    "offset": _offset,
    "ascending": _ascending,
    "late_top": _late_top,
}


# --- layouts: how the rows lie in memory ---------------------------------------------------------------------------


class Layout(NamedTuple):
    """base: shape to allocate for logits (*lead, vocab); view: from the allocation to the logits."""

    base: Callable[[tuple[int, ...], int], tuple[int, ...]]
    view: Callable[[Tensor, int], Tensor]
    inplace: bool = True  # may be overwritten


LAYOUTS: dict[str, Layout] = {
    "contiguous": Layout(lambda lead, v: (*lead, v), lambda x, v: x),
    # row stride > V and a base pointer that no vector length divides
    "padded": Layout(lambda lead, v: (*lead, v + 5), lambda x, v: x[..., 3 : 3 + v]),
    # next-token training: logits[:, :-1] of (B, S, V), two strides without a copy
    "shifted": Layout(lambda lead, v: (*lead[:-1], lead[-1] + 1, v), lambda x, v: x[..., 1:, :]),
    "every_other": Layout(lambda lead, v: (2 * lead[0], *lead[1:], v), lambda x, v: x[::2]),
    # (S, B, V) handed over as (B, S, V)
    "sequence_first": Layout(lambda lead, v: (lead[1], lead[0], v), lambda x, v: x.transpose(0, 1)),
    # three levels of strides: more than the kernels address, so a copy
    "permuted": Layout(
        lambda lead, v: (lead[2], lead[1] + 1, lead[0], v),
        lambda x, v: x[:, 1:].permute(2, 1, 0, 3),
        inplace=False,
    ),
    "columns_first": Layout(lambda lead, v: (v, lead[0]), lambda x, v: x.transpose(0, 1), inplace=False),
    "expanded": Layout(lambda lead, v: (1, v), lambda x, v: x.expand(-1, v), inplace=False),
}


# --- the table -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A row of the table."""

    reason: str
    lead: tuple[int, ...] = (3,)
    vocab: int = 37
    regime: str = "ordinary"
    temperature: float = 2.0
    student_dtype: torch.dtype = FP32
    teacher_dtype: torch.dtype = FP32
    layout: str = "contiguous"
    teacher_layout: str | None = None  # None: the student's
    teacher_vocab: int | None = None  # None: the student's
    options: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        dtypes = "-".join(
            str(d).removeprefix("torch.") for d in {self.student_dtype: 0, self.teacher_dtype: 0}
        )
        shape = "x".join(map(str, (*self.lead, self.vocab)))
        return f"{self.regime}-{shape}-T{self.temperature:g}-{dtypes}-{self.layout}"


def _case(reason: str, dtypes: str = "fp32 fp32", **fields) -> Case:
    names = {"fp32": FP32, "bf16": BF16, "fp16": FP16}
    student, teacher = (names[d] for d in dtypes.split())
    return Case(reason, student_dtype=student, teacher_dtype=teacher, **fields)


SHAPES = [
    _case("softmax of one column is 1: loss and gradient are 0", vocab=1),
    _case("one free parameter", vocab=2),
    _case("vector of 8 minus one", vocab=7),
    _case("vector of 8 exactly", vocab=8),
    _case("vector of 8 plus one", "bf16 bf16", vocab=9),
    _case("vector of 16 minus one", "fp16 fp16", vocab=15),
    _case("vector of 16 exactly", "bf16 bf16", vocab=16),
    _case("vector of 16 plus one", vocab=17),
    _case("two vectors of 16 minus one: the pairwise bf16 store ends early", "bf16 bf16", vocab=31),
    _case("two vectors of 16 plus one", "bf16 fp32", vocab=33),
    _case("no row", lead=(0,), vocab=33),
    _case("no row in a batch", lead=(2, 0), vocab=5),
    _case("one row, no leading dimension", lead=(), vocab=33),
    _case("one row", lead=(1,), vocab=33),
    _case("rows not a multiple of anything", lead=(33,), vocab=65),
    _case("leading dimensions of three levels", lead=(2, 3, 2), vocab=19),
    _case("chunk minus one", vocab=CHUNK - 1),
    _case("chunk exactly", "bf16 bf16", vocab=CHUNK),
    _case("chunk plus one: a second chunk of one column", vocab=CHUNK + 1, regime="late_top"),
    _case("two chunks minus one", "fp16 bf16", lead=(2,), vocab=2 * CHUNK - 1, regime="late_top"),
    _case("two chunks plus one", "bf16 bf16", lead=(2,), vocab=2 * CHUNK + 1, regime="late_top"),
    _case("Llama 2 plus a padding token", lead=(2,), vocab=32001),
    _case("Llama 3 in bf16, few rows: a row is split over threads", "bf16 bf16", lead=(1,), vocab=128256),
    _case("Qwen", "bf16 fp32", lead=(1,), vocab=151936, regime="late_top"),
    _case("Gemma", lead=(1,), vocab=262144, regime="near"),
]

TEMPERATURES = [
    _case("T = 1: the cross-entropy shares the exponentials", temperature=1.0),
    _case("T = 2: squares", temperature=2.0, vocab=300),
    _case("T = 3: third powers", temperature=3.0),
    _case("T = 4: fourth powers, second chunk", temperature=4.0, vocab=CHUNK + 3, lead=(2,)),
    _case("T = 8: the largest power taken", temperature=8.0),
    _case("T = 9: beyond the powers, an exponential of its own", temperature=9.0),
    _case("T = 16.5 is no integer though it is large", temperature=16.5),
    _case("T = 20, softest", "bf16 bf16", temperature=20.0),
    _case("T = 0.1, hardest: exponents ten times the logits", temperature=0.1),
    _case("T = 0.7: below 1 and not a power of 2", temperature=0.7, vocab=CHUNK + 9, lead=(2,)),
    _case(
        "T = 2.5: an exponential of its own in two chunks",
        "fp16 fp16",
        temperature=2.5,
        vocab=CHUNK + 1,
        lead=(2,),
    ),
    _case("T = 0.1 on disagreeing rows: log-probabilities of -1000", temperature=0.1, regime="disagreeing"),
    _case(
        "T = 3 on a ramp: powers rebased in every chunk", temperature=3.0, vocab=3 * CHUNK, regime="ascending"
    ),
]

VALUES = [
    _case("late in training: the KL is 1e-4 of its parts", vocab=1000, regime="near", temperature=1.0),
    _case("late in training, bf16", "bf16 bf16", vocab=1000, regime="near"),
    _case("confident and agreeing rows", vocab=500, regime="peaked", temperature=1.0),
    _case("confident and agreeing, soft", "bf16 bf16", vocab=500, regime="peaked"),
    _case("confident and contradicting", vocab=500, regime="disagreeing", temperature=1.0),
    _case("confident and contradicting, fp16", "fp16 fp16", vocab=500, regime="disagreeing"),
    _case(
        "confident and contradicting, across chunks", vocab=CHUNK + 700, regime="disagreeing", temperature=1.0
    ),
    _case(
        "p and q exactly 0 in fp32 where the other is not", vocab=200, regime="exact_zeros", temperature=1.0
    ),
    _case("exact zeros in bf16", "bf16 bf16", vocab=200, regime="exact_zeros", temperature=0.7),
    _case("masked vocabulary, in both", vocab=50, regime="masked_both"),
    _case("a whole chunk masked in both", "bf16 bf16", lead=(2,), vocab=3 * CHUNK + 5, regime="masked_both"),
    _case(
        "student forbids what the teacher allows: +inf where defined so", vocab=50, regime="masked_student"
    ),
    _case("... in a whole chunk", lead=(2,), vocab=3 * CHUNK + 5, regime="masked_student"),
    _case("teacher forbids what the student allows", vocab=50, regime="masked_teacher"),
    _case("... in the whole first chunk", "fp16 fp16", lead=(2,), vocab=3 * CHUNK, regime="masked_teacher"),
    _case("the same row in both: loss and gradient exactly 0", vocab=777, regime="identical"),
    _case("the same row in both, bf16, two chunks", "bf16 bf16", vocab=CHUNK + 77, regime="identical"),
    _case("every column a tie", vocab=100, regime="flat"),
    _case("logits of +-1e4", vocab=100, regime="huge"),
    _case(
        "logits of +-1e4, bf16, two chunks", "bf16 bf16", vocab=CHUNK + 100, regime="huge", temperature=1.0
    ),
    _case("logits of exactly +-1e4, half of them tops", "fp16 fp16", vocab=100, regime="two_levels"),
    _case("a common offset of 1e4 in the student", vocab=100, regime="offset"),
    _case("a common offset of 1e4, T not a power of 2", vocab=CHUNK + 100, regime="offset", temperature=0.7),
    _case("the running maximum moves in every chunk", vocab=5 * CHUNK + 3, regime="ascending", lead=(2,)),
]

LAYOUT_CASES = [
    _case("row stride > V, offset base pointer", layout="padded", lead=(5,), vocab=67),
    _case("... in bf16: rows at odd addresses", "bf16 bf16", layout="padded", lead=(5,), vocab=CHUNK + 3),
    _case("... in fp16", "fp16 fp16", layout="padded", lead=(5,), vocab=31),
    _case("logits[:, 1:]", layout="shifted", lead=(3, 4), vocab=33),
    _case("logits[:, 1:] of the student alone", layout="shifted", teacher_layout="contiguous", lead=(3, 4), vocab=33),
    _case("every other row", layout="every_other", lead=(5,), vocab=33),
    _case("sequence first", "bf16 bf16", layout="sequence_first", lead=(3, 5), vocab=33),
    _case("more levels of strides than the kernels address", layout="permuted", lead=(2, 3, 4), vocab=17),
    _case("transposed last dimension", layout="columns_first", lead=(5,), vocab=33),
    _case("transposed teacher", teacher_layout="columns_first", lead=(5,), vocab=33),
    _case("one row seen as many", layout="expanded", lead=(6,), vocab=33),
    _case("one teacher row for all", "fp32 bf16", teacher_layout="expanded", lead=(6,), vocab=33),
    _case("padded student head", lead=(4,), vocab=64, teacher_vocab=51, options={"vocab": "truncate"}),
    _case("padded teacher head", "bf16 bf16", vocab=51, teacher_vocab=64, options={"vocab": "truncate"}),
    _case("padded student head across a chunk", lead=(2,), vocab=2 * CHUNK, teacher_vocab=CHUNK - 3,
          layout="padded", options={"vocab": "truncate"}),
    _case("student fp16, teacher fp32", "fp16 fp32", vocab=100),
    _case("student fp32, teacher bf16", "fp32 bf16", vocab=100),
    _case("student bf16, teacher fp16", "bf16 fp16", vocab=100),
]  # fmt: skip

CASES = SHAPES + TEMPERATURES + VALUES + LAYOUT_CASES


# --- from a case to tensors, and through a backend -----------------------------------------------------------------


class Inputs(NamedTuple):
    """Student and teacher as views of their allocations; the rest per token."""

    case: Case
    student_base: Tensor
    teacher: Tensor
    labels: Tensor
    token_weights: Tensor

    def student_of(self, base: Tensor) -> Tensor:
        return LAYOUTS[self.case.layout].view(base, self.case.vocab)

    @property
    def student(self) -> Tensor:
        return self.student_of(self.student_base)


def _allocate(values: Tensor, layout_name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The values in memory of the layout; NaN everywhere between them, so that a stray read shows."""
    layout, vocab = LAYOUTS[layout_name], values.shape[-1]
    base = torch.full(layout.base(tuple(values.shape[:-1]), vocab), float("nan"), dtype=dtype)
    if layout_name == "expanded":
        base.copy_(values[:1])
        return base, base.expand(values.shape)
    view = layout.view(base, vocab)
    view.copy_(values)
    return base, view


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Tensors of the case; the same every time. About a quarter of the labels is ignored, never all."""
    g = torch.Generator().manual_seed(seed)
    widest = max(case.vocab, case.teacher_vocab or 0)
    student, teacher = REGIMES[case.regime](g, case.lead, widest)
    if case.layout == "expanded":  # one row in memory; the layout's view needs the number of rows
        student = student[:1].expand_as(student)
    base, _ = _allocate(student[..., : case.vocab], case.layout, case.student_dtype)
    if case.layout == "expanded":
        base = base.expand(*case.lead, -1)
    teacher_layout = case.teacher_layout or case.layout
    _, teacher = _allocate(
        teacher[..., : case.teacher_vocab or case.vocab], teacher_layout, case.teacher_dtype
    )
    shared = min(case.vocab, case.teacher_vocab or case.vocab)
    labels = torch.randint(shared, case.lead, generator=g)
    if labels.numel() > 2:
        ignored = torch.rand(case.lead, generator=g) < 0.25
        labels[ignored] = IGNORE
        labels.view(-1)[0] = shared - 1
    weights = 0.5 + torch.rand(case.lead, generator=g)
    return Inputs(case, base, teacher, labels, weights)


def to_numpy(x: Tensor) -> np.ndarray:
    """Exact: every float dtype below fp64 embeds in it."""
    return x.detach().to(FP64).numpy() if x.is_floating_point() else x.detach().numpy()


class Outcome(NamedTuple):
    """What a backend returned; gradient None for the value alone."""

    loss: Tensor
    gradient: Tensor | None
    stats: fastkd.KDStats | None


def run_backend(
    inputs: Inputs, options: dict, *, upstream: Tensor | None = None, in_fp32: bool = False
) -> Outcome:
    """Loss, gradient and, if asked for, statistics by `fastkd.kd_loss(**options)`.

    The gradient is taken with respect to the allocation behind the student and read through the same view, so the
    layout is part of the test. in_fp32: the same values, student in fp32 (the yardstick of tolerances.py).
    """
    base = inputs.student_base.float() if in_fp32 else inputs.student_base
    leaf = base.detach().requires_grad_()
    student = inputs.student_of(leaf.clone() if options.get("inplace") else leaf)
    result = fastkd.kd_loss(student, inputs.teacher, **options)
    loss, stats = result if options.get("return_stats") else (result, None)
    (gradient,) = torch.autograd.grad(loss, leaf, upstream)
    return Outcome(loss.detach(), inputs.student_of(gradient), stats)


def reference_of(inputs: Inputs, options: dict, upstream: Tensor | None = None) -> Reference:
    """The reference for the same keywords."""
    keywords = {k: v for k, v in options.items() if k not in ("backend", "inplace", "return_stats", "vocab")}
    for name in ("labels", "token_weights", "temperature"):
        if isinstance(keywords.get(name), Tensor):
            keywords[name] = to_numpy(keywords[name])
    if isinstance(keywords.get("num_items_in_batch"), Tensor):
        keywords["num_items_in_batch"] = float(keywords["num_items_in_batch"])
    up = 1.0 if upstream is None else to_numpy(upstream)
    return reference(to_numpy(inputs.student), to_numpy(inputs.teacher), upstream=up, **keywords)
