"""The contract of sparse_kd_loss: what equals what, what is refused and in which words, autograd, tracing."""

from __future__ import annotations

import pytest
import torch
from sparse_cases import TAILS
from torch import Tensor

import fastkd
from fastkd import SparseKDLoss, TopKTeacher, kd_loss, ops, sparse_kd_loss
from fastkd.options import Options

BACKENDS = ["eager", *([] if ops.load_error or ops.isa_error else ["native"])]
both = pytest.mark.parametrize("backend", BACKENDS)


def logits_of(rows: int = 5, vocab: int = 50, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, vocab, generator=g), 3 * torch.randn(rows, vocab, generator=g)


def teacher_of(logits: Tensor, k: int = 6, tail: str = "bucket", temperature: float = 1.0) -> TopKTeacher:
    lp, ids = torch.log_softmax(logits / temperature, -1).topk(k)
    return TopKTeacher(ids, lp, tail, temperature=temperature)


def value_and_gradient(student: Tensor, teacher: TopKTeacher, **options) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    loss = sparse_kd_loss(leaf, teacher, **options)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


# --- what equals what ------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("tail,divergence", [(t, d) for t, ds in TAILS.items() if t != "sampled" for d in ds])
def test_k_of_the_whole_vocabulary_is_the_dense_loss(tail: str, divergence: str, backend: str) -> None:
    student, teacher = logits_of()
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    lp = torch.log_softmax(teacher / 2, -1)[:, order]
    sparse = TopKTeacher(order.expand(5, 50).contiguous(), lp, tail, temperature=2.0)
    options = {"divergence": divergence, "temperature": 2.0, "beta": 0.3, "backend": backend}
    loss, gradient = value_and_gradient(student, sparse, **options)
    leaf = student.clone().requires_grad_()
    dense = kd_loss(leaf, teacher, **options)
    torch.testing.assert_close(loss, dense.detach(), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient, torch.autograd.grad(dense, leaf)[0], rtol=1e-5, atol=2e-7)


@both
@pytest.mark.parametrize("tail,divergence", [(t, d) for t, ds in TAILS.items() for d in ds])
def test_order_and_padding_change_nothing(tail: str, divergence: str, backend: str) -> None:
    student, teacher = logits_of()
    sparse = teacher_of(teacher, tail=tail)
    g = torch.Generator().manual_seed(3)
    order = torch.stack([torch.randperm(9, generator=g) for _ in range(5)])
    padded = sparse.map(
        lambda x: torch.nn.functional.pad(x, (0, 3), value=-1 if x.dtype == torch.int64 else float("-inf"))
    )
    shuffled = padded.map(lambda x: x.gather(-1, order))
    options = {"divergence": divergence, "backend": backend}
    plain, again = value_and_gradient(student, sparse, **options), value_and_gradient(student, shuffled, **options)
    torch.testing.assert_close(plain, again, rtol=1e-6, atol=1e-7)


@both
def test_bucket_is_the_dense_loss_of_summed_columns(backend: str) -> None:
    """K + 1 outcomes, literally: both models' other columns joined into one logit."""
    student, teacher = logits_of()
    sparse = teacher_of(teacher, k=4)
    named = torch.zeros(5, 50, dtype=torch.bool).scatter_(-1, sparse.ids, True)

    def joined(logits: Tensor) -> Tensor:
        rest = logits.masked_fill(named, float("-inf")).logsumexp(-1, keepdim=True)
        return torch.cat([logits.gather(-1, sparse.ids), rest], -1)

    for divergence in TAILS["bucket"]:
        loss = sparse_kd_loss(student, sparse, divergence=divergence, backend=backend)
        torch.testing.assert_close(
            loss, kd_loss(joined(student), joined(teacher), divergence=divergence), rtol=2e-6, atol=1e-6
        )


