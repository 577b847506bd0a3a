"""linear_kd_loss under autograd: what is computed, what is refused, and the company it keeps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from inputs import BF16, FP16, FP32
from linear_cases import Case, make_problem, run, run_naive
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastkd
from fastkd import linear_kd_loss
from fastkd.linear_chunks import Call, linear_kd
from fastkd.ops import scalars_of
from fastkd.options import Options

COMMON = {"temperature": 2.0, "ce_weight": 0.5}


def _products(function) -> int:
    """Matrix products that ``function`` runs."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        function()
    return sum(e.count for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm", "aten::addmm_"))


def _loss(problem, frozen: tuple[str, ...] = (), **options):
    leaves = dict(zip(("hidden", "weight", "bias"), problem.student))
    for name in frozen:
        leaves[name] = leaves[name].detach()
    teacher = problem.teacher
    options = {"student_bias": leaves["bias"], "teacher_bias": teacher[2], **COMMON, **options}
    return linear_kd_loss(leaves["hidden"], leaves["weight"], *teacher[:2], problem.labels, **options)


@pytest.mark.parametrize(
    "frozen,products",
    [((), 4), (("weight",), 3), (("hidden",), 3), (("hidden", "bias"), 3), (("hidden", "weight"), 2)],
    ids=str,
)
def test_each_subset_of_gradients(frozen: tuple[str, ...], products: int) -> None:
    """What is frozen gets no gradient and costs no product; the others' gradients are the same."""
    problem = make_problem(Case())
    whole = dict(zip(("hidden", "weight", "bias"), run(problem, **COMMON).gradients))
    wanted = [name for name in whole if name not in frozen]
    leaves = [x for name, x in zip(whole, problem.student) if name in wanted]
    gradients = torch.autograd.grad(_loss(problem, frozen), leaves)
    assert all(torch.equal(g, whole[name]) for g, name in zip(gradients, wanted))
    assert _products(lambda: _loss(problem, frozen).backward()) == products


def test_value_alone_takes_two_products() -> None:
    problem = make_problem(Case())
    with torch.no_grad():
        loss = _loss(problem)
        assert _products(lambda: _loss(problem)) == 2
    assert not loss.requires_grad and torch.equal(loss, run(problem, **COMMON).loss)
    assert not _loss(problem, ("hidden", "weight", "bias")).requires_grad


def test_backward_computes_nothing_again() -> None:
    problem = make_problem(Case())
    assert _products(_loss(problem).backward) == 0
    loss = _loss(problem, reduction="none")
    assert _products(lambda: loss.backward(torch.ones_like(loss))) == 4  # this one does: two of them the logits


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_an_upstream_scales(dtype: torch.dtype) -> None:
    problem = make_problem(Case(dtype=dtype))
    one, scaled = run(problem, **COMMON), run(problem, torch.tensor(8.0), **COMMON)
    for a, b in zip(one.gradients, scaled.gradients):
        torch.testing.assert_close(b, 8 * a, rtol=0, atol=torch.finfo(dtype).smallest_normal)


@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_retained_graph_gives_the_same_gradient_again(dtype: torch.dtype) -> None:
    problem = make_problem(Case(dtype=dtype))
    loss = _loss(problem)
    first = torch.autograd.grad(3 * loss, problem.leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(3 * loss, problem.leaves, retain_graph=True)
    third = torch.autograd.grad(3 * loss, problem.leaves)
    assert all(torch.equal(a, b) and torch.equal(b, c) for a, b, c in zip(kept, second, third))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(3 * loss, problem.leaves)


def test_weight_gradient_is_handed_over_without_a_copy() -> None:
    """The saved sum itself becomes ``weight.grad``: a copy of it would be the largest tensor of the step."""
    problem = make_problem(Case())
    known: set[int] = set()

    class Allocations(TorchDispatchMode):
        """Elements of each new storage."""

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function is not torch.ops.aten.detach.default:
                results = out if isinstance(out, tuple) else (out,)
                known.update(x.numel() for x in results if isinstance(x, torch.Tensor))
            return out

    loss = _loss(problem)
    with Allocations():
        loss.backward()
    weight = problem.student[1]
    assert weight.grad is not None and weight.numel() not in known


def test_second_derivative_is_refused() -> None:
    problem = make_problem(Case())
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(_loss(problem), problem.leaves, create_graph=True)
    (gradient,) = torch.autograd.grad(_loss(problem, backend="eager"), problem.leaves[:1], create_graph=True)
    assert gradient.requires_grad


def test_eager_gradients_are_the_slopes_of_its_values() -> None:
    problem = make_problem(Case(rows=3, vocab=7, hidden=2, teacher_hidden=2, dtype=torch.float64))
    teacher = problem.teacher

    def value(hidden, weight, bias):
        return linear_kd_loss(hidden, weight, *teacher[:2], student_bias=bias, chunk_size=2, temperature=2.0)

    assert torch.autograd.gradcheck(value, problem.student)
    grad = torch.func.grad(value)(*problem.student)
    torch.testing.assert_close(grad, torch.autograd.grad(value(*problem.student), problem.student[:1])[0])


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_autocast(dtype: torch.dtype) -> None:
    """Products in autocast's dtype; gradients of fp32 tensors are sums in fp32."""
    problem = make_problem(Case())
    low = make_problem(Case())._replace(
        student=tuple(x.detach().to(dtype).requires_grad_() for x in problem.student),
        teacher=tuple(x.to(dtype) for x in problem.teacher),
    )
    with torch.autocast("cpu", dtype=dtype):
        outcome = run(problem, chunk_size=7, **COMMON)
    same = run(low, chunk_size=7, **COMMON)
    torch.testing.assert_close(outcome.loss, same.loss, rtol=1e-6, atol=0)
    for ours, rounded in zip(outcome.gradients, same.gradients):
        assert ours.dtype == FP32
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(ours, rounded.float(), rtol=eps, atol=eps * float(rounded.abs().max()))
    assert not torch.equal(outcome.gradients[1], outcome.gradients[1].to(dtype).float())


def test_autocast_takes_hidden_states_of_another_dtype_than_the_head() -> None:
    problem = make_problem(Case())
    hidden = problem.student[0].detach().to(BF16).requires_grad_()
    with torch.autocast("cpu", dtype=BF16):
        loss = _loss(problem._replace(student=(hidden, *problem.student[1:])))
    loss.backward()
    assert hidden.grad.dtype == BF16 and problem.student[1].grad.dtype == FP32


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_checkpointing(reduction: str) -> None:
    problem = make_problem(Case())
    hidden, *head = problem.student
    layer = torch.nn.Linear(12, 12)

    def step(x):
        teacher = problem.teacher
        return linear_kd_loss(layer(x), head[0], *teacher[:2], problem.labels, reduction=reduction, **COMMON)

    plain = torch.autograd.grad(step(hidden).sum(), [hidden, head[0], *layer.parameters()])
    again = torch.autograd.grad(
        checkpoint(step, hidden, use_reentrant=False).sum(), [hidden, head[0], *layer.parameters()]
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, again))


def test_tied_head() -> None:
    """The head is the embedding, and the teacher's head is the student's, detached."""
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(301, 12)
    tokens, labels = torch.randint(301, (9,)), torch.randint(301, (9,))
    teacher = torch.randn(9, 12)

    def gradient(loss) -> torch.Tensor:
        hidden = torch.tanh(embedding(tokens))
        (got,) = torch.autograd.grad(loss(hidden, embedding.weight), embedding.weight)
        return got

    ours = gradient(lambda h, w: linear_kd_loss(h, w, teacher, w.detach(), labels, chunk_size=4, **COMMON))
    naive = gradient(lambda h, w: fastkd.kd_loss(h @ w.t(), teacher @ w.detach().t(), labels, **COMMON))
    torch.testing.assert_close(ours, naive, rtol=1e-4, atol=1e-7)


def test_head_with_lora() -> None:
    """The merged weight W + s B A is a tensor like any other: its gradient reaches A and B, and W stays frozen."""
    problem = make_problem(Case(bias=False))
    hidden, base, _ = problem.student
    base = base.detach()
    a, b = torch.randn(4, 12, requires_grad=True), torch.randn(301, 4, requires_grad=True)
    teacher = problem.teacher
    ours = linear_kd_loss(hidden, base + 0.5 * b @ a, *teacher[:2], problem.labels, chunk_size=7, **COMMON)
    logits = hidden @ base.t() + 0.5 * (hidden @ a.t()) @ b.t()
    naive = fastkd.kd_loss(logits, teacher[0] @ teacher[1].t(), problem.labels, **COMMON)
    for x, y in zip(torch.autograd.grad(ours, (hidden, a, b)), torch.autograd.grad(naive, (hidden, a, b))):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_compiled_without_a_graph_break(backend: str, native: str) -> None:
    problem = make_problem(Case())
    teacher = problem.teacher

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(hidden, weight, bias, labels):
        return linear_kd_loss(
            hidden * 2, weight, *teacher[:2], labels, student_bias=bias, chunk_size=7, backend=backend, **COMMON
        )

    doubled = problem._replace(student=((2 * problem.student[0]).detach().requires_grad_(), *problem.student[1:]))
    expected = run_naive(doubled._replace(teacher=(*teacher[:2], None)), **COMMON)
    loss = step(*problem.student, problem.labels)
    gradients = torch.autograd.grad(loss, problem.student)
    torch.testing.assert_close(loss.detach(), expected.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients[0], 2 * expected.gradients[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradients[1:], expected.gradients[1:], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_by_inductor_under_autocast_with_any_number_of_rows(reduction: str) -> None:
    compiled = torch.compile(linear_kd_loss, fullgraph=True, dynamic=True)
    for rows in (23, 31):
        problem = make_problem(Case(rows=rows, bias=False))
        arguments = (*problem.student[:2], *problem.teacher[:2], problem.labels)
        with torch.autocast("cpu", dtype=BF16):
            both = [f(*arguments, reduction=reduction, **COMMON) for f in (compiled, linear_kd_loss)]
        first, second = (torch.autograd.grad(loss.sum(), problem.leaves) for loss in both)
        assert torch.equal(both[0], both[1]) and all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("needs", [[True, True, True], [True, False, False], [False, False, False]], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_opcheck(dtype: torch.dtype, reduction: str, needs: list[bool], native: str) -> None:
    problem = make_problem(Case(rows=6, vocab=33, dtype=dtype))
    student = tuple(x.detach().requires_grad_(need) for x, need in zip(problem.student, needs))
    options = Options(ce_weight=0.5, reduction=reduction, return_stats=True)
    call = Call(
        *student, *problem.teacher, None, problem.labels, torch.rand(6), torch.rand(6) + 1, None, scalars_of(options),
        "jsd", True, -100, reduction, True, native, None, None, 4, 1, needs,
    )  # fmt: skip
    torch.library.opcheck(linear_kd, call)


def test_two_losses_of_one_head_add_up() -> None:
    problem = make_problem(Case())
    once = run(problem, **COMMON).gradients
    (_loss(problem) + _loss(problem)).backward()
    for leaf, gradient in zip(problem.leaves, once):
        torch.testing.assert_close(leaf.grad, 2 * gradient)


def test_padding_rows_by_functional_linear_is_the_documented_equivalent() -> None:
    problem = make_problem(Case())
    student, teacher = F.linear(*problem.student), F.linear(*problem.teacher)
    same = fastkd.kd_loss(student, teacher, problem.labels, **COMMON)
    torch.testing.assert_close(_loss(problem), same, rtol=1e-6, atol=0)
