"""Draws the figures of the report on a fitted probe, as SVG without scripts, in the colours of the page's light or dark theme."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from probescore_audit import Estimate
from probescore_audit.grouped import CalibrationBin
from probescore_probes.fitting.cross_validation import CurvePoint

# Placeholder colours that no figure uses otherwise; each is replaced by a colour of the page.
_INK, _SOFT, _LINE, _POSITIVE, _NEGATIVE, _THIRD, _FOURTH = "#010203", "#040506", "#070809", "#0a0b0c", "#0d0e0f", "#101112", "#131415"
_COLOURS = {
    _INK: "var(--ink)",
    _SOFT: "var(--soft)",
    _LINE: "var(--line)",
    _POSITIVE: "var(--positive)",
    _NEGATIVE: "var(--negative)",
    _THIRD: "var(--third)",
    _FOURTH: "var(--fourth)",
}
_SAYS = {
    "layers": "AUROC at each tap, by kind of probe and pooling",
    "kinds": "AUROC of each kind of probe, with intervals",
    "baselines": "AUROC of the probe, of baselines and of controls, with intervals",
    "slices": "AUROC on each slice, with intervals",
    "roc": "True-positive rate by false-positive rate",
    "histogram": "Histograms of the served scores of positive and negative rollouts",
    "learning": "AUROC by the number of groups fitted on",
    "calibration": "Share of positives by served probability",
}
_WIDE = 5.6
"""Width in inches of a figure that has a row for itself: as narrow as a telephone can show legibly."""
_SERIES = (_POSITIVE, _NEGATIVE, _THIRD, _FOURTH)
_STYLE: Any = {  # matplotlib types its settings by name
    "svg.fonttype": "none",
    "svg.hashsalt": "probescore",
    "font.size": 9.5,
    "text.color": _INK,
    "axes.labelcolor": _SOFT,
    "axes.edgecolor": _SOFT,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "grid.color": _LINE,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "axes.axisbelow": True,
}


def layers(curves: Mapping[str, Sequence[CurvePoint]], chosen: CurvePoint) -> str:
    """Draws the AUROC at each tap with one standard error, as a line for each kind of probe and pooling."""
    with mpl.rc_context(_STYLE):
        figure, axes = _new(_WIDE, 2.8)
        names = list(dict.fromkeys(point.tap for points in curves.values() for point in points))
        series = [(kind, pool) for kind, points in curves.items() for pool in dict.fromkeys(point.pool for point in points)]
        for number, (kind, pool) in enumerate(series):
            points = [point for point in curves[kind] if point.pool == pool]
            x = np.array([names.index(point.tap) for point in points])
            means, errors = (np.array([getattr(point, name) for point in points]) for name in ("mean", "standard_error"))
            colour = _SERIES[number % len(_SERIES)]
            axes.plot(x, means, color=colour, marker="o", markersize=3, linewidth=1.4, label=f"{kind}, {pool}")
            axes.fill_between(x, means - errors, means + errors, color=colour, alpha=0.15, linewidth=0)
        at = names.index(chosen.tap)
        axes.axvline(at, color=_INK, linewidth=0.8, linestyle=":")
        axes.annotate("chosen", (at, 1), xycoords=("data", "axes fraction"), xytext=(3, -9), textcoords="offset points", fontsize=8)
        hooks = {name.partition(".")[0] for name in names}
        one = len(hooks) == 1 and len(names) > 1  # then its blocks are enough
        shown = range(0, len(names), max(1, len(names) // (15 if one else 8)))
        if one:
            axes.set_xticks(list(shown), [names[place].partition(".")[2] for place in shown])
            axes.set_xlabel(f"{hooks.pop()}, block")
        else:
            axes.set_xticks(list(shown), [names[place] for place in shown], rotation=20, ha="right")
        axes.set_ylabel("AUROC, cross-validated")
        axes.legend(fontsize=8, loc="lower right")
        return _svg(figure, "layers")


def roc(rates: tuple[NDArray[np.float64], NDArray[np.float64]], false_positive_rate: float, negatives: int) -> str:
    """Draws the ROC curve: true- by false-positive rate, the latter on a logarithmic scale, since thresholds lie at small rates."""
    with mpl.rc_context(_STYLE):
        figure, axes = _new(3.5, 3.0)
        lowest = 0.5 / max(1, negatives)
        axes.step(np.maximum(rates[0], lowest), rates[1], where="post", color=_POSITIVE, linewidth=1.6)
        even = np.geomspace(lowest, 1, 50)
        axes.plot(even, even, color=_SOFT, linewidth=0.8, linestyle="--")
        axes.axvline(false_positive_rate, color=_INK, linewidth=0.8, linestyle=":")
        axes.set_xscale("log")
        axes.set_xlim(lowest, 1)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("false-positive rate (log)")
        axes.set_ylabel("true-positive rate")
        return _svg(figure, "roc")


def histogram(scores: NDArray[np.float64], positive: NDArray[np.bool_], threshold: float | None) -> str:
    """Draws histograms of the served scores of positive and of negative rollouts."""
    with mpl.rc_context(_STYLE):
        figure, axes = _new(3.5, 3.0)
        edges = np.histogram_bin_edges(scores, bins=min(30, max(8, len(scores) // 8)))
        for kind, colour, name in ((False, _NEGATIVE, "negative"), (True, _POSITIVE, "positive")):
            axes.hist(scores[positive == kind], bins=list(edges), color=colour, alpha=0.55, label=name)
        if threshold is not None:
            axes.axvline(threshold, color=_INK, linewidth=1, linestyle=":", label="threshold")
        axes.set_xlabel("served score")
        axes.set_ylabel("test rollouts")
        axes.legend(fontsize=8)
        return _svg(figure, "histogram")


def estimates(found: Mapping[str, Estimate], name: str, highlighted: Sequence[str] = ()) -> str:
    """Draws several AUROCs, one on each line, with their intervals and a mark at chance level."""
    with mpl.rc_context(_STYLE):
        known = {title: estimate for title, estimate in found.items() if not np.isnan(estimate.value)}
        figure, axes = _new(_WIDE, 0.7 + 0.27 * max(1, len(known)))
        for row, (title, estimate) in enumerate(known.items()):
            colour = _POSITIVE if title in highlighted else _NEGATIVE
            axes.plot([estimate.low, estimate.high], [row, row], color=colour, linewidth=2.4, alpha=0.5, solid_capstyle="butt")
            axes.plot([estimate.value], [row], color=colour, marker="o", markersize=5)
        axes.axvline(0.5, color=_SOFT, linewidth=0.8, linestyle="--")
        axes.set_yticks(range(len(known)), [_cut(title) for title in known])
        axes.tick_params(axis="y", colors=_INK)
        axes.set_ylim(len(known) - 0.5, -0.5)
        axes.set_xlim(min([0.4, *(each.low for each in known.values())]) - 0.02, 1.01)
        axes.set_xlabel("AUROC")
        return _svg(figure, name)


def learning(points: Sequence[tuple[int, Estimate]]) -> str:
    """Draws the learning curve: AUROC by the number of groups of rollouts that the probe was fitted on."""
    with mpl.rc_context(_STYLE):
        figure, axes = _new(3.5, 2.8)
        x = [groups for groups, _ in points]
        axes.plot(x, [each.value for _, each in points], color=_POSITIVE, marker="o", markersize=3, linewidth=1.4)
        axes.fill_between(x, [each.low for _, each in points], [each.high for _, each in points], color=_POSITIVE, alpha=0.15, linewidth=0)
        axes.axhline(0.5, color=_SOFT, linewidth=0.8, linestyle="--")
        axes.set_xscale("log")
        axes.set_xticks(x, [str(groups) for groups in x])
        axes.minorticks_off()
        axes.set_xlabel("groups fitted on")
        axes.set_ylabel("AUROC, held-out groups")
        return _svg(figure, "learning")


def calibration(bins: Sequence[CalibrationBin]) -> str:
    """Draws the calibration of a probe: the share of positive rollouts by the probability that was served."""
    with mpl.rc_context(_STYLE):
        figure, axes = _new(3.5, 2.8)
        axes.plot([0, 1], [0, 1], color=_SOFT, linewidth=0.8, linestyle="--")
        sizes = [12 + 60 * each.rollouts / max(one.rollouts for one in bins) for each in bins]
        axes.plot([each.mean for each in bins], [each.share for each in bins], color=_POSITIVE, linewidth=1)
        axes.scatter([each.mean for each in bins], [each.share for each in bins], s=sizes, color=_POSITIVE)
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("served probability")
        axes.set_ylabel("share of positives")
        return _svg(figure, "calibration")


def _new(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    return figure, axes


def _cut(title: str) -> str:
    return title if len(title) <= 44 else title[:43] + "…"


def _svg(figure: Figure, name: str) -> str:
    """Returns a figure's ``<svg>`` element, with ids unique to the figure and the colours of the page.

    Matplotlib escapes the text in the figure.
    """
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    for stand_in, colour in _COLOURS.items():
        svg = svg.replace(stand_in, colour)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{_SAYS[name]}" class="figure" ', 1)
