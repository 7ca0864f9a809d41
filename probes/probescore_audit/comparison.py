"""Compares two probes by their scores of the same rollouts: how well each separates the classes, and where the two disagree."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from probescore_audit.grouped import Estimate, grouped_auroc, resampled_aurocs


@dataclass(frozen=True)
class FlagAgreement:
    """Value object with counts of the rollouts of one class (with the behaviour, or without it) that two probes flag, each probe at its own
    threshold.

    Attributes:
        both: number of rollouts that both probes flag.
        only_first: number of rollouts that only the first probe flags.
        only_second: number of rollouts that only the second probe flags.
        neither: number of rollouts that neither probe flags.
    """

    both: int
    only_first: int
    only_second: int
    neither: int

    @property
    def rollouts(self) -> int:
        """Returns the number of rollouts on which two probes were compared."""
        return self.both + self.only_first + self.only_second + self.neither

    @property
    def agreed(self) -> float:
        """Returns the share of rollouts on which two probes agree, because both flag the rollout or neither does; NaN without rollouts."""
        return (self.both + self.neither) / self.rollouts if self.rollouts else math.nan


@dataclass(frozen=True)
class Comparison:
    """Value object with the comparison of two probes by their scores of the same rollouts.

    Attributes:
        first: AUROC of the first probe.
        second: AUROC of the second probe.
        difference: AUROC of the first probe minus that of the second, with a paired 95% interval.
        pearson: correlation of the two probes' scores; NaN if one probe gives all rollouts the same score.
        spearman: correlation of the rollouts' ranks by the two probes.
        positives: counts of flags among rollouts with the behaviour; ``None`` if a probe has no threshold.
        negatives: counts of flags among rollouts without the behaviour; ``None`` if a probe has no threshold.
        rank_gaps: rank of each rollout by the first probe minus its rank by the second, ``(n,)``, as shares of all rollouts, in (-1, 1).
    """

    first: Estimate
    second: Estimate
    difference: Estimate
    pearson: float
    spearman: float
    positives: FlagAgreement | None
    negatives: FlagAgreement | None
    rank_gaps: NDArray[np.float64]


def compare(
    first: ArrayLike,
    second: ArrayLike,
    positive: ArrayLike,
    groups: ArrayLike,
    *,
    thresholds: tuple[float, float] | None = None,
    seed: int = 0,
) -> Comparison:
    """Compares two probes by their scores of the same rollouts.

    The interval of the difference of the two AUROCs is that of Zou and Donner (2008, Statistics in Medicine 27:1693), which combines the
    intervals of the two AUROCs by the correlation of the AUROCs, here estimated from random draws of whole groups. The interval has a width
    even if both probes separate the classes, and none if both rank all rollouts alike.

    Args:
        first: one score for each rollout by the first probe, ``(n,)``.
        second: one score for each rollout by the second probe, ``(n,)``, which may have another unit than the first probe's.
        positive: whether each rollout has the behaviour, ``(n,)`` bool.
        groups: group of each rollout, ``(n,)``, equal for rollouts that belong together.
        thresholds: the threshold of the first probe and that of the second; ``None`` if a probe has none.
        seed: seed of the bootstrap.

    Raises:
        ValueError: a class is missing, a score is not finite, or the arguments differ in length.
    """
    left, right, with_it = np.asarray(first, np.float64), np.asarray(second, np.float64), np.asarray(positive, bool)
    for name, count in (("second", len(right)), ("positive", len(with_it)), ("groups", len(np.asarray(groups)))):
        if count != len(left):
            raise ValueError(f"{name}: {count} for {len(left)} rollouts; give one for each")
    for name, values in (("first", left), ("second", right)):
        if not np.isfinite(values).all():
            unknown = int((~np.isfinite(values)).sum())
            raise ValueError(f"{name}: {unknown} of {len(values)} scores are not finite; leave those rollouts out")
    if not with_it.any() or with_it.all():
        raise ValueError(f"positive: {int(with_it.sum())} of {len(with_it)} rollouts; give some with the behaviour and some without")
    ranks = rankdata(left), rankdata(right)
    one, other = (grouped_auroc(values, with_it, groups, seed=seed) for values in (left, right))
    alike = bool((ranks[0] == ranks[1]).all())
    return Comparison(
        first=one,
        second=other,
        difference=Estimate(0.0, 0.0, 0.0) if alike else _difference(one, other, _correlated(left, right, with_it, groups, seed)),
        pearson=_correlation(left, right),
        spearman=_correlation(*ranks),
        positives=None if thresholds is None else _flags(left[with_it] >= thresholds[0], right[with_it] >= thresholds[1]),
        negatives=None if thresholds is None else _flags(left[~with_it] >= thresholds[0], right[~with_it] >= thresholds[1]),
        rank_gaps=(ranks[0] - ranks[1]) / len(left),
    )


def _difference(one: Estimate, other: Estimate, correlation: float) -> Estimate:
    value = one.value - other.value
    below, above = one.value - one.low, other.high - other.value
    low = value - math.sqrt(max(0.0, below**2 - 2 * correlation * below * above + above**2))
    above, below = one.high - one.value, other.value - other.low
    high = value + math.sqrt(max(0.0, above**2 - 2 * correlation * above * below + below**2))
    return Estimate(value, max(-1.0, low), min(1.0, high))


def _correlated(left: NDArray[np.float64], right: NDArray[np.float64], positive: NDArray[np.bool_], groups: ArrayLike, seed: int) -> float:
    """Returns the correlation of the AUROCs of two probes over the same random draws of groups of rollouts; 0, which makes the interval of
    their difference wide, if one AUROC does not vary.
    """
    drawn = [resampled_aurocs(values, positive, groups, seed=seed) for values in (left, right)]
    there = ~np.isnan(drawn[0])
    found = _correlation(drawn[0][there], drawn[1][there])
    return 0.0 if math.isnan(found) else found


def _correlation(left: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    if len(left) < 2 or left.min() == left.max() or right.min() == right.max():
        return math.nan
    return float(np.corrcoef(left, right)[0, 1])


def _flags(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> FlagAgreement:
    return FlagAgreement(*(int(part.sum()) for part in (first & second, first & ~second, ~first & second, ~first & ~second)))
