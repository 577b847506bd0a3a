"""The Triton backend without a GPU. Its kernels run in Triton's interpreter, and are compiled for GPUs; neither can
share a process with the other or with this one, so each set of tests runs in a pytest of its own, two at a time."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import fastkd

TESTS = Path(__file__).parent
WORKERS = 2
SECONDS = 550


class Run(NamedTuple):
    """Arguments of one pytest, and how many of its tests must at least have passed."""

    arguments: tuple[str, ...]
    passed: int
    compiled_for: str = ""


PLUGIN = ("-p", "triton_plugin")
DRIVER = ("-p", "triton_driver")
RUNS = {
    "table, blocks as shipped": Run(
        (*PLUGIN, "--half", "0", "test_loss.py", "-k", "test_native and not inplace and everything"), 270
    ),
    "table, small blocks, in place": Run(
        (*PLUGIN, "--small-blocks", "--half", "1", "test_loss.py", "-k",
         "test_native_inplace and everything and not 128256 and not 151936 and not 262144"), 230,
    ),
    "options": Run(
        (*PLUGIN, "test_loss_options.py", "-k", "native and not across_chunks and not bf16 and not fp16"), 120
    ),
    "options, small blocks": Run(
        (*PLUGIN, "--small-blocks", "test_loss_options.py", "-k", "across_chunks and (jsd or symmetric_kl)"), 56
    ),
    "autograd": Run(
        (*PLUGIN, "test_loss_autograd.py", "-k", "not small_fp16 and not gradcheck and not eager"), 40
    ),
    "what Triton's kernels alone promise": Run((*PLUGIN, "triton_interpreted.py"), 50),
    "planted bugs": Run((*PLUGIN, "--small-blocks", "triton_mutants.py"), 20),
    "compiled for sm_80 and sm_90": Run((*DRIVER, "triton_compiled.py"), 180, "sm_80,sm_90"),
    "compiled for sm_100 and gfx942": Run((*DRIVER, "triton_compiled.py"), 180, "sm_100,gfx942"),
    "operators": Run((*PLUGIN, "test_ops.py", "-k", "not eager"), 40),
}  # fmt: skip


def _pytest(run: Run) -> tuple[int, str]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *run.arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), "OMP_NUM_THREADS": "1"}
    environment["FASTKD_TRITON_TARGETS"] = run.compiled_for
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, timeout=SECONDS)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def results() -> Iterator[dict[str, Future]]:
    """All runs, started together; each test waits for its own."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    with ThreadPoolExecutor(WORKERS) as pool:
        yield {name: pool.submit(_pytest, run) for name, run in RUNS.items()}
        pool.shutdown(cancel_futures=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_in_a_process_of_its_own(name: str, results: dict[str, Future], native: str) -> None:
    status, output = results[name].result()
    assert status == 0, output[-6000:]
    passed = re.search(r"(\d+) passed", output)
    assert passed and int(passed.group(1)) >= RUNS[name].passed, output[-3000:]
    assert "skipped" not in output, output[-3000:]


class TestChoice:
    """Who computes, with Triton installed and without a GPU."""

    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        if importlib.util.find_spec("triton") is None:
            pytest.skip("Triton is not installed")

    def test_cpu_tensors_are_refused_with_the_reason(self) -> None:
        x = torch.randn(2, 5)
        with pytest.raises(RuntimeError, match=r"backend='triton' cannot run.*CPU.*TRITON_INTERPRET.*eager"):
            fastkd.kd_loss(x, x, backend="triton")
        answer = fastkd.explain(x, x, backend="triton")
        assert answer.backend == "" and "interpreter" in answer.reasons["triton"]

    def test_another_device_is_refused_with_the_reason(self) -> None:
        x = torch.empty(2, 5, device="meta")
        assert "meta" in fastkd.explain(x, x).reasons["triton"]
        assert fastkd.explain(x, x).backend == "eager"

    def test_backends_names_its_devices(self) -> None:
        assert "cuda" in fastkd.backends().reasons["triton"]

    def test_looking_at_cpu_logits_imports_no_triton(self) -> None:
        code = (
            "import sys, torch, fastkd; x = torch.randn(2, 5); fastkd.kd_loss(x, x); fastkd.backends();"
            "fastkd.explain(x, x); sys.exit('triton' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else real(name))
    x = torch.randn(2, 5)
    assert "not installed" in fastkd.explain(x, x).reasons["triton"]
    assert "not installed" in fastkd.backends().reasons["triton"]
    with pytest.raises(RuntimeError, match=r"triton.*not installed"):
        fastkd.kd_loss(x, x, backend="triton")
