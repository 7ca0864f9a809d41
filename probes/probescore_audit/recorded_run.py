"""Takes from the record of a training run what the audit of one probe needs: the probe's scores, under one reading (which model's
activations the probe read), and the labels.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from probescore_audit.record import LabelRow, Record
from probescore_audit.run_labels import RunLabels, RunScores

_SURE = {"yes": True, "no": False}


def recorded_run(record: Record, probe: str, *, reading: str = "frozen", reduction: str | None = None) -> tuple[RunScores, RunLabels]:
    """Returns a probe's recorded scores of the rollouts of a training run, and the labels of those rollouts that were labelled.

    Rollouts without a score are left out. So are labels of which the labeller was unsure, and labels of rollouts that were not drawn with a
    known probability (each rollout's first judgement has this probability). A rollout that was judged several times is positive if every
    judgement says so.

    Args:
        record: the record of the training run.
        probe: key of the probe, ``name@version``.
        reading: name of the model whose activations the probe read; ``"frozen"`` = the model of the server.
        reduction: reduction of the scores; may be left out if the record has one with a threshold.

    Raises:
        ValueError: the record has no such scores, or no threshold for them.
    """
    table = record.table()
    described = {each.key: each for each in record.header.probes}
    if probe not in described:
        raise ValueError(f"probe: {probe!r}; the record has {', '.join(described) or 'none'}")
    thresholds = described[probe].thresholds
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
    place = {key: index for index, key in enumerate(zip(table.step[counted].tolist(), table.rollout[counted].tolist(), strict=True))}
    judged: dict[int, list[LabelRow]] = defaultdict(list)
    for label in record.labels:
        index = place.get((label.step, label.rollout))
        if index is not None:
            judged[index].append(label)
    chosen_rows = {
        index: (all(_SURE[row.label] for row in rows), rows[0].inclusion, any(row.floor for row in rows))
        for index, rows in sorted(judged.items())
        if rows[0].inclusion and all(row.label in _SURE for row in rows)
    }
    columns = list(chosen_rows.values())
    labels = RunLabels(
        rollout=np.array(list(chosen_rows), np.int64),
        positive=np.array([positive for positive, _, _ in columns], bool),
        inclusion=np.array([inclusion for _, inclusion, _ in columns], np.float64),
        floor=np.array([floor for _, _, floor in columns], bool),
    )
    return run, labels
