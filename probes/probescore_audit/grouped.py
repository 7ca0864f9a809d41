"""Estimates AUROCs and rates of labelled rollouts that come in groups, such as rollouts of one problem, which are not independent draws.

Intervals are of 95%: percentiles of a bootstrap that draws whole groups, widened to the exact or Newcombe interval of as many independent
rollouts as there are groups, since a bootstrap of few groups is too narrow, and one of separated classes has no width at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest

from probescore_audit.calibration import newcombe_interval

RESAMPLES = 1000
_CONFIDENCE = 0.95
_TAILS = [2.5, 97.5]


@dataclass(frozen=True)
class Estimate:
    """Value object with an estimated number and its 95% interval; all NaN if there were no data to estimate the number from."""

    value: float
    low: float
    high: float

    def overlaps(self, other: Estimate) -> bool:
        """Returns whether the 95% intervals of two estimates have a number in common."""
        return self.low <= other.high and other.low <= self.high

    def contains(self, value: float) -> bool:
        """Returns whether a number lies in the 95% interval of an estimate."""
        return self.low <= value <= self.high

    @property
    def reversed(self) -> Estimate:
        """Returns one minus an AUROC, with its interval: the AUROC of the negated scores."""
        return Estimate(1 - self.value, 1 - self.high, 1 - self.low)


@dataclass(frozen=True)
class CalibrationBin:
    """Value object with the rollouts to which a probe gives a probability in one tenth of [0, 1], to compare with how many of them are
    positive.

    Attributes:
        mean: mean of the rollouts' probabilities.
        share: share of the rollouts that are positive.
        rollouts: number of rollouts.
    """

    mean: float
    share: float
    rollouts: int


def auroc(scores: ArrayLike, positive: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Computes an AUROC: the probability that a positive rollout scores above a negative one, with ties counted half; NaN unless there are
    both.

    Args:
        scores: score of each rollout, ``(n,)``.
        positive: whether each rollout is positive, ``(n,)`` bool.
        weights: how many times each rollout counts, ``(n,)``; once by default.
    """
    values = np.asarray(scores, np.float64)
    counted = np.ones(len(values)) if weights is None else np.asarray(weights, np.float64)
    return float(_aurocs(values, np.asarray(positive, bool), counted[None])[0])


def grouped_auroc(
    scores: ArrayLike,
    positive: ArrayLike,
    groups: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    independent: float = 1.0,
    seed: int = 0,
) -> Estimate:
    """Computes the AUROC of a probe's scores of labelled rollouts, with a 95% interval from a bootstrap that draws whole groups.

    Args:
        scores: score of each rollout, ``(n,)``.
        positive: whether each rollout is positive, ``(n,)`` bool.
        groups: group of each rollout, ``(n,)``; equal for rollouts that belong together.
        weights: how many times each rollout counts, ``(n,)``.
        independent: share of the groups that the interval counts as independent, in (0, 1]; less than 1 if scores of different groups
            depend on each other, as those of cross-validation do.
        seed: seed of the bootstrap.
    """
    values, with_it, group = np.asarray(scores, np.float64), np.asarray(positive, bool), _numbered(groups)
    counted = np.ones(len(values)) if weights is None else np.asarray(weights, np.float64)
    value = auroc(values, with_it, counted)
    if np.isnan(value):
        return Estimate(value, value, value)
    positives, negatives = (len(np.unique(group[kind])) for kind in (with_it, ~with_it))
    low, high = newcombe_interval(value, independent * positives, independent * negatives)
    resampled = resampled_aurocs(values, with_it, group, weights=counted, independent=independent, seed=seed)
    resampled = resampled[~np.isnan(resampled)]
    if len(resampled):
        bootstrap_low, bootstrap_high = np.percentile(resampled, _TAILS)
        low, high = min(low, float(bootstrap_low)), max(high, float(bootstrap_high))
    return Estimate(value, low, high)


