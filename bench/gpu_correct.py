"""Worker: fastkd's native backend on a device against backend='eager' in fp64 on the same device.

    gpu_correct.py [--device cuda] [--variant planned] [--bare]

--bare computes no reference, for compute-sanitizer. FASTKD_CUDA_VARIANT is set by the caller.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from gpu_worker import work
from torch import Tensor

import fastkd
from fastkd.divergence import SPECS

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
SHAPES = {  # rows x columns, widest last; odd widths give rows that begin between 16-byte boundaries
    "planned": [(64, 32001), (5, 128256), (300, 1000), (9, 5003), (3, 37), (2, 262144)],
    "cluster": [(7, 32001), (5, 128256)],
    "streaming": [(7, 32001), (3, 128256), (5, 67)],
    "block": [(9, 5003), (40, 16384)],
    "warp": [(300, 1000), (5, 37)],
}
IGNORE = -100
EPS = 2.0**-24  # unit roundoff of fp32
K, FLOOR = 4.0, 16.0  # times eager's own fp32 error; eps, for inputs on which eager happens to be exact
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
STEP = {torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-24}


@dataclass
class Problem:
    """Logits (rows, vocab) on a device, labels of which about a quarter is ignored, weights, upstream gradients."""

    student: Tensor
    teacher: Tensor
    labels: Tensor
    weights: Tensor
    upstream: Tensor

    @property
    def kept(self) -> Tensor:
        return self.labels != IGNORE


def make_problem(rows: int, vocab: int, dtype: torch.dtype, device: str) -> Problem:
    """Made on the CPU, so that all devices get the same numbers."""
    g = torch.Generator().manual_seed(rows * 1000003 + vocab)
    teacher = 3 * torch.randn(rows, vocab, generator=g)
    student = 0.7 * teacher + 2 * torch.randn(rows, vocab, generator=g)
    student[:, -1] += 20  # a tail that is dropped changes everything
    labels = torch.randint(vocab, (rows,), generator=g)
    labels[0] = vocab - 1
    if rows > 2:
        labels[1:][torch.rand(rows - 1, generator=g) < 0.25] = IGNORE
        labels[1] = IGNORE
    weights = 0.5 + torch.rand(rows, generator=g)
    logits = (x.to(dtype).to(device) for x in (student, teacher))
    return Problem(*logits, *(x.to(device) for x in (labels, weights, torch.linspace(-1, 2, rows))))


def options_of(p: Problem, divergence: str, everything: bool) -> dict[str, Any]:
    if not everything:
        return {"divergence": divergence, "temperature": 2.0}
    return {
        "divergence": divergence, "temperature": 2.5, "labels": p.labels, "token_weights": p.weights, "beta": 0.2,
        "kd_weight": 0.7, "ce_weight": 0.6, "label_smoothing": 0.1, "z_loss": 1e-3, "student_softcap": 30.0,
        "teacher_softcap": 40.0, "reduction": "none",
    }  # fmt: skip


def solve(p: Problem, upstream: Tensor | None, dtype: torch.dtype | None = None, **options) -> tuple[Tensor, Tensor]:
    """Loss and gradient; dtype: of the logits, instead of their own."""
    student, teacher = (x if dtype is None else x.to(dtype) for x in (p.student, p.teacher))
    leaf = student.detach().clone().requires_grad_()
    loss = fastkd.kd_loss(leaf * 1 if options.get("inplace") else leaf, teacher, **options)
    assert isinstance(loss, Tensor)
    (gradient,) = torch.autograd.grad(loss, leaf, None if upstream is None else upstream.to(loss.dtype))
    return loss.detach(), gradient


def magnitudes(p: Problem, gradient: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """On what scale errors are judged: of the loss (rows), and of each element of the gradient, where the parts that
    cancel were about this large. gradient: the reference's."""
    t = options["temperature"]
    s, r = p.student.double(), p.teacher.double()
    lq, lp = torch.log_softmax(s / t, -1), torch.log_softmax(r / t, -1)
    parts = lq.exp() + lp.exp() + s.softmax(-1)
    row = gradient.abs().amax(-1, keepdim=True) / parts.amax(-1, keepdim=True)
    of_loss = t * t * ((lq.exp() + lp.exp()) * (2 + lq.abs() + lp.abs())).sum(-1) + (1 + s.abs().amax(-1)) ** 2
    return of_loss, gradient.abs() + row * parts


