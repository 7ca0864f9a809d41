"""Fits linear probes of pooled activations: logistic regression, difference of means, linear discriminant analysis.

The standardisation of activations is folded into the weights. So the mean of a completion's token scores, or the score of its last token,
equals the score that was fitted on pooled activations.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from probescore.types import ScoreUnit

LOGISTIC, DIFFERENCE_OF_MEANS, LDA = LINEAR_KINDS = ("logistic", "difference-of-means", "lda")
STRENGTHS = {LOGISTIC: (1e-3, 1e-2, 1e-1), DIFFERENCE_OF_MEANS: (1e-2,), LDA: (0.1, 0.5, 0.9)}
"""Strengths that cross-validation compares for each kind; the larger, the more a probe follows its data.

For logistic regression on standardised activations a strength is the inverse penalty. For linear discriminant analysis it is the share of
the measured covariance in the covariance that is inverted; the rest is a multiple of the identity. A difference of means has no strength.
"""
USUAL_STRENGTHS = {kind: strengths[len(strengths) // 2] for kind, strengths in STRENGTHS.items()}
"""The strength of a kind that is fitted without a choice."""

Rows = NDArray[np.floating]
_MOST_STEPS = 2000


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear probe: ``score = activations · weight + bias`` on activations that are not standardised.

    Attributes:
        weight: weights, ``(width,)`` float64.
        unit: unit of the scores: ``LOGIT``, or ``VALUE`` for a difference of means.
    """

    weight: NDArray[np.float64]
    bias: float
    unit: ScoreUnit

    def score(self, rows: Rows) -> NDArray[np.float64]:
        """Computes a linear probe's scores ``(n,)`` of activations ``(n, width)``."""
        return np.asarray(rows, np.float64) @ self.weight + self.bias


@dataclass(frozen=True, eq=False)
class Scaler:
    """A standardisation of activations, with the mean and the standard deviation of each feature, ``(width,)`` each."""

    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]

    @classmethod
    def of(cls, rows: Rows, weights: NDArray[np.float64]) -> Scaler:
        """Computes the weighted mean and standard deviation of each feature; a constant feature gets the standard deviation 1."""
        exact = np.asarray(rows, np.float64)
        mean = np.average(exact, axis=0, weights=weights)
        deviation = np.sqrt(np.average((exact - mean) ** 2, axis=0, weights=weights))
        return cls(mean, np.where(deviation > 1e-12 * (1 + np.abs(mean)), deviation, 1.0))

    @classmethod
    def of_tokens(cls, rows: Sequence[Rows], weights: NDArray[np.float64]) -> Scaler:
        """Computes the mean and standard deviation of each feature over all tokens; each token has the weight of its rollout."""
        total = float(weights @ [len(each) for each in rows])
        mean = sum(weight * np.sum(each, axis=0, dtype=np.float64) for weight, each in zip(weights, rows, strict=True)) / total
        squares = sum(weight * ((each - mean) ** 2).sum(axis=0) for weight, each in zip(weights, rows, strict=True))
        deviation = np.sqrt(squares / total)
        return cls(mean, np.where(deviation > 1e-12 * (1 + np.abs(mean)), deviation, 1.0))

    def scaled(self, rows: Rows) -> NDArray[np.float64]:
        """Returns activations with the mean subtracted, divided by the standard deviation."""
        return (np.asarray(rows, np.float64) - self.mean) / self.deviation

    def folded(self, weight: NDArray[np.float64], bias: float, unit: ScoreUnit) -> Linear:
        """Returns a linear probe of standardised activations as the equal probe of activations that are not standardised."""
        raw = weight / self.deviation
        return Linear(raw, float(bias - raw @ self.mean), unit)


