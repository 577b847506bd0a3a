"""What the CUDA kernels move, refuse and leave alone: exact bytes, options one by one, backward, rows out of range, the
real cluster configuration, and the host side against a driver that says no."""

from __future__ import annotations

import pytest
import simt_backend
import torch
from inputs import BF16, FP16, FP32, Case, Inputs, make_inputs
from reference import DIVERGENCES
from test_cuda_kernels import LAUNCHES, check
from test_loss import Problem
from test_loss_options import OPTIONS, _check

import fastkd

MIXED = {"forward_kl", "reverse_kl", "symmetric_kl"}  # their value needs one sweep
WAYS = {name: LAUNCHES[name] for name in ("planned", "one block", "cluster of 4", "streaming in 5 parts")}


@pytest.fixture(autouse=True)
def _needs_native(native: str) -> None:
    """The operators' schemas and the packing of arguments are those of the extension."""


def moved(launches: list[dict], *kinds: str) -> dict[str, int]:
    """ "buffer kind" -> its sum over the launches; kinds of counters as the machine names them."""
    total: dict[str, int] = {}
    for launch in launches:
        for buffer, counters in launch["buffers"].items():
            for kind in kinds:
                key = f"{buffer} {kind}"
                total[key] = total.get(key, 0) + counters[kind]
    return {key: count for key, count in total.items() if count}


def edges_of(row: int, vocab: int, width: int) -> int:
    """Columns of a row that lie outside its chunks of vectors; the first row starts on a boundary."""
    head = min(-(row * vocab) % width, vocab)
    return vocab - (vocab - head) // width * width


def call(inputs: Inputs, launch: dict, gradient: bool = True, **options) -> tuple[list[dict], dict, torch.Tensor]:
    """Launches of one forward, the plan, and the student's leaf."""
    student = inputs.student.clone().requires_grad_(gradient)
    with simt_backend.native_on_simt(**launch) as machine:
        fastkd.kd_loss(student, inputs.teacher, inputs.labels, backend="native", **options)
        return machine.launches(), machine.plan(), student


@pytest.mark.parametrize("divergence,vocab", [*((d, 2051) for d in DIVERGENCES), ("forward_kl", 2048), ("jsd", 2048)])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("launch", WAYS.values(), ids=WAYS)
def test_bytes(divergence: str, launch: dict, dtype: torch.dtype, vocab: int) -> None:
    """3 N V where a row is resident, 5 or 7 where it is streamed. Besides: the logit at the label, which is asked for
    four times, and, for a resident row, the edges' columns once more in each later sweep."""
    rows, size = 3, dtype.itemsize
    inputs = make_inputs(Case("bytes", lead=(rows,), vocab=vocab, student_dtype=dtype, teacher_dtype=dtype))
    inputs.labels[:] = vocab - 1
    launches, plan, _ = call(inputs, {**launch, "seed": 5}, divergence=divergence, ce_weight=1.0, temperature=2.0)
    width, sweeps = 16 // size, 2 if divergence in MIXED else 3
    edges = sum(edges_of(row, vocab, width) for row in range(rows))
    streamed = plan["variant"] == "streaming"
    reads = rows * vocab * (sweeps if streamed else 1) + (0 if streamed else edges * (sweeps - 1))
    assert moved([x for x in launches if x["kernel"] not in {"scales", "total"}], "bytes_read", "bytes_written") | {
        "labels bytes_read": 0, "workspace bytes_read": 0, "workspace bytes_written": 0
    } == {
        "student bytes_read": reads * size + 4 * rows * size,
        "teacher bytes_read": reads * size,
        "gradient bytes_written": rows * vocab * size,
        "labels bytes_read": 0, "workspace bytes_read": 0, "workspace bytes_written": 0,
    }  # fmt: skip
    wide = (rows * vocab - edges) // width
    accesses = moved(launches, "wide_reads", "wide_writes", "narrow_writes")
    assert accesses["teacher wide_reads"] == accesses["student wide_reads"] == wide * (sweeps if streamed else 1)
    assert accesses["gradient wide_writes"] == wide
    assert accesses.get("gradient narrow_writes", 0) == edges
    assert moved(launches, "bytes_read", "bytes_written")["workspace bytes_written"] == workspace_written(
        rows, plan, sweeps
    )
    assert moved(launches, "bytes_read", "bytes_written")["workspace bytes_read"] == workspace_read(rows, plan, sweeps)


def workspace_written(rows: int, plan: dict, sweeps: int) -> int:
    """The scales of the call and a loss a row; where rows are streamed, the sums of each part and a logit a row."""
    machine, parts = simt_backend.module(), rows * plan["splits"]
    if plan["variant"] != "streaming":
        return 16 + 4 * rows
    return 16 + 8 * rows + parts * (machine.piece_bytes + (machine.term_bytes if sweeps == 3 else 0))


def workspace_read(rows: int, plan: dict, sweeps: int) -> int:
    """By the total, the scale and each row's loss; by each block of a row, its scale; where rows are streamed, further
    the logit of the label and, in each later kernel, the sums of all parts."""
    machine = simt_backend.module()
    total = 8 + 4 * rows
    if plan["variant"] != "streaming":
        return total + 4 * rows * plan["cluster"]
    pairs = rows * plan["splits"] ** 2
    sums = (sweeps - 1) * machine.piece_bytes + (machine.term_bytes if sweeps == 3 else 0)
    return total + 8 * rows * plan["splits"] + pairs * sums


