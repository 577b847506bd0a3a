"""Every instruction set that this machine runs, each forced in a process of its own: FASTKD_CPU_ISA."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastkd import ops

TESTS = Path(__file__).parent
ISAS = () if ops.load_error else ops.cpu_isas()
# the table of cases with all options; two divergences a case in turn (each set meets all of them in tests/cpp)
CHECK = """
import sys
sys.path.insert(0, {tests!r})
import torch
import fastkd
from cases import CASES
from reference import DIVERGENCES
from test_loss import Problem

assert fastkd.ops.cpu_isa() == {isa!r}, fastkd.ops.cpu_isa()
assert {isa!r} in str(fastkd.backends())
torch.set_num_threads(2)
checked = 0
for i, case in enumerate(CASES):
    for divergence in (DIVERGENCES[i % 7], DIVERGENCES[(i + 3) % 7]):
        problem = Problem(case, divergence, everything=True)
        problem.check(problem.run(backend="native"))
        checked += 1
print("checked", checked)
"""

UNKNOWN = """
import torch
import fastkd
print(fastkd.backends())
x = torch.ones(2, 3)
fastkd.kd_loss(x, x, backend="eager")
for backend in ("native", "auto"):
    try:
        fastkd.kd_loss(x, x, backend=backend)
    except (RuntimeError, ValueError) as error:
        print("====", error)
"""


def _run(code: str, isa: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "FASTKD_CPU_ISA": isa}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("isa", ISAS)
def test_isa_against_the_reference(isa: str) -> None:
    """The table of cases with every option, within the tolerance of the backend's own tests."""
    done = _run(CHECK.format(tests=str(TESTS), isa=isa), isa)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) > 150


def test_the_best_one_is_the_default(native: str) -> None:
    done = _run("from fastkd import ops; print(ops.cpu_isa())", "")
    assert done.stdout.strip() == ISAS[-1]


@pytest.mark.parametrize("isa", ["avx1024", "AVX2", "native", " "])
def test_an_unknown_one_is_an_error_that_lists_those_available(isa: str) -> None:
    """Of native and of auto: a forced set is an order. The eager backend needs none, and backends() still answers."""
    done = _run(UNKNOWN, isa)
    assert done.returncode == 0, done.stderr
    shown, *messages = done.stdout.strip().split("====")
    assert f"FASTKD_CPU_ISA={isa}" in shown
    assert len(messages) == 2
    for message in messages:
        assert f"FASTKD_CPU_ISA={isa}" in message and "baseline" in message, message


def test_one_that_this_machine_lacks_is_the_same_error() -> None:
    lacking = sorted({"baseline", "avx2", "avx512"} - set(ISAS))
    if not lacking:
        pytest.skip("this machine runs them all")
    code = "import torch, fastkd; fastkd.kd_loss(torch.ones(2, 3), torch.ones(2, 3))"
    done = _run(code, lacking[0])
    assert done.returncode != 0 and "available" in done.stderr
