"""torch.ops.fastkd: loading, shapes for tracing (fake kernels), autograd, and the loss built on them.

The schemas and what each output means are in csrc/torch/library.cpp; every backend with operators has the same four.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .options import Options
from .stats import KDStats

load_error = ""  # why the extension is missing; "" where it loaded
isa_error = ""  # why FASTKD_CPU_ISA cannot be honoured
_cuda_architectures = ""  # read once: a trace cannot enter the extension
try:
    from . import _C

    _cuda_architectures = _C.cuda_architectures()

    try:
        _C.cpu_isa()
    except ValueError as error:
        isa_error = str(error)
except ImportError as error:
    load_error = f"the extension fastkd._C could not be loaded ({error}); build it with `pip install .`"


def native_devices() -> tuple[str, ...]:
    """Device types that the extension was built for."""
    if load_error:
        return ()
    return ("cpu", "cuda") if cuda_architectures() else ("cpu",)


def cuda_architectures() -> str:
    """What the CUDA kernels were compiled for, such as "80, 90a"; "" where they were not built."""
    return _cuda_architectures


def cpu_isa() -> str:
    """Instruction set of the CPU kernels in use; "none" where FASTKD_CPU_ISA names none that runs here."""
    return "none" if isa_error else _C.cpu_isa()


def cpu_isas() -> tuple[str, ...]:
    """Instruction sets that this machine runs, best last."""
    return tuple(_C.cpu_isas().split(", "))


class Operators(NamedTuple):
    """The operators of one backend, all with the schemas of csrc/torch/library.cpp."""

    forward: Callable  # -> loss, gradient, pending, stats
    forward_: Callable  # -> loss, pending, stats; overwrites the student's logits with the gradient
    rescale: Callable
    rescale_: Callable


class Rescaling(NamedTuple):
    """Of Operators those that backward calls."""

    rescale: Callable
    rescale_: Callable


registered: dict[str, Operators] = {}  # backend -> its operators


def release_lingering_memory() -> int:
    """Give freed memory that lingers for the next call (gradients, logits of a chunk) back to the system; its bytes."""
    return 0 if load_error else _C.release_lingering_memory()


DOUBLE_BACKWARD = (
    "fastkd's kernels have no second derivative (the gradient is computed in forward); "
    "use backend='eager' for create_graph=True"
)


def rescaled(operators: Operators | Rescaling, gradient: Tensor, upstream: Tensor, pending: Tensor) -> Tensor:
    """The gradient for the real upstream: handed over as it is where upstream and pending are 1, else scaled."""
    if torch.is_grad_enabled():
        raise RuntimeError(DOUBLE_BACKWARD)
    # A retained graph must keep its gradient, and a traced one may not mutate what it saved: scale into a copy there.
    if type(gradient) is not Tensor or torch._C._autograd._get_current_graph_task_keep_graph():
        return operators.rescale(gradient, upstream, pending)
    operators.rescale_(gradient, upstream, pending)
    return gradient


def _setup_context(ctx, inputs, output) -> None:
    _, gradient, pending, stats = output
    ctx.save_for_backward(gradient, pending)
    ctx.mark_non_differentiable(gradient, pending, stats)
    ctx.set_materialize_grads(False)
    ctx.with_gradient = inputs[-1]


def _backward_of(operators: Operators, inputs: int) -> Callable:
    def backward(ctx, upstream: Tensor | None, *_unused: Tensor | None):
        if upstream is None:
            return (None,) * inputs
        if not ctx.with_gradient:
            raise RuntimeError("the forward operator was called with with_gradient=False and cannot be differentiated")
        gradient, pending = ctx.saved_tensors
        return rescaled(operators, gradient, upstream, pending), *(None,) * (inputs - 1)

    return backward


class _Loss(torch.autograd.Function):
    """The operators under autograd, called directly: the registered formula, for traced graphs, costs 90 us a call.

    In place, the memory of student_logits becomes the saved gradient.
    """

    @staticmethod
    def forward(ctx, student_logits: Tensor, operators: Operators, arguments: tuple, inplace: bool):
        ctx.set_materialize_grads(False)
        if inplace:
            loss, pending, stats = operators.forward_(student_logits, *arguments)
            # so that autograd notices where anything else still needs the overwritten logits
            torch.autograd.graph.increment_version(student_logits)
            gradient = student_logits.detach()
        else:
            loss, gradient, pending, stats = operators.forward(student_logits, *arguments, True)
        ctx.operators = operators
        ctx.save_for_backward(gradient, pending)
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx, upstream: Tensor | None, _stats: None):
        if upstream is None:
            return None, None, None, None
        gradient, pending = ctx.saved_tensors
        return rescaled(ctx.operators, gradient, upstream, pending), None, None, None


def run(operators: Operators, student_logits: Tensor, arguments: tuple, inplace: bool) -> tuple[Tensor, Tensor]:
    """loss and stats of a backend's operators, with autograd where a gradient is asked for."""
    with_gradient = student_logits.requires_grad and torch.is_grad_enabled()
    if torch.compiler.is_compiling() or not with_gradient:
        loss, _, _, stats = operators.forward(student_logits, *arguments, with_gradient)
        return loss, stats
    return _Loss.apply(student_logits, operators, arguments, inplace)


