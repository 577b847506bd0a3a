"""Run in Triton's interpreter by test_triton.py (with triton_plugin): what only the Triton kernels promise. Elements
and exponentials counted, wrong arguments, offsets beyond 2^31, rows split over programs, full vocabularies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from inputs import BF16, FP16, FP32, Case, make_inputs, reference_of, run_backend
from reference import DIVERGENCES
from tolerances import assert_close_to_reference
from triton.runtime.interpreter import InterpreterBuilder

import fastkd
from fastkd import ops as core_ops
from fastkd.triton import blocks, launch, ops

OPTIONS = {"temperature": 2.0, "ce_weight": 0.5, "backend": "triton"}
WIDE, NARROW = 20000, 3000  # swept; resident
ONE_SWEEP = ("forward_kl", "reverse_kl", "symmetric_kl")


def _scalars(**changes: float) -> torch.Tensor:
    numbers = launch.Scalars(0.5, 2.0, 1.0, 0.5, 0.1, 1e-3, 0.0, 0.0)._replace(**changes)
    return torch.tensor(numbers, dtype=torch.float64)


def _rows(rows: int, vocab: int, dtype: torch.dtype = FP32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(rows + vocab)
    student, teacher = (3 * torch.randn(rows, vocab, generator=g) for _ in range(2))
    return student.to(dtype), teacher.to(dtype), torch.randint(vocab, (rows,), generator=g)


@contextmanager
def counting() -> Iterator[SimpleNamespace]:
    """Elements of blocks loaded and stored, and results of exponentials and logarithms, while it lasts. Blocks only:
    what a program loads and stores besides them is counted as `other` bytes."""
    count = SimpleNamespace(loaded=0, stored=0, exps=0, logs=0, other=0)
    names = ("create_masked_load", "create_masked_store", "create_exp2", "create_log2")
    kept = {name: getattr(InterpreterBuilder, name) for name in names}

    def account(ptrs, mask, kind: str) -> None:
        elements = int(np.sum(np.broadcast_to(mask.data, np.shape(ptrs.data))))
        if np.ndim(ptrs.data) == 2:  # (LANES, VECTOR)
            setattr(count, kind, getattr(count, kind) + elements)
        else:
            count.other += elements * ptrs.get_element_ty().primitive_bitwidth // 8

    def load(self, ptrs, mask, *rest):
        account(ptrs, mask, "loaded")
        return kept["create_masked_load"](self, ptrs, mask, *rest)

    def store(self, ptrs, value, mask, *rest):
        account(ptrs, mask, "stored")
        return kept["create_masked_store"](self, ptrs, value, mask, *rest)

    def exp2(self, x):
        count.exps += x.data.size
        return kept["create_exp2"](self, x)

    def log2(self, x):
        count.logs += x.data.size
        return kept["create_log2"](self, x)

    for name, function in zip(names, (load, store, exp2, log2)):
        setattr(InterpreterBuilder, name, function)
    try:
        yield count
    finally:
        for name, function in kept.items():
            setattr(InterpreterBuilder, name, function)


class TestTraffic:
    """In units of N V elements: what DESIGN section 4 states."""

    @pytest.mark.parametrize("vocab", [WIDE, NARROW])
    @pytest.mark.parametrize("divergence", DIVERGENCES)
    def test_elements_moved(self, divergence: str, vocab: int) -> None:
        student, teacher, labels = _rows(2, vocab)
        with counting() as count:
            fastkd.kd_loss(student.requires_grad_(), teacher, labels, divergence=divergence, **OPTIONS)
        sweeps = 1 if vocab == NARROW else 2 if divergence in ONE_SWEEP else 3
        assert count.loaded == 2 * sweeps * student.numel() and count.stored == student.numel()
        assert count.other < 0.01 * 4 * student.numel() + 2048

    @pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
    def test_value_alone(self, divergence: str) -> None:
        student, teacher, labels = _rows(2, WIDE)
        with counting() as count:
            fastkd.kd_loss(student, teacher, labels, divergence=divergence, **OPTIONS)
        sweeps = 1 if divergence in ONE_SWEEP else 2
        assert count.loaded == 2 * sweeps * student.numel() and count.stored == 0

    @pytest.mark.parametrize("vocab", [WIDE, NARROW])
    def test_ignored_rows_are_written_and_not_read(self, vocab: int) -> None:
        student, teacher, labels = _rows(4, vocab)
        labels[[1, 2]] = -100
        with counting() as count:
            fastkd.kd_loss(student.requires_grad_(), teacher, labels, **OPTIONS)
        sweeps = 1 if vocab == NARROW else 2
        assert count.loaded == sweeps * student.numel() and count.stored == student.numel()

    def test_a_gradient_that_fits_is_not_touched_in_backward(self) -> None:
        student, teacher, labels = _rows(2, WIDE)
        leaf = student.requires_grad_()
        loss = fastkd.kd_loss(leaf, teacher, labels, **OPTIONS)
        with counting() as count:
            loss.backward()
        assert count.loaded == count.stored == 0
        loss = fastkd.kd_loss(leaf, teacher, labels, **OPTIONS)
        with counting() as count:
            (3 * loss).backward()
        assert count.loaded == count.stored == student.numel()

    @pytest.mark.parametrize(
        "divergence,vocab,exps,logs",
        [
            ("forward_kl", WIDE, 6.4, 0),
            ("jsd", WIDE, 10.4, 2),
            ("forward_kl", NARROW, 6.8, 0),
            ("jsd", NARROW, 10.8, 2),
        ],
    )
    def test_exponentials(
        self, divergence: str, vocab: int, exps: float, logs: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Per column with cross-entropy, padding of the last block left aside: the figures of the README."""
        monkeypatch.setattr(launch, "PROGRAMS_PER_PROCESSOR", 1)  # merging pieces of so short a row would count
        rows = 2
        block = launch.resident_block(vocab, 4) or launch.SWEEP_BLOCKS[4]
        padded = rows * -(-vocab // block.columns) * block.columns
        student, teacher, labels = _rows(rows, vocab)
        with counting() as count:
            fastkd.kd_loss(student.requires_grad_(), teacher, labels, divergence=divergence, **OPTIONS)
        # Three rebase the sums of a lane, once per 4 fp32 neighbours where bf16 has 8, and once more at the end.
        times = 2 if vocab == NARROW else 1
        assert count.exps / padded == pytest.approx(exps + times * (3 / 4 - 3 / 8), abs=0.1)
        assert count.logs / padded == pytest.approx(logs, abs=0.05)


@pytest.mark.parametrize("vocab", [WIDE, NARROW])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("wrong", ["label", "negative label", "temperature", "nan temperature"])
def test_a_wrong_argument_makes_its_row_nan(wrong: str, divergence: str, vocab: int) -> None:
    """On a device nothing can raise: the row says so, and no other does."""
    student, teacher, labels = _rows(3, vocab)
    temperatures = torch.full((3,), 2.0)
    if wrong.endswith("label"):
        labels[1] = -5 if "negative" in wrong else vocab
    else:
        temperatures[1] = float("nan") if "nan" in wrong else -1.0
    rows, gradient = launch.rows_or_copy(student), launch.rows_or_copy(torch.empty_like(student))
    call = launch.Call(
        rows, launch.rows_or_copy(teacher), gradient, 3, vocab, vocab, labels, None, temperatures, None,
        launch.Scalars(0.5, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0), divergence, True, -100, "none", False,
    )  # fmt: skip
    loss = launch.run_loss(call).loss
    assert loss.isnan().tolist() == [False, True, False]
    assert gradient.data.isnan().all(-1).tolist() == [False, True, False]
    assert gradient.data[[0, 2]].isfinite().all()


@triton.jit
def _offsets_kernel(out, n, inner, outer_stride, inner_stride):
    tl.store(out, blocks.row_offset(tl.load(n), inner, outer_stride, inner_stride))


@pytest.mark.parametrize(
    "n,inner,outer_stride,inner_stride",
    [(7, 4, 5, 100), (2**20, 1, 128256, 0), (3, 1, 2**31 + 5, 0), (100000, 2**20, 0, 262144), (17, 4, 2**40, 2**33)],
)
def test_row_offsets_are_64_bits_wide(n: int, inner: int, outer_stride: int, inner_stride: int) -> None:
    out = torch.zeros(1, dtype=torch.int64)
    _offsets_kernel[(1,)](out, torch.tensor([n], dtype=torch.int32), inner, outer_stride, inner_stride)
    assert int(out) == n // inner * outer_stride + n % inner * inner_stride


@pytest.mark.parametrize("dtype,divergence", [(FP32, "jsd"), (FP16, "forward_kl"), (BF16, "reverse_kl")])
def test_full_vocabulary(dtype: torch.dtype, divergence: str) -> None:
    """Besides those of the table, which are bf16."""
    case = Case("Llama 3", lead=(1,), vocab=128256, regime="late_top", student_dtype=dtype, teacher_dtype=dtype)
    inputs = make_inputs(case)
    options = {**OPTIONS, "divergence": divergence, "labels": inputs.labels, "return_stats": True}
    eager = run_backend(inputs, {**options, "backend": "eager"}, in_fp32=True)
    roundings = 2 if dtype == FP16 else 1
    assert_close_to_reference(run_backend(inputs, options), reference_of(inputs, options), eager, roundings=roundings)


@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_a_limit_of_registers_is_for_nvidia_alone(device: str) -> None:
    """The other compilers refuse an option that they do not know. All are told to fuse products and sums."""
    options = launch._compiled_for(256, 80, torch.device(device))
    limit = {"maxnreg": 80} if device == "cuda" else {}
    assert options == {"num_warps": 8, "enable_fp_fusion": True, **limit}


@pytest.mark.parametrize("processors", [1, 3, 132])
def test_any_number_of_programs_a_row(processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same loss and gradient whoever computes which blocks, and the same bits from run to run."""
    monkeypatch.setattr(launch, "processors_of", lambda device: processors)
    inputs = make_inputs(Case("split", lead=(2,), vocab=12011, regime="ascending", teacher_dtype=BF16))
    options = {**OPTIONS, "labels": inputs.labels, "return_stats": True, "divergence": "jsd"}
    eager = run_backend(inputs, {**options, "backend": "eager"}, in_fp32=True)
    first, second = run_backend(inputs, options), run_backend(inputs, options)
    assert_close_to_reference(first, reference_of(inputs, options), eager)
    assert torch.equal(first.loss, second.loss) and torch.equal(first.gradient, second.gradient)


def test_small_fp16_gradients_survive_a_loss_scale() -> None:
    """(q - p) / N of 4096 tokens underflows in fp16; with a GradScaler's 65536 it must come out, not 0."""
    items, scale = 4096, 65536.0
    student, _, _ = _rows(8, 64)
    leaf = (student / 3).to(FP16).requires_grad_()
    teacher = (leaf.detach().float() + 0.05 * torch.randn(8, 64)).to(FP16)
    (scale * fastkd.kd_loss(leaf, teacher, num_items_in_batch=items, backend="triton")).backward()
    p, q = teacher.double().softmax(-1), leaf.detach().double().softmax(-1)
    expected = scale * (q - p) / items
    bound = 2 * 2.0**-11 * expected.abs() + 1e-6 * scale / items * (p + q) + scale / items * 2.0**-24
    assert ((leaf.grad.double() - expected).abs() <= bound).all()
    assert (leaf.grad != 0).float().mean() > 0.99


def test_schemas_are_those_of_the_extension() -> None:
    if core_ops.load_error:
        pytest.skip(core_ops.load_error)
    for word in ops.SCHEMAS:
        ours, theirs = (str(getattr(torch.ops.fastkd, p + word).default._schema) for p in ("triton_", "kd_"))
        assert ours.replace("triton_", "kd_") == theirs
