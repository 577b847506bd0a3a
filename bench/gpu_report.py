"""What gpu_check.py prints and writes: tables of at most 100 columns, CSV, one PNG. Imports no torch."""

from __future__ import annotations

import csv
import importlib.util
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpu_runner import State

WIDTH = 100
Row = dict[str, Any]
TIME_COLUMNS = (
    "dtype", "vocab", "rows", "group", "provider", "p20", "p50", "p80", "gb_s", "share", "share_moved", "goal",
    "reached", "peak_nv", "peak", "variant", "tensors_moved", "plan", "error",
)  # fmt: skip
CORRECT_COLUMNS = ("key", "ok", "of_bound", "worst", "ran", "note", "error", "at", "plan")


def timed(state: State) -> list[Row]:
    """A row a provider and shape."""
    return [result for row in state.rows("times").values() for result in row.get("results", [])]


def plain_table(title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """First column to the left, the others to the right; cells are cut where the table would be too wide."""
    table = [list(names), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(names))]
    while sum(widths) + 2 * (len(widths) - 1) > WIDTH:
        widths[widths.index(max(widths))] -= 1

    def line(row: Sequence[str]) -> str:
        cut = [cell[:width] for cell, width in zip(row, widths)]
        return "  ".join(
            cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(cut, widths))
        )

    return "\n".join([title, *(line(row).rstrip() for row in table)])


def show(title: str, names: Sequence[str], rows: Sequence[Sequence[str]], say: Callable[[str], None]) -> None:
    """By rich where it is installed, else as plain text."""
    if importlib.util.find_spec("rich") is None:
        return say(plain_table(title, names, rows))
    import io

    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, name in enumerate(names):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console = Console(file=io.StringIO(), width=WIDTH)
    console.print(table)
    say(console.file.getvalue().rstrip())  # type: ignore[attr-defined]


def _correctness(state: State) -> str:
    rows = list(state.rows("correctness").values())
    wrong = [row for row in rows if not row["ok"]]
    if not rows:
        return "correctness: nothing was checked"
    largest = max((row.get("of_bound", 0.0) for row in rows), default=0.0)
    return f"correctness: {len(rows) - len(wrong)} of {len(rows)} right; largest error {largest:.2f} of its bound"


def _goals(state: State) -> str:
    judged = [row for row in timed(state) if "reached" in row]
    if not judged:
        return "goals: nothing was timed"
    missed = [row for row in judged if not row["reached"]]
    worst = min(judged, key=lambda row: row["share_moved"] - row["goal"])
    return (
        f"goals: {len(judged) - len(missed)} of {len(judged)} reached; worst {worst['provider']} {worst['dtype']} "
        f"{worst['vocab']} ({worst['variant']}): {worst['share_moved']:.0%} of copy, goal {worst['goal']:.0%}"
    )


def headline(state: State) -> list[str]:
    """What is most worth knowing, in lines."""
    machine = state.rows("facts").get("machine", {})
    lines = [f"fastkd on {machine.get('gpu', 'an unknown GPU')}, commit {machine.get('commit', 'unknown')}"]
    lines += [_correctness(state), _goals(state)]
    for name, step in state.data["steps"].items():
        if step["status"] != "done":
            lines += textwrap.wrap(f"{name}: {step['status']}: {step['note'][:300]}", WIDTH)
    wrong = [row for row in state.rows("correctness").values() if not row["ok"]]
    for row in wrong[:8]:
        lines += textwrap.wrap(f"wrong: {row['key']}: {row['error'][:160]}", WIDTH, subsequent_indent="  ")
    return lines


def _ratio(row: Row, rows: Sequence[Row]) -> str:
    naive = [r for r in rows if r["provider"] == "naive" and "p50" in r]
    same = [r for r in naive if (r["dtype"], r["vocab"], r["rows"]) == (row["dtype"], row["vocab"], row["rows"])]
    return f"{same[0]['p50'] / row['p50']:.1f}" if same else ""


def time_cells(rows: Sequence[Row]) -> list[list[str]]:
    cells = []
    for row in rows:
        name = f"{row['dtype']} {row['rows']}x{row['vocab']} {row['provider']}"
        name += " (streaming)" if row["group"] == "streaming" else ""
        if "p50" not in row:
            cells.append([name, "", "", row.get("error", "")[:24], "", "", "", ""])
            continue
        share = row.get("share_moved", row["share"])
        reached = {True: "yes", False: "NO"}.get(row.get("reached"), "")  # type: ignore[call-overload]
        cells.append([
            name, f"{row['p50']:.3f}", f"{row['p20']:.3f}-{row['p80']:.3f}", f"{row['gb_s']:.0f}", f"{share:.0%}",
            reached, _ratio(row, rows), f"{row['peak_nv']:.2f}",
        ])  # fmt: skip
    return cells


def print_report(state: State, say: Callable[[str], None]) -> None:
    for line in headline(state):
        say(line)
    steps = [
        [name, step["status"], f"{step['seconds']:.0f}", step["note"].splitlines()[0][:60] if step["note"] else ""]
        for name, step in state.data["steps"].items()
    ]
    show("steps", ("step", "status", "s", "note"), steps, say)
    rows = timed(state)
    if rows:
        names = ("p50 ms", "p20-p80", "GB/s", "of copy", "goal", "x naive", "N.V")
        show("loss and gradient; GB/s of 3 N.V, of copy: bytes moved", ("", *names), time_cells(rows), say)


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def write_tables(state: State, folder: Path) -> None:
    """times.csv and correctness.csv, whatever there is so far."""
    write_csv(folder / "times.csv", TIME_COLUMNS, timed(state))
    write_csv(folder / "correctness.csv", CORRECT_COLUMNS, list(state.rows("correctness").values()))


def draw(state: State, path: Path) -> str:
    """Share of the copy's bandwidth, a panel a dtype. Returns why there is no picture, or ""."""
    rows = [row for row in timed(state) if "p50" in row and row["provider"] != "copy"]
    if not rows:
        return "nothing was timed"
    if importlib.util.find_spec("matplotlib") is None:
        return "matplotlib is not installed"
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure, axes = plt.subplots(len(dtypes), 1, figsize=(9, 4 * len(dtypes)), squeeze=False, layout="constrained")
    for axis, dtype in zip(axes[:, 0], dtypes):
        chosen = [row for row in rows if row["dtype"] == dtype]
        for kind in dict.fromkeys((row["provider"], row["group"] == "streaming") for row in chosen):
            points = [row for row in chosen if (row["provider"], row["group"] == "streaming") == kind]
            points.sort(key=lambda row: row["vocab"])
            x, y = [row["vocab"] for row in points], [100 * row["share"] for row in points]
            axis.plot(x, y, "o--" if kind[1] else "o-", label=kind[0] + (" (streaming)" if kind[1] else ""))
        axis.axhline(85, color="black", linewidth=0.8, linestyle=":")
        axis.set(title=dtype, xlabel="vocabulary", ylabel="% of copy bandwidth, 3 N·V (value: 2)", xscale="log")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize="small", ncols=2)
    figure.suptitle(str(state.rows("facts").get("machine", {}).get("gpu", "")))
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return ""
