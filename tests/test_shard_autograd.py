"""vocab_shard under autograd, modules, tracing and explanations, in a group of one process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

import fastkd
from fastkd import KDLoss, LinearKDLoss, VocabShard, kd_loss, linear_kd_loss

V, WIDE = 50, 53  # columns, and with padding
BACKENDS = ("native", "eager")
OPTIONS = {"temperature": 2.0, "ce_weight": 0.5, "divergence": "jsd"}


@pytest.fixture(autouse=True, scope="module")
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(6, WIDE, generator=g) for _ in range(2))
    labels = torch.randint(V, (6,), generator=g)
    labels[2] = -100
    return student.requires_grad_(), teacher, labels


SHARD = VocabShard(0, V)


def _whole(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, **options) -> torch.Tensor:
    loss = kd_loss(student[:, :V], teacher[:, :V], labels, **{**OPTIONS, **options})
    assert isinstance(loss, torch.Tensor)
    return loss


def _close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_and_retained_graphs(rows, backend: str, native: str) -> None:
    student, teacher, labels = rows
    (expected,) = torch.autograd.grad(_whole(*rows), student)
    loss = kd_loss(student, teacher, labels, vocab_shard=SHARD, backend=backend, **OPTIONS)
    for factor in (1.0, -3.0):
        (gradient,) = torch.autograd.grad(factor * loss, student, retain_graph=True)
        _close(gradient, factor * expected)
    (gradient,) = torch.autograd.grad(loss, student)
    _close(gradient, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivative_raises(rows, backend: str, native: str) -> None:
    student, teacher, labels = rows
    loss = kd_loss(student, teacher, labels, vocab_shard=SHARD, backend=backend, **OPTIONS)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, student, create_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_value_alone(rows, backend: str, native: str) -> None:
    student, teacher, labels = rows
    options = {"vocab_shard": SHARD, "backend": backend, **OPTIONS}
    with_gradient = kd_loss(student, teacher, labels, **options)
    with torch.no_grad():
        value = kd_loss(student, teacher, labels, **options)
    assert not value.requires_grad and torch.equal(value, with_gradient)


def test_in_place(rows, native: str) -> None:
    student, teacher, labels = rows
    (expected,) = torch.autograd.grad(_whole(*rows), student)
    logits = student * 1
    loss = kd_loss(logits, teacher, labels, vocab_shard=SHARD, inplace=True, backend=native, **OPTIONS)
    _close(logits.detach(), expected)
    (gradient,) = torch.autograd.grad(loss, student)
    _close(gradient, expected)
    with pytest.raises(ValueError, match=r"inplace=True.*leaf"):
        kd_loss(student, teacher, labels, vocab_shard=SHARD, inplace=True, backend=native)


def test_checkpoint(rows) -> None:
    student, teacher, labels = rows
    (expected,) = torch.autograd.grad(_whole(*rows), student)

    def step(x: torch.Tensor) -> torch.Tensor:
        loss = kd_loss(x * 1, teacher, labels, vocab_shard=SHARD, **OPTIONS)
        assert isinstance(loss, torch.Tensor)
        return loss

    (gradient,) = torch.autograd.grad(checkpoint(step, student, use_reentrant=False), student)
    _close(gradient, expected)


def test_compiled_without_a_break(rows, native: str) -> None:
    student, teacher, labels = rows
    expected, (slope,) = _whole(*rows), torch.autograd.grad(_whole(*rows), student)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x: torch.Tensor) -> torch.Tensor:
        return kd_loss(x * 1, teacher, labels, vocab_shard=SHARD, **OPTIONS)

    loss = step(student)
    (gradient,) = torch.autograd.grad(loss, student)
    _close(loss, expected)
    _close(gradient, slope)


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators(rows, backend: str, native: str) -> None:
    """Schema, fake kernel and autograd registration of the operators that exchange."""
    from fastkd.ops import scalars_of
    from fastkd.options import Options
    from fastkd.shard import group_of

    student, teacher, labels = rows
    scalars, name = scalars_of(Options(ce_weight=0.5)), group_of(SHARD).group_name
    shard = (backend, 0, V, name, True)
    arguments = (student, teacher, labels, None, None, None, scalars, "forward_kl", True, -100, "mean", True, *shard)
    torch.library.opcheck(torch.ops.fastkd.shard_kd.default, arguments)


def test_linear_and_its_module() -> None:
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(7, 8, generator=g, requires_grad=True)
    weight = torch.randn(WIDE, 8, generator=g, requires_grad=True)
    other, teacher = torch.randn(7, 5, generator=g), torch.randn(WIDE, 5, generator=g)
    labels = torch.randint(V, (7,), generator=g)
    expected = linear_kd_loss(hidden, weight[:V], other, teacher[:V], labels, **OPTIONS)
    slopes = torch.autograd.grad(expected, (hidden, weight))
    module = LinearKDLoss(vocab_shard=SHARD, chunk_size=3, **OPTIONS)
    loss = module(hidden, weight, other, teacher, labels)
    _close(loss, expected)
    for gradient, slope in zip(torch.autograd.grad(loss, (hidden, weight)), slopes):
        _close(gradient, slope)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = module(hidden, weight, other, teacher, labels)
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.02)
    with pytest.raises(ValueError, match=r"rank 0.*student_weight has 49 rows, fewer than the 50 of vocab_shard"):
        module(hidden, weight[:49], other, teacher, labels)


def test_module_and_labels_out_of_range(rows) -> None:
    student, teacher, labels = rows
    _close(KDLoss(vocab_shard=SHARD, **OPTIONS)(student, teacher, labels), _whole(*rows))
    labels[1] = V  # a column of the padding
    with pytest.raises(ValueError, match=r"labels\[1\] = 50 is outside \[0, 50\)"):
        kd_loss(student, teacher, labels, vocab_shard=SHARD)
    with pytest.raises(ValueError, match=r"vocab_shard.*DTensor|mesh"):
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        whole = torch.distributed.tensor.distribute_tensor(teacher, mesh)
        kd_loss(whole, whole, vocab_shard=SHARD)


def test_who_computes(native: str) -> None:
    x = torch.randn(2, V)
    assert fastkd.explain(x, x, vocab_shard=SHARD).backend == "native"
    assert fastkd.explain(x.double(), x, vocab_shard=SHARD).backend == "eager"
    assert "vocab_shard: any device" in fastkd.backends().reasons["eager"]
    assert "vocab_shard: cpu" in fastkd.backends().reasons["native"]
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run"):
        kd_loss(x, x, vocab_shard=SHARD, backend="triton")
    with pytest.raises(TypeError, match=r"vocab_shard must be None or a fastkd\.VocabShard"):
        fastkd.explain(x, x, vocab_shard=(0, V))  # type: ignore[arg-type]


def test_transforms_are_refused(rows) -> None:
    _, teacher, labels = rows
    loss = lambda s, t, y: kd_loss(s, t, y, vocab_shard=SHARD)  # noqa: E731
    with pytest.raises(RuntimeError, match=r"vocab_shard.*torch\.func"):
        torch.func.vmap(loss)(teacher[None], teacher[None], labels[None])


@pytest.mark.parametrize("divergence", ["symmetric_kl", "jsd"])
def test_threads_share_a_row(divergence: str, native: str) -> None:
    """One long row: its blocks go to all threads, with the bits that one thread gives."""
    g = torch.Generator().manual_seed(2)
    student, teacher = (3 * torch.randn(1, 128256, generator=g) for _ in range(2))
    student.requires_grad_()
    labels, shard, results = torch.tensor([128255]), VocabShard(0, 128256), []
    options = {"divergence": divergence, "temperature": 3.0, "ce_weight": 0.5, "label_smoothing": 0.1}
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            loss, stats = kd_loss(student, teacher, labels, vocab_shard=shard, return_stats=True, **options)
            results.append((loss.detach(), torch.stack(stats), *torch.autograd.grad(loss, student)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results))
    whole, whole_stats = kd_loss(student, teacher, labels, return_stats=True, **options)
    _close(results[0][0], whole.detach())
    _close(results[0][1], torch.stack(whole_stats))
    _close(results[0][2], torch.autograd.grad(whole, student)[0])
