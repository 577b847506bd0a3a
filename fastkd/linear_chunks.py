"""torch.ops.fastkd.linear_kd: loss and gradients from hidden states and head weights, a chunk of rows at a time.

Forward makes the logits of a chunk, turns the student's into their gradient in place, and adds that to the gradients of
hidden states, weight and bias before the next chunk overwrites it. Backward only scales.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import counted, ops, shard_ops, sparse_ops
from .linear_models import Model, model_of
from .linear_rows import Selection, select_rows
from .products import WeightGradient, hidden_gradient
from .stats import KDStats

USUAL_ROWS = 512  # rows below which the matrix products of a chunk are slower
USUAL_LIMIT = 256 << 20  # bytes that the logits of as many may take if no budget is given
DEFAULT_BUDGET = 224_000_000  # bytes; with what fp32 products take beside it 256 MB
NAIVE_SHARE = 0.36  # of one N x V tensor of logits: 5 % of what all logits and their softmaxes take


def default_budget(rows: int, vocab: int, dtypes: tuple[torch.dtype, ...], accumulator: int) -> int:
    """Bytes for the logits of a chunk where no budget is given: a small share of all logits, less the ``accumulator``
    bytes that the sum of a 16-bit weight's gradients takes beside it; USUAL_ROWS at least, DEFAULT_BUDGET at most.
    Where USUAL_ROWS take more than USUAL_LIMIT, DEFAULT_BUDGET."""
    usual = USUAL_ROWS * vocab * sum(dtype.itemsize for dtype in dtypes)
    if usual > USUAL_LIMIT:
        return DEFAULT_BUDGET
    share = int(NAIVE_SHARE * rows * vocab * dtypes[0].itemsize) - accumulator
    return max(usual, min(DEFAULT_BUDGET, share))


def chunk_rows(rows: int, vocab: int, dtypes: tuple[torch.dtype, ...], budget: int) -> int:
    """Rows of a chunk: as many as the logits of both models (``dtypes``) of ``vocab`` columns fit into ``budget``
    bytes; if there are several, evened out over the chunks in multiples of 512, 16 or 1 rows; at least 1."""
    most = max(1, budget // (vocab * sum(dtype.itemsize for dtype in dtypes)))
    if rows <= most:
        return max(1, rows)
    unit = next(unit for unit in (USUAL_ROWS, 16, 1) if unit <= most)
    even = -(-rows // -(-rows // (most // unit * unit)))
    return -(-even // unit) * unit


class Call(NamedTuple):
    """Arguments of the operator, in its order. N rows; per-row tensors (N), logits (N, V)."""

    student_hidden: Tensor  # (N, H)
    student_weight: Tensor  # (V, H)
    student_bias: Tensor | None
    teacher_hidden: Tensor | None  # (N, H') with teacher_weight, or teacher_logits
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    teacher_logits: Tensor | None
    labels: Tensor | None
    token_weights: Tensor | None
    temperatures: Tensor | None
    num_items: Tensor | None
    scalars: Tensor  # as for kd_forward
    divergence: str
    scale_by_t2: bool
    ignore_index: int
    reduction: str
    with_stats: bool
    backend: str
    autocast_dtype: torch.dtype | None
    logits_dtype: torch.dtype | None
    chunk_size: int  # rows; 0: from memory_budget
    memory_budget: int  # bytes; 0: default_budget
    needs: list[bool]  # which gradients: hidden, weight, bias
    ids: Tensor | None = None  # (N, K) each, in place of the teacher's tensors, as for sparse_forward
    logprobs: Tensor | None = None
    draw_weights: Tensor | None = None
    tail: str = ""
    start: int = 0  # of a vocabulary shard: columns [start, stop), which all weights hold
    stop: int = 0
    group: str = ""  # name of its process group; "": there is none

    @property
    def of_the_sum(self) -> bool:
        """Gradients of fp16 tensors are kept in fp32 and of the sum: those of the mean may be 0 as an fp16 operand."""
        return torch.float16 in (self.autocast_dtype, self.student_hidden.dtype)

    @property
    def with_gradient(self) -> bool:
        """``none`` makes no gradients in forward: they depend on the upstream of each row."""
        return any(self.needs) and self.reduction != "none"

    def models(self) -> tuple[Model, Model]:
        """Student and teacher with their common vocabulary; a sparse teacher has no logits."""
        if self.ids is not None:
            whole = (self.student_weight.shape[0], self.autocast_dtype, self.logits_dtype)
            student = model_of(self.student_weight, self.student_bias, None, *whole)
            return student, student._replace(weight=None, bias=None)
        given, weight = self.teacher_logits, self.teacher_weight
        head = given.shape[1] if given is not None else weight.shape[0] if weight is not None else 0
        common = (min(self.student_weight.shape[0], head), self.autocast_dtype, self.logits_dtype)
        return (
            model_of(self.student_weight, self.student_bias, None, *common),
            model_of(self.teacher_weight, self.teacher_bias, self.teacher_logits, *common),
        )

    @property
    def loss_dtype(self) -> torch.dtype:
        """fp32; fp64 only of a shard, whose eager parts take this way too."""
        return torch.promote_types(self.student_hidden.dtype, torch.float32) if self.group else torch.float32

    def denominator(self) -> Tensor:
        """0-d fp32: what the reduction over the whole batch divides by; 1 where that is 0."""
        rows, new = self.student_hidden.shape[0], self.student_hidden.new_ones
        if self.reduction != "mean":
            return new((), dtype=torch.float32)
        total = self.num_items
        if total is None:
            weights = new(rows, dtype=torch.float32) if self.token_weights is None else self.token_weights.float()
            if self.labels is not None:
                weights = weights.masked_fill(self.labels == self.ignore_index, 0.0)
            total = weights.sum()
        return torch.where(total == 0, 1.0, total.float())


_SCHEMA = (
    "(Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor? teacher_hidden, "
    "Tensor? teacher_weight, Tensor? teacher_bias, Tensor? teacher_logits, Tensor? labels, Tensor? token_weights, "
    "Tensor? temperatures, Tensor? num_items, Tensor scalars, str divergence, bool scale_by_t2, int ignore_index, "
    "str reduction, bool with_stats, str backend, ScalarType? autocast_dtype, ScalarType? logits_dtype, "
    "SymInt chunk_size, SymInt memory_budget, bool[] needs, Tensor? ids=None, Tensor? logprobs=None, "
    'Tensor? draw_weights=None, str tail="", SymInt start=0, SymInt stop=0, str group="") '
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def kept_dtype(x: Tensor) -> torch.dtype:
    """Dtype in which the gradient of ``x`` waits for backward."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


