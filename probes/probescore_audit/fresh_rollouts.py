"""Calibrates thresholds with an interval that holds for fresh rollouts, even if rollouts come in groups, such as those of one prompt.

Rollouts of one group are not independent draws: their flags resemble each other, so that ``n`` rollouts carry as much information as
``n / d`` independent ones. ``d`` is the design effect (Kish 1965): the variance of the share of flagged rollouts over whole groups, divided
by the variance of that share for as many independent rollouts.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import betabinom

from probescore_audit.calibration import calibrate
from probescore_audit.estimates import CalibratedThreshold

_TAILS = (0.025, 0.975)


def calibrate_for_fresh(
    negatives: ArrayLike,
    groups: ArrayLike,
    *,
    false_positive_rate: float,
    dataset: str,
    reduction: str | None = "mean",
    label: str = "",
) -> CalibratedThreshold:
    """Finds the lowest threshold that flags at most a stated share of negative rollouts (those without the behaviour), and predicts with
    95% confidence the share of fresh negative rollouts that the threshold will flag.

    The fresh rollouts are supposed to be as many as the given ones, and to come in as many other groups. The interval counts the effect of
    chance on both: on the negatives that the threshold was found on, and on the fresh ones. The threshold is an order statistic, so that
    among independent rollouts the number of fresh ones above the threshold is beta-binomial. Grouped rollouts are counted as fewer, by the
    design effect. The design effect is computed at the threshold and for ten times as many flagged rollouts, since few flags hardly show
    how flags depend on groups; the larger one is used.

    Args:
        negatives: scores of rollouts without the behaviour, ``(n,)``.
        groups: group of each rollout, ``(n,)``, equal for rollouts that belong together, such as those of one prompt.
        false_positive_rate: largest share of the negatives that may be flagged, in (0, 1).
        dataset: description of the negatives, in words.
        reduction: the reduction that made the scores; ``None`` for a probe that pools by itself.
        label: label of the scores, if the probe has several.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: ``calibrate`` would refuse an argument, groups and negatives differ in number, or there are fewer than two groups.
    """
    found = calibrate(negatives, false_positive_rate=false_positive_rate, dataset=dataset, reduction=reduction, label=label)
    scores = np.asarray(negatives, np.float64).ravel()
    group = np.unique(np.asarray(groups), return_inverse=True)[1].ravel()
    if len(group) != len(scores):
        raise ValueError(f"groups: {len(group)} for {len(scores)} negatives; give one for each")
    count = int(group.max()) + 1
    if count < 2:
        raise ValueError(f"groups: all {len(scores)} negatives are of one group; rollouts of several prompts tell what others will do")
    # Rollouts above a lower threshold are more, and show better how flags depend on groups.
    lower = np.sort(scores)[-min(len(scores) // 2, 10 * max(1, round(found.false_positive_rate * len(scores))))]
    effect = max(1.0, design_effect(scores >= found.threshold, group), design_effect(scores >= lower, group))
    independent = max(2, round(len(scores) / effect))
    flagged = found.false_positive_rate * independent
    low, high = (
        float(betabinom.ppf(tail, independent, above, independent + 1 - above)) / independent
        for tail, above in zip(_TAILS, (max(flagged, 1e-9), min(flagged + 1, independent)), strict=True)
    )
    rate = found.false_positive_rate
    return replace(found, false_positive_rate_low=min(low, rate), false_positive_rate_high=max(high, rate))


def design_effect(flagged: NDArray[np.bool_], group: NDArray[np.int64]) -> float:
    """Estimates the design effect: how many rollouts in groups carry as much information about a share as one independent rollout.

    The share is that of the flagged rollouts. The design effect is 1 if no rollout is flagged, or all are.

    Args:
        flagged: whether each rollout is flagged, ``(n,)`` bool.
        group: number of each rollout's group, ``(n,)``, from 0 without gaps.
    """
    total, rate = len(flagged), float(flagged.mean())
    if not 0 < rate < 1:
        return 1.0
    sizes = np.bincount(group)
    beyond = np.bincount(group, weights=flagged) - rate * sizes
    count = len(sizes)
    variance = count / (count - 1) * float((beyond**2).sum()) / total**2
    return variance / (rate * (1 - rate) / total)
