"""Finds the thresholds of a fitted probe on held-out negatives, as the engine serves them, and records what these negatives were like."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from probescore_audit import CalibratedThreshold, calibrate_for_fresh
from probescore_probes.fitting.calibrated_conditions import conditions_of
from probescore_probes.fitting.fitting_data import FittingData
from probescore_probes.fitting.judgement import FEWEST_CALIBRATION_GROUPS
from probescore_probes.fitting.labelled_rollouts import CALIBRATION
from probescore_probes.fitting.options import FitOptions
from probescore_server.engine.engine import Engine
from probescore_server.probes.format.manifest import CalibrationRecord


def thresholds_of(
    data: FittingData, scores: NDArray[np.float64], options: FitOptions, reduction: str | None
) -> dict[str, CalibratedThreshold]:
    """Computes the threshold for all data under ``""``, then one for each slice (part of the data), each only if there are enough negatives
    and groups.

    The interval of each is that of as many fresh negatives in as many other groups.

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
        groups = data.labels.groups[some]
        if len(some) < 1 / options.false_positive_rate or len(np.unique(groups)) < FEWEST_CALIBRATION_GROUPS:
            continue
        whose = f" of slice {name}" if name else ""
        found[name] = calibrate_for_fresh(
            scores[some],
            groups,
            false_positive_rate=options.false_positive_rate,
            dataset=f"held-out negatives{whose}, as served in {options.dtype}",
            reduction=reduction,
            label=options.label,
        )
    return found


def recorded(threshold: CalibratedThreshold, data: FittingData, engine: Engine, dtype: str) -> CalibrationRecord:
    """Returns the threshold for all data in the form that the manifest stores, with what its negatives were like.

    Args:
        threshold: the threshold.
        data: all examples; the threshold was found on the negatives of the split ``calibration``.
        engine: an engine with the model, whose tokenizer says how prompts begin and end.
        dtype: dtype of the model that scored the negatives.
    """
    negatives = data.negatives(data.splits[CALIBRATION])
    conditions = conditions_of(
        [data.examples[index] for index in negatives],
        data.labels.groups[negatives],
        dtype=dtype,
        bos_token_id=engine.info.bos_token_id,
        generation_prompt_ids=engine.generation_prompt_ids(),
        dataset_sha256=data.digest,
    )
    return CalibrationRecord(**vars(threshold), conditions=conditions)
