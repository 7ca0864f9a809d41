"""Measures the quality of a probe from its scores of labelled rollouts; each number comes with its 95% interval.

    from probescore_audit import calibrate, evaluate_auroc

    threshold = calibrate(scores[~cheated], false_positive_rate=0.01, dataset="honest rollouts of held-out problems", label="cheating")
    auroc = evaluate_auroc(scores[cheated], scores[~cheated], dataset="rollouts of held-out problems")

A probe file stores these numbers: ``probescore_probes.write_probe(…, calibrations=[threshold], evaluations=[auroc])``.

This package needs only numpy and scipy, and scipy is imported only when something is computed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from probescore_audit.calibration import calibrate, evaluate_auroc
    from probescore_audit.comparison import Comparison, FlagAgreement, compare
    from probescore_audit.estimates import Auroc, CalibratedThreshold
    from probescore_audit.evaluation import FlaggedShares, Quality, evaluate
    from probescore_audit.fresh_rollouts import calibrate_for_fresh
    from probescore_audit.grouped import Estimate, auroc, calibration_error, grouped_auroc, grouped_rate, roc_curve

__all__ = [
    "Auroc",
    "CalibratedThreshold",
    "Comparison",
    "Estimate",
    "FlagAgreement",
    "FlaggedShares",
    "Quality",
    "auroc",
    "calibrate",
    "calibrate_for_fresh",
    "calibration_error",
    "compare",
    "evaluate",
    "evaluate_auroc",
    "grouped_auroc",
    "grouped_rate",
    "roc_curve",
]

_MODULES = {
    "probescore_audit.calibration": ("calibrate", "evaluate_auroc"),
    "probescore_audit.comparison": ("Comparison", "FlagAgreement", "compare"),
    "probescore_audit.estimates": ("Auroc", "CalibratedThreshold"),
    "probescore_audit.evaluation": ("FlaggedShares", "Quality", "evaluate"),
    "probescore_audit.fresh_rollouts": ("calibrate_for_fresh",),
    "probescore_audit.grouped": ("Estimate", "auroc", "calibration_error", "grouped_auroc", "grouped_rate", "roc_curve"),
}


def __getattr__(name: str) -> object:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