def fake_outputs(student_logits: Tensor, reduction: str, with_stats: bool) -> tuple[Tensor, Tensor, Tensor]:
    """loss, pending, stats as the operators allocate them."""
    new = student_logits.new_empty
    shape = student_logits.shape[:-1]
    loss = new(shape if reduction == "none" else (), dtype=torch.float32)
    return loss, new((), dtype=torch.float32), new((5, *shape) if with_stats else (0,), dtype=torch.float32)


def _fake_forward(student_logits, teacher_logits, *arguments):
    *_, reduction, with_stats, with_gradient = arguments
    torch._check(student_logits.shape[:-1] == teacher_logits.shape[:-1], lambda: "logits differ in their leading shape")
    loss, pending, stats = fake_outputs(student_logits, reduction, with_stats)
    return loss, student_logits.new_empty(student_logits.shape if with_gradient else (0,)), pending, stats


def _fake_forward_inplace(student_logits, teacher_logits, *arguments):
    *_, reduction, with_stats = arguments
    torch._check(student_logits.shape[:-1] == teacher_logits.shape[:-1], lambda: "logits differ in their leading shape")
    return fake_outputs(student_logits, reduction, with_stats)


def _fake_rescale(gradient, upstream, pending):
    return gradient.new_empty(gradient.shape)


def _fake_rescale_inplace(gradient, upstream, pending):
    return None


def register_operators(forward: str, rescale: str, fake: Callable, fake_inplace: Callable, inputs: int) -> Operators:
    """Fake kernels and autograd for fastkd::<forward>, of so many inputs, and its twin <forward>_ in place; <rescale>
    and <rescale>_ serve their gradients."""
    torch.library.register_fake(f"fastkd::{forward}", fake)
    torch.library.register_fake(f"fastkd::{forward}_", fake_inplace)
    names = (forward, f"{forward}_", rescale, f"{rescale}_")
    operators = Operators(*(getattr(torch.ops.fastkd, name).default for name in names))
    backward = _backward_of(operators, inputs)
    torch.library.register_autograd(f"fastkd::{forward}", backward, setup_context=_setup_context)
    return operators


def register_backend(name: str, prefix: str) -> None:
    """Fake kernels and autograd for the four operators fastkd::<prefix>...; enters them into ``registered``."""
    rescale = f"{prefix}rescale"
    torch.library.register_fake(f"fastkd::{rescale}", _fake_rescale)
    torch.library.register_fake(f"fastkd::{rescale}_", _fake_rescale_inplace)
    registered[name] = register_operators(f"{prefix}forward", rescale, _fake_forward, _fake_forward_inplace, 13)


if not load_error:
    register_backend("native", "kd_")


def scalars_of(o: Options, last: float | None = None) -> Tensor:
    """(8) float64 on the CPU; ``last`` in place of the teacher's softcap. Traced, by arithmetic alone, which keeps a
    changing number out of the graph's guards."""
    numbers = (
        o.beta, o.temperature, o.kd_weight, o.ce_weight, o.label_smoothing, o.z_loss,
        o.student_softcap or 0.0, (o.teacher_softcap or 0.0) if last is None else last,
    )  # fmt: skip
    if not torch.compiler.is_compiling():
        return torch.tensor(numbers, dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)
    return torch.stack([one * number for number in numbers])


def fused_kd_loss(
    backend: str,
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    token_weights: Tensor | None,
    temperature: Tensor | None,
    num_items: Tensor | None,
    options: Options,
) -> tuple[Tensor, KDStats | None]:
    """Same contract as :func:`fastkd.eager.eager_kd_loss`, by the operators of a registered backend."""
    o, operators = options, registered[backend]
    arguments = (
        teacher_logits, labels, token_weights, temperature, num_items, scalars_of(o), o.divergence,
        o.scale_by_t2, o.ignore_index, o.reduction, o.return_stats,
    )  # fmt: skip
    with_gradient = student_logits.requires_grad and torch.is_grad_enabled()
    tracing = torch.compiler.is_compiling()
    if o.inplace and with_gradient and not tracing:
        checks.check_inplace(student_logits, teacher_logits)
    try:
        loss, stats = run(operators, student_logits, arguments, o.inplace)
    except RuntimeError:
        if not tracing:  # the operator knows only RuntimeError; this says which value of which argument it was
            vocab = min(student_logits.shape[-1], teacher_logits.shape[-1])
            checks.check_values_on_cpu(vocab, labels, temperature, o.ignore_index)
        raise
    return loss, KDStats(*stats.unbind(0)) if o.return_stats else None
