"""Takes from the record of a training run what the audit of one probe needs: the probe's scores, under one reading (which model's
activations the probe read), the labels, and the labelled rollouts of the model before training.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from probescore_audit.calibration import evaluate_auroc
from probescore_audit.grouped import Estimate
from probescore_audit.label_plan import Floats, Stratum
from probescore_audit.rates import ReferenceCounts
from probescore_audit.record import LabelRow, Record, RolloutRow, RolloutTable
from probescore_audit.record.rows import Scores
from probescore_audit.run_labels import RunLabels, RunScores

FROZEN = "frozen"
"""Name of the reading of the server's own model, which training does not change."""
_SAME_PLAN = 0.99  # of the labels: scores that were rounded may change places
_SURE = {"yes": True, "no": False}


@dataclass(frozen=True, eq=False)
class RecordedRun:
    """Value object with what the record of a training run has of one probe under one reading (which model's activations the probe read).

    Attributes:
        probe: key of the probe, ``name@version``.
        role: what the probe's scores are for, such as ``"reward"``.
        reading: name of the reading.
        reduction: reduction of the scores.
        rollouts: rows of the rollouts that have a score, in the order of the columns of ``run``.
        run: the scores of these rollouts.
        labels: the labels of those rollouts that were drawn for labelling.
    """

    probe: str
    role: str
    reading: str
    reduction: str
    rollouts: tuple[RolloutRow, ...]
    run: RunScores
    labels: RunLabels


@dataclass(frozen=True, eq=False)
class RecordedReference:
    """Value object with a probe's scores of labelled rollouts of the model before training.

    Attributes:
        scores: score of each rollout, ``(n,)`` float64.
        positive: whether each rollout has the behaviour, ``(n,)`` bool.
        random: whether each rollout was drawn at random, ``(n,)`` bool.
        counts: how many of them are positive, and how many flagged.
    """

    scores: Floats
    positive: NDArray[np.bool_]
    random: NDArray[np.bool_]
    counts: ReferenceCounts


@dataclass(frozen=True)
class AnchorScoring:
    """Value object with how the anchors (texts with a known label that are scored again and again) scored at a training step.

    Attributes:
        step: the training step.
        auroc: AUROC of the anchors.
        largest_move: largest change of an anchor's score since the first scoring, in standard deviations of the scores of then.
    """

    step: int
    auroc: Estimate
    largest_move: float


def recorded_run(record: Record, probe: str, *, reading: str = FROZEN, reduction: str | None = None) -> tuple[RunScores, RunLabels]:
    """Returns a probe's recorded scores of the rollouts of a training run, and the labels of those rollouts that were labelled.

    Rollouts without a score are left out. So are labels of which the labeller was unsure, and labels of rollouts that were not drawn with a
    known probability (one of each rollout's judgements has this probability). A rollout that was judged several times is positive if every
    judgement says so.

    Args:
        record: the record of the training run.
        probe: key of the probe, ``name@version``.
        reading: name of the model whose activations the probe read; ``"frozen"`` = the model of the server.
        reduction: reduction of the scores; may be left out if the record has one with a threshold.

    Raises:
        ValueError: the record has no such scores, or no threshold for them.
    """
    found = read_run(record, record.table(), probe, reading=reading, reduction=reduction)
    return found.run, found.labels


def read_run(record: Record, table: RolloutTable, probe: str, *, reading: str = FROZEN, reduction: str | None = None) -> RecordedRun:
    """Returns the same as ``recorded_run``, with the rows of the rollouts, from a table of the record that was made before.

    Raises:
        ValueError: the record has no such scores, or no threshold for them.
    """
    described = {each.key: each for each in record.header.probes}
    if probe not in described:
        raise ValueError(f"probe: {probe!r}; the record has {', '.join(described) or 'none'}")
    thresholds = described[probe].thresholds_on(reading)
    recorded = [key[2] for key in table.scores if key[:2] == (probe, reading)]
    if not recorded:
        readings = sorted({key[1] for key in table.scores if key[0] == probe})
        raise ValueError(f"reading: {reading!r}; of {probe} the record has {', '.join(readings) or 'no scores'}")
    usable = [name for name in recorded if name in thresholds]
    chosen = reduction or next((name for name in usable if name != "max"), usable[0] if usable else "")
    if chosen not in usable:
        known = ", ".join(usable) or "none"
        raise ValueError(f"reduction: {chosen or 'none given'}; of {probe} and {reading} there are scores and a threshold for {known}")
    scores = table.scores[probe, reading, chosen]
    at_most = table.scores[probe, reading, "max"] if "max" in usable and chosen != "max" else None
    counted = np.isfinite(scores) if at_most is None else np.isfinite(scores) & np.isfinite(at_most)
    run = RunScores.of(
        table.step[counted],
        table.prompt[counted],
        scores[counted],
        thresholds[chosen],
        max_scores=None if at_most is None else at_most[counted],
        max_threshold=np.nan if at_most is None else thresholds["max"],
    )
    rollouts = tuple(record.rollouts[index] for index in np.flatnonzero(counted))
    return RecordedRun(probe, described[probe].role, reading, chosen, rollouts, run, _labels(record, rollouts))


