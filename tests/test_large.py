"""More than 2^31 elements: every offset and count of the kernels must be 64 bits wide. bf16 and in place."""

from __future__ import annotations

import numpy as np
import psutil
import pytest
import torch
from inputs import BF16, Case, Inputs, Outcome, reference_of, run_backend
from tolerances import assert_close_to_reference

import fastkd

VOCAB = 128256
ROWS = 2**31 // VOCAB + 2  # the last row begins beyond element 2^31
NEEDED = 16 * 2**30  # bytes free: 4.3 GB of each model, and nothing swapped out
# a row at either end, and the one through which element 2^31 passes
CHECKED = torch.tensor([0, 1, 2**31 // VOCAB, ROWS - 1])
OPTIONS = {"temperature": 2.0, "ce_weight": 0.5, "reduction": "none", "backend": "native"}


class _Attach(torch.autograd.Function):
    """Gives a tensor a graph, as a model's last layer would, without touching its memory."""

    @staticmethod
    def forward(ctx, leaf: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(values)
        return values

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return None, None


def _zeros(rows: int, columns: int) -> torch.Tensor:
    """bf16 zeros whose pages the system hands out when they are first written."""
    return torch.from_numpy(np.zeros((rows, columns), np.int16)).view(BF16)


def _noise(rows: int, seed: int) -> torch.Tensor:
    return (3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))).to(BF16)


def _check_rows(loss: torch.Tensor, gradient: torch.Tensor, few: Inputs) -> None:
    """The rows of `few` within the whole: (len(CHECKED),) of loss and gradient."""
    options, ones = {**OPTIONS, "labels": few.labels}, torch.ones(len(CHECKED))
    eager = run_backend(few, {**options, "backend": "eager"}, upstream=ones, in_fp32=True)
    assert_close_to_reference(Outcome(loss, gradient, None), reference_of(few, options, ones), eager)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements(native: str) -> None:
    free = psutil.virtual_memory().available
    if free < NEEDED:
        pytest.skip(f"needs {NEEDED >> 30} GiB of free memory; {free / 2**30:.1f} GiB are free")
    student, teacher = _zeros(ROWS, VOCAB), _zeros(ROWS, VOCAB)
    assert student.numel() > 2**31
    student[CHECKED], teacher[CHECKED] = _noise(len(CHECKED), 1), _noise(len(CHECKED), 2)
    labels = torch.arange(ROWS) % VOCAB
    labels[5] = -100
    case = Case("the same rows alone", lead=(len(CHECKED),), vocab=VOCAB, student_dtype=BF16, teacher_dtype=BF16)
    few = Inputs(case, student[CHECKED], teacher[CHECKED], labels[CHECKED], torch.ones(len(CHECKED)))

    logits = _Attach.apply(torch.zeros((), requires_grad=True), student.detach())
    loss = fastkd.kd_loss(logits, teacher, labels, inplace=True, **OPTIONS)
    (gradient,) = torch.autograd.grad(loss, logits, torch.ones(ROWS))
    assert gradient.data_ptr() == student.data_ptr()
    _check_rows(loss.detach()[CHECKED], gradient[CHECKED], few)
    # every other row has equal logits in both models: CE alone, log V, and nothing at the ignored one
    others = torch.ones(ROWS, dtype=torch.bool)
    others[CHECKED] = others[5] = False
    torch.testing.assert_close(loss.detach()[others], torch.full((int(others.sum()),), 0.5 * float(np.log(VOCAB))))
    assert loss[5] == 0 and (gradient[5] == 0).all()


def test_row_strides_beyond_two_to_the_31(native: str) -> None:
    """Few rows far apart: address space without memory, so that it runs everywhere."""
    stride = 2**30 + 5
    bases = [torch.from_numpy(np.zeros(3 * stride + VOCAB, np.int16)).view(BF16) for _ in range(2)]
    student, teacher = (base.as_strided((4, VOCAB), (stride, 1)) for base in bases)
    student.copy_(_noise(4, 3))
    teacher.copy_(_noise(4, 4))
    labels = torch.tensor([0, 7, VOCAB - 1, 5])
    case = Case("the same rows alone", lead=(4,), vocab=VOCAB, student_dtype=BF16, teacher_dtype=BF16)
    few = Inputs(case, student.clone(), teacher.clone(), labels, torch.ones(4))
    for inplace in (False, True):
        logits = _Attach.apply(torch.zeros((), requires_grad=True), student.detach())
        loss = fastkd.kd_loss(logits, teacher, labels, inplace=inplace, **OPTIONS)
        (gradient,) = torch.autograd.grad(loss, logits, torch.ones(4))
        _check_rows(loss.detach(), gradient, few)
