"""torch.ops.fastkd.shard_kd: loss and gradient of a rank's columns, with one exchange of sums between the ranks, two
where a divergence needs both softmax denominators before its terms. Backward exchanges nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, ops, shard_eager, shard_native
from .options import Options
from .shard import VocabShard, accumulator_dtype
from .shard_eager import Piece, Row
from .shard_exchange import ShardMap, agree, gather
from .shard_exchange import add_up as add_up_of
from .shard_rows import FIELDS, MIXED, Finished, empty_piece, finish, merge, needs_hard, sent_fields


def _group_named(name: str) -> Any:
    from torch.distributed.distributed_c10d import _resolve_process_group  # missing where torch has no distributed

    return _resolve_process_group(name)  # type: ignore[arg-type]


class Parts(NamedTuple):
    """What a backend computes of a piece: see shard_eager."""

    sums: Callable[[Piece], Tensor]
    terms: Callable[[Piece, dict[str, Tensor]], Tensor]
    gradient: Callable[[Piece, Row, Tensor | None], Tensor]  # into, where given: the student's logits
    devices: tuple[str, ...] | None  # types; None: any


registered: dict[str, Parts] = {
    "eager": Parts(shard_eager.sums, shard_eager.terms, shard_eager.gradient, None),
}
if not ops.load_error:
    registered["native"] = Parts(shard_native.sums, shard_native.terms, shard_native.gradient, ops.native_devices())


def _rescaled(gradient: Tensor, upstream: Tensor, pending: Tensor) -> Tensor:
    factor = upstream * pending
    return (gradient * (factor.unsqueeze(-1) if factor.dim() else factor)).to(gradient.dtype)


def rescaling(backend: str) -> ops.Operators | ops.Rescaling:
    """Those that serve the gradients of a backend; eager's are torch's own."""
    if backend in ops.registered:
        return ops.registered[backend]

    def in_place(gradient: Tensor, upstream: Tensor, pending: Tensor) -> None:
        gradient.copy_(_rescaled(gradient, upstream, pending))

    return ops.Rescaling(_rescaled, in_place)


class Call(NamedTuple):
    """Arguments of the operator, in its order."""

    student_logits: Tensor  # (..., C), C >= stop - start: columns beyond are padding
    teacher_logits: Tensor  # (..., C')
    labels: Tensor | None  # (...): columns of the whole vocabulary
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
    start: int
    stop: int
    group: str  # name of the process group
    with_gradient: bool

    def options(self) -> Options:
        """The loss's own, of which the shard's parts use the numbers."""
        beta, t, kd, ce, smoothing, z_loss, student_cap, teacher_cap = self.scalars.tolist()  # on the CPU always
        return Options(
            self.divergence, beta, t, self.scale_by_t2, kd, ce, smoothing, z_loss, student_cap or None,
            teacher_cap or None, self.ignore_index, self.reduction, "error", False, self.with_stats,
        )  # fmt: skip

    @property
    def rows(self) -> int:
        """N"""
        return self.student_logits.shape[:-1].numel()


_SCHEMA = (
    "(Tensor student_logits, Tensor teacher_logits, Tensor? labels, Tensor? token_weights, Tensor? temperatures, "
    "Tensor? num_items, Tensor scalars, str divergence, bool scale_by_t2, SymInt ignore_index, str reduction, "
    "bool with_stats, str backend, SymInt start, SymInt stop, str group, bool with_gradient) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def common_of(call: Call, o: Options) -> dict[str, Any]:
    """What all ranks must call with, in words."""
    settings = {name: getattr(o, name) for name in Options._fields if name not in ("vocab", "inplace", "backend")}
    tensors = ("labels", "token_weights", "temperatures", "num_items")
    given = {name: getattr(call, name) is not None for name in tensors}
    return {"rows": call.rows, "backend": call.backend, **settings, **given}


def map_of(call: Call, o: Options, problem: str = "") -> ShardMap:
    """The group's map; the first call of its kind asks the others for it."""
    dtype = accumulator_dtype(call.student_logits.dtype, call.teacher_logits.dtype)
    fields = sent_fields(o, call.labels is not None)
    structure = (call.backend, call.divergence, str(dtype), fields)
    common = {**common_of(call, o), "accumulators": str(dtype)}
    shard = VocabShard(call.start, call.stop)
    return agree(_group_named(call.group), shard, call.student_logits.device, structure, common, problem)


