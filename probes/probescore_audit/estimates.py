"""Defines value objects for numbers estimated from labelled rollouts, each with its 95% interval and a description of the data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CalibratedThreshold:
    """Threshold on a probe's reduced scores, with the share of negative rollouts (rollouts without the behaviour) that it flags.

    Attributes:
        threshold: a rollout whose reduced score is at or above this number is flagged; in the unit of the scores.
        false_positive_rate: share of the negatives that are flagged, in [0, 1].
        false_positive_rate_low: lower end of the 95% interval of ``false_positive_rate``.
        false_positive_rate_high: upper end of the 95% interval of ``false_positive_rate``.
        negatives: number of negative rollouts from which the threshold was found.
        dataset: description of these rollouts, in words.
        reduction: the reduction that made one score from the token scores of each rollout; ``None`` for a probe that pools by itself.
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
    """Area under the ROC curve: the chance that a rollout with the behaviour (positive) scores above a rollout without it (negative).

    Attributes:
        value: the estimate, in [0, 1]; random scores have 0.5.
        low: lower end of the 95% interval.
        high: upper end of the 95% interval.
        positives: number of positive rollouts.
        negatives: number of negative rollouts.
        dataset: description of these rollouts, in words.
        dataset_sha256: ``sha256:…`` of the dataset, if it was given.
    """

    value: float
    low: float
    high: float
    positives: int
    negatives: int
    dataset: str
    dataset_sha256: str | None = None
