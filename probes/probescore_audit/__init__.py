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
    from probescore_audit.alarms import MissedMonitor, RecallMonitor
    from probescore_audit.calibration import calibrate, evaluate_auroc
    from probescore_audit.companions import Companion
    from probescore_audit.comparison import Comparison, FlagAgreement, compare
    from probescore_audit.estimates import Auroc, CalibratedThreshold
    from probescore_audit.evaluation import FlaggedShares, Quality, evaluate
    from probescore_audit.fitting_lines import lines_to_fit
    from probescore_audit.fresh_rollouts import calibrate_for_fresh
    from probescore_audit.further_labels import FurtherLabels, plan_further_labels
    from probescore_audit.grouped import Estimate, auroc, calibration_error, grouped_auroc, grouped_rate, roc_curve
    from probescore_audit.label_plan import LabelPlan, Stratum, plan_labels, strata
    from probescore_audit.live_audit import LiveAudit, ProbeAlarm
    from probescore_audit.rates import FlagRateParts, Rates, ReferenceCounts, draw_rates, draw_reference, honest_share, interval
    from probescore_audit.record_audit import ReadingAudit, RecordAudit, audit_record
    from probescore_audit.recorded_labels import PlannedLabel, label_rows, plan_further, plan_recorded, unflagged_rollouts
    from probescore_audit.recorded_refit import Refit
    from probescore_audit.refit import fresh_auroc
    from probescore_audit.run_audit import Alarm, AlarmBounds, JudgedWindow, RunAudit, Watch, alarm_bounds, audit_run
    from probescore_audit.run_labels import LabelledWindow, RunLabels, RunScores, StratumCounts, labelled_window
    from probescore_audit.verdicts import Judgement, Verdict, judge
    from probescore_audit.weighted_auroc import window_auroc

__all__ = [
    "Alarm",
    "AlarmBounds",
    "Auroc",
    "CalibratedThreshold",
    "Companion",
    "Comparison",
    "Estimate",
    "FlagAgreement",
    "FlagRateParts",
    "FlaggedShares",
    "FurtherLabels",
    "JudgedWindow",
    "Judgement",
    "LabelPlan",
    "LabelledWindow",
    "LiveAudit",
    "MissedMonitor",
    "PlannedLabel",
    "ProbeAlarm",
    "Quality",
    "Rates",
    "ReadingAudit",
    "RecallMonitor",
    "RecordAudit",
    "ReferenceCounts",
    "Refit",
    "RunAudit",
    "RunLabels",
    "RunScores",
    "Stratum",
    "StratumCounts",
    "Verdict",
    "Watch",
    "alarm_bounds",
    "audit_record",
    "audit_run",
    "auroc",
    "calibrate",
    "calibrate_for_fresh",
    "calibration_error",
    "compare",
    "draw_rates",
    "draw_reference",
    "evaluate",
    "evaluate_auroc",
    "fresh_auroc",
    "grouped_auroc",
    "grouped_rate",
    "honest_share",
    "interval",
    "judge",
    "label_rows",
    "labelled_window",
    "lines_to_fit",
    "plan_further",
    "plan_further_labels",
    "plan_labels",
    "plan_recorded",
    "roc_curve",
    "strata",
    "unflagged_rollouts",
    "window_auroc",
]

_MODULES = {
    "probescore_audit.calibration": ("calibrate", "evaluate_auroc"),
    "probescore_audit.comparison": ("Comparison", "FlagAgreement", "compare"),
    "probescore_audit.estimates": ("Auroc", "CalibratedThreshold"),
    "probescore_audit.evaluation": ("FlaggedShares", "Quality", "evaluate"),
    "probescore_audit.fitting_lines": ("lines_to_fit",),
    "probescore_audit.fresh_rollouts": ("calibrate_for_fresh",),
    "probescore_audit.further_labels": ("FurtherLabels", "plan_further_labels"),
    "probescore_audit.grouped": ("Estimate", "auroc", "calibration_error", "grouped_auroc", "grouped_rate", "roc_curve"),
    "probescore_audit.alarms": ("MissedMonitor", "RecallMonitor"),
    "probescore_audit.label_plan": ("LabelPlan", "Stratum", "plan_labels", "strata"),
    "probescore_audit.run_labels": ("LabelledWindow", "RunLabels", "RunScores", "StratumCounts", "labelled_window"),
    "probescore_audit.rates": ("FlagRateParts", "Rates", "ReferenceCounts", "draw_rates", "draw_reference", "honest_share", "interval"),
    "probescore_audit.record_audit": ("ReadingAudit", "RecordAudit", "audit_record"),
    "probescore_audit.recorded_labels": ("PlannedLabel", "label_rows", "plan_further", "plan_recorded", "unflagged_rollouts"),
    "probescore_audit.run_audit": ("Alarm", "AlarmBounds", "JudgedWindow", "RunAudit", "Watch", "alarm_bounds", "audit_run"),
    "probescore_audit.live_audit": ("LiveAudit", "ProbeAlarm"),
    "probescore_audit.companions": ("Companion",),
    "probescore_audit.recorded_refit": ("Refit",),
    "probescore_audit.refit": ("fresh_auroc",),
    "probescore_audit.verdicts": ("Judgement", "Verdict", "judge"),
    "probescore_audit.weighted_auroc": ("window_auroc",),
}


def __getattr__(name: str) -> object:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
