"""bench/gpu_check.py where there is no GPU: its runner, its report, its judgement of numbers, its exit."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import gpu_correct  # noqa: E402
import gpu_report  # noqa: E402
from gpu_runner import (  # noqa: E402
    Context,
    CutOff,
    State,
    Step,
    StepFailed,
    fingerprint,
    run_command,
    run_steps,
    run_worker,
)

WORKER = """
import json, os, sys, time
done = json.loads(sys.stdin.readline())
print("words that are no result", flush=True)
for key in ("a", "b", "c", "d"):
    if key in done:
        continue
    print(json.dumps({"begin": key}), flush=True)
    if key == "b":
        print("the device says no", flush=True)
        os._exit(7)
    if key == "c":
        time.sleep(60)
    print(json.dumps({"key": key, "ok": True, "from": os.getpid()}), flush=True)
"""


def _context(folder: Path, seconds: float) -> Context:
    return Context(State(folder, "source"), "step", time.monotonic() + seconds)


def _run(steps: list[Step], folder: Path, seconds: float = 60, source: str = "source") -> State:
    state = State(folder, source)
    run_steps(steps, state, seconds, lambda text: None, lambda: None)
    return state


def _script(folder: Path, text: str) -> list[str]:
    (folder / "worker.py").write_text(text)
    return [sys.executable, str(folder / "worker.py")]


class TestRunner:
    def test_a_failing_step_is_recorded_and_the_next_one_run(self, tmp_path: Path) -> None:
        def fail(context: Context) -> str:
            context.add("half", {"ok": True})
            raise ValueError("out of luck")

        state = _run([Step("one", 9, "", fail), Step("two", 9, "", lambda context: "fine")], tmp_path)
        kept = json.loads((tmp_path / "state.json").read_text())
        assert kept == state.data
        assert kept["steps"]["one"]["status"] == "failed" and "out of luck" in kept["steps"]["one"]["note"]
        assert kept["steps"]["two"]["status"] == "done" and kept["rows"]["one"] == {"half": {"ok": True}}

    def test_a_rerun_skips_what_is_done_and_repeats_what_is_not(self, tmp_path: Path) -> None:
        calls: list[str] = []
        lucky = False

        def sometimes(context: Context) -> str:
            calls.append("sometimes")
            if not lucky:
                raise StepFailed("not yet")
            return ""

        steps = [Step("once", 9, "", lambda c: calls.append("once") or "", lambda s: True), Step("s", 9, "", sometimes)]
        _run(steps, tmp_path)
        lucky = True
        assert _run(steps, tmp_path).step("s")["status"] == "done"
        assert calls == ["once", "sometimes", "sometimes"]
        _run(steps, tmp_path, source="other")  # other sources: nothing of before counts
        assert calls[3:] == ["once", "sometimes"]

    def test_a_done_step_whose_work_is_gone_is_repeated(self, tmp_path: Path) -> None:
        calls: list[int] = []
        step = Step("build", 9, "", lambda c: calls.append(1) or "", lambda state: False)
        _run([step], tmp_path)
        _run([step], tmp_path)
        assert calls == [1, 1]

    def test_no_step_is_begun_without_time(self, tmp_path: Path) -> None:
        state = _run([Step("late", 9, "", lambda c: "")], tmp_path, seconds=0.5)
        assert state.step("late")["status"] == "not begun"

    def test_a_command_beyond_its_budget_is_cut_off_with_its_children(self, tmp_path: Path) -> None:
        parent = (
            "import subprocess, sys; print('compiling', flush=True);"
            "subprocess.run([sys.executable, '-c', 'import time; time.sleep(100)'])"
        )
        step = Step("slow", 8, "", lambda c: str(run_command([sys.executable, "-c", parent], c.left())))
        state = _run([step, Step("next", 9, "", lambda c: "")], tmp_path)
        assert state.step("slow")["status"] == "cut off" and "compiling" in state.step("slow")["note"]
        assert state.step("next")["status"] == "done"
        assert state.step("slow")["seconds"] < 60  # a child that lives on would hold its output open for 100 s

    def test_a_worker_alone_is_told_of_nothing_done(self) -> None:
        """As the sanitizers run it: whatever lies on the caller's own standard input is not its list of keys."""
        text = f"import sys; sys.path.insert(0, {str(ROOT / 'bench')!r}); import gpu_worker; "
        text += "gpu_worker.work([('a', dict), ('b', lambda: 1 / 0)])"
        reader, writer = os.pipe()
        os.write(writer, b'["a"]\n')
        inherited = os.dup(0)
        os.dup2(reader, 0)
        try:
            code, output = run_command([sys.executable, "-c", text], 30)
        finally:
            os.dup2(inherited, 0)
            os.close(inherited)
            os.close(reader)
            os.close(writer)
        rows = [json.loads(line) for line in output.splitlines()]
        assert code == 0 and [row.get("ok") for row in rows] == [None, True, None, False]
        assert "ZeroDivisionError" in rows[3]["error"]

    def test_a_worker_that_dies_or_hangs_is_restarted_behind_that_key(self, tmp_path: Path) -> None:
        context = _context(tmp_path, 300)
        run_worker(context, _script(tmp_path, WORKER), stall=10)
        rows = State(tmp_path, "source").rows("step")  # from the file
        assert list(rows) == ["a", "b", "c", "d"]
        assert [row["ok"] for row in rows.values()] == [True, False, False, True]
        assert "exit 7" in rows["b"]["error"] and "the device says no" in rows["b"]["error"]
        assert "nothing for 10 s" in rows["c"]["error"]
        assert rows["a"]["from"] != rows["d"]["from"]

    def test_a_worker_beyond_the_budget_leaves_its_rows(self, tmp_path: Path) -> None:
        context = _context(tmp_path, 100)
        context.add("b", {"ok": True})
        context.on_row = lambda: setattr(context, "deadline", time.monotonic() + 3)  # little is left behind "a"
        with pytest.raises(CutOff, match="at c"):
            run_worker(context, _script(tmp_path, WORKER), stall=30)
        assert list(State(tmp_path, "source").rows("step")) == ["b", "a"]

    def test_a_worker_that_cannot_start_fails_the_step(self, tmp_path: Path) -> None:
        with pytest.raises(StepFailed, match="no such thing"):
            run_worker(_context(tmp_path, 20), _script(tmp_path, "raise SystemExit('no such thing')"))

    def test_fingerprint_sees_a_changed_kernel(self, tmp_path: Path) -> None:
        (tmp_path / "csrc").mkdir()
        (tmp_path / "setup.py").write_text("")
        (tmp_path / "csrc" / "a.cu").write_text("1")
        before = fingerprint(tmp_path)
        assert fingerprint(tmp_path) == before
        (tmp_path / "csrc" / "a.cu").write_text("2")
        assert fingerprint(tmp_path) != before


