"""Sparse teachers on the Triton backend without a GPU: interpreted and compiled, in processes of their own."""

from __future__ import annotations

import pytest
from triton_process import Run, check_passes, needs_triton

PLUGIN = ("-p", "triton_plugin")
RUNS = {
    "interpreted": Run((*PLUGIN, "triton_sparse.py"), 85),
    "interpreted, small blocks": Run(
        (*PLUGIN, "--small-blocks", "triton_sparse.py", "-k", "option or moved or wrong"), 6
    ),
    "compiled": Run(("-p", "triton_driver", "-W", "error::UserWarning", "triton_sparse_compiled.py"), 12,
                    "sm_80,sm_90,sm_100,gfx942"),
}  # fmt: skip


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("name", RUNS)
def test_in_a_process_of_its_own(name: str, native: str) -> None:
    check_passes(RUNS[name])
