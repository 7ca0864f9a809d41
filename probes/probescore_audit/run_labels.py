"""Gathers the rollouts of consecutive training steps, with their labels, for the estimates of how well a probe separates rollouts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probescore_audit.label_plan import Floats, Indices, Stratum, strata

STRATA = len(Stratum)


@dataclass(frozen=True, eq=False)
class RunScores:
    """Value object with a probe's scores of the rollouts of a training run, in the order of the steps.

    Attributes:
        step: training step of each rollout, ``(n,)`` int64, ascending.
        prompt: number of each rollout's prompt, ``(n,)`` int64.
        scores: score of each rollout, ``(n,)`` float64; as a logit, since probabilities near 0 and 1 tie.
        threshold: a rollout whose score is at or above this number is flagged.
        max_scores: the same probe's scores under the reduction ``max``, ``(n,)``; ``None`` if the run has none.
        max_threshold: threshold of ``max_scores``.
        stratum: the ``Stratum`` (class by score) of each rollout within its step, ``(n,)`` int8.
    """

    step: Indices
    prompt: Indices
    scores: Floats
    threshold: float
    max_scores: Floats | None
    max_threshold: float
    stratum: NDArray[np.int8]

    @classmethod
    def of(
        cls,
        step: ArrayLike,
        prompt: ArrayLike,
        scores: ArrayLike,
        threshold: float,
        *,
        max_scores: ArrayLike | None = None,
        max_threshold: float = np.nan,
    ) -> RunScores:
        """Checks the columns of a training run's scores, finds the stratum (class by score) of each rollout, and returns all as
        ``RunScores``.

        Raises:
            ValueError: the columns differ in length, the steps do not ascend, or a score is not finite.
        """
        steps, values = np.asarray(step, np.int64), np.asarray(scores, np.float64)
        prompts = np.unique(np.asarray(prompt), return_inverse=True)[1].astype(np.int64)
        at_most = None if max_scores is None else np.asarray(max_scores, np.float64)
        for name, column in (("scores", values), ("prompt", prompts), ("max_scores", values if at_most is None else at_most)):
            if column.shape != steps.shape:
                raise ValueError(f"{name}: {len(column)} entries for {len(steps)} rollouts; give one for each")
            if not np.isfinite(column).all():
                raise ValueError(f"{name}: {int((~np.isfinite(column)).sum())} entries are not finite; leave out rollouts without a score")
        if (np.diff(steps) < 0).any():
            raise ValueError("step: the steps do not ascend; sort the rollouts by step")
        bounds = np.flatnonzero(np.diff(steps)) + 1
        stratum = np.concatenate([strata(part, threshold) for part in np.split(values, bounds)])
        return cls(steps, prompts, values, threshold, at_most, max_threshold, stratum)

    @property
    def flagged(self) -> NDArray[np.bool_]:
        """Returns whether the probe flags each rollout, ``(n,)`` bool."""
        return self.scores >= self.threshold


@dataclass(frozen=True, eq=False)
class RunLabels:
    """Value object with the labels of rollouts of a training run. A rollout of which the labeller was unsure is left out.

    Attributes:
        rollout: index of each labelled rollout in the columns of ``RunScores``, ``(m,)`` int64, ascending, each once.
        positive: whether the rollout has the behaviour, ``(m,)`` bool.
        inclusion: probability with which the rollout was chosen for labelling, ``(m,)`` float64 in (0, 1].
        floor: whether the rollout was chosen at random rather than for its score, ``(m,)`` bool.
        planned_inclusion: probability with which the plan of its step chose the rollout, ``(m,)``; NaN for a rollout that was chosen later,
            since the labels did not suffice. ``None`` if this is ``inclusion`` throughout. Monitors see this plan alone, as what is chosen
            later depends on what the other labels said.
    """

    rollout: Indices
    positive: NDArray[np.bool_]
    inclusion: Floats
    floor: NDArray[np.bool_]
    planned_inclusion: Floats | None = None

    def planned(self) -> RunLabels:
        """Returns the labels of those rollouts that were chosen with the others of their step."""
        if self.planned_inclusion is None:
            return self
        kept = ~np.isnan(self.planned_inclusion)
        return RunLabels(self.rollout[kept], self.positive[kept], self.planned_inclusion[kept], self.floor[kept])


@dataclass(frozen=True, eq=False)
class StratumCounts:
    """Value object with the numbers of rollouts and labels in the three strata (classes of rollouts by score) of a window of training
    steps: the sufficient statistics of every rate.

    Attributes:
        rollouts: number of rollouts of each stratum, ``(3,)`` float64.
        design_effect: number of rollouts in groups that say as much about the share of flagged rollouts as one independent rollout; at
            least 1, and more where rollouts of one prompt resemble each other (Kish 1965).
        labelled: effective number of labels of each stratum, ``(3,)`` float64: the number of equally weighted labels that say as much as
            these.
        positive: effective number of positive labels of each stratum, ``(3,)`` float64.
        pairs: number of pairs of rollouts of one prompt in one step, each pair counted once for either order.
        flagged_positive: estimated number of rollouts that are flagged and positive, from the labels.
        flagged_positive_pairs: estimated number of the pairs in which both rollouts are flagged and positive, from the labels.
    """

    rollouts: Floats
    design_effect: float
    labelled: Floats
    positive: Floats
    pairs: float
    flagged_positive: float
    flagged_positive_pairs: float


FEWEST_LABELLED = 10
"""Fewest labelled rollouts of a class for a share of the rollouts of that class to be shown as one number."""


@dataclass(frozen=True)
class LabelCounts:
    """Value object with plain counts of labelled rollouts of a window of training steps; those who are labelled are no fair sample, so
    that shares of these numbers estimate nothing.

    Attributes:
        positives: number of labelled rollouts that have the behaviour.
        flagged_positives: number of these that the probe flags.
        negatives: number of labelled rollouts without the behaviour.
        flagged_negatives: number of these that the probe flags.
    """

    positives: int
    flagged_positives: int
    negatives: int
    flagged_negatives: int


@dataclass(frozen=True, eq=False)
class LabelledWindow:
    """Value object with the rollouts of a window of consecutive training steps, and the labels that some of them have.

    Attributes:
        first_step, last_step: the window's first and last step, both included.
        counts: the numbers of rollouts and labels in each stratum (class of rollouts by score).
        stratum: the ``Stratum`` of each labelled rollout, ``(m,)`` int8.
        positive: whether each labelled rollout has the behaviour, ``(m,)`` bool.
        weight: the number of rollouts for which each labelled rollout stands, ``(m,)`` float64.
        scores: score of each labelled rollout, ``(m,)`` float64.
        max_flagged: whether the probe under the reduction ``max`` flags each labelled rollout, ``(m,)`` bool; ``None`` if the run has no
            such scores.
    """

    first_step: int
    last_step: int
    counts: StratumCounts
    stratum: NDArray[np.int8]
    positive: NDArray[np.bool_]
    weight: Floats
    scores: Floats
    max_flagged: NDArray[np.bool_] | None

    @property
    def seen(self) -> LabelCounts:
        """Returns how many of the labelled rollouts of each class the probe flags."""
        flagged = self.stratum == Stratum.FLAGGED
        return LabelCounts(
            positives=int(self.positive.sum()),
            flagged_positives=int((self.positive & flagged).sum()),
            negatives=int((~self.positive).sum()),
            flagged_negatives=int((~self.positive & flagged).sum()),
        )


def labelled_window(run: RunScores, labels: RunLabels, first_step: int, last_step: int) -> LabelledWindow:
    """Gathers the rollouts of a training run from step ``first_step`` to step ``last_step``, both included, and their labels."""
    start, end = np.searchsorted(run.step, [first_step, last_step + 1])
    chosen = slice(*np.searchsorted(labels.rollout, [start, end]))
    rollout, positive, weight = labels.rollout[chosen], labels.positive[chosen], 1 / labels.inclusion[chosen]
    stratum = run.stratum[rollout]
    total, squares, with_it = (
        np.bincount(stratum, weights=of, minlength=STRATA).astype(np.float64) for of in (weight, weight**2, weight * positive)
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        labelled = np.nan_to_num(total**2 / squares)
        positives = np.nan_to_num(labelled * with_it / total)
    clusters, cluster, sizes = _prompt_clusters(run.step[start:end], run.prompt[start:end])
    caught = weight * (positive & (stratum == Stratum.FLAGGED))
    caught_of_prompt = np.bincount(cluster[rollout - start], weights=caught, minlength=clusters)
    counts = StratumCounts(
        rollouts=np.bincount(run.stratum[start:end], minlength=STRATA).astype(np.float64),
        design_effect=_design_effect(run.flagged[start:end], cluster, sizes),
        labelled=labelled,
        positive=positives,
        pairs=float((sizes * (sizes - 1)).sum()),
        flagged_positive=float(caught.sum()),
        flagged_positive_pairs=float((caught_of_prompt**2).sum() - (caught**2).sum()),
    )
    return LabelledWindow(
        first_step=first_step,
        last_step=last_step,
        counts=counts,
        stratum=stratum,
        positive=positive,
        weight=weight,
        scores=run.scores[rollout],
        max_flagged=None if run.max_scores is None else run.max_scores[rollout] >= run.max_threshold,
    )


def latest_window(run: RunScores, labels: RunLabels, last_step: int, least_labels: int) -> LabelledWindow | None:
    """Gathers the rollouts and labels of the shortest window of training steps that ends with ``last_step`` and has enough labels; ``None``
    if all steps up to ``last_step`` have too few.

    Labels of rollouts that were chosen later do not count as enough, since the window would otherwise shrink as they come.
    """
    planned = labels.planned().rollout
    known = int(np.searchsorted(planned, np.searchsorted(run.step, last_step + 1)))
    if known < least_labels:
        return None
    return labelled_window(run, labels, int(run.step[planned[known - least_labels]]), last_step)


def _prompt_clusters(step: Indices, prompt: Indices) -> tuple[int, Indices, Floats]:
    """Returns the number of clusters, each of which has the rollouts of one prompt in one training step, the cluster of each rollout, and
    the size of each cluster.
    """
    if not len(step):
        return 0, np.zeros(0, np.int64), np.zeros(0)
    _, cluster, sizes = np.unique(step * (int(prompt.max()) + 1) + prompt, return_inverse=True, return_counts=True)
    return len(sizes), cluster, sizes.astype(np.float64)


def _design_effect(flagged: NDArray[np.bool_], cluster: Indices, sizes: Floats) -> float:
    """Estimates the design effect of the share of flagged rollouts: how many rollouts say as much as one independent rollout."""
    rate = float(flagged.mean()) if len(flagged) else 0.0
    if not 0 < rate < 1 or len(sizes) < 2:
        return 1.0
    means = np.bincount(cluster, weights=flagged) / sizes
    return max(1.0, float(means.var(ddof=1)) * float(sizes.mean()) / (rate * (1 - rate)))
