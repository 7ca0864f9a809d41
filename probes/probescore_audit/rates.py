"""Estimates, from labels of some rollouts, how many rollouts have the behaviour, and how many of those the probe flags.

Rollouts are drawn for labelling within strata (classes of rollouts by score; see ``label_plan``), and each stratum's share of positives
gets a posterior. The estimate is that of Begg and Greenes (1983, Biometrics 39:207) for tests of which only some are verified, with random
draws in place of a normal approximation, which covers badly if few positives are seen. Intervals are quantiles of the draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from probescore_audit.grouped import Estimate
from probescore_audit.label_plan import Floats, Stratum
from probescore_audit.run_labels import StratumCounts

DRAWS = 4000
# Pseudo-counts of positives and of negatives in the strata: flagged, near, rest. The last two share the half of Jeffreys' prior. Most of it
# goes to the rest: that is most of the rollouts, and with less the bound on what is missed is too low where no positive is seen there.
_PRIOR = np.array([0.5, 0.15, 0.35])
_TAILS = [2.5, 97.5]
_LEAST_WEIGHT = 1e-6  # in place of an empty stratum, for which a Dirichlet distribution does not exist


@dataclass(frozen=True, eq=False)
class Rates:
    """Value object with random draws from the posterior of three rates of a probe, ``(draws,)`` float64 each. Arithmetic on the rates draw
    by draw keeps their dependence.

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
        """Returns the share of all rollouts that are positive and flagged, for each posterior draw."""
        return self.positive_rate * self.recall

    @property
    def missed(self) -> Floats:
        """Returns the share of all rollouts that are positive and not flagged, for each posterior draw."""
        return self.positive_rate * (1 - self.recall)


@dataclass(frozen=True, kw_only=True)
class ReferenceCounts:
    """Value object with counts of labelled rollouts of the model before training, with which the training run is compared.

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
    """Samples from their posterior the share of all rollouts that are positive and in each of the three strata (classes by score), and the
    share that are negative and in each, ``(draws, 3)`` each.
    """
    share = rng.beta(counts.positive + _PRIOR, counts.labelled - counts.positive + _PRIOR, (draws, len(_PRIOR)))
    weight = rng.dirichlet(np.maximum(counts.rollouts / counts.design_effect, _LEAST_WEIGHT), draws)
    return weight * share, weight * (1 - share)


def draw_rates(counts: StratumCounts, rng: np.random.Generator, draws: int = DRAWS) -> Rates:
    """Samples from their posterior the rates of a probe (positives, recall, false positives) in a window of training steps.

    The share of positives is that among rollouts of all prompts like those of the window, which a window of other prompts would have shown
    as well.
    """
    positive, negative = draw_positive_mass(counts, rng, draws)
    rate, flagged = positive.sum(axis=1), Stratum.FLAGGED
    with np.errstate(invalid="ignore", divide="ignore"):
        recall = np.nan_to_num(positive[:, flagged] / rate)
        false_positive_rate = np.nan_to_num(negative[:, flagged] / (1 - rate))
    odds = np.exp(rng.normal(0.0, _prompt_spread(counts), draws))
    return Rates(positive_rate=rate * odds / (1 - rate + rate * odds), recall=recall, false_positive_rate=false_positive_rate)


def _prompt_spread(counts: StratumCounts) -> float:
    """Returns the standard deviation that the choice of prompts adds to the logarithm of the odds of a positive in a window of training
    steps, beyond what the draws of labels and of strata (classes by score) have already.

    Estimated from pairs of labels of one prompt (Horvitz and Thompson 1952): where more of these are both flagged and positive than if
    rollouts of a prompt were independent, other prompts would have had more or fewer positives. Only pairs of flagged rollouts are used,
    since few others are labelled. Draws of strata have the part that is seen in the flags.
    """
    rollouts, caught = float(counts.rollouts.sum()), counts.flagged_positive
    if not caught:
        return 0.0
    flagged = float(counts.rollouts[Stratum.FLAGGED])
    between_prompts = counts.flagged_positive_pairs - counts.pairs * (caught / rollouts) ** 2
    seen_in_flags = (caught / flagged) ** 2 * flagged * (1 - flagged / rollouts) * (counts.design_effect - 1)
    return float(np.sqrt(max(0.0, between_prompts - seen_in_flags)) / caught)


def draw_reference(reference: ReferenceCounts, rng: np.random.Generator, draws: int = DRAWS) -> Rates:
    """Samples from their posterior (with Jeffreys' prior) the rates of a probe (positives, recall, false positives) before training."""

    def drawn(hits: int, trials: int) -> Floats:
        return rng.beta(hits + 0.5, trials - hits + 0.5, draws)

    return Rates(
        positive_rate=drawn(reference.random_positives, reference.random_rollouts),
        recall=drawn(reference.flagged_positives, reference.positives),
        false_positive_rate=drawn(reference.flagged_negatives, reference.negatives),
    )


def interval(draws: Floats) -> Estimate:
    """Returns the median of random draws of a number with their central 95% interval; NaN if every draw is NaN."""
    known = draws[~np.isnan(draws)]
    if not len(known):
        return Estimate(np.nan, np.nan, np.nan)
    low, high = np.percentile(known, _TAILS)
    return Estimate(float(np.median(known)), float(low), float(high))


def honest_share(before: Rates, now: Rates) -> Floats:
    """Computes, for each posterior draw, which share of a fall of detections is real, that is, due to positives that are gone rather than
    to positives that are there and now missed.

    A detection is a positive rollout that is flagged. The share is NaN in a draw in which detections have not fallen.
    """
    fall = before.detected - now.detected
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.clip((before.positive_rate - now.positive_rate) / fall, 0, 1)
    return np.where(fall > 0, share, np.nan)


@dataclass(frozen=True)
class FlagRateParts:
    """Value object with the change of the share of flagged rollouts between two times, divided into three parts by cause (Kitagawa 1955).
    The parts add up to the change.

    Attributes:
        composition: the part due to more or fewer positives.
        positives: the part due to a probe that flags more or fewer of the positives.
        negatives: the part due to a probe that flags more or fewer of the negatives.
    """

    composition: Estimate
    positives: Estimate
    negatives: Estimate


def flag_rate_parts(before: Rates, now: Rates) -> FlagRateParts:
    """Divides the change of the share of flagged rollouts between two times into the parts due to the number of positives, to recall and to
    false positives.
    """
    rate = (before.positive_rate + now.positive_rate) / 2
    recall = (before.recall + now.recall) / 2
    alarms = (before.false_positive_rate + now.false_positive_rate) / 2
    return FlagRateParts(
        composition=interval((now.positive_rate - before.positive_rate) * (recall - alarms)),
        positives=interval(rate * (now.recall - before.recall)),
        negatives=interval((1 - rate) * (now.false_positive_rate - before.false_positive_rate)),
    )