class _Rows:
    """One call, from the logits of this rank to the loss of all."""

    def __init__(self, call: Call) -> None:
        self.call, self.o = call, call.options()
        self.shard, self.group = VocabShard(call.start, call.stop), _group_named(call.group)
        self.common = common_of(call, self.o)
        self.map = map_of(call, self.o)
        checks.check_values_on_cpu(self.map.vocab, call.labels, call.temperatures, call.ignore_index)
        self.dtype = accumulator_dtype(call.student_logits.dtype, call.teacher_logits.dtype)
        flat = lambda x: None if x is None else x.reshape(-1)  # noqa: E731
        self.labels, self.temperatures = flat(call.labels), flat(call.temperatures)
        self.valid = None if self.labels is None else self.labels != call.ignore_index
        self.weights = self._weights()
        self.hard = needs_hard(self.o, self.labels is not None)
        self.parts, self.piece = registered[call.backend], self._piece()
        self.alike: Tensor | None = None

    def _weights(self) -> Tensor:
        """(N): of the tokens, 0 where they are ignored."""
        given, device = self.call.token_weights, self.call.student_logits.device
        if given is None:
            weights = torch.ones(self.call.rows, dtype=self.dtype, device=device)
        else:
            weights = given.reshape(-1).to(self.dtype)
        return weights if self.valid is None else torch.where(self.valid, weights, 0.0)

    def _piece(self) -> Piece:
        call, local, owned = self.call, None, None
        if self.labels is not None:
            assert self.valid is not None
            owned = self.valid & (self.labels >= call.start) & (self.labels < call.stop)
            local = torch.where(self.valid, torch.where(owned, self.labels - call.start, 0), -1)
        temperatures = self.temperatures
        if temperatures is not None and self.valid is not None:  # an ignored row's may be anything
            temperatures = torch.where(self.valid, temperatures, 1.0)
        return Piece(
            call.student_logits, call.teacher_logits, local, owned, temperatures, call.scalars, self.o, self.shard,
            self.hard,
        )  # fmt: skip

    def _exchange(self, rows: Tensor, first: bool) -> Tensor:
        pieces, alike = gather(self.group, self.shard, self.common, rows, first)
        if alike is not None:
            self.alike = alike if self.alike is None else self.alike & alike
        return pieces

    def row(self) -> tuple[dict[str, Tensor], Tensor | None]:
        """Sums of whole rows, and of their terms (2, N) where the divergence has them."""
        fields = sent_fields(self.o, self.labels is not None)
        if self.shard.width:
            piece = self.parts.sums(self.piece)
        else:
            piece = empty_piece(self.call.student_logits, self.call.rows, self.dtype)
        sent = torch.stack([piece[FIELDS.index(name)] for name in fields])
        widths = self.map.widths_on(sent.device, self.dtype)
        row = merge(self._exchange(sent, first=True), fields, self.temperature(), widths)
        if self.o.divergence in MIXED:
            return row, None
        own = self.parts.terms(self.piece, row) if self.shard.width else sent.new_zeros(2, self.call.rows)
        return row, self._exchange(own, first=False).sum(0)

    def temperature(self) -> Tensor | float:
        """(N), or a number."""
        given = self.piece.temperatures
        return self.o.temperature if given is None else given.to(self.dtype)

    def denominator(self) -> Tensor:
        """0-d: of the reduction; 1 where there is none, or no token."""
        if self.o.reduction != "mean":
            return torch.ones((), dtype=self.dtype, device=self.weights.device)
        total = self.weights.sum() if self.call.num_items is None else self.call.num_items.to(self.dtype)
        return torch.where(total == 0, 1.0, total)

    def usable(self) -> Tensor | None:
        """(N), 1 or NaN: labels and temperatures that no host has looked at, and ranks that disagree."""
        if self.weights.device.type == "cpu":  # there all of that has raised
            return None
        good = torch.ones_like(self.weights, dtype=torch.bool)
        if self.labels is not None:
            good &= (self.labels >= 0) & (self.labels < self.map.vocab)
        if self.piece.temperatures is not None:
            good &= torch.isfinite(self.piece.temperatures) & (self.piece.temperatures > 0)
        if self.valid is not None:
            good |= ~self.valid
        if self.alike is not None:
            good &= self.alike
        return torch.where(good, 1.0, torch.nan).to(self.dtype)


