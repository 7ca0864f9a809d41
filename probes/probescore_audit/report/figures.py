"""Chooses what the charts of the audit of a training run show."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from probescore_audit.grouped import Estimate
from probescore_audit.label_plan import Floats
from probescore_audit.rates import draw_reference, interval
from probescore_audit.record_audit import ReadingAudit
from probescore_audit.recorded_run import FROZEN
from probescore_audit.report.charts import Cloud, Curve, curves, histograms, scatter, stacks
from probescore_audit.report.words import escaped, share
from probescore_audit.run_labels import FEWEST_LABELLED, LabelCounts
from probescore_audit.verdicts import Judgement

COLOURS = ("first", "second", "third", "fourth")
_MOST_POINTS = 500
_UNKNOWN = Estimate(np.nan, np.nan, np.nan)


def figure(svg: str, title: str, keys: Sequence[tuple[str, str]] = (), note: str = "") -> str:
    """Returns a chart as HTML with its title, the names of its colours, and a remark. A key whose colour ends with ``line`` stands for a
    dashed line.
    """
    named = "".join(f'<span class="key {colour}">{escaped(name)}</span>' for colour, name in keys)
    return f"<figure><h3>{escaped(title)}</h3>{svg}<figcaption>{named}{escaped(note)}</figcaption></figure>"


def by_step(audits: Sequence[ReadingAudit]) -> list[str]:
    """Draws how frequent the behaviour is, recall, false alarms and AUROC by step, for each reading (whose activations a probe reads)."""
    shown = [each for each in audits if each.audit.windows]
    if not shown:
        return []
    last = max(int(each.recorded.run.step[-1]) for each in shown)
    first = min(int(each.recorded.run.step[0]) for each in shown)
    marks = [(each.audit.alarms[0].step, f"alarm: {each.recorded.reading}") for each in shown if each.audit.alarms]
    rng = np.random.default_rng(0)
    before = draw_reference(shown[0].reference.counts, rng)
    keys = [(COLOURS[number % 4], each.recorded.reading) for number, each in enumerate(shown)]
    line = ("soft line", "before training")
    asked: list[tuple[str, Callable[[Judgement], Estimate], Callable[[LabelCounts], int], Estimate, tuple[float, float] | None]] = [
        ("Rollouts with the behaviour", lambda found: found.positive_rate, _all_labels, interval(before.positive_rate), None),
        (
            "Recall: flagged of those with the behaviour",
            lambda found: found.recall,
            lambda seen: seen.positives,
            interval(before.recall),
            (0.0, 1.02),
        ),
        (
            "False alarms: flagged of those without",
            lambda found: found.false_positive_rate,
            lambda seen: seen.negatives,
            interval(before.false_positive_rate),
            None,
        ),
        (
            "AUROC (approximate)",
            lambda found: found.auroc,
            lambda seen: min(seen.positives, seen.negatives),
            shown[0].reference.counts.auroc,
            (0.0, 1.02),
        ),
    ]
    drawn = []
    for title, estimate, labelled, reference, y_range in asked:
        series = [_by_window(each, estimate, labelled, reference, COLOURS[number % 4]) for number, each in enumerate(shown)]
        svg = curves(
            series,
            title=f"{title}, by step",
            x_range=(first, last),
            y_range=y_range,
            levels=[(reference.value, "soft")],
            marks=marks if title.startswith(("Recall", "Rollouts")) else (),
            y_text=share if not title.startswith("AUROC") else "{:g}".format,
        )
        drawn.append(figure(svg, title, [*keys, line]))
    return drawn


def fall(each: ReadingAudit) -> str:
    """Draws what became of the rollouts with the behaviour in each window of training steps: flagged, missed, or gone."""
    windows = each.audit.windows
    before = interval(draw_reference(each.reference.counts, np.random.default_rng(0)).positive_rate).value
    rate, missed = (
        np.array([getattr(window.judgement, name).value for window in windows], np.float64) for name in ("positive_rate", "missed")
    )
    missed = np.minimum(missed, rate)
    svg = stacks(
        [(window.first_step, window.last_step) for window in windows],
        [("first", rate - missed), ("second", missed), ("gone", np.maximum(0.0, before - rate))],
        title=f"What became of the behaviour, {each.recorded.reading}",
        x_range=(float(each.recorded.run.step[0]), float(each.recorded.run.step[-1] + 1)),  # a bar ends where the step after it begins
        level=(before, "soft"),
        y_text=share,
    )
    keys = [("first", "there and flagged"), ("second", "there and missed"), ("gone", "gone"), ("soft line", "before training")]
    return figure(svg, f"What became of the behaviour: {each.recorded.reading}", keys, "Share of all rollouts, in each window.")


def distributions(each: ReadingAudit) -> str:
    """Draws how scores are distributed: before training, in the last window of steps, and of labelled positives in that window."""
    run, labels, reference = each.recorded.run, each.recorded.labels, each.reference
    first = each.audit.windows[-1].first_step
    recent = run.scores[run.step >= first]
    chosen = labels.positive & (run.step[labels.rollout] >= first)
    before = reference.scores[reference.random]
    layers = [Cloud("gone", before, np.ones(len(before))), Cloud("first", recent, np.ones(len(recent)))]
    keys = [("gone", "before training"), ("first", f"from step {first} on")]
    if chosen.any():
        layers.append(Cloud("second", run.scores[labels.rollout[chosen]], 1 / labels.inclusion[chosen]))
        keys.append(("second", f"of these, with the behaviour ({int(chosen.sum())} labelled)"))
    svg = histograms(layers, run.threshold, title=f"Distribution of scores, {each.recorded.reading}")
    return figure(svg, f"Scores: {each.recorded.reading}", keys, "Each of area 1.")


def evidence(each: ReadingAudit) -> str:
    """Draws the evidence of the monitors that a probe misses more than it may, by step."""
    watches = each.audit.watches
    series = [
        Curve(colour, watch.step.astype(np.float64), *[watch.log_evidence / np.log(10)] * 3)
        for watch, colour in zip(watches, COLOURS, strict=False)
    ]
    top = watches[0].enough / float(np.log(10))
    highest = max([top, *(float(curve.value.max()) for curve in series if len(curve.value))])
    lowest = min([-1.0, *(float(curve.value.min()) for curve in series if len(curve.value))])
    svg = curves(
        series,
        title=f"Evidence of the monitors, {each.recorded.reading}",
        x_range=(float(each.recorded.run.step[0]), float(each.recorded.run.step[-1])),
        y_range=(max(lowest, -3.0), min(highest, 4 * top) * 1.1),
        levels=[(top, "soft")],
        y_text=lambda value: f"10^{value:g}",
    )
    keys = [
        (colour, f"{watch.monitor} ({'at least' if watch.monitor == 'recall' else 'at most'} {share(watch.bound)})")
        for watch, colour in zip(watches, COLOURS, strict=False)
    ]
    return figure(svg, f"Evidence of the monitors: {each.recorded.reading}", [*keys, ("soft line", "alarm")])


def readings_against_each_other(frozen: ReadingAudit, other: ReadingAudit) -> str:
    """Draws the scores of rollouts of the last window of training steps under two readings (whose activations the probe reads)."""
    places = {(row.step, row.rollout): index for index, row in enumerate(other.recorded.rollouts)}
    first = frozen.audit.windows[-1].first_step
    own = [index for index in np.flatnonzero(frozen.recorded.run.step >= first).tolist() if _key(frozen, index) in places]
    labels = frozen.recorded.labels
    said = dict(zip(labels.rollout.tolist(), labels.positive.tolist(), strict=True))
    chosen = np.random.default_rng(0).permutation(np.array([index for index in own if index not in said], np.int64))[:_MOST_POINTS].tolist()
    kinds = [("soft", chosen), ("first", [at for at in own if said.get(at) is False]), ("second", [at for at in own if said.get(at)])]
    clouds = [
        Cloud(
            colour,
            frozen.recorded.run.scores[np.array(members, np.int64)],
            _scores(other, [places[_key(frozen, index)] for index in members]),
        )
        for colour, members in kinds
    ]
    svg = scatter(
        clouds,
        title=f"Scores on {FROZEN} and on {other.recorded.reading}",
        x_text=f"score, {FROZEN}",
        y_text=f"score, {other.recorded.reading}",
        x_line=frozen.recorded.run.threshold,
        y_line=other.recorded.run.threshold,
    )
    keys = [("second", "with the behaviour"), ("first", "without"), ("soft", "not labelled")]
    return figure(svg, f"{FROZEN} against {other.recorded.reading}", keys, f"From step {first} on; the lines are thresholds.")


def _all_labels(seen: LabelCounts) -> int:
    return seen.positives + seen.negatives


def _by_window(
    each: ReadingAudit,
    estimate: Callable[[Judgement], Estimate],
    labelled: Callable[[LabelCounts], int],
    before: Estimate,
    colour: str,
) -> Curve:
    """Returns an estimate of the model before training and of each window in which enough rollouts are labelled."""
    judged = [window.judgement for window in each.audit.windows]
    found = [before, *(estimate(one) if labelled(one.seen) >= FEWEST_LABELLED else _UNKNOWN for one in judged)]
    x = np.array([float(each.recorded.run.step[0]), *((window.first_step + window.last_step) / 2 for window in each.audit.windows)])
    value, low, high = (np.array([getattr(one, name) for one in found], np.float64) for name in ("value", "low", "high"))
    return Curve(colour, x, value, low, high)


def _scores(each: ReadingAudit, places: list[int]) -> Floats:
    return each.recorded.run.scores[np.array(places, np.int64)]


def _key(each: ReadingAudit, index: int) -> tuple[int, str]:
    row = each.recorded.rollouts[index]
    return row.step, row.rollout
