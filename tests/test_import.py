"""What ``import fastkd`` costs and touches, each asked of a fresh interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

MAX_SECONDS = 0.3  # beyond torch
TRIES = 5  # the best of them: the machine is shared

PROBE = """
import json, os, sys, threading, time
import torch
before, environment, threads = set(sys.modules), dict(os.environ), threading.active_count()
torch_threads = torch.get_num_threads()
start = time.perf_counter()
import fastkd
seconds = time.perf_counter() - start
print(json.dumps({
    "seconds": seconds,
    "new": sorted({name.split(".")[0] for name in set(sys.modules) - before}),
    "environment_changed": dict(os.environ) != environment,
    "threads_changed": threading.active_count() != threads or torch.get_num_threads() != torch_threads,
    "cuda_initialised": torch.cuda.is_initialized(),
    "version": fastkd.__version__,
}))
"""


def probe(cwd: Path) -> dict:
    done = subprocess.run([sys.executable, "-c", PROBE], cwd=cwd, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_import_is_fast(tmp_path: Path) -> None:
    assert min(probe(tmp_path)["seconds"] for _ in range(TRIES)) <= MAX_SECONDS


def test_import_touches_nothing_else(tmp_path: Path) -> None:
    result = probe(tmp_path)
    assert set(result["new"]) - {"fastkd", "torch"} <= sys.stdlib_module_names
    assert not result["environment_changed"]
    assert not result["threads_changed"]
    assert not result["cuda_initialised"]