def _labels(record: Record, rollouts: tuple[RolloutRow, ...]) -> RunLabels:
    place = {(row.step, row.rollout): index for index, row in enumerate(rollouts)}
    judged: dict[int, list[LabelRow]] = defaultdict(list)
    for label in record.labels:
        index = place.get((label.step, label.rollout))
        if index is not None:
            judged[index].append(label)
    drawn = {index: row for index, rows in sorted(judged.items()) if (row := _drawn(rows)) and all(each.label in _SURE for each in rows)}
    together: dict[tuple[int, str | None], list[LabelRow]] = defaultdict(list)
    for row in drawn.values():
        together[row.step, row.stratum].append(row)
    shares = {key: share for key, rows in together.items() if (share := _later_share(rows))}
    columns = list(drawn.items())
    return RunLabels(
        rollout=np.array(list(drawn), np.int64),
        positive=np.array([all(_SURE[row.label] for row in judged[index]) for index, _ in columns], bool),
        inclusion=np.array([shares.get((row.step, row.stratum), row.inclusion) for _, row in columns], np.float64),
        floor=np.array([row.floor for _, row in columns], bool),
        planned_inclusion=np.array([np.nan if row.population is not None else row.inclusion for _, row in columns], np.float64),
    )


def _drawn(judgements: list[LabelRow]) -> LabelRow | None:
    """Returns the judgement of a rollout that says with which probability the rollout was chosen; ``None`` if none does."""
    return next((row for row in judgements if row.inclusion), None)


def _later_share(rows: list[LabelRow]) -> float | None:
    """Returns which share of the rollouts of a step and stratum (class by score) is labelled, if some of these were chosen after the
    others; ``None`` if none was.
    """
    population = next((row.population for row in rows if row.population), None)
    return None if population is None else min(1.0, len(rows) / population)


def planned_by(record: Record, recorded: RecordedRun) -> bool:
    """Returns whether the labels of a training run were shared out by a probe's scores under a reading (whose activations the probe reads):
    whether the strata (classes by score) that the labels name are those of these scores.
    """
    place = {(row.step, row.rollout): index for index, row in enumerate(recorded.rollouts)}
    agree = [
        Stratum(int(recorded.run.stratum[index])).name.lower() == label.stratum
        for label in record.labels
        if label.stratum is not None and label.population is None and (index := place.get((label.step, label.rollout))) is not None
    ]
    return bool(agree) and sum(agree) >= _SAME_PLAN * len(agree)


def recorded_reference(record: Record, probe: str, *, reading: str = FROZEN, reduction: str) -> RecordedReference | None:
    """Returns a probe's recorded scores of labelled rollouts of the model before training; ``None`` if there are none of both classes, or
    none that were drawn at random.

    Before training each reading is that of the frozen model, so that a reading without such scores has those of the frozen model.

    Raises:
        ValueError: the record has no threshold for these scores.
    """
    thresholds = next((each.thresholds_on(reading) for each in record.header.probes if each.key == probe), {})
    if reduction not in thresholds:
        raise ValueError(f"reduction: {reduction}; of {probe} the record has no threshold for it")
    scored = [(row, score) for row in record.references if (score := _score(row.scores, probe, reading, reduction)) is not None]
    scores = np.array([score for _, score in scored], np.float64)
    positive = np.array([row.positive for row, _ in scored], bool)
    random = np.array([row.random for row, _ in scored], bool)
    if not random.any() or positive.all() or not positive.any():
        return None
    auroc = evaluate_auroc(scores[positive], scores[~positive], dataset="before training")
    flagged = scores >= thresholds[reduction]
    counts = ReferenceCounts(
        positives=int(positive.sum()),
        flagged_positives=int((positive & flagged).sum()),
        negatives=int((~positive).sum()),
        flagged_negatives=int((~positive & flagged).sum()),
        random_rollouts=int(random.sum()),
        random_positives=int((random & positive).sum()),
        auroc=Estimate(auroc.value, auroc.low, auroc.high),
    )
    return RecordedReference(scores, positive, random, counts)


def recorded_anchors(record: Record, probe: str, *, reading: str = FROZEN, reduction: str) -> tuple[AnchorScoring, ...]:
    """Returns how the anchors (texts with a known label that are scored again and again) scored at each training step at which some of both
    classes were scored.
    """
    by_step: dict[int, dict[str, tuple[bool, float]]] = defaultdict(dict)
    for row in record.anchors:
        score = row.scores.get(probe, {}).get(reading, {}).get(reduction)
        if score is not None:
            by_step[row.step][row.anchor] = (row.positive, score)
    found: list[AnchorScoring] = []
    first: dict[str, float] = {}
    spread = 1.0
    for step, scored in sorted(by_step.items()):
        scores = np.array([score for _, score in scored.values()])
        positive = np.array([is_positive for is_positive, _ in scored.values()], bool)
        if positive.all() or not positive.any():
            continue
        if not first:
            first, spread = {name: score for name, (_, score) in scored.items()}, float(scores.std()) or 1.0
        moved = max((abs(score - first[name]) for name, (_, score) in scored.items() if name in first), default=0.0)
        auroc = evaluate_auroc(scores[positive], scores[~positive], dataset="anchors")
        found.append(AnchorScoring(step, Estimate(auroc.value, auroc.low, auroc.high), moved / spread))
    return tuple(found)


def _score(scores: Scores, probe: str, reading: str, reduction: str) -> float | None:
    readings = scores.get(probe, {})
    return readings.get(reading, readings.get(FROZEN, {})).get(reduction)
