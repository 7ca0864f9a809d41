"""Measures whether a fresh probe could still tell rollouts with the behaviour from others: whether the information is still in the
activations, wherever it is by now.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probescore_audit import arguments
from probescore_audit.grouped import Estimate, auroc, grouped_auroc, resampled_aurocs
from probescore_audit.label_plan import Floats

FEWEST = 15
"""Number of labelled rollouts of each class without which nothing is said of a fresh probe."""
_FOLDS = 5
_PENALTY = 0.01  # of the mean loss; the same throughout, since choosing it would take labels
_INDEPENDENT = 0.5  # share of the prompts: scores of cross-validation depend on each other


def fresh_auroc(
    activations: ArrayLike, positive: ArrayLike, groups: ArrayLike, *, weights: ArrayLike | None = None, seed: int = 0
) -> Estimate:
    """Computes the AUROC of fresh linear probes (logistic regressions with an L2 penalty), each fitted on four fifths of the groups and
    judged on the others. It is a lower bound on what the activations tell: of more labels a probe would learn more.

    Args:
        activations: pooled activation of each rollout, ``(n, d)``.
        positive: whether each rollout has the behaviour, ``(n,)`` bool.
        groups: prompt of each rollout, ``(n,)``: rollouts of one prompt are either fitted or judged.
        weights: number of rollouts for which each one stands, ``(n,)``; 1 by default.
        seed: seed of the division into fifths, and of the bootstrap of the interval.

    Returns:
        The AUROC with its 95% interval; NaN if there are fewer than 15 rollouts of a class.

    Raises:
        ValueError: the activations are not a finite matrix, or the arguments differ in length.
    """
    with_it, counted = np.asarray(positive, bool), None if weights is None else np.asarray(weights, np.float64)
    ranks = _held_out_ranks(activations, with_it, groups, counted, seed)
    if np.isnan(ranks).any():
        return Estimate(np.nan, np.nan, np.nan)
    return grouped_auroc(ranks, with_it, groups, weights=counted, independent=_INDEPENDENT, seed=seed)


def fresh_auroc_change(before: ArrayLike, now: ArrayLike, positive: ArrayLike, *, seed: int = 0) -> Estimate:
    """Computes how the AUROC of fresh linear probes has changed between two sets of activations of the same texts.

    Args:
        before: pooled activations of the texts at one time, ``(n, d)``.
        now: those of the same texts at another time, ``(n, d)``.
        positive: whether each text has the behaviour, ``(n,)`` bool.
        seed: seed of the division into fifths, and of the bootstrap of the interval; both are the same for both times.

    Returns:
        The AUROC now less the AUROC before, with its 95% interval; NaN if there are fewer than 15 texts of a class.

    Raises:
        ValueError: the activations are not finite matrices, or the arguments differ in length.
    """
    with_it = np.asarray(positive, bool)
    text = np.arange(len(with_it))
    ranks = [_held_out_ranks(activations, with_it, text, None, seed) for activations in (before, now)]
    if np.isnan(ranks).any():
        return Estimate(np.nan, np.nan, np.nan)
    first, second = (resampled_aurocs(each, with_it, text, independent=_INDEPENDENT, seed=seed) for each in ranks)
    low, high = np.nanpercentile(second - first, [2.5, 97.5])
    return Estimate(auroc(ranks[1], with_it) - auroc(ranks[0], with_it), float(low), float(high))


def _held_out_ranks(activations: ArrayLike, positive: NDArray[np.bool_], groups: ArrayLike, weights: Floats | None, seed: int) -> Floats:
    """Fits a probe for each fifth of the groups on the others, and returns the rank of each rollout within its fifth, in (0, 1): probes of
    two fifths share no scale. NaN if there are too few rollouts of a class.
    """
    values = np.asarray(activations, np.float64)
    if values.ndim != 2 or not np.isfinite(values).all():
        raise ValueError(f"activations: {arguments.shown(values)}; give a finite number for each rollout and dimension, (n, d)")
    group = np.unique(np.asarray(groups), return_inverse=True)[1]
    counted = np.ones(len(values)) if weights is None else weights
    for name, column in (("positive", positive), ("groups", group), ("weights", counted)):
        if len(column) != len(values):
            raise ValueError(f"{name}: {len(column)} for {len(values)} activations; give one for each")
    ranks = np.full(len(values), np.nan)
    if min(int(positive.sum()), int((~positive).sum())) < FEWEST:
        return ranks
    fold = np.random.default_rng(seed).permutation(int(group.max()) + 1)[group] % _FOLDS
    for held in range(_FOLDS):
        judged = np.flatnonzero(fold == held)
        rest = fold != held
        scores = _scores_of_fit(values[rest], positive[rest], counted[rest], values[judged])
        ranks[judged] = (np.argsort(np.argsort(scores)) + 0.5) / max(1, len(judged))
    return ranks


def _scores_of_fit(fitted: Floats, positive: NDArray[np.bool_], weights: Floats, judged: Floats) -> Floats:
    """Fits a logistic regression on standardised activations, and returns its logits of other activations."""
    if positive.all() or not positive.any():
        return np.zeros(len(judged))
    from scipy.optimize import minimize

    centre, scale = fitted.mean(axis=0), fitted.std(axis=0)
    scale[scale == 0] = 1.0
    standard = (fitted - centre) / scale
    # As many directions as rollouts hold all that the fit can see of any number of dimensions.
    axes = np.linalg.svd(standard, full_matrices=False)[2]
    design = np.column_stack([standard @ axes.T, np.ones(len(standard))])
    share = weights / weights.sum()
    sign = np.where(positive, 1.0, -1.0)

    def loss(parameters: Floats) -> tuple[float, Floats]:
        margin = sign * (design @ parameters)
        slope = -share * sign / (1 + np.exp(np.clip(margin, -500, 500)))
        penalised = np.append(parameters[:-1], 0.0)
        value = float(share @ np.logaddexp(0.0, -margin)) + 0.5 * _PENALTY * float(penalised @ penalised)
        return value, design.T @ slope + _PENALTY * penalised

    found = minimize(loss, np.zeros(design.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 200}).x
    logits: Floats = ((judged - centre) / scale) @ axes.T @ found[:-1] + found[-1]
    return logits
