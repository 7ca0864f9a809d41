"""Calibrates thresholds with an interval that holds for fresh rollouts, also where rollouts come in groups.

Rollouts of one prompt are no independent draws: the flags of one group resemble each other, so that ``n`` rollouts say as much as ``n / d``
independent ones. ``d``, the design effect (Kish 1965), is the variance of the share of flagged rollouts over whole groups, divided by that
of as many independent rollouts.
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
    """Finds the threshold of ``calibrate``, with a 95% prediction interval: what share of as many fresh rollouts it will flag.

    The interval counts what chance does to both: to the negatives that the threshold was found on, and to fresh ones of as many other
    groups. The threshold is an order statistic, so that among independent rollouts the number of fresh ones above it is beta-binomial;
    among grouped ones so many fewer rollouts are counted as the design effect says, which is that of the threshold or, if it is larger, of
    ten times as many flagged rollouts, since few flags hardly show what groups they come in.

    Args:
        negatives: ``(n,)`` as ``calibrate`` takes them.
        groups: ``(n,)``, equal for rollouts that belong together, such as those of one prompt.
        false_positive_rate: as ``calibrate`` takes it.
        dataset: as ``calibrate`` takes it.
        reduction: as ``calibrate`` takes it.
        label: as ``calibrate`` takes it.

    Raises:
        TypeError: as ``calibrate`` does.
        ValueError: as ``calibrate`` does; also where groups and negatives differ in number, or fewer than two groups are there.
    """
    found = calibrate(negatives, false_positive_rate=false_positive_rate, dataset=dataset, reduction=reduction, label=label)
    scores = np.asarray(negatives, np.float64).ravel()
    group = np.unique(np.asarray(groups), return_inverse=True)[1].ravel()
    if len(group) != len(scores):
        raise ValueError(f"groups: {len(group)} for {len(scores)} negatives; give one for each")
    count = int(group.max()) + 1
    if count < 2:
        raise ValueError(f"groups: all {len(scores)} negatives are of one group; rollouts of several prompts tell what others will do")
    # rollouts above a lower threshold, which show better how flags come in groups
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
    """Estimates how many rollouts say as much about a share of flagged rollouts as one independent rollout would.

    It is 1 where no rollout is flagged, or each.

    Args:
        flagged: ``(n,)`` bool, whether each rollout is flagged.
        group: ``(n,)`` number of each rollout's group, from 0, none left out.
    """
    total, rate = len(flagged), float(flagged.mean())
    if not 0 < rate < 1:
        return 1.0
    sizes = np.bincount(group)
    beyond = np.bincount(group, weights=flagged) - rate * sizes
    count = len(sizes)
    variance = count / (count - 1) * float((beyond**2).sum()) / total**2
    return variance / (rate * (1 - rate) / total)