def _measured(folder: Path) -> State:
    """As after a run: fastkd within its goal at one width, not at the other; naive out of memory there."""
    state = State(folder, "source")
    state.add("facts", "machine", {"gpu": "Some GPU", "commit": "abc"})
    for vocab, share in ((32000, 0.9), (262144, 0.5)):
        base = {"rows": 8192, "vocab": vocab, "dtype": "bf16", "group": "ours", "p20": 1.0, "p50": 2.0, "p80": 3.0}
        base |= {"gb_s": 2000.0, "share": share, "peak_nv": 1.0, "peak": 10}
        judged = {
            "provider": "fastkd",
            "share_moved": share,
            "goal": 0.85,
            "reached": share >= 0.85,
            "variant": "block",
        }
        naive = {**base, "provider": "naive", "group": "others", "p50": 20.0, "share": 0.05}
        if vocab == 262144:
            naive = {k: naive[k] for k in ("rows", "vocab", "dtype", "group", "provider")} | {"error": "out of memory"}
        state.add("times", str(vocab), {"key": str(vocab), "ok": True, "results": [base | judged, naive]})
    state.add("correctness", "good", {"key": "good", "ok": True, "of_bound": 0.25})
    state.add("correctness", "bad", {"key": "bad", "ok": False, "error": "error over its bound " * 20})
    state.end("correctness", "failed", 9, "1 of 2 problems are wrong")
    return state