def excess(got: Tensor, expected: Tensor, eager: Tensor, scale: Tensor, stored: int = 0, step: float = 1.0) -> float:
    """Largest error over its bound: K times eager's own error in fp32 on that scale, FLOOR eps, and the roundings of
    the stored value. inf where something that should be a number is none."""
    scale = scale.clamp_min(1e-300)
    unit = K * float(((eager.double() - expected).abs() / scale).max()) + FLOOR * EPS
    bound = unit * scale + stored * HALF_ULP[got.dtype] * (1 + 2.0**-10) * expected.abs() + STEP[got.dtype] * (1 + step)
    ratio = (got.double() - expected).abs() / bound
    return float(torch.where(torch.isfinite(got), ratio, math.inf).max())


def against_eager(p: Problem, divergence: str, everything: bool, backend: str) -> dict[str, float]:
    """ "what" -> error over its bound, for the ways to ask for the same numbers."""
    options = options_of(p, divergence, everything)
    upstream = p.upstream if everything else None
    expected = solve(p, upstream, torch.float64, backend="eager", **options)
    eager = solve(p, upstream, torch.float32, backend="eager", **options)
    of_loss, of_gradient = magnitudes(p, expected[1], options)
    of_loss = of_loss if everything else of_loss.mean()
    fp16 = p.student.dtype == torch.float16
    found: dict[str, float] = {}

    def judge(what: str, loss: Tensor, gradient: Tensor | None, factor: float = 1.0, rounded: int = 1) -> None:
        found[f"{what} loss"] = excess(loss, expected[0], eager[0], of_loss)
        if gradient is None:
            return
        stored = rounded + (1 if fp16 else 0)
        wanted, yardstick, scale = (abs(factor) * x for x in (expected[1], eager[1], of_gradient))
        found[f"{what} gradient"] = excess(gradient, wanted, yardstick, scale, stored, max(3.0, factor))

    judge("fresh", *solve(p, upstream, backend=backend, **options), rounded=2 if everything else 1)
    judge("in place", *solve(p, upstream, backend=backend, inplace=True, **options), rounded=2 if everything else 1)
    with torch.no_grad():
        judge("value", fastkd.kd_loss(p.student, p.teacher, backend=backend, **options), None)
    if not everything:
        three = torch.full((), 3.0, device=p.student.device)
        judge("upstream 3", *solve(p, three, backend=backend, **options), factor=3.0, rounded=2)
    return found


def same_bits(p: Problem, divergence: str, backend: str) -> None:
    options = {"backend": backend, **options_of(p, divergence, True)}
    first, second = solve(p, p.upstream, **options), solve(p, p.upstream, **options)
    assert all(torch.equal(a, b) for a, b in zip(first, second)), "two runs differ in their bits"


def ignored_rows(p: Problem, divergence: str, backend: str) -> None:
    """NaN in them changes nothing, and their gradient is exactly 0."""
    if bool(p.kept.all()):
        return
    spoilt = Problem(p.student.clone(), p.teacher.clone(), p.labels, p.weights, p.upstream)
    spoilt.student[~p.kept] = math.nan
    spoilt.teacher[~p.kept] = math.nan
    options = {"backend": backend, **options_of(p, divergence, True)}
    clean, got = solve(p, p.upstream, **options), solve(spoilt, p.upstream, **options)
    assert torch.equal(clean[0], got[0]) and torch.equal(clean[1], got[1]), "NaN in ignored rows was read"
    assert not got[1][~p.kept].any() and not got[0][~p.kept].any(), "an ignored row has a loss or a gradient"


