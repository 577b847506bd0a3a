"""Prints what there is to know of the machine as one JSON object; needs a CUDA device."""

from __future__ import annotations

import importlib.util
import json
import platform
import shutil
import subprocess
from pathlib import Path

import torch


def printed(*command: str) -> str:
    """Output of a command, "" where it is missing or fails."""
    if not shutil.which(command[0]):
        return ""
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent)
    return done.stdout.strip() if done.returncode == 0 else ""


def facts() -> dict[str, object]:
    p = torch.cuda.get_device_properties(0)
    query = "driver_version,clocks.max.sm,clocks.max.memory,power.limit"
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    version = [line for line in printed(nvcc, "--version").splitlines() if "release" in line]
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    dirty = "-dirty" if printed("git", "status", "--porcelain", "--untracked-files=no") else ""
    return {
        "gpu": p.name,
        "devices": torch.cuda.device_count(),
        "arch": f"{p.major}{p.minor}" + ("a" if p.major >= 9 else ""),
        "multiprocessors": p.multi_processor_count,
        "memory_gb": round(p.total_memory / 1e9, 1),
        "l2_mb": round(p.L2_cache_size / 1e6, 1),
        "driver, clocks, power": printed("nvidia-smi", "-i", "0", f"--query-gpu={query}", "--format=csv,noheader"),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": platform.python_version(),
        "nvcc": version[0].split("release")[-1].strip() if version else "",
        "sanitizer": sanitizer if shutil.which(sanitizer) else "",
        "missing": [name for name in ("triton", "numpy", "rich", "matplotlib") if not importlib.util.find_spec(name)],
        "commit": (printed("git", "rev-parse", "--short=12", "HEAD") or "unknown") + dirty,
    }


if __name__ == "__main__":
    print(json.dumps(facts()))
