"""Simulates training runs whose truth is known: prompts with several rollouts a step, a probe's scores of these, and planned labels.

Negative rollouts, which are those without the behaviour, score as a standard normal variable before training, and positive ones as another
with a higher mean. What training does to them is a ``Change``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from probescore_audit import ReferenceCounts, RunLabels, RunScores, plan_labels
from probescore_audit.calibration import evaluate_auroc
from probescore_audit.grouped import Estimate

PROMPTS, ROLLOUTS = 32, 16
THRESHOLD = float(norm.ppf(0.95))
POSITIVE_RATE, RECALL = 0.09, 0.93
POSITIVE_MEAN = THRESHOLD + float(norm.ppf(RECALL))


@dataclass(frozen=True)
class Change:
    """What training has done to the behaviour and to what the probe sees of it.

    Attributes:
        positive_rate: share of rollouts with the behaviour.
        shift: added to the scores of all rollouts.
        hidden: share of the positive rollouts whose scores are those of negative ones.
        dilution: taken from the scores of positive rollouts, but not from their scores under ``max``.
        correlation: of the behaviour between rollouts of one prompt.
    """

    positive_rate: float = POSITIVE_RATE
    shift: float = 0.0
    hidden: float = 0.0
    dilution: float = 0.0
    correlation: float = 0.3

    @property
    def recall(self) -> float:
        """Share of the positive rollouts that the probe flags."""
        seen = norm.sf(THRESHOLD - POSITIVE_MEAN - self.shift + self.dilution)
        return float((1 - self.hidden) * seen + self.hidden * self.false_positive_rate)

    @property
    def false_positive_rate(self) -> float:
        """Share of the negative rollouts that the probe flags."""
        return float(norm.sf(THRESHOLD - self.shift))


@dataclass(frozen=True)
class Labeller:
    """Who labels rollouts.

    Attributes:
        specificity: share of the negative rollouts that get the right label.
        twice: whether a positive label of an unflagged rollout counts only if a second, independent judgement agrees.
    """

    specificity: float = 1.0
    twice: bool = False


def simulate_step(change: Change, rng: np.random.Generator) -> tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.float64]]:
    """Draws the rollouts of a step: whether each has the behaviour, its score, and its score under ``max``, ``(512,)`` each."""
    shape, rate = (PROMPTS, ROLLOUTS), change.positive_rate
    chances: float | NDArray[np.float64] = rate
    if change.correlation:
        precision = 1 / change.correlation - 1
        chances = rng.beta(rate * precision, (1 - rate) * precision, (PROMPTS, 1))
    positive = (rng.random(shape) < chances).ravel()
    seen = positive & (rng.random(len(positive)) >= change.hidden)
    noise = rng.standard_normal(len(positive)) + change.shift
    return positive, noise + seen * (POSITIVE_MEAN - change.dilution), noise + seen * POSITIVE_MEAN


def simulate_run(
    changes: Sequence[Change], labels: int, rng: np.random.Generator, labeller: Labeller = Labeller()
) -> tuple[RunScores, RunLabels]:
    """Draws a run, with one ``Change`` for each step, and labels of some rollouts of every step.

    Args:
        changes: what is true at each step.
        labels: number of labels a step.
        rng: source of randomness.
        labeller: who labels.
    """
    size = PROMPTS * ROLLOUTS
    prompts = np.repeat(np.arange(PROMPTS), ROLLOUTS)
    positive, scores, at_most = map(np.concatenate, zip(*(simulate_step(change, rng) for change in changes), strict=True))
    plans = [plan_labels(scores[start : start + size], prompts, THRESHOLD, labels, rng=rng) for start in range(0, len(scores), size)]
    rollout = np.concatenate([plan.rollouts + number * size for number, plan in enumerate(plans)])
    said = positive[rollout] | (rng.random(len(rollout)) >= labeller.specificity)
    if labeller.twice:
        agreed = positive[rollout] | (rng.random(len(rollout)) >= labeller.specificity)
        said &= agreed | (scores[rollout] >= THRESHOLD)
    inclusion, floor = (np.concatenate([getattr(plan, name) for plan in plans]) for name in ("inclusion", "floor"))
    step = np.repeat(np.arange(len(changes)), size)
    prompt = step * PROMPTS + np.tile(prompts, len(changes))
    run = RunScores.of(step, prompt, scores, THRESHOLD, max_scores=at_most, max_threshold=THRESHOLD)
    return run, RunLabels(rollout, said, inclusion, floor)


def simulate_reference(rng: np.random.Generator, each: int = 300, random_rollouts: int = 2048) -> ReferenceCounts:
    """Draws labelled rollouts of the model before training: so many of each class, and so many at random."""
    with_it, without_it = POSITIVE_MEAN + rng.standard_normal(each), rng.standard_normal(each)
    auroc = evaluate_auroc(with_it, without_it, dataset="simulated")
    positives = int(rng.binomial(random_rollouts, POSITIVE_RATE))
    negatives = random_rollouts - positives
    return ReferenceCounts(
        positives=each,
        flagged_positives=int((with_it >= THRESHOLD).sum()),
        negatives=negatives,
        flagged_negatives=int(rng.binomial(negatives, norm.sf(THRESHOLD))),
        random_rollouts=random_rollouts,
        random_positives=positives,
        auroc=Estimate(auroc.value, auroc.low, auroc.high),
    )
