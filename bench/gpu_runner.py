"""Runs steps within time budgets and writes each result at once, so that a rerun goes on where a cut-off left it.

A step is a function of a Context. Steps that make many results run a worker, a process that prints one JSON object a
line: {"begin": key} before it starts on something, {"key": key, ...} with the result. A worker that dies or is silent
for too long is started again without the key that it was at: a device that has faulted stays so for that process alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
TAIL = 4000  # characters of output that are kept
LEAST_SECONDS = 2.0  # below which no step is begun


class CutOff(Exception):
    """The step's time is over; what it has written stays, and a rerun goes on from there."""


class StepFailed(Exception):
    """The step could not do its work; the message says why."""


def fingerprint(root: Path = ROOT) -> str:
    """Of the sources that a result depends on, whether or not they are committed."""
    digest = hashlib.sha256()
    folders = ("csrc", "fastkd", "bench", "tests")
    files = [p for f in folders for p in (root / f).rglob("*") if p.suffix in {".py", ".h", ".cpp", ".cu", ".cuh"}]
    for path in sorted([*files, root / "setup.py"]):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


class State:
    """state.json: {"source": fingerprint, "steps": {name: status, seconds, note}, "rows": {step: {key: row}}}."""

    def __init__(self, folder: Path, source: str) -> None:
        self.path = folder / "state.json"
        self.data: dict[str, Any] = {"source": source, "steps": {}, "rows": {}}
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            try:
                kept = json.loads(self.path.read_text())
            except ValueError:  # not written by save(), which replaces the file whole
                kept = {}
            if kept.get("source") == source:
                self.data = kept

    def save(self) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1))
        os.replace(partial, self.path)

    def step(self, name: str) -> Row:
        return self.data["steps"].get(name, {})

    def rows(self, step: str) -> dict[str, Row]:
        return self.data["rows"].setdefault(step, {})

    def add(self, step: str, key: str, row: Row) -> None:
        self.rows(step)[key] = row
        self.save()

    def end(self, step: str, status: str, seconds: float, note: str = "") -> None:
        self.data["steps"][step] = {"status": status, "seconds": round(seconds, 1), "note": note}
        self.save()


@dataclass
class Context:
    """What a step sees. deadline: of the step, on the clock of time.monotonic."""

    state: State
    name: str
    deadline: float
    on_row: Callable[[], None] = lambda: None

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def rows(self) -> dict[str, Row]:
        return self.state.rows(self.name)

    def add(self, key: str, row: Row) -> None:
        self.state.add(self.name, key, row)
        self.on_row()


@dataclass(frozen=True)
class Step:
    """run returns a note. holds: whether what a finished step left behind is still there (a build, say)."""

    name: str
    seconds: float  # its budget
    what: str
    run: Callable[[Context], str] = field(repr=False)
    holds: Callable[[State], bool] = field(default=lambda state: True, repr=False)


def run_steps(
    steps: Sequence[Step], state: State, seconds: float, say: Callable[[str], None], on_row: Callable[[], None]
) -> None:
    """All steps in order, within ``seconds``; a step that fails is recorded and the next one is run."""
    end = time.monotonic() + seconds
    for step in steps:
        before = state.step(step.name)
        if before.get("status") == "done" and step.holds(state):
            say(f"{step.name}: done before")
            continue
        start = time.monotonic()
        budget = min(step.seconds, end - start)
        if budget < LEAST_SECONDS:
            if not before:
                state.end(step.name, "not begun", 0.0, "no time left")
            say(f"{step.name}: no time left")
            continue
        try:
            status, note = "done", step.run(Context(state, step.name, start + budget, on_row))
        except CutOff as error:
            status, note = "cut off", str(error) or f"after {budget:.0f} s"
        except Exception as error:  # whatever it is, the next step may still tell something
            status, note = "failed", f"{error}" if isinstance(error, StepFailed) else f"{type(error).__name__}: {error}"
        state.end(step.name, status, time.monotonic() - start, note[-TAIL:])
        on_row()
        say(f"{step.name}: {status} in {time.monotonic() - start:.0f} s{': ' + note.splitlines()[0] if note else ''}")


def environment(**extra: str) -> dict[str, str]:
    """Of a process that imports fastkd from the working tree."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **extra}


def run_command(command: Sequence[str], seconds: float, **extra: str) -> tuple[int, str]:
    """Exit status and the end of what it printed.

    Raises:
        CutOff: it took longer; its process group is killed.
    """
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(**extra), start_new_session=True, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=max(0.1, seconds))
    except subprocess.TimeoutExpired:
        kill(process)
        output, _ = process.communicate()
        last = output.strip().splitlines()[-1:] or ["no output"]
        raise CutOff(f"{Path(command[1] if len(command) > 1 else command[0]).name}: {last[0][:200]}") from None
    return process.returncode, output[-TAIL:]


def kill(process: subprocess.Popen) -> None:
    """With everything that it started: compilers outlive the script that called them."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)


def _lines(process: subprocess.Popen, stall: float, left_of: Callable[[], float]) -> Iterator[str | None]:
    """Lines of its output; None where it was silent for ``stall`` seconds. Ends with the output or the time."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while (left := left_of()) > 0:
        try:
            line = lines.get(timeout=min(stall, left))
        except queue.Empty:
            if stall < left:
                yield None
            return
        if line is None:
            return
        yield line


def _one_worker(context: Context, command: Sequence[str], stall: float, extra: dict[str, str]) -> tuple[str, str]:
    """Runs a worker once. Returns the key that it was at when it ended early, or "", and why."""
    done = json.dumps(sorted(context.rows()))
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(**extra), start_new_session=True, text=True, bufsize=1,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    at, why, noise = "", "", ""
    try:
        assert process.stdin is not None
        process.stdin.write(done + "\n")
        process.stdin.close()
        for line in _lines(process, stall, context.left):
            if line is None:
                why = f"nothing for {stall:.0f} s"
                break
            if not line.startswith("{"):
                noise = (noise + line)[-TAIL:]
                continue
            row = json.loads(line)
            if "begin" in row:
                at = row["begin"]
            else:
                context.add(row["key"], row)
                at = ""
        if context.left() <= 0:
            raise CutOff(f"at {at or 'its start'}")
        if not why:
            code = process.wait(timeout=max(0.1, context.left()))
            why = f"exit {code}: {noise.strip()[-600:]}" if code else ""
    except subprocess.TimeoutExpired:
        raise CutOff("at its end") from None
    except BrokenPipeError:
        why = "it ended before it was told what to do"
    finally:
        kill(process)
        process.wait()
    return at, why


def run_worker(context: Context, command: Sequence[str], *, stall: float = 60, **extra: str) -> None:
    """Runs a worker, again after each key that it dies at or hangs on, until it has been through all.

    Raises:
        CutOff: the step's time is over.
        StepFailed: it died while it was at nothing, so that another start would die too.
    """
    while True:
        before = len(context.rows())
        at, why = _one_worker(context, command, stall, extra)
        if not why:
            return
        if not at and len(context.rows()) == before:
            raise StepFailed(why)
        if at:
            context.add(at, {"key": at, "ok": False, "error": f"the process ended here: {why}"})


def python(*arguments: str) -> list[str]:
    """A command that runs a script of this folder."""
    script, *rest = arguments
    return [sys.executable, str(Path(__file__).parent / script), *rest]
