"""Audits one probe over a whole training run: estimates for each window of steps, alarms in between, and a verdict at the end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from probescore_audit.alarms import MissedMonitor, RecallMonitor
from probescore_audit.label_plan import Floats, Indices
from probescore_audit.rates import ReferenceCounts, draw_reference, interval
from probescore_audit.run_labels import LabelledWindow, RunLabels, RunScores, latest_window
from probescore_audit.verdicts import Judgement, judge

WINDOW_LABELS = 320
"""Number of labels that a window of steps has at least: 10 steps of 32."""
_RECALL_MARGIN = 0.05
_LOWEST_FLOOR, _HIGHEST_CEILING = 0.01, 0.5


@dataclass(frozen=True)
class Alarm:
    """An alarm of a monitor: evidence that a probe misses more of the behaviour than it did before training.

    Attributes:
        monitor: ``"recall"`` or ``"missed rate"``.
        bound: the recall that the probe should have at least, or the missed rate that it should have at most.
        step: the training step of the alarm.
    """

    monitor: str
    bound: float
    step: int


@dataclass(frozen=True, eq=False)
class Watch:
    """Value object with what a monitor saw in a training run.

    Attributes:
        monitor: ``"recall"`` or ``"missed rate"``.
        bound: the recall that the probe should have at least, or the missed rate that it should have at most.
        step: the labelled training steps, ``(n,)`` int64.
        log_evidence: logarithm of the evidence that the bound is broken, after each of these steps, ``(n,)`` float64.
        enough: the logarithm of the evidence at which the monitor raises an alarm.
        alarm_step: the training step of the alarm; ``None`` if there was none.
    """

    monitor: str
    bound: float
    step: Indices
    log_evidence: Floats
    enough: float
    alarm_step: int | None


@dataclass(frozen=True)
class AlarmBounds:
    """Value object with the bounds at which monitors accept a probe in training; beyond these they raise alarms.

    Attributes:
        recall: lowest acceptable recall.
        missed: highest acceptable missed rate, which is the share of all rollouts that are positive and not flagged.
    """

    recall: float
    missed: float


@dataclass(frozen=True)
class JudgedWindow:
    """Value object with a window of consecutive training steps, both ends included, and the judgement on a probe in these steps."""

    first_step: int
    last_step: int
    judgement: Judgement


@dataclass(frozen=True)
class RunAudit:
    """Value object with the audit of one probe over a training run.

    Attributes:
        windows: judgements on consecutive windows of steps that do not overlap, the last of which ends with the run's last labelled step;
            empty if the run has too few labels.
        bounds: the bounds of the monitors.
        watches: what each monitor saw.
        unlabelled_steps: number of steps of the run without any label; the monitors do not see these.
    """

    windows: tuple[JudgedWindow, ...]
    bounds: AlarmBounds
    watches: tuple[Watch, ...]
    unlabelled_steps: int

    @property
    def alarms(self) -> tuple[Alarm, ...]:
        """Returns the first alarm of each monitor that raised one, by step."""
        raised = [Alarm(watch.monitor, watch.bound, watch.alarm_step) for watch in self.watches if watch.alarm_step is not None]
        return tuple(sorted(raised, key=lambda alarm: alarm.step))

    @property
    def final(self) -> Judgement | None:
        """Returns the judgement on a probe in the last window of training steps; ``None`` if the run has too few labels."""
        return self.windows[-1].judgement if self.windows else None


def audit_run(
    run: RunScores,
    labels: RunLabels,
    reference: ReferenceCounts,
    *,
    planned_steps: int,
    alpha: float = 0.05,
    audits: int = 1,
    window_labels: int = WINDOW_LABELS,
    bounds: AlarmBounds | None = None,
    seed: int = 0,
) -> RunAudit:
    """Audits one probe over a training run, from labels of some of the run's rollouts.

    Args:
        run: the probe's scores of the run's rollouts.
        labels: labels of some of them, drawn as ``plan_labels`` draws.
        reference: labelled rollouts of the model before training.
        planned_steps: number of training steps that the run was planned for.
        alpha: largest chance that any audit of the run raises a false alarm.
        audits: number of audits of the run, one for each probe and each model whose activations it reads, among which ``alpha`` is shared
            out.
        window_labels: number of labels of a window, at least.
        bounds: bounds of the monitors; those of ``alarm_bounds`` by default.
        seed: seed of the draws from posteriors.

    Raises:
        ValueError: an argument is out of its range.
    """
    if audits < 1:
        raise ValueError(f"audits: {audits}; give the number of probes times readings that are audited")
    windows = tuple(
        JudgedWindow(window.first_step, window.last_step, judge(window, reference, seed=seed))
        for window in _windows(run, labels, window_labels)
    )
    watched = alarm_bounds(reference, seed=seed) if bounds is None else bounds
    watches = _watches(run, labels.planned(), watched, planned_steps, alpha / (2 * audits))
    labelled_steps = len(np.unique(run.step[labels.rollout]))
    return RunAudit(windows, watched, watches, len(np.unique(run.step)) - labelled_steps)


def alarm_bounds(reference: ReferenceCounts, *, seed: int = 0) -> AlarmBounds:
    """Returns the bounds at which monitors accept a probe in training, from labelled rollouts of the model before training.

    The lowest acceptable recall is the lower end of the 95% interval of the recall before training, less 0.05. The highest acceptable
    missed rate is twice the missed rate before training, plus 0.01.
    """
    before = draw_reference(reference, np.random.default_rng(seed))
    return AlarmBounds(
        recall=max(_LOWEST_FLOOR, interval(before.recall).low - _RECALL_MARGIN),
        missed=min(_HIGHEST_CEILING, 2 * interval(before.missed).value + 0.01),
    )


def _windows(run: RunScores, labels: RunLabels, least_labels: int) -> list[LabelledWindow]:
    """Cuts a training run into windows of steps, from its end backwards, and returns the windows in the order of the steps."""
    found: list[LabelledWindow] = []
    if not len(labels.rollout):
        return found
    end = int(run.step[labels.rollout[-1]])
    while (window := latest_window(run, labels, end, least_labels)) is not None:
        found.append(window)
        end = window.first_step - 1
    return found[::-1]


def _watches(run: RunScores, labels: RunLabels, bounds: AlarmBounds, planned_steps: int, alpha: float) -> tuple[Watch, ...]:
    recall, missed = RecallMonitor(bounds.recall, planned_steps, alpha), MissedMonitor(bounds.missed, planned_steps, alpha)
    flagged = run.flagged[labels.rollout]
    caught_floor, missed_floor = (labels.floor & labels.positive & which for which in (flagged, ~flagged))
    unseen = labels.positive & ~flagged
    steps = run.step[labels.rollout]
    labelled = np.unique(steps)
    evidence = np.zeros((2, len(labelled)))
    for number, step in enumerate(labelled):
        here: Indices = np.flatnonzero(steps == step)
        rollouts = int(np.diff(np.searchsorted(run.step, [step, step + 1]))[0])
        evidence[:, number] = (
            recall.update(int(step), int(caught_floor[here].sum()), int(missed_floor[here].sum())),
            missed.update(int(step), labels.inclusion[here][unseen[here]].tolist(), rollouts),
        )
    enough = -float(np.log(alpha))
    return (
        Watch("recall", bounds.recall, labelled, evidence[0], enough, recall.alarm_step),
        Watch("missed rate", bounds.missed, labelled, evidence[1], enough, missed.alarm_step),
    )
