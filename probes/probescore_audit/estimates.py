"""Holds numbers that were estimated from labelled rollouts, each with its 95% interval and with the data that it was estimated on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CalibratedThreshold:
    """Holds a threshold on a probe's reduced scores, and the share of negative rollouts, those without the behaviour, that it flags.

    Attributes:
        threshold: a rollout whose reduced score is at or above this is flagged; in the unit of the scores that the threshold was found on.
        false_positive_rate: share of the negatives that are flagged, in [0, 1].
        false_positive_rate_low: lower end of that share's 95% interval.
        false_positive_rate_high: upper end of that share's 95% interval.
        negatives: how many negative rollouts the threshold was found on.
        dataset: what these rollouts are.
        reduction: the reduction that made one score of each rollout; ``None`` for a probe that pools by itself.
        label: label of the scores; empty where a probe has one label.
    """

    threshold: float
    false_positive_rate: float
    false_positive_rate_low: float
    false_positive_rate_high: float
    negatives: int
    dataset: str
    reduction: str | None = None
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class Auroc:
    """Holds the area under the ROC curve, the chance that a positive rollout scores above a negative one.

    Attributes:
        value: the estimate, in [0, 1]; 0.5 is that of a random score.
        low: lower end of the 95% interval.
        high: upper end of the 95% interval.
        positives: how many positive rollouts the area was measured on.
        negatives: how many negative rollouts the area was measured on.
        dataset: what these rollouts are.
        dataset_sha256: ``sha256:…`` of that data, if it was given.
    """

    value: float
    low: float
    high: float
    positives: int
    negatives: int
    dataset: str
    dataset_sha256: str | None = None
