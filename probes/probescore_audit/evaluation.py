"""Evaluates a probe by its scores of labelled rollouts, all together and by slice: AUROC, and the shares that each threshold flags.

A slice is a named part of the data. Intervals are of 95%. If rollouts come in groups, intervals come from the bootstrap of the module
``grouped``, which draws whole groups. If each rollout is a group of its own, intervals are Newcombe's of an AUROC and Clopper and Pearson's
of a share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest

from probescore_audit.calibration import evaluate_auroc
from probescore_audit.grouped import Estimate, grouped_auroc, grouped_rate

_UNKNOWN = Estimate(float("nan"), float("nan"), float("nan"))


@dataclass(frozen=True)
class FlaggedShares:
    """Value object with the shares of the positive and of the negative rollouts that a probe flags at one threshold, each with its 95%
    interval.

    Attributes:
        threshold: the threshold; a rollout whose score is at or above it is flagged.
        recall: the share of the positive rollouts that are flagged; NaN without positives.
        false_positives: the share of the negative rollouts that are flagged; NaN without negatives.
    """

    threshold: float
    recall: Estimate
    false_positives: Estimate


@dataclass(frozen=True)
class Quality:
    """Value object with measures of how well a probe separates rollouts with a behaviour from rollouts without it, on all data or on one
    slice.

    Attributes:
        slice: the name of the part of the data; empty for all of the data.
        positives: number of rollouts with the behaviour.
        negatives: number of rollouts without the behaviour.
        groups: number of groups that the rollouts come in.
        auroc: the probability that a positive rollout scores above a negative one; NaN unless there are both.
        thresholds: the flagged shares for each threshold that was given, in the order given.
    """

    slice: str
    positives: int
    negatives: int
    groups: int
    auroc: Estimate
    thresholds: tuple[FlaggedShares, ...]


def evaluate(
    scores: ArrayLike,
    positive: ArrayLike,
    groups: ArrayLike,
    *,
    slices: Sequence[str] = (),
    thresholds: Sequence[float] = (),
    seed: int = 0,
) -> tuple[Quality, ...]:
    """Evaluates a probe on all rollouts together, then on each slice (part of the data) by itself in the order of the slices' names.

    Args:
        scores: one score for each rollout, ``(n,)``, in the unit of the thresholds.
        positive: whether each rollout has the behaviour, ``(n,)`` bool.
        groups: group of each rollout, ``(n,)``, equal for rollouts that belong together.
        slices: the name of each rollout's slice, empty for none; an empty sequence if the data has no slices.
        thresholds: the thresholds that the probe is used with.
        seed: seed of the bootstrap.

    Raises:
        ValueError: there are no rollouts, their scores are not finite, or the arguments differ in length.
    """
    values, with_it, group = np.asarray(scores, np.float64), np.asarray(positive, bool), np.asarray(groups)
    for name, other in (("positive", with_it), ("groups", group), *((("slices", slices),) if len(slices) else ())):
        if len(other) != len(values):
            raise ValueError(f"{name}: {len(other)} for {len(values)} scores; give one for each rollout")
    if not len(values):
        raise ValueError("scores: no rollouts to judge by; give one score for each rollout (n,)")
    if not np.isfinite(values).all():
        raise ValueError(f"scores: {int((~np.isfinite(values)).sum())} of {len(values)} are not finite; leave out what was not scored")
    named = np.array(slices if len(slices) else [""] * len(values))
    parts = [("", np.ones(len(values), bool)), *((str(name), named == name) for name in np.unique(named) if name)]
    return tuple(_quality(name, values[part], with_it[part], group[part], thresholds, seed) for name, part in parts)


def _quality(
    name: str,
    scores: NDArray[np.float64],
    positive: NDArray[np.bool_],
    groups: NDArray[np.generic],
    thresholds: Sequence[float],
    seed: int,
) -> Quality:
    count = len(np.unique(groups))
    return Quality(
        slice=name,
        positives=int(positive.sum()),
        negatives=int((~positive).sum()),
        groups=count,
        auroc=_auroc(scores, positive, groups, count, seed),
        thresholds=tuple(
            FlaggedShares(
                float(threshold),
                recall=_share((scores >= threshold)[positive], groups[positive], seed),
                false_positives=_share((scores >= threshold)[~positive], groups[~positive], seed),
            )
            for threshold in thresholds
        ),
    )


def _auroc(scores: NDArray[np.float64], positive: NDArray[np.bool_], groups: NDArray[np.generic], count: int, seed: int) -> Estimate:
    if not positive.any() or positive.all():
        return _UNKNOWN
    if count < len(scores):
        return grouped_auroc(scores, positive, groups, seed=seed)
    alone = evaluate_auroc(scores[positive], scores[~positive], dataset="rollouts that stand alone")
    return Estimate(alone.value, alone.low, alone.high)


def _share(flagged: NDArray[np.bool_], groups: NDArray[np.generic], seed: int) -> Estimate:
    if not len(flagged):
        return _UNKNOWN
    if len(np.unique(groups)) < len(flagged):
        return grouped_rate(flagged, groups, seed=seed)
    exact = binomtest(int(flagged.sum()), len(flagged)).proportion_ci(0.95, method="exact")
    return Estimate(float(flagged.mean()), float(exact.low), float(exact.high))
