"""How a row of the table of cases becomes tensors: regimes of values, layouts in memory, a run through a backend."""

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


# --- a case --------------------------------------------------------------------------------------------------------


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
        dtypes = "-".join(str(d).removeprefix("torch.") for d in {self.student_dtype: 0, self.teacher_dtype: 0})
        shape = "x".join(map(str, (*self.lead, self.vocab)))
        return f"{self.regime}-{shape}-T{self.temperature:g}-{dtypes}-{self.layout}"


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
    _, teacher = _allocate(teacher[..., : case.teacher_vocab or case.vocab], teacher_layout, case.teacher_dtype)
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


def run_backend(inputs: Inputs, options: dict, *, upstream: Tensor | None = None, in_fp32: bool = False) -> Outcome:
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
