"""Draws the charts of the audit of a training run as SVG without scripts, in the colours of the page's light or dark theme."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from probescore_audit.label_plan import Floats
from probescore_audit.report.words import escaped

_WIDTH, _HEIGHT = 440.0, 230.0
_MOST_DOTS = 40
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 430.0, 14.0, 194.0


@dataclass(frozen=True, eq=False)
class Curve:
    """Value object with numbers by training step, and the band around them.

    Attributes:
        colour: name of the colour, a class of the page's style.
        x: step of each number, ``(n,)``.
        value: the numbers, ``(n,)``; NaN where one is not known.
        low: lower edge of the band, ``(n,)``.
        high: upper edge of the band, ``(n,)``.
    """

    colour: str
    x: Floats
    value: Floats
    low: Floats
    high: Floats


@dataclass(frozen=True, eq=False)
class Cloud:
    """Value object with points of a scatter plot, or with values of a histogram and their weights.

    Attributes:
        colour: name of the colour, a class of the page's style.
        x: values on the horizontal axis, ``(n,)``.
        y: values on the vertical axis, or weights, ``(n,)``.
    """

    colour: str
    x: Floats
    y: Floats


@dataclass(frozen=True)
class _Frame:
    """Value object with the ranges of a chart's axes; places values in the chart."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * (value - self.x_low) / (self.x_high - self.x_low)

    def y(self, value: float) -> float:
        kept = min(max(value, self.y_low), self.y_high)
        return _BOTTOM - (_BOTTOM - _TOP) * (kept - self.y_low) / (self.y_high - self.y_low)


def curves(
    series: Sequence[Curve],
    *,
    title: str,
    x_range: tuple[float, float],
    y_range: tuple[float, float] | None = None,
    levels: Sequence[tuple[float, str]] = (),
    marks: Sequence[tuple[float, str]] = (),
    y_text: Callable[[float], str] = "{:g}".format,
) -> str:
    """Draws numbers by training step, each with its band.

    Args:
        series: the numbers.
        title: what the chart shows, for those who cannot see it.
        x_range: first and last step of the axis.
        y_range: ends of the vertical axis; from 0 to a little above all bands by default.
        levels: dashed horizontal lines, each with its colour.
        marks: vertical lines at steps, each with its text.
        y_text: form of the labels of the vertical axis.
    """
    if y_range is None:
        known = [float(np.nanmax(each.high)) for each in series if len(each.x) and not np.isnan(each.high).all()]
        y_range = (0.0, 1.08 * max([*known, *(level for level, _ in levels), 1e-3]))
    frame = _Frame(x_range[0], max(x_range[1], x_range[0] + 1), *y_range)
    parts = [*_axes(frame, "step", y_text)]
    for level, colour in levels:
        parts.append(f'<line class="{colour} dashed" x1="{_LEFT}" x2="{_RIGHT}" y1="{frame.y(level):.1f}" y2="{frame.y(level):.1f}"/>')
    for each in series:
        parts += _curve(each, frame)
    for row, (step, text) in enumerate(marks):
        x = frame.x(step)
        anchor = "end" if x > _RIGHT - 90 else "start"
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_BOTTOM}"/>')
        parts.append(
            f'<text class="mark" x="{x + (4 if anchor == "start" else -4):.1f}" y="{_TOP + 34 + 14 * row:.1f}" text-anchor="{anchor}">'
            f"{escaped(text)}</text>"
        )
    return _svg(title, parts)


def stacks(
    edges: Sequence[tuple[float, float]],
    layers: Sequence[tuple[str, Floats]],
    *,
    title: str,
    x_range: tuple[float, float],
    level: tuple[float, str],
    y_text: Callable[[float], str],
) -> str:
    """Draws a bar for each window of training steps, made of one layer on another.

    Args:
        edges: first and last step of each window.
        layers: from the bottom, the colour of each layer and its heights, one for each window.
        title: what the chart shows, for those who cannot see it.
        x_range: first and last step of the axis.
        level: a dashed horizontal line, with its colour.
        y_text: form of the labels of the vertical axis.
    """
    total = np.sum([heights for _, heights in layers], axis=0) if layers else np.zeros(0)
    frame = _Frame(x_range[0], max(x_range[1], x_range[0] + 1), 0.0, 1.08 * max([*total.tolist(), level[0], 1e-3]))
    parts = [*_axes(frame, "step", y_text)]
    base = np.zeros(len(edges))
    for colour, heights in layers:
        for (first, last), below, height in zip(edges, base, heights, strict=True):
            left, right = frame.x(first), frame.x(last + 1)
            top, bottom = frame.y(below + height), frame.y(below)
            parts.append(
                f'<rect class="fill {colour}" x="{left + 1:.1f}" y="{top:.1f}" width="{max(1.0, right - left - 2):.1f}" '
                f'height="{max(0.0, bottom - top):.1f}"/>'
            )
        base = base + heights
    y = frame.y(level[0])
    parts.append(f'<line class="{level[1]} dashed over" x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    return _svg(title, parts)


def histograms(layers: Sequence[Cloud], threshold: float, *, title: str) -> str:
    """Draws how scores are distributed, as a curve of shares for each layer, whose weights are scaled to a sum of 1."""
    every = np.concatenate([layer.x for layer in layers]) if layers else np.zeros(1)
    low, high = (float(end) for end in np.percentile(np.append(every, threshold), [0.2, 99.8]))
    bins = np.linspace(low, high if high > low else low + 1, 37)
    heights = [np.histogram(np.clip(layer.x, low, high), bins, weights=layer.y)[0] for layer in layers]
    heights = [height / max(float(height.sum()), 1e-12) for height in heights]
    frame = _Frame(float(bins[0]), float(bins[-1]), 0.0, 1.08 * max([float(height.max()) for height in heights] or [1.0]))
    parts = [*_axes(frame, "score", lambda value: f"{100 * value:.0f}%")]
    for layer, height in zip(layers, heights, strict=True):
        path = f"M{frame.x(bins[0]):.1f},{_BOTTOM}"
        for left, right, value in zip(bins[:-1], bins[1:], height, strict=True):
            path += f"L{frame.x(left):.1f},{frame.y(value):.1f}L{frame.x(right):.1f},{frame.y(value):.1f}"
        path += f"L{frame.x(bins[-1]):.1f},{_BOTTOM}"
        parts.append(f'<path class="band {layer.colour}" d="{path}Z"/><path class="curve {layer.colour}" d="{path}"/>')
    x = frame.x(threshold)
    parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_BOTTOM}"/>')
    parts.append(f'<text class="mark" x="{x - 4:.1f}" y="{_TOP + 9}" text-anchor="end">threshold</text>')
    return _svg(title, parts)


