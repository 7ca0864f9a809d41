"""Audits one probe over a whole training run: estimates for each window of steps, alarms in between, and a verdict at the end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from probescore_audit.alarms import MissedMonitor, RecallMonitor
from probescore_audit.grouped import Estimate
from probescore_audit.label_plan import Indices
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
        alarms: first alarm of each monitor that raised one, by step.
        unlabelled_steps: number of steps of the run without any label; the monitors do not see these.
    """

    windows: tuple[JudgedWindow, ...]
    alarms: tuple[Alarm, ...]
    unlabelled_steps: int

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
    anchors: Estimate | None = None,
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
        anchors: AUROC on fixed labelled texts after training, if there are such.
        seed: seed of the draws from posteriors.

    Raises:
        ValueError: an argument is out of its range.
    """
    if audits < 1:
        raise ValueError(f"audits: {audits}; give the number of probes times readings that are audited")
    windows = tuple(
        JudgedWindow(window.first_step, window.last_step, judge(window, reference, seed=seed, anchors=anchors if last else None))
        for last, window in _windows(run, labels, window_labels)
    )
    alarms = _alarms(run, labels, reference, planned_steps, alpha / (2 * audits), seed)
    labelled_steps = len(np.unique(run.step[labels.rollout]))
    return RunAudit(windows, alarms, len(np.unique(run.step)) - labelled_steps)


def _windows(run: RunScores, labels: RunLabels, least_labels: int) -> list[tuple[bool, LabelledWindow]]:
    """Cuts a training run into windows of steps, from its end backwards, and returns the windows in the order of the steps, each with
    whether it is the run's last one.
    """
    found: list[tuple[bool, LabelledWindow]] = []
    if not len(labels.rollout):
        return found
    end = int(run.step[labels.rollout[-1]])
    while (window := latest_window(run, labels, end, least_labels)) is not None:
        found.append((not found, window))
        end = window.first_step - 1
    return found[::-1]


def _alarms(
    run: RunScores, labels: RunLabels, reference: ReferenceCounts, planned_steps: int, alpha: float, seed: int
) -> tuple[Alarm, ...]:
    before = draw_reference(reference, np.random.default_rng(seed))
    floor = max(_LOWEST_FLOOR, interval(before.recall).low - _RECALL_MARGIN)
    ceiling = min(_HIGHEST_CEILING, 2 * interval(before.missed).value + 0.01)
    recall, missed = RecallMonitor(floor, planned_steps, alpha), MissedMonitor(ceiling, planned_steps, alpha)
    flagged = run.flagged[labels.rollout]
    caught_floor, missed_floor = (labels.floor & labels.positive & which for which in (flagged, ~flagged))
    unseen = labels.positive & ~flagged
    steps = run.step[labels.rollout]
    for step in np.unique(steps):
        here: Indices = np.flatnonzero(steps == step)
        recall.update(int(step), int(caught_floor[here].sum()), int(missed_floor[here].sum()))
        rollouts = int(np.diff(np.searchsorted(run.step, [step, step + 1]))[0])
        missed.update(int(step), labels.inclusion[here][unseen[here]].tolist(), rollouts)
    raised = [("recall", floor, recall.alarm_step), ("missed rate", ceiling, missed.alarm_step)]
    return tuple(sorted((Alarm(name, bound, step) for name, bound, step in raised if step is not None), key=lambda alarm: alarm.step))
