"""Teachers from logits and from hidden states: the right columns, exact log-probabilities, bounded memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastkd import kd_loss, linear_kd_loss, sparse_kd_loss
from fastkd.teachers import sample_from_hidden, sample_from_logits, topk_from_hidden, topk_from_logits


def logits_of(*shape: int) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("temperature,softcap", [(1.0, None), (2.5, 4.0)])
@pytest.mark.parametrize("budget", [1, 64 << 20])
def test_topk_from_logits(dtype: torch.dtype, temperature: float, softcap: float | None, budget: int) -> None:
    logits = logits_of(2, 7, 300).to(dtype)
    teacher = topk_from_logits(logits, 9, temperature=temperature, softcap=softcap, memory_budget=budget)
    exact = logits.double()
    exact = exact if softcap is None else softcap * torch.tanh(exact / softcap)
    lp, ids = torch.log_softmax(exact / temperature, -1).topk(9)
    assert teacher.ids.shape == (2, 7, 9) and teacher.temperature == temperature and teacher.tail == "bucket"
    torch.testing.assert_close(teacher.logprobs.double(), lp, rtol=1e-6, atol=1e-6)
    picked = torch.log_softmax(exact / temperature, -1).gather(-1, teacher.ids)
    torch.testing.assert_close(picked, lp, rtol=1e-6, atol=1e-6)  # the same columns but for ties
    if dtype == torch.float32 and softcap is None:
        assert torch.equal(teacher.ids, ids)


def test_masked_and_offset_logits() -> None:
    logits = logits_of(3, 40) + 1e4
    logits[:, 5:] = float("-inf")
    teacher = topk_from_logits(logits, 8)
    assert torch.isneginf(teacher.logprobs[:, 5:]).all()
    torch.testing.assert_close(teacher.logprobs.exp().sum(-1), torch.ones(3))
    assert sparse_kd_loss(logits, teacher).abs() < 1e-6


def test_topk_from_hidden_never_holds_all_logits() -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = torch.randn(600, 16, generator=g), torch.randn(4000, 16, generator=g), torch.randn(4000)
    budget = 1 << 20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        teacher = topk_from_hidden(hidden, weight, 5, bias=bias, memory_budget=budget)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest <= budget < 600 * 4000 * 4 / 9
    lp, ids = torch.log_softmax(hidden @ weight.T + bias, -1).topk(5)
    assert (teacher.ids == ids).float().mean() > 0.999
    torch.testing.assert_close(teacher.logprobs, lp, rtol=1e-4, atol=1e-4)


def test_a_teacher_of_all_columns_gives_the_linear_loss() -> None:
    g = torch.Generator().manual_seed(0)
    student, head = torch.randn(6, 8, generator=g), torch.randn(50, 8, generator=g)
    hidden, weight = torch.randn(6, 12, generator=g), torch.randn(50, 12, generator=g)
    teacher = topk_from_hidden(hidden, weight, 50, temperature=2.0)
    expected = linear_kd_loss(student, head, hidden, weight, temperature=2.0)
    torch.testing.assert_close(
        sparse_kd_loss(student @ head.T, teacher, temperature=2.0), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("proposal", [None, 3.0])
def test_draws_carry_their_log_probabilities(proposal: float | None) -> None:
    logits = logits_of(4, 30)
    draws = sample_from_logits(logits, 12, temperature=2.0, proposal_temperature=proposal)
    lp = torch.log_softmax(logits / 2, -1).gather(-1, draws.ids)
    torch.testing.assert_close(draws.logprobs, lp)
    assert draws.tail == "sampled" and draws.temperature == 2.0 and draws.ids.shape == (4, 12)
    if proposal is None:
        assert draws.weights is None
    else:
        lr = torch.log_softmax(logits / proposal, -1).gather(-1, draws.ids)
        torch.testing.assert_close(draws.weights, (lp - lr).exp() / 12)


def test_draws_from_hidden_states_and_from_their_logits_agree() -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 3, 8, generator=g), torch.randn(40, 8, generator=g)
    one, two = (torch.Generator().manual_seed(9) for _ in range(2))
    a = sample_from_hidden(hidden, weight, 6, generator=one)
    b = sample_from_logits(torch.nn.functional.linear(hidden, weight), 6, generator=two)
    assert torch.equal(a.ids, b.ids) and a.ids.shape == (2, 3, 6)
    again = sample_from_hidden(hidden, weight, 6, generator=one)
    assert not torch.equal(a.ids, again.ids)


def test_no_rows() -> None:
    assert topk_from_logits(torch.zeros(0, 9), 3).ids.shape == (0, 3)
    assert sample_from_logits(torch.zeros(2, 0, 9), 3, proposal_temperature=2.0).weights.shape == (2, 0, 3)


def test_bucket_is_never_above_the_dense_divergence() -> None:
    """Joining outcomes loses information: KL over K + 1 of them is at most KL over all, and grows with K."""
    student, teacher = logits_of(6, 200), logits_of(12, 200)[6:]
    values = [float(sparse_kd_loss(student, topk_from_logits(teacher, k))) for k in (1, 4, 16, 64, 200)]
    full = float(kd_loss(student, teacher))
    assert values == sorted(values) and values[-1] == pytest.approx(full, rel=1e-5) and values[0] < 0.9 * full


@pytest.mark.parametrize(
    "call,error,message",
    [
        (lambda x: topk_from_logits(x.long(), 3), TypeError, "logits must be a floating point tensor"),
        (lambda x: topk_from_logits(x, 31), ValueError, "k must be at most the vocabulary, 30; got 31"),
        (lambda x: topk_from_logits(x, 0), ValueError, "k must be >= 1; got 0"),
        (lambda x: topk_from_logits(x, 2.0), TypeError, "k must be an int; got float"),
        (lambda x: topk_from_logits(x, 3, temperature=0), ValueError, "temperature must be a finite number > 0; got 0"),
        (
            lambda x: topk_from_logits(x, 3, softcap=-1),
            ValueError,
            "softcap must be a finite number > 0 or None; got -1",
        ),
        (lambda x: topk_from_logits(x, 3, tail="none"), ValueError, "tail='none' is not known"),
        (lambda x: topk_from_logits(x, 3, memory_budget=0), ValueError, "memory_budget must be a number of bytes"),
        (lambda x: sample_from_logits(x, 0), ValueError, "draws must be >= 1; got 0"),
        (lambda x: sample_from_logits(x, 3, proposal_temperature=-1), ValueError, "proposal_temperature must be"),
        (lambda x: topk_from_hidden(x, x.T, 3), ValueError, r"agree in H; got float32 \(4, 30\)"),
        (lambda x: topk_from_hidden(x, x[0], 3), ValueError, "weight must have 2 dimensions"),
        (lambda x: topk_from_hidden(x, x, 3, bias=x[0]), ValueError, "bias .* must agree in V"),
    ],
)
def test_errors(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(logits_of(4, 30))