def scatter(clouds: Sequence[Cloud], *, title: str, x_text: str, y_text: str, x_line: float, y_line: float) -> str:
    """Draws points: the scores of rollouts under two readings (whose activations the probe reads), with the thresholds."""
    x, y = (np.concatenate([getattr(cloud, axis) for cloud in clouds]) for axis in ("x", "y"))
    ends = [_padded(np.append(values, line)) for values, line in ((x, x_line), (y, y_line))]
    frame = _Frame(*ends[0], *ends[1])
    parts = [*_axes(frame, x_text, "{:g}".format), f'<text class="axis" x="{_LEFT}" y="{_TOP - 4}">{escaped(y_text)}</text>']
    for cloud in clouds:
        parts += [
            f'<circle class="fill {cloud.colour}" cx="{frame.x(a):.1f}" cy="{frame.y(b):.1f}" r="2.2"/>'
            for a, b in zip(cloud.x, cloud.y, strict=True)
        ]
    parts.append(f'<line class="mark" x1="{frame.x(x_line):.1f}" x2="{frame.x(x_line):.1f}" y1="{_TOP}" y2="{_BOTTOM}"/>')
    parts.append(f'<line class="mark" x1="{_LEFT}" x2="{_RIGHT}" y1="{frame.y(y_line):.1f}" y2="{frame.y(y_line):.1f}"/>')
    return _svg(title, parts)


def _curve(curve: Curve, frame: _Frame) -> Iterator[str]:
    for run in _known_runs(curve.value):
        x = [frame.x(step) for step in curve.x[run].tolist()]
        value, low, high = ([frame.y(number) for number in part[run].tolist()] for part in (curve.value, curve.low, curve.high))
        upper, middle, lower = ([f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True)] for y in (high, value, low))
        yield f'<path class="band {curve.colour}" d="M{"L".join([*upper, *lower[::-1]])}Z"/>'
        yield f'<path class="curve {curve.colour}" d="M{"L".join(middle)}"/>'
        if len(x) <= _MOST_DOTS:
            for a, b, down, up in zip(x, value, low, high, strict=True):
                yield f'<line class="curve {curve.colour} thin" x1="{a:.1f}" x2="{a:.1f}" y1="{down:.1f}" y2="{up:.1f}"/>'
                yield f'<circle class="fill {curve.colour}" cx="{a:.1f}" cy="{b:.1f}" r="2.6"/>'


def _known_runs(values: Floats) -> Iterator[slice]:
    """Yields the stretches in which all of the values are known."""
    known = np.flatnonzero(~np.isnan(values))
    for part in np.split(known, np.flatnonzero(np.diff(known) > 1) + 1):
        if len(part):
            yield slice(int(part[0]), int(part[-1]) + 1)


def _padded(values: Floats) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    gap = 0.04 * (high - low) or 1.0
    return low - gap, high + gap


def _axes(frame: _Frame, x_name: str, y_text: Callable[[float], str]) -> Iterator[str]:
    for value in _ticks(frame.y_low, frame.y_high, 5):
        y = frame.y(value)
        yield f'<line class="grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="axis" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escaped(y_text(value).replace("-", "−"))}</text>'
    for value in _ticks(frame.x_low, frame.x_high, 6):
        yield f'<text class="axis" x="{frame.x(value):.1f}" y="{_BOTTOM + 16}" text-anchor="middle">{f"{value:g}".replace("-", "−")}</text>'
    yield f'<line class="base" x1="{_LEFT}" x2="{_RIGHT}" y1="{_BOTTOM}" y2="{_BOTTOM}"/>'
    yield f'<text class="axis" x="{_RIGHT}" y="{_BOTTOM + 31}" text-anchor="end">{escaped(x_name)}</text>'


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Returns round numbers between two numbers, at most so many."""
    raw = (high - low) / most
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _svg(title: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-label="{escaped(title)}">{"".join(parts)}</svg>'
