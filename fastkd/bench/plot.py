"""A picture of one run: time of each provider, a panel a dtype or shape."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .report import Result, machine

OURS, THEIRS = "#1b7f5c", "#8a8f98"


def draw(results: Sequence[Result], path: Path) -> bool:
    """Horizontal bars of p50 in ms with p20–p80; False, and no file, where nothing was timed."""
    panels: dict[str, list[Result]] = {}
    for result in results:
        if "p50" in result:
            title = f"{result['rows']} × {result['vocab']} {result['dtype']}, {result['divergence']}"
            panels.setdefault(f"{title}, {result['threads']} threads", []).append(result)
    if not panels:
        return False
    heights = [len(group) for group in panels.values()]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(9, 1.0 + sum(0.34 * h + 0.75 for h in heights)), squeeze=False,
        gridspec_kw={"height_ratios": heights}, layout="constrained",
    )  # fmt: skip
    for axis, (title, group) in zip(axes[:, 0], panels.items()):
        _draw_panel(axis, title, group)
    about = machine()
    figure.suptitle(f"{about['cpu']}, {about['isa']}, torch {about['torch']}: median of each provider", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def _draw_panel(axis, title: str, group: list[Result]) -> None:
    names = [result["provider"] for result in group]
    middle = [result["p50"] * 1e3 for result in group]
    below = [m - result["p20"] * 1e3 for m, result in zip(middle, group)]
    above = [result["p80"] * 1e3 - m for m, result in zip(middle, group)]
    colours = [OURS if name.startswith("fastkd") else THEIRS for name in names]
    axis.barh(names, middle, xerr=[below, above], color=colours, error_kw={"lw": 0.8})
    axis.set_xscale("log")
    axis.invert_yaxis()
    axis.set_title(title, fontsize=9, loc="left")
    axis.set_xlabel("milliseconds (log scale), bar: p20 – p80", fontsize=8)
    axis.tick_params(labelsize=8)
    for place, (value, result) in enumerate(zip(middle, group)):
        ratio = f"   {result['times_naive']:.1f}× naive" if result.get("times_naive") else ""
        axis.text(value, place, f"  {value:.3g} ms{ratio}", va="center", fontsize=7)
    axis.set_xlim(right=max(middle) * 6)
    axis.spines[["top", "right"]].set_visible(False)
