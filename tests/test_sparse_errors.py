"""What sparse_kd_loss refuses, in which words, and what becomes of it where no look is taken."""

from __future__ import annotations

import pytest
import torch
from sparse_cases import TAILS
from test_sparse_api import both, logits_of, teacher_of

from fastkd import TopKTeacher, sparse_kd_loss
from fastkd.options import Options
from fastkd.sparse_eager import eager_sparse_kd_loss


@pytest.mark.parametrize(
    "change,message",
    [
        ({"tail": "sum"}, "tail='sum' is not known; allowed: 'bucket', 'renormalize', 'sampled'"),
        ({"ids": [[1]]}, r"ids of a TopKTeacher must be a int64 or int32 tensor \(..., K\); got list"),
        ({"ids": torch.ones(5, 6)}, r"ids of a TopKTeacher must be int64 or int32; got float32 \(5, 6\)"),
        ({"ids": torch.ones(5, 0, dtype=torch.int64)}, r"ids of a TopKTeacher must be \(..., K\) with K >= 1"),
        (
            {"logprobs": torch.zeros(5, 5)},
            r"logprobs of a TopKTeacher must have the shape and device of ids, int64 \(5, 6\)",
        ),
        ({"logprobs": torch.zeros(5, 6, requires_grad=True)}, "logprobs of a TopKTeacher must not require grad"),
        ({"weights": torch.zeros(5, 6)}, "weights are those of draws, of tail='sampled'; got them with tail='bucket'"),
        ({"temperature": 0}, "temperature of a TopKTeacher must be None or a finite number > 0; got 0"),
    ],
)
def test_teacher_is_checked(change: dict, message: str) -> None:
    base = teacher_of(logits_of()[1])
    fields = {"ids": base.ids, "logprobs": base.logprobs, **change}
    with pytest.raises((TypeError, ValueError), match=message):
        TopKTeacher(**fields)


@both
@pytest.mark.parametrize("tail", ["renormalize", "sampled"])
def test_undefined_divergences_say_why(tail: str, backend: str) -> None:
    student, teacher = logits_of()
    why = {"renormalize": "infinite", "sampled": "not linear in the teacher's probabilities"}[tail]
    for divergence in set(TAILS["bucket"]) - set(TAILS[tail]):
        with pytest.raises(ValueError, match=f"divergence='{divergence}' is not defined for tail='{tail}': .*{why}"):
            sparse_kd_loss(student, teacher_of(teacher, tail=tail), divergence=divergence, backend=backend)


@both
def test_one_sided_symmetric_kl_is_forward_kl(backend: str) -> None:
    student, teacher = logits_of()
    sparse = teacher_of(teacher, tail="renormalize")
    one_sided = sparse_kd_loss(student, sparse, divergence="symmetric_kl", beta=1.0, backend=backend)
    torch.testing.assert_close(one_sided, sparse_kd_loss(student, sparse, backend=backend))


@pytest.mark.parametrize("tail", ["bucket", "sampled"])
@pytest.mark.parametrize("temperature", [2.0, torch.full((5,), 1.0)])
def test_temperature_must_be_the_teachers(tail: str, temperature: object) -> None:
    student, teacher = logits_of()
    with pytest.raises(ValueError, match=r"taken at 1\.0 and tail='.*' cannot temper them: the normaliser"):
        sparse_kd_loss(student, teacher_of(teacher, tail=tail), temperature=temperature)