@pytest.mark.parametrize("launch", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_value_alone(divergence: str, launch: dict) -> None:
    """Without a gradient nothing of N V is written, and a sweep less is read."""
    inputs = make_inputs(Case("value", lead=(3,), vocab=2048, student_dtype=BF16, teacher_dtype=BF16))
    launches, plan, _ = call(inputs, {**launch, "seed": 1}, gradient=False, divergence=divergence)
    sweeps = (1 if divergence == "forward_kl" else 2) if plan["variant"] == "streaming" else 1
    counted = moved(launches, "bytes_read", "bytes_written")
    ignored = int((inputs.labels == -100).sum())
    assert counted["teacher bytes_read"] == sweeps * (3 - ignored) * 2048 * 2
    assert not any(key.startswith("gradient") for key in counted)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("upstream", [1.0, 2.5])
def test_backward_costs_no_sweep(upstream: float, dtype: torch.dtype) -> None:
    """The plain backward reads the factors alone; another upstream, or what fp16 has pending, costs one sweep."""
    inputs = make_inputs(Case("backward", lead=(4,), vocab=513, student_dtype=dtype, teacher_dtype=dtype))
    student = inputs.student.clone().requires_grad_()
    with simt_backend.native_on_simt(seed=2) as machine:
        loss = fastkd.kd_loss(student, inputs.teacher, inputs.labels, ce_weight=1.0, backend="native")
        (loss * upstream).backward()
        (rescale,) = machine.launches()
    counted = moved([rescale], "bytes_read", "bytes_written")
    touched = 0 if upstream == 1 and dtype != FP16 else 4 * 513 * dtype.itemsize
    assert rescale["kernel"] == "rescale"
    assert counted.get("gradient bytes_written", 0) == touched
    assert counted.get("gradient bytes_read", 0) in {touched, 2 * touched}


@pytest.mark.parametrize("dtype,ways", [(FP32, (0, 1)), (BF16, (2, 3)), (FP16, (0, 2))], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_option(options: dict, dtype: torch.dtype, ways: tuple[int, int]) -> None:
    """Every option by itself, every way of launching."""
    case = Case("options", lead=(3, 4), vocab=301, student_dtype=dtype, teacher_dtype=dtype, regime="late_top")
    for seed in ways:
        launch = list(WAYS.values())[seed]
        with simt_backend.native_on_simt(**launch, seed=seed):
            _check(case, {**options, "divergence": DIVERGENCES[seed], "backend": "native"}, inplace=seed % 2 == 1)


@pytest.mark.parametrize("launch", WAYS.values(), ids=WAYS)
def test_rows_out_of_range(launch: dict) -> None:
    """A label or temperature that no row may have makes its own row NaN, in value and gradient, and no other."""
    inputs = make_inputs(Case("range", lead=(6,), vocab=1029))
    labels = torch.tensor([0, 1029, 1028, -1, 5, 1 << 40])
    temperature = torch.tensor([1.0, 1.0, 2.0, 1.0, 0.0, 1.0])
    bad = [1, 3, 4, 5]
    student = inputs.student.clone().requires_grad_()
    with simt_backend.native_on_simt(**launch, seed=7):
        loss = fastkd.kd_loss(
            student, inputs.teacher, labels, ce_weight=1.0, temperature=temperature, reduction="none", backend="native"
        )
        loss.sum().backward()
    good = [0, 2]
    assert loss[bad].isnan().all() and student.grad[bad].isnan().any(-1).all()
    eager = inputs.student.clone().requires_grad_()
    expected = fastkd.kd_loss(
        eager[good], inputs.teacher[good], labels[good], ce_weight=1.0, temperature=temperature[good],
        reduction="none", backend="eager",
    )  # fmt: skip
    expected.sum().backward()
    torch.testing.assert_close(loss[good], expected)
    torch.testing.assert_close(student.grad[good], eager.grad[good])


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_full_size(dtype: torch.dtype, seed: int) -> None:
    """4 x 128256 through the cluster that an H100 would run."""
    divergence = DIVERGENCES[seed % len(DIVERGENCES)]
    case = Case("full size", lead=(4,), vocab=128256, student_dtype=dtype, teacher_dtype=dtype)
    problem = Problem(case, divergence, True)
    check(problem, {"multiprocessors": 8, "seed": seed})
    plan = simt_backend.module().plan()
    assert plan["variant"] == "cluster" and plan["cluster"] >= 8 and plan["threads"] >= 128


def test_limits_of_the_device() -> None:
    """What the host side asks the driver for; a device that is not there is an error, not a crash."""
    machine = simt_backend.module()
    assert machine.limits(0) == {
        "arch": 90,
        "multiprocessors": 132,
        "shared_per_block": 227 << 10,
        "shared_per_multiprocessor": 228 << 10,
        "largest_cluster": 16,
    }
    assert machine.limits(1) == "invalid device ordinal"


REFUSED = {
    "more threads than the launch bound": (
        {"variant": "block", "threads": 1024}, 2, 2000, "invalid configuration argument",
    ),
    "a cluster of 32": ({"variant": "cluster", "parts": 32, "threads": 32}, 2, 30000, "invalid configuration argument"),
    "more shared memory than the device has": (
        {"shared_per_block": 400 << 10, "shared_per_multiprocessor": 800 << 10, "largest_cluster": 1}, 200, 30000,
        "invalid argument",
    ),
}  # fmt: skip


@pytest.mark.parametrize("launch,rows,vocab,text", REFUSED.values(), ids=REFUSED)
def test_refused_launches(launch: dict, rows: int, vocab: int, text: str) -> None:
    """What the driver refuses comes back as an error of the call that names it."""
    inputs = make_inputs(Case("refused", lead=(rows,), vocab=vocab))
    with simt_backend.native_on_simt(**launch), pytest.raises(RuntimeError, match=f"fastkd on CUDA: {text}"):
        fastkd.kd_loss(inputs.student, inputs.teacher, backend="native")
