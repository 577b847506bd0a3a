"""The Triton backend without a GPU: who computes, and its kernels in Triton's interpreter. Compiled for GPUs
they are in test_triton_compiled.py."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch
from triton_process import Run, check_passes, needs_triton

import fastkd

PLUGIN = ("-p", "triton_plugin")
RUNS = {
    # a third of the table each: every case with two or three divergences in each
    "table, blocks as shipped": Run(
        (*PLUGIN, "--third", "0", "test_loss.py", "-k",
         "test_native and not inplace and everything and not 151936 and not 1048576"), 170,
    ),
    "table, blocks as shipped, in place": Run(
        (*PLUGIN, "--third", "2", "test_loss.py", "-k",
         "test_native_inplace and everything and not 151936 and not 1048576"), 170,
    ),
    "table, small blocks, in place": Run(
        (*PLUGIN, "--small-blocks", "--third", "1", "test_loss.py", "-k",
         "test_native_inplace and everything and not 128256 and not 151936 and not 262144 and not 1048576"), 150,
    ),
    "options": Run(
        (*PLUGIN, "test_loss_options.py", "-k", "native and not across_chunks and not bf16 and not fp16"), 120
    ),
    "options, small blocks": Run(
        (*PLUGIN, "--small-blocks", "test_loss_options.py", "-k", "across_chunks and jsd"), 28
    ),
    "autograd": Run(
        (*PLUGIN, "test_loss_autograd.py", "-k",
         "not small_fp16 and not gradcheck and not eager and not handed_over and not loss_and_gradient[dtype0"), 40,
    ),
    "what Triton's kernels alone promise": Run((*PLUGIN, "triton_interpreted.py"), 48),
    "planted bugs": Run((*PLUGIN, "--small-blocks", "triton_mutants.py"), 33),
    "operators": Run((*PLUGIN, "test_ops.py", "-k", "not eager and not inductor"), 40),
}  # fmt: skip


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("name", RUNS)
def test_in_a_process_of_its_own(name: str, native: str) -> None:
    check_passes(RUNS[name])


@needs_triton
class TestChoice:
    """Who computes, with Triton installed and without a GPU."""

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
