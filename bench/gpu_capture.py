"""What only a device can show: graphs, streams, other devices, logits at odd addresses, backward without a sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gpu_correct
import torch
from gpu_correct import Problem, make_problem, options_of, solve

import fastkd

SHAPES = [(64, 32001), (4, 128256), (300, 1000)]


def _native(p: Problem, divergence: str) -> tuple[torch.Tensor, torch.Tensor]:
    return solve(p, p.upstream, backend="native", **options_of(p, divergence, True))


def _equal(got, expected, what: str) -> None:
    assert all(torch.equal(a, b) for a, b in zip(got, expected)), f"{what} gives other bits"


def graph(rows: int, vocab: int, divergence: str, device: str) -> dict[str, Any]:
    """Captured once, replayed on new numbers."""
    p = make_problem(rows, vocab, torch.bfloat16, device)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        _native(p, divergence)
    torch.cuda.current_stream(device).wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        got = _native(p, divergence)
    p.student.copy_(p.student.flip(0))
    captured.replay()
    torch.cuda.synchronize(device)
    _equal(got, _native(p, divergence), "replay of a captured graph")
    return gpu_correct.planned(p)


def stream(rows: int, vocab: int, divergence: str, device: str) -> dict[str, Any]:
    """On a stream of its own, behind work that makes its inputs: launched elsewhere it would read the old ones."""
    p = make_problem(rows, vocab, torch.bfloat16, device)
    fresh = p.student.flip(0).contiguous()
    expected = _native(Problem(fresh, p.teacher, p.labels, p.weights, p.upstream), divergence)
    side = torch.cuda.Stream(device)
    torch.cuda.synchronize(device)
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # clock ticks, about 30 ms
        p.student.copy_(fresh)
        got = _native(p, divergence)
    side.synchronize()
    _equal(got, expected, "another stream")
    return gpu_correct.planned(p)


def odd_addresses(rows: int, vocab: int, divergence: str, device: str) -> dict[str, Any]:
    """Rows wider apart than they are long, from an address that no vector divides; both alike, then the student alone,
    which takes the scalar kernels. Those sum in another order, so bounds decide."""
    p = make_problem(rows, vocab, torch.bfloat16, device)
    wide = torch.full((rows, vocab + 5), float("nan"), dtype=p.student.dtype, device=device)
    moved = [wide.clone()[:, 3 : 3 + vocab].copy_(x) for x in (p.student, p.teacher)]
    for teacher in (moved[1], p.teacher):
        odd = Problem(moved[0], teacher, p.labels, p.weights, p.upstream)
        options = options_of(p, divergence, True)
        expected = solve(p, p.upstream, torch.float64, backend="eager", **options)
        eager = solve(p, p.upstream, torch.float32, backend="eager", **options)
        leaf = odd.student.detach().requires_grad_()
        loss = fastkd.kd_loss(leaf, teacher, backend="native", **options)
        (gradient,) = torch.autograd.grad(loss, leaf, p.upstream)
        of_loss, of_gradient = gpu_correct.magnitudes(p, expected[1], options)
        found = {
            "loss": gpu_correct.excess(loss.detach(), expected[0], eager[0], of_loss),
            "gradient": gpu_correct.excess(gradient, expected[1], eager[1], of_gradient, 2, 3.0),
        }
        assert all(x <= 1 for x in found.values()), f"error over its bound: {found}"
    return {}


def second_device(rows: int, vocab: int, divergence: str, device: str) -> dict[str, Any]:
    """With the first one current."""
    if torch.cuda.device_count() < 2:
        return {"note": "one device here"}
    expected = _native(make_problem(rows, vocab, torch.bfloat16, "cuda:0"), divergence)
    with torch.cuda.device(0):
        got = _native(make_problem(rows, vocab, torch.bfloat16, "cuda:1"), divergence)
    _equal([x.cpu() for x in got], [x.cpu() for x in expected], "the second device")
    return {}


def same_memory(rows: int, vocab: int, divergence: str, device: str) -> dict[str, Any]:
    """Backward of a mean with upstream 1 allocates nothing: the gradient made in forward is handed over."""
    p = make_problem(rows, vocab, torch.bfloat16, device)
    leaf = p.student.requires_grad_()
    loss = fastkd.kd_loss(leaf, p.teacher, divergence=divergence, backend="native")
    assert isinstance(loss, torch.Tensor)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    loss.backward()
    torch.cuda.synchronize(device)
    grown = torch.cuda.max_memory_allocated(device) - before
    assert grown < leaf.numel() * leaf.element_size() // 2, f"backward allocated {grown} bytes"
    return {"grown_bytes": grown}


def jobs(device: str) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    for test in (graph, stream, odd_addresses, same_memory, second_device):
        for rows, vocab in SHAPES:
            for divergence in ("forward_kl", "jsd"):
                key = f"{test.__name__}/{divergence}/bf16/{rows}x{vocab}"
                yield key, lambda t=test, a=(rows, vocab, divergence, device): t(*a)
