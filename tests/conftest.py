"""What the whole suite shares: the header that says what is under test, and torch kept to the threads it is given."""

from __future__ import annotations

import platform

import pytest
import torch

import fastkd
from fastkd import ops

# Files of a minute or more, longest first. A file runs on one core: begun last, one would leave the others idle.
LONG = (
    "test_loss.py", "test_triton_compiled.py", "test_triton.py", "test_cuda_kernels.py", "test_trainer_resume.py",
    "test_sparse.py", "test_native_harness.py", "test_mutation.py", "test_cuda_mutation.py", "test_demo.py",
    "test_triton_sparse.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; the others as they came."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """With -q pytest leaves the header out; which instruction set passed is worth a line all the same."""
    if terminalreporter.verbosity < 0:
        for line in pytest_report_header():
            terminalreporter.write_line(line)


def pytest_report_header() -> list[str]:
    """The build under test: versions, backends, instruction set, threads."""
    built = fastkd.backends().reasons
    return [
        f"fastkd {fastkd.__version__}, torch {torch.__version__}, {platform.machine()}, "
        f"threads {torch.get_num_threads()}",
        f"native: {built['native']}",
    ]


@pytest.fixture(scope="session")
def native() -> str:
    """Name of the native backend; skips where it is not built or FASTKD_CPU_ISA forbids it."""
    if ops.load_error or ops.isa_error:
        pytest.skip(ops.load_error or ops.isa_error)
    return "native"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
