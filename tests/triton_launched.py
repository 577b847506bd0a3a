"""Launches, recorded by test_triton_compiled.py (plugin triton_driver): whatever a call asks for, its kernels are on
the list; and a training run that changes its numbers asks for no new one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import triton_driver
import triton_specialisations as listed
from reference import DIVERGENCES
from triton_driver import TARGETS, Key, Launch, record_for

from fastkd.ops import scalars_of
from fastkd.options import Options
from fastkd.shard import VocabShard
from fastkd.shard_eager import Piece, Row
from fastkd.triton import launch, ops, shard

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WIDE, NARROW, SMALL = 128256, 4096, 100  # swept; resident, at its widest and narrow
OPTIONS = {
    "plain": {}, "no labels": {"labels": False}, "statistics": {"stats": True}, "softcap": {"student_softcap": 20.0},
    "teacher's softcap": {"teacher_softcap": 20.0}, "temperatures": {"temperatures": True},
    "weights": {"weights": True}, "items": {"items": 3.0}, "sum": {"reduction": "sum"}, "none": {"reduction": "none"},
    "value alone": {"gradient": False}, "no cross-entropy": {"ce_weight": 0.0}, "one row": {"rows": 1},
    "all": {"stats": True, "student_softcap": 20.0, "teacher_softcap": 30.0, "temperatures": True, "weights": True},
}  # fmt: skip


def _numbers(**changes: float) -> torch.Tensor:
    scalars = launch.Scalars(0.5, 2.0, 1.0, 0.5, 0.1, 1e-3, 0.0, 0.0)._replace(**changes)
    return torch.tensor(scalars, dtype=torch.float64)


def _call(
    divergence: str, student: torch.Tensor, teacher: torch.Tensor, *, labels: bool = True, stats: bool = False,
    temperatures: bool = False, weights: bool = False, rows: int = 2, gradient: bool = True, inplace: bool = False,
    reduction: str = "mean", ignore_index: int = -100, items: float | None = None, **numbers: float,
) -> list[Launch]:  # fmt: skip
    """What one call launches, of the first `rows` of the logits."""
    triton_driver.launches.clear()
    if not labels:
        numbers = {"ce_weight": 0.0, **numbers}
    arguments = (
        student[:rows], teacher[:rows], torch.zeros(rows, dtype=torch.int64) if labels else None,
        torch.ones(rows) if weights else None, torch.ones(rows) if temperatures else None,
        None if items is None else torch.tensor(items), _numbers(**numbers), divergence, True, ignore_index, reduction,
        stats,
    )  # fmt: skip
    if inplace:
        ops._forward_inplace(*arguments)
    else:
        ops._forward(*arguments, gradient)
    return list(triton_driver.launches)


def _loss(divergence: str, dtype: torch.dtype, columns: int, teacher: torch.dtype | None = None, **options):
    rows = options.get("rows", 2)
    return _call(
        divergence,
        torch.zeros(rows, columns, dtype=dtype),
        torch.zeros(rows, columns, dtype=teacher or dtype),
        **options,
    )


def _rescale(gradient: torch.Tensor) -> list[Launch]:
    triton_driver.launches.clear()
    rows = gradient.shape[:-1].numel()
    for upstream in (torch.ones(()), torch.ones(rows)):
        ops._rescale(gradient, upstream, torch.ones(()))
        ops._rescale_inplace(gradient, upstream, torch.ones(()))
    return list(triton_driver.launches)


def _of_a_shard(divergence: str, dtype: torch.dtype, **options) -> list[Launch]:
    """What the three parts of a piece launch, with and without labels."""
    triton_driver.launches.clear()
    o = Options(divergence=divergence, ce_weight=0.5, temperature=2, label_smoothing=0.1, **options)
    columns, rows = 32064, 2
    student, teacher = (torch.zeros(rows, columns, dtype=dtype) for _ in range(2))
    sums = {name: torch.ones(rows) for name in ("largest_s", "largest_t", "sum_s", "sum_t", "dot_t", "sum_hard")}
    for labels in (torch.zeros(rows, dtype=torch.int64), None):
        owned = None if labels is None else labels == 0
        piece = Piece(
            student, teacher, labels, owned, None, scalars_of(o), o, VocabShard(0, columns), labels is not None
        )
        shard.sums(piece)
        if divergence not in launch.ONE_SWEEP:
            shard.terms(piece, sums)
        shard.gradient(piece, Row(sums, None, torch.ones(rows), torch.ones(rows), torch.ones(rows), 4 * columns), None)
    return list(triton_driver.launches)


@pytest.fixture(autouse=True)
def _recording() -> Iterator[None]:
    record_for("sm_90")
    yield


def _keys(launches: list[Launch]) -> set[Key]:
    assert launches and all(x.key is not None for x in launches)
    return {x.key for x in launches if x.key is not None}


def _listed() -> set[Key]:
    return {listed.key_of(x) for x in listed.every()}


class TestList:
    """fastkd/triton/specialisations.py against what is launched."""

    @pytest.mark.parametrize("target", TARGETS)
    def test_it_is_what_calls_launch_and_nothing_more(self, target: str) -> None:
        record_for(target)
        found: set[Key] = set()
        two = (DTYPES["bf16"], DTYPES["fp32"])
        for divergence, student, teacher, columns in itertools.product(DIVERGENCES, two, two, (WIDE, NARROW, SMALL)):
            for busy in (False, True):
                found |= _keys(_loss(divergence, student, columns, teacher, stats=busy))
        for dtype in two:
            found |= _keys(_rescale(torch.zeros(2, WIDE, dtype=dtype)))
        assert found == _listed()

    @pytest.mark.parametrize("columns", [WIDE, NARROW, SMALL, WIDE + 1, 33, 1])
    @pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
    def test_every_option(self, divergence: str, columns: int) -> None:
        for options in OPTIONS.values():
            found = _keys(_loss(divergence, torch.bfloat16, columns, **options))
            assert found <= _listed(), options

    @pytest.mark.parametrize("divergence", DIVERGENCES)
    def test_pairs_of_dtypes(self, divergence: str) -> None:
        for student, teacher, columns in itertools.product(DTYPES.values(), DTYPES.values(), (WIDE + 1, 3001)):
            assert _keys(_loss(divergence, student, columns, teacher)) <= _listed()

    @pytest.mark.parametrize("inplace", [False, True])
    @pytest.mark.parametrize("columns", [WIDE, NARROW, SMALL])
    @pytest.mark.parametrize("dtype", ["bf16", "fp32"])
    def test_rows_that_lie_anywhere(self, dtype: str, columns: int, inplace: bool) -> None:
        """Padded, shifted by one element, beside a wider teacher, on two strides."""
        whole = torch.zeros(2, 3, columns + 8, dtype=DTYPES[dtype])
        padded, shifted = whole[..., :columns], whole[..., 1 : columns + 1]
        pairs = [(padded, padded), (shifted, padded), (padded, shifted), (padded, whole)]
        for student, teacher in pairs:
            assert _keys(_call("jsd", student[0], teacher[0], inplace=inplace)) <= _listed()
        assert _keys(_call("jsd", padded[:, :1], padded[:, :1], inplace=inplace)) <= _listed()
        assert _keys(_rescale(padded) + _rescale(shifted)) <= _listed()

    def test_strides_beyond_32_bits(self) -> None:
        x = torch.zeros(2, WIDE, dtype=torch.bfloat16)
        far = launch.Rows(x, 7, 2**34, 2**33)
        call = launch.Call(
            far, far, far, 2, WIDE, WIDE, None, None, None, None,
            launch.Scalars(0.5, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0), "jsd", True, -(2**40), "mean", False,
        )  # fmt: skip
        triton_driver.launches.clear()
        launch.run_loss(call._replace(student=far._replace(inner=1), gradient=far._replace(inner=2)))
        assert _keys(list(triton_driver.launches)) <= _listed()

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("divergence", DIVERGENCES)
    def test_shards(self, divergence: str, dtype: str) -> None:
        names = {x.name for x in _of_a_shard(divergence, DTYPES[dtype])}
        assert {"sums_kernel", "gradient_kernel"} <= names
        assert _keys(_of_a_shard(divergence, DTYPES[dtype])) <= _listed()
        assert _keys(_of_a_shard(divergence, DTYPES[dtype], student_softcap=20.0, return_stats=True)) <= _listed()

    def test_it_sees_what_is_not_in_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        known = _listed()
        monkeypatch.setattr(launch, "PLAIN_REGISTERS", 72)
        assert not _keys(_loss("forward_kl", torch.bfloat16, WIDE)) <= known

    def test_16_bit_dtypes_share_their_kernels(self) -> None:
        for columns in (WIDE, NARROW):
            bf16, fp16 = (_keys(_loss("jsd", DTYPES[name], columns)) for name in ("bf16", "fp16"))
            assert bf16 == fp16


class TestAccess:
    """Who is read 16 bytes at a time: a wrong answer would be a fault on a GPU, which nothing here would see."""

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_rows_have_to_begin_and_end_with_a_vector(self, dtype: str) -> None:
        whole = torch.zeros(4, 1032, dtype=DTYPES[dtype])
        vector = launch.SWEEP_BLOCKS[whole.element_size()].vector

        def wide(student: torch.Tensor, teacher: torch.Tensor, gradient: torch.Tensor | None = None) -> bool:
            s, t, d = (None if x is None else launch.view_as_rows(x) for x in (student, teacher, gradient))
            assert s is not None and t is not None
            widths = (min(student.shape[-1], teacher.shape[-1]), student.shape[-1])
            return bool(launch.asked_of_rows(s, t, d, widths, vector) & launch.row.WIDE.value)

        good = whole[:, :1024]
        assert wide(whole, whole, whole) and wide(good, whole) and wide(whole[:, vector:], whole[:, :-vector])
        shifted, apart = whole[:, 1:1025], torch.zeros(4, 1033, dtype=DTYPES[dtype])[:, :1024]
        for bad in (shifted, apart):
            assert not wide(bad, good) and not wide(good, bad) and not wide(good, good, bad)
        assert not wide(whole[:, :1025], whole) and not wide(whole, whole[:, :1025])

    def test_rows_on_two_strides(self) -> None:
        x = torch.zeros(3, 4, 64, dtype=torch.bfloat16)
        odd = torch.zeros(3 * 4 * 65 + 4, dtype=torch.bfloat16).as_strided((3, 4, 64), (4 * 64 + 4, 64, 1))
        for student, wide in ((x.transpose(0, 1), True), (odd, False)):
            rows = launch.view_as_rows(student)
            assert rows is not None and launch.is_wide(rows, 8) == wide

    def test_a_wider_teacher_needs_16_bytes_alone(self) -> None:
        """8 fp32 of a teacher beside 8 bf16 of the student."""
        x = torch.zeros(2, 1032)[:, 4:]
        rows = launch.view_as_rows(x)
        assert rows is not None and x.data_ptr() % 32 == 16 and launch.is_wide(rows, 8)


class TestCompilations:
    """A compilation takes a second or more: training must not meet a new one after its first step."""

    def _new(self, first: list[Launch], later: list[Launch]) -> set[str]:
        return {key.kernel for key in _keys(later) - _keys(first)}

    @pytest.mark.parametrize("columns", [WIDE, NARROW])
    @pytest.mark.parametrize("divergence", ["jsd", "symmetric_kl", "skew_forward_kl"])
    def test_annealed_numbers(self, divergence: str, columns: int) -> None:
        first = _loss(divergence, torch.bfloat16, columns)
        for step in range(1, 8):
            numbers = {
                "beta": step / 8, "temperature": 4.0 - step / 2, "kd_weight": 1 - step / 9, "ce_weight": step / 7,
                "label_smoothing": step / 20, "z_loss": step * 1e-4,
            }  # fmt: skip
            assert not self._new(first, _loss(divergence, torch.bfloat16, columns, **numbers))

    @pytest.mark.parametrize("columns", [WIDE, NARROW])
    def test_numbers_of_rows(self, columns: int) -> None:
        """Also 1, which Triton would make a constant, and multiples of 16, which it would tell from others."""
        first = _loss("forward_kl", torch.float32, columns, rows=7)
        for rows in (1, 2, 15, 16, 32, 33):
            assert not self._new(first, _loss("forward_kl", torch.float32, columns, rows=rows))

    def test_items_and_ignore_index(self) -> None:
        first = _loss("forward_kl", torch.bfloat16, WIDE, items=3.0)
        for items, ignore_index in ((1.0, 0), (16.0, 1), (77.0, -1), (5.0, 16)):
            later = _loss("forward_kl", torch.bfloat16, WIDE, items=items, ignore_index=ignore_index)
            assert not self._new(first, later)

    def test_the_count_sees_another_specialisation(self) -> None:
        first = _loss("forward_kl", torch.bfloat16, WIDE)
        assert self._new(first, _loss("forward_kl", torch.bfloat16, WIDE, stats=True))
        assert self._new(first, _loss("reverse_kl", torch.bfloat16, WIDE)) == {"sums_kernel", "gradient_kernel"}
        assert not self._new(first, _loss("forward_kl", torch.bfloat16, WIDE))

    @pytest.mark.parametrize("divergence,columns,most", [("forward_kl", WIDE, 6), ("jsd", WIDE, 8), ("jsd", NARROW, 3)])
    def test_options_on_and_off(self, divergence: str, columns: int, most: int) -> None:
        """scale, total, and each sweep twice: without statistics and softcaps, and with whatever a call may ask for."""
        names = ["labels", "stats", "temperatures", "weights"]
        found: set[Key] = set()
        for given in itertools.product([False, True], repeat=len(names)):
            for cap in (0.0, 20.0):
                found |= _keys(
                    _loss(divergence, torch.bfloat16, columns, student_softcap=cap, **dict(zip(names, given)))
                )
        assert len(found) == most and found <= _listed()

    @pytest.mark.parametrize(
        "divergence,columns,kernels",
        [("forward_kl", WIDE, 4), ("jsd", WIDE, 5), ("forward_kl", NARROW, 3), ("jsd", NARROW, 3)],
    )
    def test_kernels_launched(self, divergence: str, columns: int, kernels: int) -> None:
        assert len(_loss(divergence, torch.bfloat16, columns)) == kernels
        assert len(_loss(divergence, torch.bfloat16, columns, reduction="none")) == kernels - 1


class TestShapes:
    """The shape of a launch is a pure function of numbers."""

    def test_rows_that_fill_the_device_are_not_split(self) -> None:
        block = launch.SWEEP_BLOCKS[2]
        assert launch.split_rows(132 * launch.PROGRAMS_PER_PROCESSOR, WIDE, block, 132).splits == 1

    @pytest.mark.parametrize("rows", [1, 2, 3, 17, 100, 1000])
    @pytest.mark.parametrize("columns", [1, 8193, 32001, 128256, 262144, 1 << 20, 1 << 24])
    def test_splits_cover_the_row_once(self, rows: int, columns: int) -> None:
        for block in launch.SWEEP_BLOCKS.values():
            split = launch.split_rows(rows, columns, block, 132)
            blocks = -(-columns // block.columns)
            assert 1 <= split.splits <= launch.pieces.MAX_PIECES.value
            assert (split.splits - 1) * split.blocks < blocks <= split.splits * split.blocks

    @pytest.mark.parametrize("size", [2, 4])
    def test_resident_blocks_hold_the_row(self, size: int) -> None:
        for columns in (1, 2, 31, 33, 255, 1000, 1024, 1025, 4096):
            block = launch.resident_block(columns, size)
            assert block is not None and block.columns >= columns and block.lanes * block.vector >= block.threads
            assert block.lanes & (block.lanes - 1) == 0
        assert launch.resident_block(4097, size) is None
