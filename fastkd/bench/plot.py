"""A picture of one run: time of each provider, a panel a preset and dtype."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from .report import Result, machine

OURS, THEIRS = "#1b7f5c", "#8a8f98"


# what tells the bars of one panel apart, besides the provider
VARYING = ("rows", "vocab", "divergence", "threads")


def _panels(results: Sequence[Result]) -> dict[tuple[str, str], list[Result]]:
    """(preset, dtype) -> what was timed; the copy only where a single shape is compared."""
    panels: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        if "p50" in result and (result["preset"] == "default" or result["provider"] != "copy"):
            panels.setdefault((result["preset"], result["dtype"]), []).append(result)
    return panels


def draw(results: Sequence[Result], path: Path) -> bool:
    """Horizontal bars of p50 in ms with p20 – p80; False, and no file, where nothing was timed."""
    panels = _panels(results)
    if not panels:
        return False
    heights = [len(group) + 2 for group in panels.values()]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(9, 0.6 + 0.26 * sum(heights)), squeeze=False,
        gridspec_kw={"height_ratios": heights}, layout="constrained",
    )  # fmt: skip
    for axis, ((_, dtype), group) in zip(axes[:, 0], panels.items()):
        _draw_panel(axis, dtype, group)
    about = machine()
    where = f"{about['cpu']}, {about['cores']} cores, {about['isa']}, torch {about['torch']}"
    figure.suptitle(f"Loss and gradient of the logits: median time\n{where}", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def _text(key: str, value: Any) -> str:
    return f"{value} threads" if key == "threads" else str(value)


def _names(group: list[Result]) -> tuple[str, list[str]]:
    """The title of a panel, from what its results share, and the name of each bar, from what they do not."""
    vary = [key for key in VARYING if len({result[key] for result in group}) > 1]
    if "rows" in vary or "vocab" in vary:
        vary = [key for key in vary if key not in ("rows", "vocab")]
        shape = lambda result: f"{result['rows']} × {result['vocab']}"  # noqa: E731
        title = [_text(key, group[0][key]) for key in ("divergence", "threads") if key not in vary]
    else:
        shape = lambda result: ""  # noqa: E731
        first = group[0]
        title = [f"{first['rows']} × {first['vocab']}"]
        title += [_text(key, first[key]) for key in ("divergence", "threads") if key not in vary]
    names = [
        "  ".join(part for part in (shape(r), *(_text(key, r[key]) for key in vary), r["provider"]) if part)
        for r in group
    ]
    return ", ".join(title), names


def _draw_panel(axis: Axes, dtype: str, group: list[Result]) -> None:
    title, names = _names(group)
    middle = [result["p50"] * 1e3 for result in group]
    below = [m - result["p20"] * 1e3 for m, result in zip(middle, group)]
    above = [result["p80"] * 1e3 - m for m, result in zip(middle, group)]
    places = range(len(group))
    colours = [OURS if result["provider"].startswith("fastkd") else THEIRS for result in group]
    axis.barh(places, middle, xerr=[below, above], color=colours, error_kw={"lw": 0.8})
    axis.set_yticks(places, names)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.invert_yaxis()
    axis.set_title(f"{dtype}, {title}", fontsize=9, loc="left")
    axis.set_xlabel("milliseconds (log scale), line: p20 – p80", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.margins(y=0.02)
    for place, result in enumerate(group):
        median = f"{middle[place]:.0f}" if middle[place] >= 100 else f"{middle[place]:.3g}"
        ratio = f"   {result['times_naive']:.1f}× naive" if result.get("times_naive", 1) != 1 else ""
        axis.text(result["p80"] * 1e3, place, f"  {median} ms{ratio}", va="center", fontsize=7)
    axis.set_xlim(min(middle) / 3, max(middle) * 6)
    axis.spines[["top", "right"]].set_visible(False)
