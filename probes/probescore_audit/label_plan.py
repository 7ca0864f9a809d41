"""Chooses which rollouts of a training step to label, so that labels are few and yet say how much behaviour a probe misses.

Half of the labels go to rollouts drawn at random, at most one of a prompt (the floor labels): without these nobody learns how many positive
rollouts, which are rollouts with the behaviour, the probe does not flag. A quarter goes to flagged rollouts, and a quarter to those
unflagged rollouts whose scores come nearest to the threshold. Each label is stored with the probability with which its rollout was chosen,
so that estimates can weigh it by the inverse (Horvitz and Thompson 1952).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probescore_audit import arguments

_NEAR_SHARE = 0.1  # of the unflagged rollouts
Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


class Stratum(IntEnum):
    """Enumeration of the classes of a step's rollouts by score, among which labels are shared out: flagged rollouts, the tenth of the
    unflagged rollouts with the highest scores, and the rest.
    """

    FLAGGED = 0
    NEAR = 1
    REST = 2


@dataclass(frozen=True, eq=False)
class LabelPlan:
    """Value object that says which rollouts of one training step are to be labelled.

    Attributes:
        rollouts: index of each chosen rollout within the training step, ``(m,)`` int64, ascending.
        inclusion: probability with which each of these rollouts was chosen, ``(m,)`` float64 in (0, 1].
        stratum: the ``Stratum`` (class by score) of each of these rollouts, ``(m,)`` int8.
        floor: whether each of these rollouts is among those drawn at random, ``(m,)`` bool.
    """

    rollouts: Indices
    inclusion: Floats
    stratum: NDArray[np.int8]
    floor: NDArray[np.bool_]


def strata(scores: ArrayLike, threshold: float) -> NDArray[np.int8]:
    """Returns the class by score (``Stratum``: flagged, highest of the unflagged, or rest) of each rollout of one training step, ``(n,)``
    int8.

    Args:
        scores: the probe's scores of the step's rollouts, ``(n,)``.
        threshold: a rollout whose score is at or above this number is flagged.
    """
    values = np.asarray(scores, np.float64)
    found = np.full(len(values), Stratum.REST, np.int8)
    found[values >= threshold] = Stratum.FLAGGED
    unflagged = np.flatnonzero(values < threshold)
    near = unflagged[np.argsort(-values[unflagged], kind="stable")][: int(np.ceil(_NEAR_SHARE * len(unflagged)))]
    found[near] = Stratum.NEAR
    return found


def plan_labels(scores: ArrayLike, prompts: ArrayLike, threshold: float, labels: int, *, rng: np.random.Generator) -> LabelPlan:
    """Chooses which rollouts of one training step to label: half of them at random, a quarter among the flagged ones, and a quarter among
    the unflagged ones with the highest scores.

    A rollout can be chosen twice, at random and within its stratum (class by score); it is then labelled once, so that fewer than
    ``labels`` rollouts may come back. Fewer come back as well if a stratum has fewer rollouts than a quarter of ``labels``, or the step has
    fewer prompts than half of ``labels``.

    Args:
        scores: the probe's scores of the step's rollouts, ``(n,)``.
        prompts: prompt of each rollout, ``(n,)``, equal for rollouts of one prompt.
        threshold: a rollout whose score is at or above this number is flagged.
        labels: number of labels that the step may cost, at least 4.
        rng: source of randomness.

    Raises:
        ValueError: a score is not finite, scores and prompts differ in number, or there are fewer than 4 labels.
    """
    values, prompt = arguments.real(scores, "scores", "one score for each rollout of the step"), np.asarray(prompts)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"scores: {arguments.shown(values)}; give a finite score for each rollout, and leave out what has none")
    if prompt.shape != values.shape:
        raise ValueError(f"prompts: {len(prompt)} for {len(values)} scores; give the prompt of each rollout")
    if labels < 4:
        raise ValueError(f"labels: {labels} a step; give at least 4: 2 at random, 1 among flagged, 1 near the threshold")
    stratum, quarter = strata(values, threshold), labels // 4
    group, sizes = np.unique(prompt, return_inverse=True, return_counts=True)[1:]
    drawn = rng.permutation(len(sizes))[: labels - 2 * quarter]
    order = rng.permutation(len(values))
    first = np.full(len(sizes), -1, np.int64)
    first[group[order[::-1]]] = order[::-1]  # the first rollout of each prompt in a random order: one drawn uniformly
    floor = np.zeros(len(values), bool)
    floor[first[drawn]] = True
    by_chance = len(drawn) / len(sizes) / sizes[group]
    targeted, share = np.zeros(len(values), bool), np.zeros(len(values))
    for kind in (Stratum.FLAGGED, Stratum.NEAR):
        members = np.flatnonzero(stratum == kind)
        if len(members):
            chosen = rng.permutation(members)[:quarter]
            targeted[chosen] = True
            share[members] = len(chosen) / len(members)
    rollouts = np.flatnonzero(floor | targeted)
    inclusion = 1 - (1 - by_chance) * (1 - share)
    return LabelPlan(rollouts, inclusion[rollouts], stratum[rollouts], floor[rollouts])
