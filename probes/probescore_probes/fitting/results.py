"""Defines the result of fitting a probe: its file, and every number of its report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from probescore_audit import CalibratedThreshold, Estimate
from probescore_audit.grouped import CalibrationBin
from probescore_probes.fitting.cross_validation import CurvePoint, Nested, Selection
from probescore_probes.fitting.judgement import Evidence, FitVerdict, Warning
from probescore_probes.fitting.options import FitOptions
from probescore_probes.fitting.serving import Agreement, BatchRounding
from probescore_probes.fitting.wrong_rollouts import WrongRollout
from probescore_server.probes.format.probe_file import ProbeFile


@dataclass(frozen=True, kw_only=True, eq=False)
class FitResult:
    """The result of fitting a probe: its file, and every number of the report. Scores are those that an engine serves from the file.

    Attributes:
        file: the probe file that was written.
        curves: AUROC by tap and pooling, for the kind by which the tap was chosen and for the difference of means.
        kinds: AUROC over held-out groups of each kind of probe at the chosen tap; of kinds fitted on tokens, only if one of them was asked
            for.
        nested: result of nested cross-validation; for a kind fitted on tokens, at the tap that all examples together chose.
        agreement: differences between served and fitted scores, which come from activations of the same batches in half precision.
        batch_rounding: differences between scores of the same rollouts in other batches, which no server can avoid.
        thresholds: the threshold for all data, and one for each slice with enough negatives; empty if there are too few negatives. Its
            interval is that of as many fresh negatives in as many other groups.
        calibrated_on: what the negatives of the threshold for all data were like, as the file records it; empty without a threshold.
        roc: false- and true-positive rates on test rollouts.
        test_scores, test_positive: scores and labels of the test rollouts, ``(tests,)``.
        calibration: expected calibration error and its bins; ``None`` for scores that are no probabilities.
    """

    file: ProbeFile
    options: FitOptions
    model: str
    evidence: Evidence
    warnings: tuple[Warning, ...]
    verdict: FitVerdict
    data: dict[str, object]
    selection: Selection
    nested: Nested
    curves: Mapping[str, tuple[CurvePoint, ...]]
    kinds: Mapping[str, Estimate]
    learning: tuple[tuple[int, Estimate], ...]
    agreement: Agreement
    batch_rounding: BatchRounding
    thresholds: Mapping[str, CalibratedThreshold]
    calibrated_on: Mapping[str, object]
    roc: tuple[NDArray[np.float64], NDArray[np.float64]]
    test_scores: NDArray[np.float64]
    test_positive: NDArray[np.bool_]
    calibration: tuple[float, tuple[CalibrationBin, ...]] | None
    wrong: tuple[WrongRollout, ...]
    provenance: dict[str, str]
