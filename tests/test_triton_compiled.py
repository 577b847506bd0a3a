"""The Triton kernels compiled for GPUs that are not here: triton_compiled.py, in processes of its own."""

from __future__ import annotations

import importlib.util

import pytest
from triton_process import Run, check_passes, needs_triton

# whoever trains would see a warning, and could do nothing about it
DRIVER = ("-p", "triton_driver", "-W", "error::UserWarning")
RUNS = {
    "gradients": Run((*DRIVER, "triton_compiled.py", "-k", "test_specialisation and gradient_kernel"), 56),
    "other kernels": Run((*DRIVER, "triton_compiled.py", "-k", "test_specialisation and not gradient_kernel"), 96),
    "what the meters see": Run((*DRIVER, "triton_compiled.py", "-k", "not test_specialisation"), 10),
    "launches": Run((*DRIVER, "triton_launched.py"), 126),
}


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("name", RUNS)
def test_compiled_for(name: str, native: str) -> None:
    check_passes(RUNS[name])


@needs_triton
def test_compiled_for_intel() -> None:
    if importlib.util.find_spec("triton.backends.intel") is None:
        pytest.skip("Triton as installed compiles for NVIDIA and AMD alone: its wheel lacks triton.backends.intel")
    pytest.skip("Triton as installed compiles for Intel; no target of Intel's is in triton_driver.TARGETS")
