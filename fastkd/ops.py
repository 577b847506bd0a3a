"""torch.ops.fastkd: loading, shapes for tracing (fake kernels), autograd, and the native backend built on them.

The schemas and what each output means are in csrc/torch/library.cpp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .options import Options
from .stats import KDStats

load_error = ""  # why the extension is missing; "" where it loaded
isa_error = ""  # why FASTKD_CPU_ISA cannot be honoured
try:
    from . import _C

    try:
        _C.cpu_isa()
    except ValueError as error:
        isa_error = str(error)
except ImportError as error:
    load_error = f"the extension fastkd._C could not be loaded ({error}); build it with `pip install .`"


def native_devices() -> tuple[str, ...]:
    """Device types that the extension was built for."""
    return () if load_error else ("cpu",)


def cpu_isa() -> str:
    """Instruction set of the CPU kernels in use; "none" where FASTKD_CPU_ISA names none that runs here."""
    return "none" if isa_error else _C.cpu_isa()


def cpu_isas() -> tuple[str, ...]:
    """Instruction sets that this machine runs, best last."""
    return tuple(_C.cpu_isas().split(", "))


_DOUBLE_BACKWARD = (
    "fastkd's native loss has no second derivative (its gradient is computed in forward); "
    "use backend='eager' for create_graph=True"
)


def _rescaled(gradient: Tensor, upstream: Tensor, pending: Tensor) -> Tensor:
    """The gradient for the real upstream: handed over as it is where upstream and pending are 1, else scaled."""
    if torch.is_grad_enabled():
        raise RuntimeError(_DOUBLE_BACKWARD)
    # A retained graph must keep its gradient, and a traced one may not mutate what it saved: scale into a copy there.
    if type(gradient) is not Tensor or torch._C._autograd._get_current_graph_task_keep_graph():
        return torch.ops.fastkd.kd_rescale(gradient, upstream, pending)
    torch.ops.fastkd.kd_rescale_(gradient, upstream, pending)
    return gradient


def _setup_context(ctx, inputs, output) -> None:
    _, gradient, pending, stats = output
    ctx.save_for_backward(gradient, pending)
    ctx.mark_non_differentiable(gradient, pending, stats)
    ctx.set_materialize_grads(False)
    ctx.with_gradient = inputs[-1]


def _backward(ctx, upstream: Tensor | None, *_unused: Tensor | None):
    if upstream is None:
        return (None,) * 13
    if not ctx.with_gradient:
        raise RuntimeError("kd_forward was called with with_gradient=False and cannot be differentiated")
    gradient, pending = ctx.saved_tensors
    return _rescaled(gradient, upstream, pending), *(None,) * 12


class _Loss(torch.autograd.Function):
    """The operators under autograd, called directly: the registered formula, for traced graphs, costs 90 us a call.

    In place, the memory of student_logits becomes the saved gradient.
    """

    @staticmethod
    def forward(ctx, student_logits: Tensor, arguments: tuple, inplace: bool):
        ctx.set_materialize_grads(False)
        if inplace:
            loss, pending, stats = torch.ops.fastkd.kd_forward_.default(student_logits, *arguments)
            # so that autograd notices where anything else still needs the overwritten logits
            torch.autograd.graph.increment_version(student_logits)
            gradient = student_logits.detach()
        else:
            loss, gradient, pending, stats = torch.ops.fastkd.kd_forward.default(student_logits, *arguments, True)
        ctx.save_for_backward(gradient, pending)
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx, upstream: Tensor | None, _stats: None):
        if upstream is None:
            return None, None, None
        gradient, pending = ctx.saved_tensors
        return _rescaled(gradient, upstream, pending), None, None


def _fake_outputs(student_logits: Tensor, reduction: str, with_stats: bool) -> tuple[Tensor, Tensor, Tensor]:
    """loss, pending, stats as the operators allocate them."""
    new = student_logits.new_empty
    shape = student_logits.shape[:-1]
    loss = new(shape if reduction == "none" else (), dtype=torch.float32)
    return loss, new((), dtype=torch.float32), new((5, *shape) if with_stats else (0,), dtype=torch.float32)


def _fake_forward(student_logits, teacher_logits, *arguments):
    *_, reduction, with_stats, with_gradient = arguments
    torch._check(student_logits.shape[:-1] == teacher_logits.shape[:-1], lambda: "logits differ in their leading shape")
    loss, pending, stats = _fake_outputs(student_logits, reduction, with_stats)
    return loss, student_logits.new_empty(student_logits.shape if with_gradient else (0,)), pending, stats


def _fake_forward_inplace(student_logits, teacher_logits, *arguments):
    *_, reduction, with_stats = arguments
    torch._check(student_logits.shape[:-1] == teacher_logits.shape[:-1], lambda: "logits differ in their leading shape")
    return _fake_outputs(student_logits, reduction, with_stats)


if not load_error:
    torch.library.register_fake("fastkd::kd_forward", _fake_forward)
    torch.library.register_fake("fastkd::kd_forward_", _fake_forward_inplace)
    torch.library.register_fake(
        "fastkd::kd_rescale", lambda gradient, upstream, pending: gradient.new_empty(gradient.shape)
    )
    torch.library.register_fake("fastkd::kd_rescale_", lambda gradient, upstream, pending: None)
    torch.library.register_autograd("fastkd::kd_forward", _backward, setup_context=_setup_context)


def _as_tensor(numbers: tuple[float, ...]) -> Tensor:
    """(8) float64 on the CPU. Traced, by arithmetic alone, which keeps a changing number out of the graph's guards."""
    if not torch.compiler.is_compiling():
        return torch.tensor(numbers, dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)
    return torch.stack([one * number for number in numbers])


def native_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    token_weights: Tensor | None,
    temperature: Tensor | None,
    num_items: Tensor | None,
    options: Options,
) -> tuple[Tensor, KDStats | None]:
    """Same contract as :func:`fastkd.eager.eager_kd_loss`, by the operators."""
    o = options
    numbers = (
        o.beta, o.temperature, o.kd_weight, o.ce_weight, o.label_smoothing, o.z_loss,
        o.student_softcap or 0.0, o.teacher_softcap or 0.0,
    )  # fmt: skip
    arguments = (
        teacher_logits, labels, token_weights, temperature, num_items, _as_tensor(numbers), o.divergence,
        o.scale_by_t2, o.ignore_index, o.reduction, o.return_stats,
    )  # fmt: skip
    with_gradient = student_logits.requires_grad and torch.is_grad_enabled()
    tracing = torch.compiler.is_compiling()
    if o.inplace and with_gradient and not tracing:
        checks.check_inplace(student_logits, teacher_logits)
    try:
        if tracing or not with_gradient:
            loss, _, _, stats = torch.ops.fastkd.kd_forward(student_logits, *arguments, with_gradient)
        else:
            loss, stats = _Loss.apply(student_logits, arguments, o.inplace)
    except RuntimeError:
        if not tracing:  # the operator knows only RuntimeError; this says which value of which argument it was
            vocab = min(student_logits.shape[-1], teacher_logits.shape[-1])
            checks.check_values_on_cpu(vocab, labels, temperature, o.ignore_index)
        raise
    return loss, KDStats(*stats.unbind(0)) if o.return_stats else None
