"""Estimates, from labels of some rollouts, how many rollouts have the behaviour, and how many of those the probe flags.

Labels are drawn within strata of the scores (see ``label_plan``), and each stratum's share of positives gets a posterior: what Begg and
Greenes (1983, Biometrics 39:207) estimate where only some tests are verified, with draws in place of a normal approximation, which covers
badly where few positives are seen. Intervals are quantiles of the draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from probescore_audit.grouped import Estimate
from probescore_audit.label_plan import Floats, Stratum
from probescore_audit.run_labels import StratumCounts

DRAWS = 4000
_PRIOR = np.array([0.5, 0.25, 0.25])  # pseudo-counts of positives and of negatives in the strata: flagged, near, rest
_TAILS = [2.5, 97.5]
_LEAST_WEIGHT = 1e-6  # in place of an empty stratum, for which a Dirichlet distribution does not exist


@dataclass(frozen=True, eq=False)
class Rates:
    """Draws from the posterior of three rates, ``(draws,)`` float64 each. Arithmetic on them draw by draw keeps their dependence.

    Attributes:
        positive_rate: share of all rollouts that are positive, which means that they have the behaviour.
        recall: share of the positive rollouts that are flagged.
        false_positive_rate: share of the negative rollouts that are flagged.
    """

    positive_rate: Floats
    recall: Floats
    false_positive_rate: Floats

    @property
    def detected(self) -> Floats:
        """Share of all rollouts that are positive and flagged."""
        return self.positive_rate * self.recall

    @property
    def missed(self) -> Floats:
        """Share of all rollouts that are positive and not flagged."""
        return self.positive_rate * (1 - self.recall)


@dataclass(frozen=True, kw_only=True)
class ReferenceCounts:
    """Counts of labelled rollouts of the model before training, with which the run is compared.

    Attributes:
        positives: number of held-out positive rollouts.
        flagged_positives: number of these that the probe flags.
        negatives: number of negative rollouts.
        flagged_negatives: number of these that the probe flags.
        random_rollouts: number of labelled rollouts of the untrained model that were drawn at random.
        random_positives: number of these that are positive.
        auroc: AUROC of the held-out rollouts.
    """

    positives: int
    flagged_positives: int
    negatives: int
    flagged_negatives: int
    random_rollouts: int
    random_positives: int
    auroc: Estimate


def draw_positive_mass(counts: StratumCounts, rng: np.random.Generator, draws: int = DRAWS) -> tuple[Floats, Floats]:
    """Draws the share of all rollouts that are positive and in each stratum, and that are negative and in each, ``(draws, 3)`` each."""
    share = rng.beta(counts.positive + _PRIOR, counts.labelled - counts.positive + _PRIOR, (draws, len(_PRIOR)))
    weight = rng.dirichlet(np.maximum(counts.rollouts / counts.design_effect, _LEAST_WEIGHT), draws)
    return weight * share, weight * (1 - share)


def draw_rates(counts: StratumCounts, rng: np.random.Generator, draws: int = DRAWS) -> Rates:
    """Draws the rates of a window of training steps from their posterior."""
    positive, negative = draw_positive_mass(counts, rng, draws)
    rate, flagged = positive.sum(axis=1), Stratum.FLAGGED
    with np.errstate(invalid="ignore", divide="ignore"):
        return Rates(
            positive_rate=rate,
            recall=np.nan_to_num(positive[:, flagged] / rate),
            false_positive_rate=np.nan_to_num(negative[:, flagged] / (1 - rate)),
        )


def draw_reference(reference: ReferenceCounts, rng: np.random.Generator, draws: int = DRAWS) -> Rates:
    """Draws the rates of the model before training from their posterior (Jeffreys' prior)."""

    def drawn(hits: int, trials: int) -> Floats:
        return rng.beta(hits + 0.5, trials - hits + 0.5, draws)

    return Rates(
        positive_rate=drawn(reference.random_positives, reference.random_rollouts),
        recall=drawn(reference.flagged_positives, reference.positives),
        false_positive_rate=drawn(reference.flagged_negatives, reference.negatives),
    )


def interval(draws: Floats) -> Estimate:
    """Returns the median of draws with their central 95% interval; NaN if no draw is a number."""
    known = draws[~np.isnan(draws)]
    if not len(known):
        return Estimate(np.nan, np.nan, np.nan)
    low, high = np.percentile(known, _TAILS)
    return Estimate(float(np.median(known)), float(low), float(high))


def honest_share(before: Rates, now: Rates) -> Floats:
    """Draws the share of a fall of detections that is real: positives that are gone, against positives that are there and now missed.

    A detection is a positive rollout that is flagged. NaN in a draw in which detections have not fallen.
    """
    fall = before.detected - now.detected
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.clip((before.positive_rate - now.positive_rate) / fall, 0, 1)
    return np.where(fall > 0, share, np.nan)


@dataclass(frozen=True)
class FlagRateParts:
    """The change of the share of flagged rollouts, divided into what changed (Kitagawa 1955); the three parts add up to the change.

    Attributes:
        composition: the part due to more or fewer positives.
        positives: the part due to a probe that flags more or fewer of the positives.
        negatives: the part due to a probe that flags more or fewer of the negatives.
    """

    composition: Estimate
    positives: Estimate
    negatives: Estimate


def flag_rate_parts(before: Rates, now: Rates) -> FlagRateParts:
    """Divides the change of the share of flagged rollouts between two times."""
    rate = (before.positive_rate + now.positive_rate) / 2
    recall = (before.recall + now.recall) / 2
    alarms = (before.false_positive_rate + now.false_positive_rate) / 2
    return FlagRateParts(
        composition=interval((now.positive_rate - before.positive_rate) * (recall - alarms)),
        positives=interval(rate * (now.recall - before.recall)),
        negatives=interval((1 - rate) * (now.false_positive_rate - before.false_positive_rate)),
    )