def label_out_of_range(p: Problem, divergence: str, backend: str) -> None:
    """On an accelerator: NaN in that row, nothing else touched."""
    if p.student.device.type == "cpu":
        return  # there it is an error
    wrong = Problem(p.student, p.teacher, p.labels.clone(), p.weights, p.upstream.abs() + 1)
    wrong.labels[0] = p.student.shape[-1]
    right = Problem(p.student, p.teacher, p.labels, p.weights, wrong.upstream)
    clean = solve(right, right.upstream, backend=backend, **options_of(right, divergence, True))
    got = solve(wrong, wrong.upstream, backend=backend, **options_of(wrong, divergence, True))
    assert bool(got[0][0].isnan()) and bool(got[1][0].isnan().all()), "a label out of range gave a number"
    assert torch.equal(clean[0][1:], got[0][1:]) and torch.equal(clean[1][1:], got[1][1:]), "it changed another row"


def check(rows: int, vocab: int, dtype: str, divergence: str, device: str, backend: str = "native") -> dict[str, Any]:
    """All of it for one problem. Raises AssertionError with every excess, or with what does not hold."""
    p = make_problem(rows, vocab, DTYPES[dtype], device)
    found = {}
    for everything, name in ((False, "alone"), (True, "everything")):
        found |= {f"{name}, {what}": x for what, x in against_eager(p, divergence, everything, backend).items()}
    worst = max(found, key=lambda what: found[what])
    off = {what: round(x, 2) for what, x in found.items() if not x <= 1}
    assert not off, f"error over its bound: {off}"
    for holds in (same_bits, ignored_rows, label_out_of_range):
        holds(p, divergence, backend)
    return {"worst": worst, "of_bound": round(found[worst], 3), **planned(p)}


def planned(p: Problem) -> dict[str, Any]:
    """The kernels that the launch arithmetic names for contiguous logits."""
    if not p.student.is_cuda:
        return {}
    import os

    from fastkd import cuda

    rows, vocab = p.student.shape
    wanted = os.environ.get("FASTKD_CUDA_VARIANT", "")
    dtype = p.student.dtype
    gpu = cuda.gpu_of(p.student.device)
    plan = cuda.plan_loss(rows, vocab, gpu, student_dtype=dtype, teacher_dtype=dtype, wanted=wanted)
    return {"ran": plan.variant, "plan": str(plan)}


def bare(rows: int, vocab: int, dtype: str, divergence: str, device: str) -> dict[str, Any]:
    """The kernels alone: forward, in place, value, a backward that scales."""
    p = make_problem(rows, vocab, DTYPES[dtype], device)
    options = {"backend": "native", **options_of(p, divergence, True)}
    for inplace in (False, True):
        solve(p, p.upstream, inplace=inplace, **options)
    with torch.no_grad():
        fastkd.kd_loss(p.student, p.teacher, **options)
    torch.cuda.synchronize()
    return planned(p)


def jobs(variant: str, device: str, only_bare: bool) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Widest in meaning first: every divergence in bf16 on the first shape, then the rest."""
    shapes = SHAPES[variant]
    if only_bare:
        for divergence in ("forward_kl", "jsd"):
            for dtype in ("bf16", "fp32"):
                arguments = (3, min(shapes[0][1], 5003), dtype, divergence, device)
                yield f"{variant}/{divergence}/{dtype}", lambda a=arguments: bare(*a)
        return
    for rows, vocab in shapes:
        for dtype in DTYPES:
            for divergence in SPECS:
                key = f"{variant}/{divergence}/{dtype}/{rows}x{vocab}"
                yield key, lambda a=(rows, vocab, dtype, divergence, device): check(*a)
    if variant == "planned" and device.startswith("cuda"):
        import gpu_capture

        yield from gpu_capture.jobs(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--variant", default="planned", choices=SHAPES)
    parser.add_argument("--bare", action="store_true")
    arguments = parser.parse_args()
    work(jobs(arguments.variant, arguments.device, arguments.bare))


if __name__ == "__main__":
    main()