def bad_values() -> list:
    def change(name: str, row: int, entry: int, value: float, tail: str = "bucket"):
        def apply(t: TopKTeacher) -> TopKTeacher:
            getattr(t, name)[row, entry] = value
            return TopKTeacher(t.ids, t.logprobs, tail, weights=t.weights, temperature=1.0)

        return apply

    def doubled(t: TopKTeacher) -> TopKTeacher:
        t.ids[3, 4] = t.ids[3, 1]
        return t

    def heavy(t: TopKTeacher) -> TopKTeacher:
        t.logprobs[2] = torch.tensor([0.2] * 6).log()
        return t

    def empty(t: TopKTeacher) -> TopKTeacher:
        t.ids[2], t.logprobs[2] = -1, float("-inf")
        return TopKTeacher(t.ids, t.logprobs, "renormalize", temperature=1.0)

    def weighted(value: float):
        def apply(t: TopKTeacher) -> TopKTeacher:
            weights = torch.full(t.ids.shape, 0.1)
            weights[1, 2] = value
            return TopKTeacher(t.ids, t.logprobs, "sampled", weights=weights)

        return apply

    return [
        (change("ids", 2, 3, 50), r"ids\[2, 3\] of the teacher: 50 is outside \[0, 50\)"),
        (change("ids", 2, 3, -1), r"ids\[2, 3\] of the teacher: -1 is outside \[0, 50\), and no padding"),
        (change("ids", 2, 3, -7, "sampled"), r"ids\[2, 3\] of the teacher: -7 is outside"),
        (change("logprobs", 1, 0, float("nan")), r"logprobs\[1, 0\] of the teacher: nan is no log-probability"),
        (
            change("logprobs", 1, 0, 0.01, "sampled"),
            r"logprobs\[1, 0\] of the teacher: 0\.00999.* is no log-probability",
        ),
        (change("logprobs", 1, 0, float("inf"), "renormalize"), r"logprobs\[1, 0\] of the teacher: inf is no log-prob"),
        (doubled, r"ids\[3, 4\] of the teacher: \d+ stands twice in its row; only draws"),
        (
            heavy,
            r"logprobs\[2\] of the teacher: 1\.\d* is the sum of its probabilities, above 1 by more than rounding",
        ),
        (empty, r"ids\[2\] names no column with a probability, which tail='renormalize' needs"),
        (weighted(float("nan")), r"weights\[1, 2\] of the teacher: nan must be a finite number >= 0"),
        (weighted(-0.5), r"weights\[1, 2\] of the teacher: -0\.5 must be a finite number >= 0"),
    ]


@both
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("change,message", bad_values())
def test_bad_values_name_row_and_value(change, message: str, inplace: bool, backend: str) -> None:
    student, teacher = logits_of()
    sparse = change(teacher_of(teacher))
    logits = student.clone().requires_grad_() * 1
    with pytest.raises(ValueError, match=message):
        sparse_kd_loss(logits, sparse, inplace=inplace, backend=backend)
    assert torch.equal(logits, student)  # nothing was written


@pytest.mark.parametrize("change,_message", bad_values())
def test_where_no_look_is_taken_bad_rows_are_nan(change, _message: str) -> None:
    """What an accelerator gets: the eager computation without the checks."""
    student, teacher = logits_of()
    clean = teacher_of(teacher)
    sparse = change(teacher_of(teacher))
    row = int((sparse.ids != clean.ids).any(-1).nonzero()[0]) if (sparse.ids != clean.ids).any() else None
    if row is None and sparse.weights is not None:
        row = 1
    if row is None:
        row = int((~(sparse.logprobs == clean.logprobs)).any(-1).nonzero()[0])
    leaf = student.clone().requires_grad_()
    losses, _ = eager_sparse_kd_loss(leaf, sparse, None, None, None, None, Options(reduction="none"))
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    assert losses.isnan().nonzero().flatten().tolist() == [row]
    assert gradient.isnan().any(-1).nonzero().flatten().tolist() == [row]


def test_shape_device_and_backend_errors() -> None:
    student, teacher = logits_of()
    sparse = teacher_of(teacher)
    with pytest.raises(TypeError, match=r"teacher must be a fastkd\.TopKTeacher; got Tensor"):
        sparse_kd_loss(student, teacher)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"agree in all but the last dimension; got \(4, 50\) and \(5, 6\)"):
        sparse_kd_loss(student[:4], sparse)
    with pytest.raises(ValueError, match="needs labels"):
        sparse_kd_loss(student, sparse, ce_weight=1.0)
    with pytest.raises(ValueError, match=r"teacher must be on the device of student_logits \(meta\)"):
        sparse_kd_loss(student.to("meta"), sparse)
    with pytest.raises(TypeError, match="student_logits must be a tensor"):
        sparse_kd_loss([1.0], sparse)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="backend='native' cannot run"):
        sparse_kd_loss(student.double(), sparse, backend="native")