@both
def test_bucket_reverse_kl_of_a_certain_teacher_is_finite(backend: str) -> None:
    """1 - sum p = 0 within rounding: a mass that cannot be told from 0 is no reason for an infinite loss."""
    student, _ = logits_of(1)
    certain = TopKTeacher(torch.tensor([[3]]), torch.tensor([[0.0]]))
    loss, gradient = value_and_gradient(student, certain, divergence="reverse_kl", backend=backend)
    q = torch.softmax(student.double(), -1)[0]
    rest = 1 - q[3]
    lowest = 8 * 2.0**-24  # fastkd.topk.mass_resolution
    expected = q[3] * q[3].log() + rest * (rest.log() - torch.tensor(lowest, dtype=torch.float64).log())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert gradient.isfinite().all()


@both
def test_rest_masked_by_the_student(backend: str) -> None:
    """A rest that the student cannot reach costs nothing where the teacher's mass there is rounding, else +inf."""
    student = torch.full((1, 8), float("-inf"))
    student[0, :3] = torch.tensor([0.5, 0.0, -1.0])
    lp = torch.log_softmax(torch.tensor([[1.0, 0.5, 0.0]]), -1)
    loss, gradient = value_and_gradient(student, TopKTeacher(torch.tensor([[0, 1, 2]]), lp), backend=backend)
    torch.testing.assert_close(loss, kd_loss(student[:, :3], torch.tensor([[1.0, 0.5, 0.0]])))
    assert (gradient[0, 3:] == 0).all()
    short = TopKTeacher(torch.tensor([[0, 1]]), lp[:, :2])
    student[0, 2] = float("-inf")
    assert sparse_kd_loss(student, short, backend=backend) == float("inf")


@both
def test_sum_above_one_by_rounding_is_divided_out(backend: str) -> None:
    student, teacher = logits_of(1)
    lp, ids = torch.log_softmax(teacher, -1).topk(50)
    above = TopKTeacher(ids, lp + 5e-5)
    loss = sparse_kd_loss(student, above, backend=backend)
    torch.testing.assert_close(loss, kd_loss(student, teacher), rtol=2e-6, atol=2e-6)


@both
def test_tempering_of_renormalize_is_exact(backend: str) -> None:
    """p**(1/T) over its sum, from log-probabilities at T = 1: what the teacher's logits at T give for the same ids."""
    student, teacher = logits_of()
    at_one = teacher_of(teacher, tail="renormalize")
    at_three = teacher_of(teacher, tail="renormalize", temperature=3.0)
    kl = [sparse_kd_loss(student, t, temperature=3.0, backend=backend) for t in (at_one, at_three)]
    torch.testing.assert_close(kl[0], kl[1], rtol=1e-6, atol=1e-6)
    per_token = torch.full((5,), 3.0)
    torch.testing.assert_close(sparse_kd_loss(student, at_one, temperature=per_token, backend=backend), kl[0])


@both
def test_temperature_per_token(backend: str) -> None:
    student, teacher = logits_of()
    temperature = torch.tensor([0.7, 1.0, 2.0, 2.5, 9.0])
    lp, ids = torch.log_softmax(teacher / temperature[:, None], -1).topk(6)
    sparse = TopKTeacher(ids, lp, temperature=None)
    losses = sparse_kd_loss(student, sparse, temperature=temperature, reduction="none", backend=backend)
    for n in range(5):
        one = sparse.map(lambda x, n=n: x[n : n + 1])
        alone = sparse_kd_loss(student[n : n + 1], one, temperature=float(temperature[n]), backend=backend)
        torch.testing.assert_close(losses[n], alone)


