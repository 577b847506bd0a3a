"""Sparse teachers on the Triton backend without a GPU: interpreted and compiled, in processes of their own."""

from __future__ import annotations

import pytest
from triton_process import Run, check_passes, needs_triton

PLUGIN = ("-p", "triton_plugin")
RUNS = {
    "interpreted": Run((*PLUGIN, "triton_sparse.py"), 130),
    "planted bugs": Run((*PLUGIN, "triton_sparse_mutants.py"), 40),
    "compiled": Run(("-p", "triton_driver", "-W", "error::UserWarning", "triton_sparse_compiled.py"), 30),
}


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("name", RUNS)
def test_in_a_process_of_its_own(name: str, native: str) -> None:
    check_passes(RUNS[name])
