"""The kernels without torch: plain on every instruction set, then under sanitizers, with pages behind the rows that
fault when touched. Each sanitizer is first shown to see what it is for."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import harness
import pytest

SANITIZERS = {
    "address,undefined": ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-O1", "-g", "-fsanitize=thread"),
}
PROBES = {  # a program with the fault, and what the sanitizer calls it
    "address,undefined": (
        "int main(int n, char**) { int* x = new int[n]; return x[n + 1]; }",
        "heap-buffer-overflow",
    ),
    "thread": (
        "#include <thread>\nint x;\nint main() { std::thread t([] { ++x; }); ++x; t.join(); return x - 2; }",
        "data race",
    ),
}
CLEAN = "int main() { return 0; }"


def _compile_probe(folder: Path, name: str, source: str, sanitizer: str) -> Path:
    path = folder / f"{name}.cpp"
    path.write_text(source)
    binary = folder / name
    command = [
        harness.find_compiler(),
        "-std=c++17",
        *SANITIZERS[sanitizer],
        str(path),
        "-o",
        str(binary),
        "-lpthread",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"the compiler has no {sanitizer} sanitizer: {done.stderr.strip().splitlines()[-1]}")
    return binary


def _launcher(folder: Path, sanitizer: str) -> list[str]:
    """How to start a sanitized program here: some kernels' address layout needs `setarch -R` for ThreadSanitizer."""
    binary = _compile_probe(folder, "clean", CLEAN, sanitizer)
    for prefix in ([], ["setarch", "-R"] if shutil.which("setarch") else []):
        if harness.run(binary, prefix=prefix).returncode == 0:
            return prefix
    pytest.skip(f"programs with the {sanitizer} sanitizer do not start here: {harness.run(binary).stderr.strip()}")


def _assert_passes(done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert harness.problems_in(done.stdout) > 400
    assert "0 failed" in done.stdout


@pytest.mark.parametrize("isa", harness.ISA_FLAGS)
def test_kernels(isa: str, tmp_path: Path) -> None:
    """Values, gradients, statistics, bounds and refusals, with 1 and 4 threads."""
    if isa not in harness.runnable_isas():
        pytest.skip(f"this machine does not run {isa}")
    binary = harness.build(tmp_path, isa, ("-O2",))
    for threads in ("1", "4"):
        _assert_passes(harness.run(binary, "all", threads))


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_kernels_compile_for_sets_that_this_machine_lacks(isa: str, tmp_path: Path) -> None:
    """Compiled and disassembled to the vector width that the set is for."""
    if isa in harness.runnable_isas():
        pytest.skip("it runs here: see test_kernels")
    compiler = harness.find_compiler()
    if "x86_64" not in subprocess.run([compiler, "-dumpmachine"], capture_output=True, text=True, check=True).stdout:
        pytest.skip(f"the compiler does not build {isa}")
    kernels, _ = harness.compile_kernels(tmp_path, isa, ("-O2",))
    code = subprocess.run(["objdump", "-d", str(kernels)], capture_output=True, text=True, check=True).stdout
    assert {"avx512": "%zmm", "avx2": "%ymm", "baseline": "%xmm"}[isa] in code


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_the_sanitizer_sees_its_fault(sanitizer: str, tmp_path: Path) -> None:
    prefix = _launcher(tmp_path, sanitizer)
    source, words = PROBES[sanitizer]
    done = harness.run(_compile_probe(tmp_path, "faulty", source, sanitizer), prefix=prefix)
    assert done.returncode != 0
    assert words in done.stderr


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_kernels_under_sanitizers(sanitizer: str, tmp_path: Path) -> None:
    """On the best instruction set here, with 4 threads: rows apart and a row shared by all."""
    prefix = _launcher(tmp_path, sanitizer)
    binary = harness.build(tmp_path, harness.runnable_isas()[-1], SANITIZERS[sanitizer])
    _assert_passes(harness.run(binary, "all", "4", prefix=prefix))


def test_flags_are_those_of_the_build() -> None:
    """The harness compiles each instruction set as setup.py does."""
    setup = (harness.ROOT / "setup.py").read_text()
    missing = [flag for flags in harness.ISA_FLAGS.values() for flag in flags if f'"{flag}"' not in setup]
    assert not missing
    shipped = {path.stem.removeprefix("isa_") for path in (harness.ROOT / "csrc/kernels/cpu").glob("isa_*.cpp")}
    assert shipped == set(harness.ISA_FLAGS)