@both
def test_module_and_no_grad(backend: str) -> None:
    student, teacher = logits_of()
    sparse, labels = teacher_of(teacher), torch.tensor([1, 2, -100, 4, 5])
    module = SparseKDLoss(divergence="jsd", beta=0.3, ce_weight=0.5, return_stats=True, backend=backend)
    loss, stats = module(student, sparse, labels, num_items_in_batch=7)
    expected, again = sparse_kd_loss(
        student, sparse, labels, divergence="jsd", beta=0.3, ce_weight=0.5, num_items_in_batch=7, return_stats=True,
        backend=backend,
    )  # fmt: skip
    assert torch.equal(loss, expected) and all(torch.equal(a, b) for a, b in zip(stats, again))
    assert (
        repr(module)
        == f"SparseKDLoss(divergence='jsd', beta=0.3, ce_weight=0.5, return_stats=True, backend='{backend}')"
    )
    with pytest.raises(TypeError, match=r"unknown options \['teacher_softcap'\]; allowed: divergence"):
        SparseKDLoss(teacher_softcap=3.0)


@both
def test_ignored_rows_are_not_read(backend: str) -> None:
    student, teacher = logits_of()
    sparse = teacher_of(teacher)
    labels = torch.tensor([1, -100, 3, -100, 5])
    expected = value_and_gradient(student, sparse, labels=labels, ce_weight=0.5, backend=backend)
    student[1] = float("nan")
    sparse.ids[1], sparse.logprobs[3] = 10**6, float("nan")
    loss, gradient = value_and_gradient(student, sparse, labels=labels, ce_weight=0.5, backend=backend)
    assert torch.equal(loss, expected[0]) and torch.equal(gradient, expected[1])
    assert (gradient[labels == -100] == 0).all()
    loss, gradient = value_and_gradient(student, sparse, labels=torch.full((5,), -100), backend=backend)
    assert loss == 0 and (gradient == 0).all()


@both
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("column", ["named", "rest"])
def test_nan_and_inf_logits_spoil_their_row_alone(column: str, bad: float, backend: str) -> None:
    student, teacher = logits_of()
    sparse = teacher_of(teacher)
    at = int(sparse.ids[2, 1]) if column == "named" else int(teacher[2].argmin())
    student[2, at] = bad
    for divergence in TAILS["bucket"]:
        leaf = student.clone().requires_grad_()
        losses = sparse_kd_loss(leaf, sparse, divergence=divergence, reduction="none", backend=backend)
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        assert losses.isfinite().tolist() == [True, True, False, True, True]
        assert gradient[2].isnan().any() and gradient[[0, 1, 3, 4]].isfinite().all()


# --- autograd and tracing --------------------------------------------------------------------------------------------


def test_gradcheck_of_eager() -> None:
    student, teacher = (x.double() for x in logits_of(3, 12))
    student.requires_grad_()
    for tail, divergences in TAILS.items():
        sparse = teacher_of(teacher, 4, tail)
        for divergence in divergences:
            if divergence == "total_variation":
                continue  # no derivative at ties
            run = lambda x: sparse_kd_loss(x, sparse, divergence=divergence, student_softcap=9.0, backend="eager")  # noqa: B023, E731
            assert torch.autograd.gradcheck(run, student)


def test_upstream_retained_graph_and_double_backward(native: str) -> None:
    student, teacher = logits_of()
    sparse = teacher_of(teacher)
    leaf = student.clone().requires_grad_()
    loss = sparse_kd_loss(leaf, sparse, backend=native)
    (once,) = torch.autograd.grad(3 * loss, leaf, retain_graph=True)
    (again,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(once, 3 * again)
    loss = sparse_kd_loss(leaf, sparse, backend=native)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, leaf, create_graph=True)


def test_inplace_overwrites_and_is_refused_on_leaves(native: str) -> None:
    student, teacher = logits_of()
    sparse = teacher_of(teacher)
    _, expected = value_and_gradient(student, sparse, backend=native)
    leaf = student.clone().requires_grad_()
    logits = leaf * 1
    sparse_kd_loss(logits, sparse, inplace=True, backend=native).backward()
    assert torch.equal(logits.detach(), expected) and torch.equal(leaf.grad, expected)
    with pytest.raises(ValueError, match="leaf that requires grad"):
        sparse_kd_loss(leaf, sparse, inplace=True, backend=native)