def fit_linear(kind: str, rows: Rows, positive: NDArray[np.bool_], weights: NDArray[np.float64], strength: float | None = None) -> Linear:
    """Fits a linear probe of one of ``LINEAR_KINDS`` to pooled activations.

    Args:
        kind: the kind of linear probe.
        rows: pooled activations, ``(n, width)``.
        positive: labels, ``(n,)`` bool, of both classes.
        weights: how many times each example counts, ``(n,)``.
        strength: the kind's strength, as ``STRENGTHS`` explains it; ``None`` = its usual one.
    """
    return fit_strengths(kind, rows, positive, weights, (USUAL_STRENGTHS[kind] if strength is None else strength,))[0]


def fit_strengths(
    kind: str,
    rows: Rows,
    positive: NDArray[np.bool_],
    weights: NDArray[np.float64],
    strengths: Sequence[float],
    *,
    tolerance: float = 1e-4,
) -> list[Linear]:
    """Fits linear probes of one of ``LINEAR_KINDS`` with several strengths to the same pooled activations ``(n, width)``; ``tolerance`` is
    that of the solver of logistic regressions.
    """
    if kind == DIFFERENCE_OF_MEANS:
        exact = np.asarray(rows, np.float64)
        above, below = _means(exact, positive, weights)
        direction = above - below
        return [Linear(direction, float(-direction @ (above + below) / 2), ScoreUnit.VALUE)] * len(strengths)
    if kind == LDA:
        return _fit_discriminants(rows, positive, weights, strengths)
    return fit_logistic(rows, positive, weights, tuple(strengths), tolerance=tolerance)


def fit_logistic(
    rows: Rows, positive: NDArray[np.bool_], weights: NDArray[np.float64], strengths: tuple[float, ...], *, tolerance: float = 1e-4
) -> list[Linear]:
    """Fits logistic regressions with several inverse penalties, the smallest first; each starts from the weights of the one before."""
    scaler = Scaler.of(rows, weights)
    scaled = scaler.scaled(rows)
    fitted = []
    estimator = LogisticRegression(C=strengths[0], max_iter=_MOST_STEPS, tol=tolerance, warm_start=True)
    for strength in strengths:
        estimator.set_params(C=strength)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            estimator.fit(scaled, positive, sample_weight=weights)
        fitted.append(scaler.folded(estimator.coef_[0], float(estimator.intercept_[0]), ScoreUnit.LOGIT))
    return fitted


def _fit_discriminants(rows: Rows, positive: NDArray[np.bool_], weights: NDArray[np.float64], strengths: Sequence[float]) -> list[Linear]:
    """Fits Fisher's linear discriminants, whose score is the log odds of two normal classes, with several shares of the covariance.

    The share is a strength that cross-validation chooses, and no formula's. That of Ledoit and Wolf (2004) minimises the error of the
    covariance matrix. Beside the few large directions of a language model's activations this error hardly counts in the many small ones,
    and the inverse amplifies it there: on statements of a trained model the formula's share was .99 and gave an AUROC of .85, where .5
    gave .91.
    """
    scaler = Scaler.of(rows, weights)
    scaled = scaler.scaled(rows)
    above, below = _means(scaled, positive, weights)
    within = scaled - np.where(positive[:, None], above, below)
    covariance = (within.T * weights) @ within / weights.sum()
    variances, directions = np.linalg.eigh(covariance)
    mean_variance = float(variances.mean())
    apart = directions.T @ (above - below)
    odds = np.log(weights[positive].sum() / weights[~positive].sum())
    fitted = []
    for share in strengths:
        shrunk = share * variances + (1 - share) * mean_variance
        direction = directions @ np.divide(apart, shrunk, out=np.zeros_like(apart), where=shrunk > 1e-12)  # zero where nothing varies
        fitted.append(scaler.folded(direction, float(odds - direction @ (above + below) / 2), ScoreUnit.LOGIT))
    return fitted


def _means(
    rows: NDArray[np.float64], positive: NDArray[np.bool_], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Computes the weighted means of both classes, ``(width,)`` each, the positive class first."""
    above, below = (np.average(rows[side], axis=0, weights=weights[side]) for side in (positive, ~positive))
    return above, below