class TestReport:
    @pytest.mark.parametrize("installed", [True, False], ids=["rich", "plain"])
    def test_the_worst_comes_first_and_lines_are_short(self, tmp_path: Path, installed: bool, monkeypatch) -> None:
        if not installed:
            monkeypatch.setattr(gpu_report.importlib.util, "find_spec", lambda name: None)
        said: list[str] = []
        gpu_report.print_report(_measured(tmp_path), said.append)
        text = "\n".join(said)
        assert max(map(len, text.splitlines())) <= 100
        assert "Some GPU" in said[0] and "1 of 2 right" in said[1] and "1 of 2 reached" in said[2]
        assert "262144 (block): 50% of copy, goal 85%" in said[2]
        lines = {line: line.split() for line in text.splitlines() if "8192x" in line}
        assert any("8192x32000" in line and "yes" in words and "10.0" in words for line, words in lines.items())
        assert any("8192x262144" in line and "NO" in words for line, words in lines.items())
        assert any("naive" in line and "out of memory" in line for line in lines)

    def test_csv(self, tmp_path: Path) -> None:
        gpu_report.write_tables(_measured(tmp_path), tmp_path)
        with (tmp_path / "times.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [(r["vocab"], r["provider"], r["p50"]) for r in rows] == [
            ("32000", "fastkd", "2.0"),
            ("32000", "naive", "20.0"),
            ("262144", "fastkd", "2.0"),
            ("262144", "naive", ""),
        ]
        assert rows[3]["error"] == "out of memory" and rows[0]["reached"] == "True"
        assert len(list(csv.DictReader((tmp_path / "correctness.csv").open()))) == 2

    def test_picture_or_why_there_is_none(self, tmp_path: Path, monkeypatch) -> None:
        assert gpu_report.draw(State(tmp_path / "empty", ""), tmp_path / "x.png") == "nothing was timed"
        state = _measured(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(gpu_report.importlib.util, "find_spec", lambda name: None)
            assert "matplotlib is not installed" in gpu_report.draw(state, tmp_path / "x.png")
        assert not (tmp_path / "x.png").exists()
        assert gpu_report.draw(state, tmp_path / "x.png") == "" and (tmp_path / "x.png").stat().st_size > 5000


class TestJudgement:
    """The comparison with eager in fp64, by the CPU's kernels: they pass, and an error planted in them does not."""

    @pytest.mark.parametrize("dtype", gpu_correct.DTYPES)
    @pytest.mark.parametrize("divergence", gpu_correct.SPECS)
    def test_right(self, divergence: str, dtype: str, native: str) -> None:
        assert gpu_correct.check(9, 5003, dtype, divergence, "cpu")["of_bound"] <= 1

    @pytest.mark.parametrize("plant", ["column", "sign", "loss", "nan", "scale"])
    @pytest.mark.parametrize("dtype", gpu_correct.DTYPES)
    def test_planted(self, dtype: str, plant: str, native: str, monkeypatch: pytest.MonkeyPatch) -> None:
        solve = gpu_correct.solve

        def wrong(*arguments, **options):
            loss, gradient = solve(*arguments, **options)
            if options.get("backend") != "native":
                return loss, gradient
            gradient = gradient.clone()
            if plant == "column":
                gradient[0, 17] = 0
            elif plant == "sign":
                gradient[2, -1] *= -1
            elif plant == "nan":
                gradient[0, 3] = float("nan")
            elif plant == "scale":
                gradient *= 1.05
            else:
                loss = loss * (1 + 1e-3)
            return loss, gradient

        monkeypatch.setattr(gpu_correct, "solve", wrong)
        with pytest.raises(AssertionError, match="over its bound"):
            gpu_correct.check(5, 1003, dtype, "forward_kl", "cpu")

    def test_ignored_rows_that_are_read(self, native: str, monkeypatch: pytest.MonkeyPatch) -> None:
        p = gpu_correct.make_problem(5, 37, torch.float32, "cpu")
        gpu_correct.ignored_rows(p, "jsd", "native")
        solve = gpu_correct.solve
        monkeypatch.setattr(gpu_correct, "solve", lambda q, *a, **o: (solve(q, *a, **o)[0], 0 * q.student))
        with pytest.raises(AssertionError, match="was read"):
            gpu_correct.ignored_rows(p, "jsd", "native")


class TestCommand:
    def _gpu_check(self, *arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-X", "importtime", str(ROOT / "bench" / "gpu_check.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    def test_list_names_the_steps_and_imports_no_torch(self) -> None:
        done = self._gpu_check("--list")
        steps = [line.split()[0] for line in done.stdout.splitlines()]
        assert done.returncode == 0 and steps == ["facts", "build", "correctness", "times", "sanitizer", "tests"]
        budgets = [int(line.split()[1]) for line in done.stdout.splitlines()]
        assert sum(budgets[:-1]) <= 410  # the last one takes what is left of the 470
        assert "torch" not in done.stderr

    def test_without_a_gpu(self, tmp_path: Path) -> None:
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        done = self._gpu_check(str(tmp_path / "out"))
        assert done.returncode == 2 and done.stdout == ""
        said = [line for line in done.stderr.splitlines() if not line.startswith("import time")]
        assert len(said) == 1 and "needs a CUDA GPU" in said[0] and "nothing was run" in said[0]
        assert not (tmp_path / "out").exists()

    def test_without_a_folder(self) -> None:
        done = self._gpu_check()
        assert done.returncode == 2 and "OUT_FOLDER is missing" in done.stderr


class TestDeviceInputs:
    """What tests/test_cuda_device.py moves: onto the CPU, whose kernels must then find the same problems."""

    @pytest.mark.parametrize(
        "layout", ["contiguous", "padded", "shifted", "sequence_first", "expanded", "columns_first"]
    )
    def test_same_bytes_and_strides(self, layout: str, native: str) -> None:
        from cases import CASES
        from device_inputs import moved, run_on
        from test_loss import problem_of

        index = next(i for i, case in enumerate(CASES) if case.layout == layout)
        problem = problem_of(index, "jsd", True)
        for x in (problem.inputs.student_base, problem.inputs.teacher):
            there = moved(x, "cpu")
            assert there.data_ptr() != x.data_ptr() and torch.equal(there.nan_to_num(7.0), x.nan_to_num(7.0))
            assert (there.stride(), there.storage_offset()) == (x.stride(), x.storage_offset())
        problem.check(run_on(problem, "cpu", backend="native"))
