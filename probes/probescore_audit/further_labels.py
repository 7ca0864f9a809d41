"""Chooses which further rollouts of a window of training steps to label if the labels that are there do not decide anything."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from probescore_audit.label_plan import Floats, Indices
from probescore_audit.run_labels import STRATA, RunLabels, RunScores, StratumCounts, labelled_window


@dataclass(frozen=True, eq=False)
class FurtherLabels:
    """Value object that says which further rollouts of a training run are to be labelled.

    Attributes:
        rollouts: index of each chosen rollout in the columns of ``RunScores``, ``(m,)`` int64, ascending.
        stratum: the ``Stratum`` (class by score) of each of these rollouts, ``(m,)`` int8.
        population: number of rollouts of the same step and stratum, ``(m,)`` int64.
        inclusion: share of these that are labelled once all of these labels are there, ``(m,)`` float64 in (0, 1].
    """

    rollouts: Indices
    stratum: NDArray[np.int8]
    population: Indices
    inclusion: Floats


def allotted_labels(counts: StratumCounts, labels: int) -> Floats:
    """Returns how many of some further labels go to each of the three strata (classes of rollouts by score), ``(3,)`` whole numbers.

    Labels are shared out by Neyman's (1934) rule, in proportion to the standard deviation that each stratum contributes.
    """
    mean = (counts.positive + 0.5) / (counts.labelled + 1)
    importance = counts.rollouts * np.sqrt(mean * (1 - mean))
    return np.asarray(np.round(labels * importance / importance.sum()), np.float64)


def plan_further_labels(
    run: RunScores, labels: RunLabels, first_step: int, last_step: int, more: int, *, rng: np.random.Generator
) -> FurtherLabels:
    """Chooses further rollouts to label in a window of training steps, at random within each stratum (class of rollouts by score).

    Fewer than ``more`` may come back, since a stratum may have fewer rollouts that have no label yet.

    Args:
        run: the probe's scores of the run's rollouts.
        labels: the labels that there are.
        first_step: first step of the window.
        last_step: last step of the window, included.
        more: number of further labels.
        rng: source of randomness.

    Raises:
        ValueError: ``more`` is less than 1, or the run has no rollouts in the window.
    """
    start, end = np.searchsorted(run.step, [first_step, last_step + 1])
    if more < 1:
        raise ValueError(f"more: {more}; give the number of further labels")
    if start == end:
        raise ValueError(f"steps {first_step} to {last_step}: the run has no rollouts there")
    open_to_choice = np.ones(len(run.step), bool)
    open_to_choice[labels.rollout] = False
    open_to_choice[:start] = open_to_choice[end:] = False
    share = allotted_labels(labelled_window(run, labels, first_step, last_step).counts, more).astype(int)
    chosen = np.sort(
        np.concatenate([rng.permutation(np.flatnonzero(open_to_choice & (run.stratum == kind)))[: share[kind]] for kind in range(STRATA)])
    )
    sizes = _by_step_and_stratum(run, np.arange(start, end))
    labelled = _by_step_and_stratum(run, np.append(labels.rollout[(labels.rollout >= start) & (labels.rollout < end)], chosen))
    population, known = (
        np.array([counted[int(run.step[index]), int(run.stratum[index])] for index in chosen], np.int64) for counted in (sizes, labelled)
    )
    return FurtherLabels(chosen, run.stratum[chosen], population, known / population)


def _by_step_and_stratum(run: RunScores, rollouts: Indices) -> Counter[tuple[int, int]]:
    return Counter(zip(run.step[rollouts].tolist(), run.stratum[rollouts].tolist(), strict=True))