@pytest.mark.parametrize("tail", list(TAILS))
@pytest.mark.parametrize("with_gradient", [True, False])
def test_opcheck(tail: str, with_gradient: bool, native: str) -> None:
    student, teacher = logits_of(4, 30)
    sparse = teacher_of(teacher, tail=tail)
    labels, scalars = torch.tensor([1, 2, -100, 3]), ops.scalars_of(Options(ce_weight=0.5), last=1.0)
    weights = torch.full(sparse.ids.shape, 0.2) if tail == "sampled" else None
    common = (sparse.ids, sparse.logprobs, weights, labels, None, None, None, scalars, tail, "forward_kl", True, -100,
              "mean", True)  # fmt: skip
    leaf = student.requires_grad_(with_gradient)
    torch.library.opcheck(torch.ops.fastkd.sparse_forward.default, (leaf, *common, with_gradient))
    if not with_gradient:
        torch.library.opcheck(torch.ops.fastkd.sparse_forward_.default, (student.clone(), *common))


def test_fullgraph_compile(native: str) -> None:
    student, teacher = logits_of(4, 30)
    sparse = teacher_of(teacher)
    labels = torch.tensor([1, 2, -100, 3])

    def step(x: Tensor, ids: Tensor, logprobs: Tensor, weight: float) -> Tensor:
        teacher = TopKTeacher(ids, logprobs)
        return 2 * sparse_kd_loss(x, teacher, labels, divergence="jsd", ce_weight=weight, backend=native)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)
    for weight in (0.5, 0.25):
        leaf, other = (student.clone().requires_grad_() for _ in range(2))
        loss, expected = (
            compiled(leaf, sparse.ids, sparse.logprobs, weight),
            step(other, sparse.ids, sparse.logprobs, weight),
        )
        loss.backward()
        expected.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(leaf.grad, other.grad)


def test_threads_and_runs_give_the_same_bits(native: str) -> None:
    student, teacher = logits_of(3, 9000)
    sparse = teacher_of(teacher, 40)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            found.append(value_and_gradient(student, sparse, divergence="jsd", backend=native))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


def test_no_memory_of_the_logits_size(native: str) -> None:
    """Value alone and in place: nothing N x V is allocated; with a gradient, the gradient."""
    student, teacher = logits_of(8, 4000)  # less than what lingers, which the profiler does not see
    sparse = teacher_of(teacher, 16)
    size = student.numel() * 4

    def allocated(run) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            run()
        return sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())

    assert allocated(lambda: sparse_kd_loss(student, sparse, backend=native)) < size / 10
    logits = student.clone().requires_grad_() * 1
    assert allocated(lambda: sparse_kd_loss(logits, sparse, inplace=True, backend=native)) < size / 10
    fresh = allocated(lambda: sparse_kd_loss(student.requires_grad_(), sparse, backend=native))
    assert size <= fresh < 1.1 * size


def test_functions_transform_through_eager() -> None:
    student, teacher = logits_of(2, 20)
    sparse = teacher_of(teacher, 3)
    gradient = torch.func.grad(lambda x: sparse_kd_loss(x, sparse))(student)
    torch.testing.assert_close(gradient, value_and_gradient(student, sparse, backend="eager")[1])


def test_public_names() -> None:
    assert {"SparseKDLoss", "TopKTeacher", "sparse_kd_loss"} <= set(fastkd.__all__)


def test_explain_speaks_of_sparse_teachers(native: str) -> None:
    """The backend that would run is the one that does, and the answer is about the student alone."""
    student, teacher = torch.randn(3, 20), TopKTeacher(torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, 1))
    answer = fastkd.explain(student, teacher)
    assert answer.backend == "native" and "the student's logits" in answer.reasons["native"]
    assert "float64" in fastkd.explain(student.double(), teacher).reasons["native"]
    assert fastkd.explain(student.double(), teacher).backend == "eager"
    half = TopKTeacher(teacher.ids, teacher.logprobs.double())  # of which no backend asks more than values
    assert fastkd.explain(student, half).backend == "native"
    assert fastkd.explain(student, teacher, backend="triton").backend == ""