def resampled_aurocs(
    scores: ArrayLike,
    positive: ArrayLike,
    groups: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    independent: float = 1.0,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Computes the AUROC of labelled rollouts for each of ``RESAMPLES`` random draws of whole groups of rollouts; NaN for a draw without
    positives or without negatives.

    The same groups and seed give the same draws, so that two probes can be compared draw by draw.

    The arguments are those of ``grouped_auroc``.
    """
    values, with_it, group = np.asarray(scores, np.float64), np.asarray(positive, bool), _numbered(groups)
    counted = np.ones(len(values)) if weights is None else np.asarray(weights, np.float64)
    return _aurocs(values, with_it, _drawn_groups(group, seed, independent)[:, group] * counted)


def grouped_rate(flagged: ArrayLike, groups: ArrayLike, *, seed: int = 0) -> Estimate:
    """Computes the share of rollouts that are flagged, with a 95% interval from a bootstrap that draws whole groups.

    Args:
        flagged: whether each rollout is flagged, ``(n,)`` bool.
        groups: group of each rollout, ``(n,)``.
        seed: seed of the bootstrap.
    """
    flags, group = np.asarray(flagged, np.float64), _numbered(groups)
    if not len(flags):
        return Estimate(np.nan, np.nan, np.nan)
    value, independent = float(flags.mean()), int(group.max()) + 1
    exact = binomtest(round(value * independent), independent).proportion_ci(_CONFIDENCE, method="exact")
    drawn = _drawn_groups(group, seed)[:, group]
    resampled = (drawn @ flags) / drawn.sum(axis=1)
    low, high = np.percentile(resampled, _TAILS)
    return Estimate(value, min(float(exact.low), float(low), value), max(float(exact.high), float(high), value))


def roc_curve(scores: ArrayLike, positive: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Computes the ROC curve: the false- and the true-positive rate at every threshold, from none flagged to all flagged, ``(thresholds,)``
    each.
    """
    values, with_it = np.asarray(scores, np.float64), np.asarray(positive, bool)
    order = np.argsort(-values, kind="stable")
    last = np.append(np.diff(values[order]) != 0, True)
    true, false = np.cumsum(with_it[order])[last], np.cumsum(~with_it[order])[last]
    return np.append(0, false / max(1, int((~with_it).sum()))), np.append(0, true / max(1, int(with_it.sum())))


def calibration_error(probabilities: ArrayLike, positive: ArrayLike) -> tuple[float, tuple[CalibrationBin, ...]]:
    """Computes the expected calibration error of a probe's probabilities, in ten bins that are the tenths of [0, 1], and returns the error
    with the bins that contain rollouts.
    """
    chances, with_it = np.asarray(probabilities, np.float64), np.asarray(positive, bool)
    tenth = np.minimum((chances * 10).astype(int), 9)
    bins = tuple(
        CalibrationBin(float(chances[tenth == index].mean()), float(with_it[tenth == index].mean()), int((tenth == index).sum()))
        for index in np.unique(tenth)
    )
    return sum(each.rollouts * abs(each.mean - each.share) for each in bins) / max(1, len(chances)), bins


def _aurocs(scores: NDArray[np.float64], positive: NDArray[np.bool_], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Computes the AUROC of ``n`` rollouts once for each row of ``weights`` ``(resamples, n)``, which says how many times each rollout
    counts; NaN for a row whose weights leave no positives or no negatives.
    """
    order = np.argsort(scores, kind="stable")
    ranked, with_it, counted = scores[order], positive[order], weights[:, order]
    starts = np.flatnonzero(np.append(True, np.diff(ranked) != 0)) if len(ranked) else np.zeros(0, int)
    if not len(starts):
        return np.full(len(weights), np.nan)
    negatives, positives = (np.add.reduceat(np.where(kind, counted, 0.0), starts, axis=1) for kind in (~with_it, with_it))
    below = np.cumsum(negatives, axis=1) - negatives / 2
    pairs = negatives.sum(axis=1) * positives.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(pairs > 0, (below * positives).sum(axis=1) / pairs, np.nan)


def _numbered(groups: ArrayLike) -> NDArray[np.int64]:
    return np.unique(np.asarray(groups), return_inverse=True)[1].astype(np.int64)


def _drawn_groups(group: NDArray[np.int64], seed: int, independent: float = 1.0) -> NDArray[np.float64]:
    """Draws, for each resample of a bootstrap, groups of rollouts with replacement, as many as count as independent, and returns how often
    each group is drawn, ``(RESAMPLES, groups)``.
    """
    count = int(group.max()) + 1
    drawn = max(1, round(independent * count))
    return np.random.default_rng(seed).multinomial(drawn, np.full(count, 1 / count), RESAMPLES).astype(np.float64)
