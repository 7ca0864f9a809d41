"""Finds the thresholds of a fitted probe on held-out negatives, as the engine serves them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from probescore_audit import CalibratedThreshold, calibrate, grouped_rate
from probescore_probes.fitting.fitting_data import FittingData
from probescore_probes.fitting.labelled_rollouts import CALIBRATION
from probescore_probes.fitting.options import FitOptions


def thresholds_of(
    data: FittingData, scores: NDArray[np.float64], options: FitOptions, reduction: str | None
) -> dict[str, CalibratedThreshold]:
    """Computes the threshold for all data under ``""``, then one for each slice, each only if there are enough negatives.

    Intervals come from a bootstrap that draws whole groups.

    Args:
        data: all examples; the threshold is found on the negatives of the split ``calibration``.
        scores: served scores of all examples, ``(n,)``.
        options: options of fitting, with the false-positive rate.
        reduction: the reduction of the probe file; ``None`` for a probe that pools by itself.
    """
    negatives = data.negatives(data.splits[CALIBRATION])
    slices = np.array([data.examples[index].slice for index in negatives])
    found = {}
    for name in ["", *sorted({each for each in slices if each})]:
        some = negatives if not name else negatives[slices == name]
        if len(some) < 1 / options.false_positive_rate:
            continue
        whose = f" of slice {name}" if name else ""
        threshold = calibrate(
            scores[some],
            false_positive_rate=options.false_positive_rate,
            dataset=f"held-out negatives{whose}, as served in {options.dtype}",
            reduction=reduction,
            label=options.label,
        )
        grouped = grouped_rate(scores[some] >= threshold.threshold, data.labels.groups[some], seed=options.seed)
        found[name] = replace(
            threshold,
            false_positive_rate_low=min(threshold.false_positive_rate_low, grouped.low),
            false_positive_rate_high=max(threshold.false_positive_rate_high, grouped.high),
        )
    return found
