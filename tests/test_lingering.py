"""Fresh gradients in memory that lingers after they are freed: reused, never shared, given back when asked for."""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import ops

ROWS, VOCAB = 40, 32768  # 5 MiB of fp32: in huge pages
BYTES = ROWS * VOCAB * 4
PAST_PAGE, PAGE = 1024, 4096  # bytes from the border of a page to the gradient
MADV_PAGEOUT = 21  # linux/mman.h

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or torch.__version__ < "2.11", reason="lingers on Linux, with torch >= 2.11"
)


def mapped(size: int) -> int:
    """Bytes of the pages that hold a gradient of so many."""
    return -(-(size + PAST_PAGE) // PAGE) * PAGE


def _logits(seed: int, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(rows, VOCAB, generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher


def _gradient(student: Tensor, teacher: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(fastkd.kd_loss(student, teacher, backend="native"), student)
    return gradient


def _expected(student: Tensor, teacher: Tensor) -> Tensor:
    return (student.detach().softmax(-1) - teacher.softmax(-1)) / len(student)


def _assert_right(gradient: Tensor, student: Tensor, teacher: Tensor) -> None:
    torch.testing.assert_close(gradient, _expected(student, teacher), rtol=1e-4, atol=1e-9)


@pytest.fixture(autouse=True)
def nothing_lingers(native: str) -> None:
    ops.release_lingering_memory()


def test_memory_of_a_freed_gradient_is_used_again() -> None:
    first, second = _logits(1), _logits(2)
    gradient = _gradient(*first)
    address = gradient.data_ptr()
    assert address % (1 << 21) == PAST_PAGE and ops.release_lingering_memory() == 0, "it is in use: nothing lingers"
    del gradient
    again = _gradient(*second)
    assert again.data_ptr() == address
    _assert_right(again, *second)


def test_what_lingers_can_be_given_back() -> None:
    _gradient(*_logits(1))
    assert ops.release_lingering_memory() == mapped(BYTES)
    assert ops.release_lingering_memory() == 0


def test_gradients_alive_at_once_do_not_share_memory() -> None:
    problems = [_logits(seed) for seed in range(4)]
    _gradient(*problems[0])  # one lingers
    gradients = [_gradient(*problem) for problem in problems]
    for gradient, problem in zip(gradients, problems):
        _assert_right(gradient, *problem)
    addresses = sorted(gradient.data_ptr() for gradient in gradients)
    assert all(b - a >= BYTES for a, b in itertools.pairwise(addresses))
    del gradients, gradient
    assert ops.release_lingering_memory() == mapped(BYTES), "one lingers, not four"


@pytest.mark.parametrize("outlives", [lambda g: g[3:5], lambda g: g.detach(), lambda g: g.view(-1)[7:]])
def test_a_view_outlives_its_base(outlives) -> None:
    first, second = _logits(1), _logits(2)
    view = outlives(_gradient(*first))
    other = _gradient(*second)
    other.fill_(7)
    torch.testing.assert_close(view, outlives(_expected(*first)), rtol=1e-4, atol=1e-9)


def test_accumulated_gradients_of_a_leaf() -> None:
    """autograd may take the gradient as .grad itself, and adds the next one to it in place."""
    student, teacher = _logits(1)
    for _ in range(3):
        fastkd.kd_loss(student, teacher, backend="native").backward()
    assert student.grad is not None
    _assert_right(student.grad / 3, student, teacher)


def test_other_sizes() -> None:
    """Larger memory serves half as much and more; smaller requests and larger ones get their own."""
    wide, narrow = _logits(1, 4 * ROWS), _logits(2, ROWS)
    _gradient(*wide)
    _assert_right(_gradient(*narrow), *narrow)
    assert ops.release_lingering_memory() == mapped(BYTES)
    three_quarters = _logits(3, 3 * ROWS)
    _gradient(*wide)
    _assert_right(_gradient(*three_quarters), *three_quarters)
    assert ops.release_lingering_memory() == mapped(4 * BYTES)
    _gradient(*narrow)
    _assert_right(_gradient(*wide), *wide)
    assert ops.release_lingering_memory() == mapped(4 * BYTES)


def test_a_small_gradient_lingers_beside_a_large_one() -> None:
    small, large = _logits(1, 2), _logits(2)
    addresses = [_gradient(*small).data_ptr(), _gradient(*large).data_ptr()]
    for _ in range(2):
        for problem, address in zip((small, large), addresses):
            gradient = _gradient(*problem)
            assert gradient.data_ptr() == address
            _assert_right(gradient, *problem)
            del gradient
    assert ops.release_lingering_memory() == mapped(BYTES) + mapped(2 * VOCAB * 4)


def test_what_the_c_library_keeps_itself_does_not_linger() -> None:
    tiny, teacher = torch.randn(1, VOCAB - 1025, requires_grad=True), torch.randn(1, VOCAB - 1025)
    _gradient(tiny, teacher)
    assert ops.release_lingering_memory() == 0


def test_ignored_rows_and_columns_beyond_the_vocabulary_are_zeroed_again() -> None:
    student, teacher = _logits(1)
    _gradient(student, teacher).fill_(float("nan"))
    labels = torch.zeros(ROWS, dtype=torch.long)
    labels[::2] = -100
    loss = fastkd.kd_loss(student, teacher[:, :-100], labels, vocab="truncate", backend="native")
    (gradient,) = torch.autograd.grad(loss, student)
    assert (gradient[::2] == 0).all() and (gradient[:, -100:] == 0).all() and (gradient[1::2, :-100] != 0).any()


def test_threads() -> None:
    """Each with gradients of its own, freed and taken as they come."""
    problems = [_logits(seed) for seed in range(4)]
    expected = [_expected(*problem) for problem in problems]

    def work(i: int) -> float:
        worst = 0.0
        for _ in range(12):
            gradient = _gradient(*problems[i])
            worst = max(worst, float((gradient - expected[i]).abs().max()))
            gradient.fill_(float(i))
            assert (gradient == i).all()
        return worst

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(work, range(4))) < 1e-7


def test_after_a_fork() -> None:
    """A child inherits what lingers, as a copy of its own."""
    first, second = _logits(1), _logits(2)
    _gradient(*first)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # the pool's threads do not live here
        try:
            _assert_right(_gradient(*second), *second)
        finally:
            os._exit(sys.exc_info()[0] is not None)
    _assert_right(_gradient(*first), *first)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _smaps_field(field: str, address: int) -> int:
    """Bytes of a field of the mapping that starts at the address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name = line.split()[0]
        if "-" in name and not name.endswith(":"):
            inside = int(name.split("-")[0], 16) == address
        elif inside and name == field + ":":
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def test_the_system_may_take_the_pages() -> None:
    """What lingers is lazily freed: the system takes it before it runs short, and zero pages stand in for it then."""
    first, second = _logits(1), _logits(2)
    gradient = _gradient(*first)
    address = gradient.data_ptr()
    start = address - PAST_PAGE
    assert _smaps_field("LazyFree", start) == 0
    del gradient
    assert _smaps_field("LazyFree", start) > 0.7 * BYTES  # pages on their way are not counted yet
    arguments = ctypes.c_void_p(start), ctypes.c_size_t(BYTES), MADV_PAGEOUT
    if ctypes.CDLL(None).madvise(*arguments) == 0:  # reclaims as under pressure; a system before 5.4 refuses
        assert _smaps_field("Rss", start) < 0.1 * BYTES
    again = _gradient(*second)
    assert again.data_ptr() == address
    _assert_right(again, *second)


SWITCH = """
import torch, fastkd
from fastkd import ops
student = torch.randn(40, 32768, requires_grad=True)
try:
    torch.autograd.grad(fastkd.kd_loss(student, torch.randn(40, 32768), backend="native"), student)
    print(ops.release_lingering_memory())
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("value", "words"),
    [("", str(mapped(BYTES))), ("0", "0"), (str(BYTES - 1), "0"), (str(BYTES), str(mapped(BYTES))),
     ("1G", "FASTKD_LINGER_BYTES=1G"), ("-1", "not a number of bytes >= 0")],
)  # fmt: skip
def test_switch(value: str, words: str) -> None:
    environment = {**os.environ, "FASTKD_LINGER_BYTES": value}
    done = subprocess.run([sys.executable, "-c", SWITCH], env=environment, capture_output=True, text=True, check=True)
    assert words in done.stdout
    assert done.stdout.strip().isdigit() == words.isdigit()
