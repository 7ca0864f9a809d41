"""Takes from the record of a training run the activations of labelled rollouts and of anchors, and measures whether a fresh probe would see
the behaviour in them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from probescore_audit.grouped import Estimate
from probescore_audit.record import ActivationRow, Record
from probescore_audit.recorded_run import RecordedRun
from probescore_audit.refit import fresh_auroc, fresh_auroc_change


@dataclass(frozen=True)
class Refit:
    """Value object with what fresh probes, fitted on recorded activations, can tell of the behaviour late in a training run.

    Attributes:
        source: ``"rollouts"`` = the labelled rollouts of the last window of steps, or ``"anchors"`` (texts with a known label that are
            scored again and again), when they were scored last.
        step: the last step of these.
        auroc: AUROC of the fresh probes.
        change: the AUROC less that of fresh probes on the same anchors when they were scored first; ``None`` if they were scored once, and
            for rollouts.
    """

    source: Literal["rollouts", "anchors"]
    step: int
    auroc: Estimate
    change: Estimate | None


def recorded_refit(record: Record, recorded: RecordedRun, first_step: int, *, seed: int = 0) -> Refit | None:
    """Fits fresh probes on the recorded activations of a training run, of the labelled rollouts from a step on, or else of the anchors
    (texts with a known label that are scored again and again).

    Args:
        record: the record of the run.
        recorded: a probe's scores and labels; the activations are those of its reading (which model's activations a probe reads).
        first_step: first step whose rollouts count.
        seed: seed of what is random.

    Returns:
        What the fresh probes can tell; ``None`` if there are activations of fewer than 15 rollouts, and of 15 anchors, of a class.
    """
    rows = [row for row in record.activations if row.reading == recorded.reading]
    if not rows:
        return None
    read = Counter((row.tap, row.pool) for row in rows).most_common(1)[0][0]
    rows = [row for row in rows if (row.tap, row.pool) == read]
    return _of_rollouts(rows, recorded, first_step, seed) or _of_anchors(rows, record, seed)


def _of_rollouts(rows: Sequence[ActivationRow], recorded: RecordedRun, first_step: int, seed: int) -> Refit | None:
    known = {(row.step, row.rollout): row for row in rows if row.rollout is not None and row.step >= first_step}
    labels = recorded.labels
    labelled = [
        (row, known[row.step, row.rollout], place)
        for place, index in enumerate(labels.rollout.tolist())
        if ((row := recorded.rollouts[index]).step, row.rollout) in known
    ]
    if not labelled:
        return None
    places = np.array([place for _, _, place in labelled], np.int64)
    found = fresh_auroc(
        np.stack([activation.vector() for _, activation, _ in labelled]),
        labels.positive[places],
        [f"{row.step} {row.prompt}" for row, _, _ in labelled],
        weights=1 / labels.inclusion[places],
        seed=seed,
    )
    return None if np.isnan(found.value) else Refit("rollouts", labelled[-1][0].step, found, None)


def _of_anchors(rows: Sequence[ActivationRow], record: Record, seed: int) -> Refit | None:
    positive = {row.anchor: row.positive for row in record.anchors}
    by_step: dict[int, dict[str, ActivationRow]] = defaultdict(dict)
    for row in rows:
        if row.anchor is not None and row.anchor in positive:
            by_step[row.step][row.anchor] = row
    if not by_step:
        return None
    first, last = min(by_step), max(by_step)
    names = sorted(by_step[first].keys() & by_step[last].keys())
    if not names:
        return None
    before, now = (np.stack([by_step[step][name].vector() for name in names]) for step in (first, last))
    with_it = [positive[name] for name in names]
    found = fresh_auroc(now, with_it, np.arange(len(names)), seed=seed)
    change = None if first == last else fresh_auroc_change(before, now, with_it, seed=seed)
    return None if np.isnan(found.value) else Refit("anchors", last, found, change)
