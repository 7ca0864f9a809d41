"""Estimates the AUROC of a probe in a window of training steps, in which some rollouts are labelled, each chosen with a known
probability.
"""

from __future__ import annotations

import numpy as np

from probescore_audit.grouped import Estimate, auroc
from probescore_audit.label_plan import Stratum
from probescore_audit.rates import DRAWS, draw_positive_mass, interval
from probescore_audit.run_labels import LabelledWindow

_OBSERVATIONS = 3  # for each positive
_PRIOR = 0.25


def window_auroc(window: LabelledWindow, rng: np.random.Generator) -> Estimate:
    """Estimates a probe's AUROC on all rollouts of a window of training steps from the labelled rollouts.

    Between strata (classes of rollouts by score) the order of scores is known. Two things are uncertain: how positives and negatives are
    spread over the strata, which is drawn from a posterior, and the AUROC within each stratum. That AUROC is drawn from a beta distribution
    with three observations for each effective positive of the stratum: with one observation it would have the largest variance that an
    AUROC can have (Birnbaum and Klose 1957), and intervals would be far too wide. The interval is approximate. The estimate is NaN if no
    labelled rollout is positive, or all are.
    """
    if not window.positive.any() or window.positive.all():
        return Estimate(np.nan, np.nan, np.nan)
    positive, negative = draw_positive_mass(window.counts, rng)
    positive, negative = (mass / mass.sum(axis=1, keepdims=True) for mass in (positive, negative))
    below = np.cumsum(negative[:, ::-1], axis=1)[:, ::-1] - negative  # strata are numbered from the highest scores down
    value = np.zeros(DRAWS)
    for stratum in Stratum:
        here = window.stratum == stratum
        within = auroc(window.scores[here], window.positive[here], window.weight[here])
        seen = _OBSERVATIONS * window.counts.positive[stratum] if not np.isnan(within) else 0.0
        within = 0.5 if np.isnan(within) else within
        drawn = rng.beta(within * seen + _PRIOR, (1 - within) * seen + _PRIOR, DRAWS)
        value += positive[:, stratum] * (below[:, stratum] + negative[:, stratum] * drawn)
    return interval(value)


def difference_low(now: Estimate, before: Estimate) -> float:
    """Returns the lower end of the 95% interval of the difference of two estimates, from the 95% interval of each (Zou and Donner 2008)."""
    return now.value - before.value - float(np.hypot(now.value - now.low, before.high - before.value))


def difference_high(now: Estimate, before: Estimate) -> float:
    """Returns the upper end of the 95% interval of the difference of two estimates, from the 95% interval of each (Zou and Donner 2008)."""
    return now.value - before.value + float(np.hypot(now.high - now.value, before.value - before.low))
