"""Formats numbers and texts of the audit of a training run for people."""

from __future__ import annotations

import math

from probescore.types.shown import escaped
from probescore_audit.grouped import Estimate
from probescore_audit.run_labels import FEWEST_LABELLED
from probescore_audit.verdicts import Judgement

__all__ = ["escaped", "number_with_interval", "points", "share", "share_with_interval"]


def share(value: float) -> str:
    """Returns a share in per cent with two digits; ``unknown`` for NaN."""
    if math.isnan(value):
        return "unknown"
    return f"{100 * value:.2g}%" if abs(value) < 0.995 else f"{100 * value:.0f}%"


def share_with_interval(estimate: Estimate) -> str:
    """Returns an estimated share with its 95% interval, such as ``0.4% (0.2%–0.8%)``; ``unknown`` if it is NaN."""
    if math.isnan(estimate.value):
        return "unknown"
    return f"{share(estimate.value)} ({share(estimate.low)}–{share(estimate.high)})"


def rate_of_labelled(estimate: Estimate, hits: int, labelled: int) -> str:
    """Returns an estimated share of the rollouts of one class with its 95% interval and the plain numbers of labelled rollouts of the
    class, such as ``96% (93%–98%); 187 of 195 labelled``. Of fewer than ``FEWEST_LABELLED`` an estimate would say more of its prior than
    of the rollouts, and only the interval is given.
    """
    counted = f"{hits:,} of {labelled:,} labelled"
    if labelled < FEWEST_LABELLED and not math.isnan(estimate.value):
        return f"unknown ({share(estimate.low)}–{share(estimate.high)}); {counted}"
    return f"{share_with_interval(estimate)}; {counted}"


def recall(found: Judgement) -> str:
    """Returns the recall of a window of training steps with the numbers that it is estimated from."""
    return rate_of_labelled(found.recall, found.seen.flagged_positives, found.seen.positives)


def false_alarms(found: Judgement) -> str:
    """Returns the share of false alarms in a window of training steps with the numbers that it is estimated from."""
    return rate_of_labelled(found.false_positive_rate, found.seen.flagged_negatives, found.seen.negatives)


def points(estimate: Estimate) -> str:
    """Returns an estimated change of a share in percentage points with its 95% interval, such as ``−8.3 (−9.1 to −7.2)``."""
    value, low, high = (f"{100 * number:+.1f}".replace("-", "−") for number in (estimate.value, estimate.low, estimate.high))
    return "unknown" if math.isnan(estimate.value) else f"{value} ({low} to {high})"


def number_with_interval(estimate: Estimate) -> str:
    """Returns an estimated number with its 95% interval, such as ``0.94 (0.92–0.95)``; ``unknown`` if it is NaN."""
    return "unknown" if math.isnan(estimate.value) else f"{estimate.value:.3f} ({estimate.low:.3f}–{estimate.high:.3f})"
