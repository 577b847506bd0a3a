"""The bias of top-k and its absence in tail="sampled": expectations over every possible draw, exactly."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_sparse_api import BACKENDS, value_and_gradient
from torch import Tensor

from fastkd import TopKTeacher, kd_loss, sparse_kd_loss
from fastkd.teachers import sample_from_logits

VOCAB, DRAWS = 5, 3
both = pytest.mark.parametrize("backend", BACKENDS)


def one_row() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(11)
    return 2 * torch.randn(1, VOCAB, generator=g), 2 * torch.randn(1, VOCAB, generator=g)


def dense(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    loss = kd_loss(leaf, teacher)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def every_draw(teacher: Tensor, proposal: Tensor) -> tuple[TopKTeacher, Tensor]:
    """All VOCAB**DRAWS outcomes as rows, and the probability of each under ``proposal``."""
    ids = torch.tensor(list(itertools.product(range(VOCAB), repeat=DRAWS)))
    lp, lr = torch.log_softmax(teacher[0], -1), torch.log_softmax(proposal[0], -1)
    weights = (lp - lr).exp()[ids] / DRAWS
    return TopKTeacher(ids, lp[ids], "sampled", weights=weights), lr[ids].sum(-1).exp()


def expected(student: Tensor, draws: TopKTeacher, probability: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    rows = student.expand(len(probability), VOCAB).contiguous()
    losses = sparse_kd_loss(rows, draws, reduction="none", backend=backend)
    _, gradient = value_and_gradient(rows, draws, reduction="sum", token_weights=probability, backend=backend)
    return (probability * losses).sum(), gradient.sum(0, keepdim=True)


@both
@pytest.mark.parametrize("flatness", [1.0, 2.0])
def test_value_and_gradient_are_those_of_the_dense_loss_on_average(flatness: float, backend: str) -> None:
    student, teacher = one_row()
    draws, probability = every_draw(teacher, teacher / flatness)
    torch.testing.assert_close(probability.sum(), torch.tensor(1.0))
    value, gradient = expected(student, draws, probability, backend)
    dense_value, dense_gradient = dense(student, teacher)
    torch.testing.assert_close(value, dense_value, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, dense_gradient, rtol=1e-4, atol=1e-6)


@both
def test_weights_left_out_are_those_of_draws_from_the_teacher(backend: str) -> None:
    student, teacher = one_row()
    draws, probability = every_draw(teacher, teacher)
    plain = TopKTeacher(draws.ids, draws.logprobs, "sampled")
    for a, b in zip(expected(student, plain, probability, backend), expected(student, draws, probability, backend)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@both
def test_draws_without_their_weights_are_biased(backend: str) -> None:
    """The test above can fail: a flatter proposal taken for the teacher is off by far more than its tolerance."""
    student, teacher = one_row()
    draws, probability = every_draw(teacher, teacher / 2)
    plain = TopKTeacher(draws.ids, draws.logprobs, "sampled")
    _, gradient = expected(student, plain, probability, backend)
    assert (gradient - dense(student, teacher)[1]).abs().max() > 0.01


@both
def test_top_k_is_biased(backend: str) -> None:
    """Anshumann et al. 2025, section 3: where the student equals the teacher, the dense gradient is 0; renormalised
    top-k pushes the named columns up and all others down, and bucket, which has no such bias, does not."""
    _, teacher = one_row()
    lp, ids = torch.log_softmax(teacher, -1).topk(2)
    _, exact = dense(teacher, teacher)
    _, renormalised = value_and_gradient(teacher, TopKTeacher(ids, lp, "renormalize"), backend=backend)
    _, bucket = value_and_gradient(teacher, TopKTeacher(ids, lp), backend=backend)
    assert exact.abs().max() < 1e-6 and bucket.abs().max() < 1e-6
    missing = 1 - lp.exp().sum()
    torch.testing.assert_close(renormalised[0, ids[0]], -(lp[0].exp() * (1 / (1 - missing) - 1)), rtol=1e-4, atol=1e-6)
    assert missing > 0.05 and (renormalised.scatter(-1, ids, 1.0) > 0).all()


@pytest.mark.parametrize("proposal", [None, 2.0])
def test_sampler_draws_what_its_weights_say(proposal: float | None) -> None:
    """The mean of many draws from the library's own sampler, within five standard errors of the dense gradient."""
    student, teacher = one_row()
    rows = 20000
    g = torch.Generator().manual_seed(5)
    draws = sample_from_logits(teacher.expand(rows, VOCAB), DRAWS, proposal_temperature=proposal, generator=g)
    _, gradients = value_and_gradient(student.expand(rows, VOCAB).contiguous(), draws, reduction="sum")
    error = gradients.std(0) / rows**0.5
    assert ((gradients.mean(0) - dense(student, teacher)[1][0]).abs() < 5 * error + 1e-6).all()
    assert error.max() < 0.01
