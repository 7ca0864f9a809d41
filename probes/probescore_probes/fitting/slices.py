"""Measures a served probe on each slice of the data, a part that is evaluated separately."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from probescore_audit import Estimate, grouped_rate
from probescore_probes.fitting.fitting_data import FittingData
from probescore_probes.fitting.judgement import SliceResult
from probescore_probes.fitting.labelled_rollouts import OOD, TEST

_UNKNOWN = Estimate(float("nan"), float("nan"), float("nan"))

Indices = NDArray[np.int64]


def slices_of(data: FittingData, scores: NDArray[np.float64], threshold: float | None, seed: int) -> dict[str, SliceResult]:
    """Measures the probe on each slice (part of the data) of the test rollouts, then on each slice of the out-of-distribution rollouts.

    Args:
        data: all examples.
        scores: served scores of all examples, ``(n,)``.
        threshold: threshold for all data; ``None`` = none.
        seed: seed of the bootstrap.
    """
    found = {}
    for part in (TEST, OOD):
        indices = data.splits[part]
        slices = np.array([data.examples[index].slice for index in indices])
        for name in sorted({each for each in slices if each}):
            some = indices[slices == name]
            negatives = data.negatives(some)
            title = f"{name} (out of distribution)" if part == OOD and name != "out of distribution" else name
            found[title] = SliceResult(
                data.auroc(scores, some, seed),
                false_positives(data, scores, threshold, negatives, seed),
                len(some) - len(negatives),
                len(negatives),
                part == OOD,
            )
    return found


def false_positives(data: FittingData, scores: NDArray[np.float64], threshold: float | None, negatives: Indices, seed: int) -> Estimate:
    """Computes the share of the given negative rollouts whose score is at or above the threshold; NaN without a threshold."""
    if threshold is None:
        return _UNKNOWN
    return grouped_rate(scores[negatives] >= threshold, data.labels.groups[negatives], seed=seed)
