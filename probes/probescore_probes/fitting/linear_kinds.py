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
STRENGTHS = (1e-3, 1e-2, 1e-1)
"""Inverse penalties that are tried for logistic regression on standardised activations."""

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
        """Computes the same over the tokens of rollouts ``(tokens, width)``, each of which counts as its rollout, a rollout at a time."""
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


def fit_linear(kind: str, rows: Rows, positive: NDArray[np.bool_], weights: NDArray[np.float64], strength: float = 1e-2) -> Linear:
    """Fits a linear probe of one of ``LINEAR_KINDS`` to pooled activations.

    Args:
        kind: the kind of linear probe.
        rows: pooled activations, ``(n, width)``.
        positive: labels, ``(n,)`` bool, of both classes.
        weights: how many times each example counts, ``(n,)``.
        strength: inverse penalty of logistic regression.
    """
    if kind == DIFFERENCE_OF_MEANS:
        exact = np.asarray(rows, np.float64)
        above, below = (np.average(exact[side], axis=0, weights=weights[side]) for side in (positive, ~positive))
        direction = above - below
        return Linear(direction, float(-direction @ (above + below) / 2), ScoreUnit.VALUE)
    if kind == LDA:
        scaler = Scaler.of(rows, weights)
        return scaler.folded(*_discriminant(scaler.scaled(rows), positive, weights), ScoreUnit.LOGIT)
    return fit_logistic(rows, positive, weights, (strength,))[0]


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


def _discriminant(
    rows: NDArray[np.float64], positive: NDArray[np.bool_], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float]:
    """Computes the weights ``(width,)`` and the bias of Fisher's linear discriminant, whose score is the log odds of two normal classes.

    The covariance within the classes is shrunk towards a multiple of the identity by the formula of Ledoit and Wolf (2004).
    """
    above, below = (np.average(rows[side], axis=0, weights=weights[side]) for side in (positive, ~positive))
    within = rows - np.where(positive[:, None], above, below)
    total, width = float(weights.sum()), rows.shape[1]
    covariance = (within.T * weights) @ within / total
    scale = np.trace(covariance) / width
    distance = float((covariance**2).sum()) / width - scale**2  # from a multiple of the identity
    fourth = float(weights @ (within**2).sum(axis=1) ** 2) / total
    noise = (fourth - float((covariance**2).sum())) / (width * total)
    shrinkage = min(1.0, max(0.0, noise / distance)) if distance > 0 else 0.0
    direction = np.linalg.lstsq((1 - shrinkage) * covariance + shrinkage * scale * np.eye(width), above - below, rcond=None)[0]
    odds = np.log(weights[positive].sum() / weights[~positive].sum())
    return direction, float(odds - direction @ (above + below) / 2)
