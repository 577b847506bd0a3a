"""KDLoss, the module: the function with its configuration held, copied, stored, printed."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch

import fastkd

OPTIONS = {"divergence": "jsd", "beta": 0.3, "temperature": 2.0, "ce_weight": 0.5, "label_smoothing": 0.1}


def _rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(5, 11), torch.randn(5, 11), torch.tensor([1, -100, 3, 10, 0])


def test_equals_the_function() -> None:
    student, teacher, labels = _rows()
    per_call = {"token_weights": torch.rand(5), "num_items_in_batch": 9}
    module = fastkd.KDLoss(**OPTIONS)
    a, b = student.clone().requires_grad_(), student.clone().requires_grad_()
    one, two = (
        module(a, teacher, labels, **per_call),
        fastkd.kd_loss(b, teacher, labels, **OPTIONS, **per_call),
    )
    one.backward()
    two.backward()
    assert torch.equal(one, two) and torch.equal(a.grad, b.grad)


def test_temperature_of_the_call_wins() -> None:
    student, teacher, _ = _rows()
    module = fastkd.KDLoss(temperature=5.0)
    per_token = torch.linspace(1, 3, 5)
    assert torch.equal(
        module(student, teacher, temperature=per_token),
        fastkd.kd_loss(student, teacher, temperature=per_token),
    )
    assert torch.equal(module(student, teacher, temperature=2), fastkd.kd_loss(student, teacher, temperature=2))
    assert torch.equal(module(student, teacher), fastkd.kd_loss(student, teacher, temperature=5.0))


def test_statistics() -> None:
    student, teacher, labels = _rows()
    loss, stats = fastkd.KDLoss(return_stats=True, reduction="none")(student, teacher, labels)
    assert torch.allclose(loss, stats.kd, rtol=1e-6)


def test_every_scalar_option_of_the_function_is_one_of_the_module() -> None:
    parameters = inspect.signature(fastkd.kd_loss).parameters
    per_call = {"student_logits", "teacher_logits", "labels", "token_weights", "num_items_in_batch"}
    for name, parameter in parameters.items():
        if name not in per_call:
            fastkd.KDLoss(**{name: parameter.default})


def test_bad_options_raise_at_construction() -> None:
    with pytest.raises(TypeError, match=r"temprature.*allowed.*temperature"):
        fastkd.KDLoss(temprature=2.0)
    with pytest.raises(ValueError, match=r"divergence.*'kl'.*'forward_kl'"):
        fastkd.KDLoss(divergence="kl")
    with pytest.raises(ValueError, match=r"beta.*2"):
        fastkd.KDLoss(divergence="jsd", beta=2)
    with pytest.raises(ValueError, match=r"temperature.*-1"):
        fastkd.KDLoss(temperature=-1)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(copied) -> None:
    student, teacher, labels = _rows()
    module = fastkd.KDLoss(**OPTIONS)
    twin = copied(module)
    assert repr(twin) == repr(module)
    assert torch.equal(twin(student, teacher, labels), module(student, teacher, labels))


def test_has_no_state() -> None:
    module = fastkd.KDLoss(**OPTIONS)
    assert not list(module.parameters()) and not module.state_dict()


def test_repr_shows_what_differs_from_the_defaults() -> None:
    assert repr(fastkd.KDLoss()) == "KDLoss()"
    assert repr(fastkd.KDLoss(divergence="jsd", beta=0.3)) == "KDLoss(divergence='jsd', beta=0.3)"


def test_within_a_model() -> None:
    model = torch.nn.ModuleDict({"student": torch.nn.Linear(4, 11), "loss": fastkd.KDLoss(**OPTIONS)})
    _, teacher, labels = _rows()
    model["loss"](model["student"](torch.randn(5, 4)), teacher, labels).backward()
    assert model["student"].weight.grad.abs().sum() > 0