def shard_forward(call: Call, into: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator's results; the gradient goes ``into`` a tensor of the student's shape where that is given."""
    work = _Rows(call)
    row, terms = work.row()
    done = finish(work.o, row, terms, work.temperature(), work.weights, work.map.vocab)
    denominator, usable = work.denominator(), work.usable()
    loss, weights = done.loss, work.weights
    if usable is not None:
        loss, weights = loss * usable, weights * usable
    if work.valid is not None:
        loss = torch.where(work.valid, loss, 0.0)
    lead = call.student_logits.shape[:-1]
    reduced = loss.view(lead) if call.reduction == "none" else loss.sum() / denominator
    # fp16 keeps the gradient of the sum: that of the mean would underflow before a loss scaler could save it
    normalise = call.student_logits.dtype != torch.float16
    pending = torch.ones_like(denominator) if normalise else 1 / denominator
    gradient = call.student_logits.new_empty(0)
    if call.with_gradient:
        scale = weights / denominator if normalise else weights
        gradient = _gradient(work, Row(row, terms, done.dlogq, done.lse, scale, work.map.vocab), into)
    return reduced, gradient, pending, _stats(work, done, lead)


def _gradient(work: _Rows, row: Row, into: Tensor | None) -> Tensor:
    if work.shard.width:
        return work.parts.gradient(work.piece, row, into)
    if into is None:
        return torch.zeros_like(work.call.student_logits, memory_format=torch.contiguous_format)
    return into.zero_()


def _stats(work: _Rows, done: Finished, lead: torch.Size) -> Tensor:
    if done.stats is None:
        return work.weights.new_empty(0, dtype=torch.float32)
    stats = done.stats if work.valid is None else torch.where(work.valid, done.stats, 0.0)
    return stats.float().view(5, *lead)


@torch.library.custom_op("fastkd::shard_kd", mutates_args=(), schema=_SCHEMA)
def shard_kd(*arguments):
    """-> loss, gradient (empty without with_gradient), pending scale of the gradient, stats (5, ...) or empty."""
    return shard_forward(Call(*arguments))


@shard_kd.register_fake
def _fake(*arguments):
    call = Call(*arguments)
    student = call.student_logits
    dtype = accumulator_dtype(student.dtype, call.teacher_logits.dtype)
    loss, pending, stats = ops.fake_outputs(student, call.reduction, call.with_stats)
    gradient = student.new_empty(student.shape if call.with_gradient else (0,))
    return loss.to(dtype), gradient, pending.to(dtype), stats


def _setup_context(ctx, inputs, output) -> None:
    call, (_, gradient, pending, stats) = Call(*inputs), output
    ctx.save_for_backward(gradient, pending)
    ctx.mark_non_differentiable(gradient, pending, stats)
    ctx.set_materialize_grads(False)
    ctx.with_gradient, ctx.backend = call.with_gradient, call.backend


def _backward(ctx, upstream: Tensor | None, *_unused: Tensor | None):
    nothing = (None,) * len(Call._fields)
    if upstream is None:
        return nothing
    if not ctx.with_gradient:
        raise RuntimeError("the operator was called with with_gradient=False and cannot be differentiated")
    if torch.is_grad_enabled():
        raise RuntimeError(ops.DOUBLE_BACKWARD)
    gradient, pending = ctx.saved_tensors
    return rescaling(ctx.backend).rescale(gradient, upstream, pending), *nothing[1:]


shard_kd.register_autograd(_backward, setup_context=_setup_context)


def _operators(backend: str, call_of: Callable[..., Call]) -> ops.Operators:
    """A shard's part with the signatures of any backend's operators; call_of: student_logits, ..., with_gradient."""

    def forward(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return shard_forward(call_of(logits, *rest))

    def forward_(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        loss, _, pending, stats = shard_forward(call_of(logits, *rest, True), logits.detach())
        return loss, pending, stats

    rescale = rescaling(backend)
    return ops.Operators(forward, forward_, rescale.rescale, rescale.rescale_)


def add_up(group: str, x: Tensor) -> None:
    """x <- its sum over the group's ranks, the same bits on each."""
    add_up_of(_group_named(group), x)


def tell_problem(like: Tensor, arguments: tuple, backend: str, shard: VocabShard, group: str, problem: str) -> None:
    """Raises the problem of this rank, on the others too; like and arguments as for operators_for."""
    call = Call._make((like, like, *arguments, backend, shard.start, shard.stop, group, False))
    map_of(call, call.options(), problem)


def operators_for(
    like: Tensor, arguments: tuple, backend: str, start: int, stop: int, group: str
) -> tuple[ops.Operators, int]:
    """Those of a shard with the signatures of any backend's, for the chunks of the linear loss; and the columns of the
    widest rank. like: (N, H); arguments: labels ... with_stats of all rows, which the ranks must have in common."""

    def call_of(logits: Tensor, *rest: Any) -> Call:
        *others, with_gradient = rest
        return Call._make((logits, *others, backend, start, stop, group, with_gradient))

    whole = call_of(like, like, *arguments, False)
    known = map_of(whole, whole.options())
    checks.check_values_on_cpu(known.vocab, whole.labels, whole.temperatures, whole.ignore_index)
    return _operators(backend, call_of), max(known.widths)


def run(call: Call, inplace: bool) -> tuple[Tensor, Tensor]:
    """loss and stats, with autograd where a gradient is asked for. Eager ignores ``inplace``, as elsewhere."""
    if torch.compiler.is_compiling() or not call.with_gradient:
        loss, _, _, stats = shard_kd(*call)
        return loss, stats
    backend = call.backend if call.student_logits.numel() else "eager"  # no kernel rescales rows without columns
    operators = _operators(backend, lambda logits, _with_gradient: call._replace(student_logits=logits))
    return ops.run(operators, call.student_logits, (), inplace and call.backend != "eager")
