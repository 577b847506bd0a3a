"""The curves of a run as a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

TEACHER = "0.45"  # grey


def _panel(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("optimizer steps", fontsize=9)
    axes.set_ylabel(unit, fontsize=9)
    axes.grid(True, alpha=0.3)
    axes.tick_params(labelsize=8)


def plot_metrics(metrics: list[dict[str, Any]], path: Path, title: str) -> None:
    """Training loss, gradient norm, and the held-out figures against optimizer steps.

    Args:
        metrics: lines of metrics.jsonl.
        path: PNG to write.
        title: over all panels.
    """
    train = [m for m in metrics if m["event"] == "train"]
    held_out = [m for m in metrics if m["event"] == "eval"]
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    figure.suptitle(title, fontsize=11)
    (loss, nll), (kl, agreement) = figure.subplots(2, 2)
    steps = [m["step"] for m in train]
    loss.plot(steps, [m["loss"] for m in train], label="loss", color="C0")
    if any(m["kd"] is not None for m in train):
        loss.plot(steps, [m["kd"] for m in train], label="divergence, unweighted", color="C1", lw=1)
    loss.plot(steps, [m["ce"] for m in train], label="cross-entropy, unweighted", color="C2", lw=1)
    loss.legend(fontsize=8)
    _panel(loss, "training loss", "nats per token")
    for axes, key, name, unit in [
        (nll, "nll", "held-out cross-entropy", "nats per token"),
        (kl, "kl", "held-out KL(teacher||student), T = 1", "nats per token"),
        (agreement, "agreement", "held-out top-1 agreement with the teacher", "share of tokens"),
    ]:
        _panel(axes, name, unit)
        if held_out:
            axes.plot(
                [m["step"] for m in held_out],
                [m[key] for m in held_out],
                "o-",
                ms=3,
                color="C0",
                label="student",
            )
        else:
            axes.text(0.5, 0.5, "no held-out text (data.eval)", ha="center", transform=axes.transAxes, fontsize=9)
    if held_out and held_out[0].get("teacher_nll") is not None:
        nll.axhline(held_out[0]["teacher_nll"], color=TEACHER, ls="--", label="teacher")
        nll.legend(fontsize=8)
    figure.savefig(path, dpi=110)
