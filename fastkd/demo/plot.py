"""The demo's figure: learning on dev rows, and the paired differences on test rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .compare import Difference

COLOUR = {"kd": "C0", "hard": "C1"}
KIND = {"kd": "KD + CE", "hard": "hard labels"}
STYLE = {"reused": "-", "fresh": "--"}


def plot_demo(
    curves: dict[str, dict[str, list[dict[str, Any]]]],
    labels: dict[str, str],
    differences: dict[str, dict[str, Difference]],
    path: Path,
    title: str,
) -> None:
    """Write the PNG.

    Args:
        curves: dev evaluations by regime and kind, each with ``tokens``, ``nll``, ``kl``, ``agreement``.
        labels: regimes in words.
        differences: KD + CE minus hard labels on the test rows, by regime and figure.
        path: PNG to write.
        title: over all panels.
    """
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    figure.suptitle(title, fontsize=12)
    panels = figure.subplots(2, 2).ravel()
    for axes, name, head, unit, scale in [
        (panels[0], "nll", "cross-entropy on dev rows", "nats per token", 1),
        (panels[1], "kl", "KL(teacher||student) on dev rows", "nats per token", 1),
        (panels[2], "agreement", "top-1 agreement with the teacher on dev rows", "% of tokens", 100),
    ]:
        for regime, kinds in curves.items():
            for kind, points in kinds.items():
                axes.plot(
                    [p["tokens"] / 1000 for p in points], [scale * p[name] for p in points], STYLE[regime], marker="o",
                    ms=4, color=COLOUR[kind], label=f"{KIND[kind]}, {labels[regime]}",
                )  # fmt: skip
        if name == "nll":
            first = next(iter(curves.values()))["kd"][0]
            axes.axhline(first["teacher_nll"], color="0.45", ls=":", label="teacher")
        axes.set_title(head, fontsize=10)
        axes.set_xlabel("training tokens, thousands", fontsize=9)
        axes.set_ylabel(unit, fontsize=9)
        axes.grid(True, alpha=0.3)
    panels[0].legend(fontsize=8)
    _plot_differences(panels[3], differences, labels)
    figure.savefig(path, dpi=110)


def _plot_differences(axes: Any, differences: dict[str, dict[str, Difference]], labels: dict[str, str]) -> None:
    """Points with 95 % bars; left of zero is in favour of KD for both figures."""
    ticks: list[int] = []
    names: list[str] = []
    for regime, by_figure in differences.items():
        for name, text, colour in [("nll", "nll", "C2"), ("kl", "KL to teacher", "C3")]:
            d, height = by_figure[name], -len(ticks)
            axes.errorbar(d.mean, height, xerr=d.half_width, fmt="o", color=colour, capsize=4)
            ticks.append(height)
            names.append(f"{text}\n{labels[regime]}")
    axes.axvline(0, color="0.45", lw=1)
    axes.set_yticks(ticks, names, fontsize=8)
    axes.set_ylim(-len(ticks) + 0.5, 0.5)
    axes.set_title("KD + CE minus hard labels, test rows, 95 % bars", fontsize=10)
    axes.set_xlabel("nats per token (below 0: KD + CE is ahead)", fontsize=9)
    axes.grid(True, axis="x", alpha=0.3)
