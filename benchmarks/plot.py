"""The ratios as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.compare import Comparison
from benchmarks.variants import OURS, VARIANTS

mpl.use("Agg")

_OURS, _FLOOR, _OTHERS = "#c8460c", "#b8b8be", "#4a6a8a"


def save_plot(path: Path, comparisons: Sequence[Comparison], caption: str) -> None:
    """One panel a load: bars of the medians, with their range."""
    shown = [comparison for comparison in comparisons if "a" in comparison.records]
    heights = [len(comparison.records) + 1.2 for comparison in shown]
    figure = Figure(figsize=(9, 0.34 * sum(heights) + 0.6), layout="constrained")
    panels = figure.subplots(len(shown), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, comparison in zip(panels, shown, strict=True):
        names = list(comparison.records)
        spreads = [spread for name in names if (spread := comparison.over(name, "a")) is not None]
        middles = [spread.median for spread in spreads]
        ranges = [[spread.median - spread.min for spread in spreads], [spread.max - spread.median for spread in spreads]]
        colours = [_OURS if name in OURS else _FLOOR if name == "floor" else _OTHERS for name in names]
        panel.barh([VARIANTS[name].title for name in names], middles, xerr=ranges, color=colours, ecolor="#222", capsize=2, height=0.7)
        for row, spread in enumerate(spreads):
            panel.annotate(f"{spread.median:.1f}×", (spread.max, row), (4, 0), textcoords="offset points", va="center", fontsize=8)
        panel.invert_yaxis()
        panel.margins(x=0.08)
        panel.set_title(comparison.load.name, loc="left", fontsize=10, fontweight="bold")
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("times as fast as A (median of repetitions, with range)", fontsize=9)
    figure.suptitle(caption, fontsize=9, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