class Gradients:
    """Sums of the gradients over chunks of rows; None where one is not wanted."""

    def __init__(self, call: Call, selection: Selection, student: Model, chunks: int) -> None:
        wanted, self.group = call.needs if call.with_gradient else [False] * 3, call.group
        hidden, weight, bias = call.student_hidden, call.student_weight, call.student_bias
        new = hidden.new_empty if selection.index is None else hidden.new_zeros
        dtype = call.loss_dtype if call.group else kept_dtype(hidden)  # parts of other ranks are still to be added
        self.hidden = new(hidden.shape, dtype=dtype) if wanted[0] else None
        self.hidden_dtype = kept_dtype(hidden)
        self.by_count = selection.live is not None and student.counted()
        arguments = (weight, kept_dtype(weight), student.logits_dtype, chunks, self.by_count)
        self.weight = WeightGradient(*arguments) if wanted[1] else None
        self.bias = torch.zeros_like(bias, dtype=call.loss_dtype) if wanted[2] and bias is not None else None
        self.bias_dtype = None if bias is None else kept_dtype(bias)

    def add(
        self, gradient: Tensor, hidden: Tensor, weight: Tensor, selection: Selection, rows: slice,
        count: Tensor | None, free: Tensor | None,
    ) -> None:  # fmt: skip
        """gradient: (R, V') of a chunk's logits; hidden: its (R, H); weight: (V', H); count: how many of the R, for
        products that take it; free: memory for the others."""
        count = count if self.by_count else None
        if self.hidden is not None:
            values = hidden_gradient(gradient, weight, free, count)
            if count is not None and selection.ignored is not None:  # beyond the count they are no numbers
                values.masked_fill_(selection.ignored[rows, None], 0.0)
            selection.put(self.hidden, rows, values)
        if self.weight is not None:
            self.weight.add(gradient, hidden, free, count)
        if self.bias is not None:
            self.bias[: gradient.shape[1]] += gradient.sum(0, dtype=self.bias.dtype)

    def results(self, like: Tensor, in_buffer: bool) -> tuple[Tensor, Tensor, Tensor]:
        """As the operator returns them: (0) where not wanted. in_buffer: as for WeightGradient.result."""
        empty = like.new_empty
        if self.group and self.hidden is not None:
            shard_ops.add_up(self.group, self.hidden)
        return (
            empty(0) if self.hidden is None else self.hidden.to(self.hidden_dtype),
            empty(0) if self.weight is None else self.weight.result(in_buffer),
            empty(0) if self.bias is None else self.bias.to(self.bias_dtype),
        )


