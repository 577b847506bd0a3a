"""The steps of gpu_check.py: what each runs, within which time, and what it leaves. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from gpu_runner import ROOT, Context, CutOff, State, Step, StepFailed, python, run_command, run_worker

VARIANTS = ("planned", "cluster", "streaming", "block", "warp")
TOOLS = ("memcheck", "racecheck", "synccheck")
SANITIZER_ERROR = 86  # exit status of a tool that found something
EXTENSION = ROOT / "fastkd" / "_C.abi3.so"


def extension_hash() -> str:
    return hashlib.sha256(EXTENSION.read_bytes()).hexdigest()[:16] if EXTENSION.exists() else ""


def facts_of(state: State) -> dict:
    return state.rows("facts").get("machine", {})


def facts(context: Context) -> str:
    code, output = run_command(python("gpu_facts.py"), context.left())
    if code != 0:
        raise StepFailed(output[-600:])
    row = json.loads(output.strip().splitlines()[-1])
    before = facts_of(context.state)
    if before and any(before.get(key) != row[key] for key in ("gpu", "torch", "driver, clocks, power")):
        context.state.data["rows"], context.state.data["steps"] = {}, {}  # figures of two machines are not mixed
    context.add("machine", row)
    return f"{row['gpu']}, torch {row['torch']}, nvcc {row['nvcc'] or 'missing'}"


def build(context: Context) -> str:
    arch = facts_of(context.state).get("arch")
    if not arch:
        raise StepFailed("the architecture is unknown: the step facts has to come first")
    began = time.monotonic()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    code, output = run_command(command, context.left(), FASTKD_CUDA="1", FASTKD_CUDA_ARCHS=arch)
    if code != 0:
        raise StepFailed(output[-2000:])
    seconds = time.monotonic() - began
    look = "import fastkd; from fastkd import ops; print(fastkd.backends()); assert 'cuda' in ops.native_devices()"
    code, output = run_command([sys.executable, "-c", look], context.left())
    if code != 0:
        raise StepFailed(output[-2000:])
    row = {"seconds": round(seconds, 1), "bytes": EXTENSION.stat().st_size, "hash": extension_hash(), "says": output}
    context.add("extension", row)
    return f"sm_{arch}, {row['bytes'] / 1e6:.1f} MB"


def build_holds(state: State) -> bool:
    return bool(extension_hash()) and state.rows("build").get("extension", {}).get("hash") == extension_hash()


def _needs_build(context: Context) -> None:
    if not build_holds(context.state):
        raise StepFailed("no extension built by this command is there")


def correctness(context: Context) -> str:
    _needs_build(context)
    first = time.monotonic() + 0.6 * context.left()  # what planned may take before the others have had their turn
    unfinished = False
    for variant in VARIANTS:
        wanted = "" if variant == "planned" else variant
        deadline = first if variant == "planned" else context.deadline
        part = Context(context.state, context.name, deadline, context.on_row)
        try:
            run_worker(part, python("gpu_correct.py", "--variant", variant), FASTKD_CUDA_VARIANT=wanted)
        except CutOff:
            if variant != "planned":
                raise
            unfinished = True
    if unfinished:
        run_worker(context, python("gpu_correct.py"), FASTKD_CUDA_VARIANT="")
    return counted(context, "problems")


def counted(context: Context, what: str) -> str:
    """The note of a step whose rows are right or wrong. Raises StepFailed where one is wrong."""
    rows = list(context.rows().values())
    wrong = [row for row in rows if not row["ok"]]
    if wrong:
        raise StepFailed(f"{len(wrong)} of {len(rows)} {what} are wrong, first {wrong[0]['key']}: {wrong[0]['error']}")
    return f"{len(rows)} {what} right"


def times(context: Context) -> str:
    _needs_build(context)
    run_worker(context, python("gpu_times.py"), stall=90)
    return counted(context, "shapes timed,")


def sanitized(tool: str, path: str, context: Context) -> dict:
    """A tool over the small matrix, all variants after each other in processes of their own."""
    found = {"key": tool, "ok": True, "summary": []}
    for variant in ("planned", "cluster", "block", "streaming", "warp"):
        wanted = "" if variant == "planned" else variant
        command = [path, "--tool", tool, "--error-exitcode", str(SANITIZER_ERROR)]
        command += python("gpu_correct.py", "--bare", "--variant", variant)
        code, output = run_command(command, context.left(), FASTKD_CUDA_VARIANT=wanted)
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output)
        found["summary"].append(f"{variant}: {summary[-1] if summary else 'no summary'}")
        if code != 0 or not summary or '"ok": false' in output:
            return found | {"ok": False, "error": f"{variant}: exit {code}: {output[-1500:]}"}
    return found


def sanitizer(context: Context) -> str:
    """The tools beside each other: most of their time is the start of a process."""
    _needs_build(context)
    path = facts_of(context.state).get("sanitizer")
    if not path:
        return "skipped: there is no compute-sanitizer"
    waiting = [tool for tool in TOOLS if tool not in context.rows()]
    with ThreadPoolExecutor(len(TOOLS)) as pool:
        running = {tool: pool.submit(sanitized, tool, path, context) for tool in waiting}
    late = [tool for tool, future in running.items() if isinstance(future.exception(), CutOff)]
    for tool, future in running.items():
        if tool not in late:
            context.add(tool, future.result())
    if late:
        raise CutOff(f"{', '.join(late)} did not finish")
    return counted(context, "tools")


def tests(context: Context) -> str:
    _needs_build(context)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-ra", "tests/test_cuda_device.py"]
    code, output = run_command(command, context.left())
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", output)}
    row = {"key": "pytest", "ok": code == 0 and counts.get("passed", 0) > 0, **counts, "tail": output[-2500:]}
    context.add("pytest", row if row["ok"] else {**row, "error": output[-1500:]})
    if not row["ok"]:
        raise StepFailed(f"exit {code}: {', '.join(f'{n} {w}' for w, n in counts.items()) or output[-300:]}")
    return ", ".join(f"{n} {word}" for word, n in counts.items())


def again(state: State) -> bool:
    return False


def stays(state: State) -> bool:
    return True


_TABLE: tuple[tuple[str, float, str, Callable[[Context], str], Callable[[State], bool]], ...] = (
    ("facts", 20, "GPU, driver, torch, nvcc, commit", facts, again),
    ("build", 120, "the extension in place, for this GPU alone, and its import", build, build_holds),
    ("correctness", 90, "each divergence, dtype and kernel variant against eager in fp64", correctness, stays),
    ("times", 120, "8192 rows of 32000 to 262144 columns beside copy, naive, compile, Triton", times, stays),
    ("sanitizer", 60, "compute-sanitizer: memcheck, racecheck, synccheck on a small matrix", sanitizer, stays),
    ("tests", 150, "the table of cases on the device: tests/test_cuda_device.py", tests, stays),
)
STEPS = [Step(name, seconds, what, run, holds) for name, seconds, what, run, holds in _TABLE]