class _Chunks:
    """The loop over chunks of one call."""

    def __init__(self, call: Call) -> None:
        self.call, (self.student, self.teacher) = call, call.models()
        self.selection = self._select()
        self.denominator = call.denominator()
        vocab = self.student.vocab
        if call.group:  # the widest rank's, for all to take the same chunks
            arguments = (call.backend, call.start, call.stop, call.group)
            self.operators, vocab = shard_ops.operators_for(call.student_hidden, call[7:17], *arguments)
        else:
            self.operators = (ops if call.ids is None else sparse_ops).registered[call.backend]
        reduction = "sum" if call.reduction == "mean" and call.of_the_sum else call.reduction
        self.numbers = (call.scalars, call.divergence, call.scale_by_t2, call.ignore_index, reduction, call.with_stats)
        self.num_items = self.denominator if reduction == "mean" else None
        made = (self.student, self.teacher) if call.ids is None else (self.student,)
        dtypes = tuple(model.logits_dtype for model in made)
        count, weight = self.selection.count, call.student_weight
        accumulator = 2 * weight.numel() if call.needs[1] and kept_dtype(weight).itemsize == 2 else 0
        budget = call.memory_budget or default_budget(count, vocab, dtypes, accumulator)
        rows = call.chunk_size or chunk_rows(count, vocab, dtypes, budget)
        self.step = max(1, min(rows, self.selection.count))

    def _select(self) -> Selection:
        """In an order that all ranks of a group have in common, whatever their part of the head and their device."""
        call, student, rows = self.call, self.student, self.call.student_hidden.shape[0]
        in_order = student.counted()
        if call.group:
            common = counted.possible(call.student_hidden, student.dtype, student.logits_dtype)
            in_order = common and student.bias is None
        return select_rows(call.labels, call.ignore_index, rows, in_order)

    def run(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The operator's results."""
        call, new, rows = self.call, self.call.student_hidden.new_zeros, self.call.student_hidden.shape[0]
        loss = new(rows if call.reduction == "none" else (), dtype=call.loss_dtype)
        stats = new((5, rows) if call.with_stats else (0,), dtype=torch.float32)
        chunks = -(-self.selection.count // self.step)
        sums = Gradients(call, self.selection, self.student, chunks)
        rounded = 0 if sums.weight is None or sums.by_count else sums.weight.rounded_bytes
        in_buffer = rounded > 0 and rounded >= self.step * self.student.vocab * self.student.logits_dtype.itemsize
        student_buffer = None if sums.by_count else self.student.buffer(self.step, rounded if in_buffer else 0)
        own = self.selection.live is not None and self.teacher.counted()  # counted products bring memory of their own
        teacher_buffer = None if own else self.teacher.buffer(self.step, teacher=True)
        for start in range(0, self.selection.count, self.step):
            chunk = slice(start, min(start + self.step, self.selection.count))
            value, part = self._one(chunk, student_buffer, teacher_buffer, sums)
            if call.reduction == "none":
                self.selection.put(loss, chunk, value)
            else:
                loss += value
            if call.with_stats:
                self.selection.put(stats, chunk, part, dim=1)
        del student_buffer, teacher_buffer  # before a 16-bit weight's gradient is rounded into a tensor of its own
        pending = 1 / self.denominator if call.of_the_sum else torch.ones_like(self.denominator)
        return loss * pending, *sums.results(call.student_hidden, in_buffer), pending, stats

    def _one(self, chunk: slice, student_buffer, teacher_buffer, sums: Gradients) -> tuple[Tensor, Tensor]:
        """Value and stats of a chunk; its gradients go into ``sums``."""
        call, take = self.call, self.selection.take
        hidden = take(call.student_hidden, chunk)
        if self.selection.ignored is not None:  # NaN there times a gradient of 0 would be NaN
            hidden = hidden.masked_fill(self.selection.ignored[chunk, None], 0.0)
        hidden, count = hidden.to(self.student.dtype), self.selection.live_of(chunk)
        logits = self.student.logits_of(hidden, student_buffer, count)
        teacher = self._teacher(chunk, teacher_buffer, count)
        each = (call.labels, call.token_weights, call.temperatures)
        per_row = (None if x is None else take(x, chunk) for x in each)
        scalars, *options = self.numbers
        tail = () if call.ids is None else (call.tail,)
        arguments = (*teacher, *per_row, self.num_items, scalars, *tail, *options)
        if not call.with_gradient:
            value, _, _, part = self.operators.forward(logits, *arguments, False)
            return value, part
        value, _, part = self.operators.forward_(logits, *arguments)
        assert self.student.weight is not None
        # the teacher's logits of the chunk are of no more use
        sums.add(logits, hidden, self.student.weight, self.selection, chunk, count, teacher_buffer)
        return value, part

    def _teacher(self, chunk: slice, buffer, count: Tensor | None) -> tuple[Tensor | None, ...]:
        """A chunk's logits of the teacher, or its ids, log-probabilities and weights."""
        call, take = self.call, self.selection.take
        if call.ids is not None:
            return tuple(None if x is None else take(x, chunk) for x in (call.ids, call.logprobs, call.draw_weights))
        if self.teacher.logits is not None:
            return (take(self.teacher.logits, chunk),)
        assert call.teacher_hidden is not None
        return (self.teacher.logits_of(take(call.teacher_hidden, chunk).to(self.teacher.dtype), buffer, count),)


@torch.library.custom_op("fastkd::linear_kd", mutates_args=(), schema=_SCHEMA)
def linear_kd(*arguments):
    """-> loss; gradients of hidden states, weight and bias, (0) where not wanted; pending, with which these must still
    be multiplied; stats (5, N) or (0)."""
    call = Call(*arguments)
    with torch.autocast(call.student_hidden.device.type, enabled=False):
        return _Chunks(call).run()


@linear_kd.register_fake
def _fake(*arguments):
    call = Call(*arguments)
    new, rows = call.student_hidden.new_empty, call.student_hidden.shape[0]
    gradients = (
        new((0,)) if x is None or not (wanted and call.with_gradient) else new(x.shape, dtype=kept_dtype(x))
        for x, wanted in zip((call.student_hidden, call.student_weight, call.student_bias), call.needs)
    )
    loss = new((rows,) if call.reduction == "none" else (), dtype=call.loss_dtype)
    pending, stats = new((), dtype=torch.float32), new((5, rows) if call.with_stats else (0,), dtype=torch.float32)
    return loss, *gradients, pending, stats


def _save(ctx, call: Call, gradients: tuple[Tensor, ...], pending: Tensor) -> None:
    """For backward: the gradients; for ``none``, which makes them there, the arguments."""
    ctx.set_materialize_grads(False)
    none = call.reduction == "none"
    ctx.present = [none and isinstance(x, Tensor) for x in call]
    ctx.call = Call._make(None if isinstance(x, Tensor) else x for x in call)
    ctx.dtypes = [None if x is None else x.dtype for x in call[:3]]
    tensors = (x for x in call if isinstance(x, Tensor)) if none else (*gradients, pending)
    ctx.save_for_backward(*tensors)


def _gradients_of_rows(ctx, upstream: Tensor) -> tuple[Tensor, ...]:
    """Gradients and pending for an upstream of its own for each row, which is a weight of the row."""
    saved = iter(ctx.saved_tensors)
    call = Call._make(next(saved) if there else x for x, there in zip(ctx.call, ctx.present))
    weights = upstream if call.token_weights is None else upstream * call.token_weights
    anew = call._replace(token_weights=weights.float(), reduction="sum", with_stats=False)
    _, *gradients, pending, _ = torch.ops.fastkd.linear_kd(*anew)
    return (*gradients, pending)


def _backward_by(ctx, upstream: Tensor | None, rescale: Callable) -> tuple[Tensor | None, ...]:
    """Gradients of hidden states, weight and bias; rescale(operators, gradient, upstream, pending)."""
    if upstream is None:
        return None, None, None
    if torch.is_grad_enabled():
        raise RuntimeError(ops.DOUBLE_BACKWARD)
    if ctx.call.reduction == "none":
        *gradients, pending = _gradients_of_rows(ctx, upstream)
        upstream = torch.ones_like(pending)
    else:
        *gradients, pending = ctx.saved_tensors
    operators = shard_ops.rescaling(ctx.call.backend)
    return tuple(
        rescale(operators, gradient, upstream, pending).to(dtype) if wanted and dtype is not None else None
        for gradient, wanted, dtype in zip(gradients, ctx.call.needs, ctx.dtypes)
    )


def _setup_context(ctx, inputs, output) -> None:
    _, *gradients, pending, stats = output
    ctx.mark_non_differentiable(*gradients, pending, stats)
    _save(ctx, Call(*inputs), gradients, pending)


def _backward(ctx, upstream: Tensor | None, *_unused: Tensor | None):
    """Of the operator, whose outputs, the gradients among them, belong to the caller: scaled into copies."""
    rescale = lambda operators, *tensors: operators.rescale(*tensors)  # noqa: E731
    return (*_backward_by(ctx, upstream, rescale), *(None,) * (len(Call._fields) - 3))


linear_kd.register_autograd(_backward, setup_context=_setup_context)


class _Loss(torch.autograd.Function):
    """The operator under autograd outside a trace: nobody else holds the gradients, which are scaled in place."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, rest: tuple):
        call = Call._make((hidden, weight, bias, *rest))
        loss, *gradients, pending, stats = linear_kd(*call)
        _save(ctx, call, gradients, pending)
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx, upstream: Tensor | None, _stats: None):
        return (*_backward_by(ctx, upstream, ops.rescaled), None)


def fused_linear(call: Call) -> tuple[Tensor, KDStats | None]:
    """Loss and stats (N), differentiable with respect to the student's tensors."""
    if torch.compiler.is_compiling() or not any(call.needs):
        loss, *_, stats = linear_kd(*call)
    else:
        loss, stats = _Loss.apply(*call[:3], tuple(call[3:]))
    return loss, KDStats(*stats.unbind(0)) if call.with_stats else None
