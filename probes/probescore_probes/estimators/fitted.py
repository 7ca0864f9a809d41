"""Separates a fitted scikit-learn estimator into the affine steps in front of it and the innermost estimator.

The innermost estimator is found inside pipelines, hyperparameter searches and other estimators that wrap one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from probescore_probes.estimators.linear import affine_map, linear_steps
from probescore_probes.estimators.methods import Function, Rows, called, scoring
from probescore_probes.estimators.names import DELEGATES, SEARCHES, Estimator, described, name_of
from probescore_probes.estimators.refusals import width_of


@dataclass(frozen=True, eq=False)
class FittedEstimator:
    """Value object with a fitted estimator and the affine steps, such as scalers, that are applied before it.

    Args:
        estimator: the estimator, or a part of one.
        width: number of features in each input row of the first step.
        before: the affine steps that are applied before the estimator.
    """

    estimator: Any
    width: int
    before: tuple[Any, ...] = ()

    @cached_property
    def _parts(self) -> tuple[Estimator, tuple[Estimator, ...]]:
        return opened(self.estimator, self.before)

    @property
    def inner(self) -> Estimator:
        """Returns the scikit-learn estimator inside all pipelines, hyperparameter searches and wrappers."""
        return self._parts[0]

    @property
    def steps(self) -> tuple[Estimator, ...]:
        """Returns all affine steps (such as scalers) that are applied before the innermost scikit-learn estimator."""
        return self._parts[1]

    def kind(self, name: str) -> str:
        """Returns the kind of a scikit-learn estimator: ``classifier``, ``regressor`` or ``outliers``.

        Raises:
            ValueError: the estimator is of no such kind, and so has no scores.
        """
        from sklearn.base import is_classifier, is_outlier_detector, is_regressor

        for kind, holds in (("classifier", is_classifier), ("regressor", is_regressor), ("outliers", is_outlier_detector)):
            if holds(self.estimator):
                return kind
        if name_of(self.inner) in ("PLSCanonical", "CCA"):
            return "regressor"
        raise ValueError(
            f"estimator: {name} is no classifier, regressor or outlier detector, and has no scores; fit a Pipeline that ends in one"
        )

    def part(self, estimator: Estimator) -> FittedEstimator:
        """Returns a description of a part of the innermost scikit-learn estimator, with the same affine steps before the part."""
        return FittedEstimator(estimator, self.width, self.steps)

    def transformed(self, rows: Rows) -> Rows:
        """Returns rows of features as the affine steps in front of an estimator, such as scalers, transform them, float64."""
        for step in self.steps:
            rows = np.asarray(called(step, "transform", rows), np.float64)
        return rows

    @cached_property
    def affine(self) -> tuple[Rows, Rows]:
        """Returns the weight ``(columns, width)`` and bias ``(columns,)`` of an estimator that ``is_linear`` finds to be an affine map."""
        method = "decision_function" if hasattr(self.inner, "decision_function") else "predict"
        return affine_map(self._behind(method), self.width)

    def is_logit(self) -> bool:
        """Returns whether a classifier's probability of its second class is the sigmoid of an affine decision function."""
        weight, _ = self.affine
        if len(weight) != 1 or not weight.any():
            return False
        rows, decisions = self._undecided()
        return bool(np.allclose(1 / (1 + np.exp(-decisions[:, 0])), self._behind("predict_proba")(rows)[:, 1], rtol=1e-6, atol=1e-9))

    def is_softmax(self) -> bool:
        """Returns whether a classifier's probabilities of several classes are the softmax of affine decision functions.

        Some classifiers instead divide the sigmoid of each decision by the sum of the sigmoids.
        """
        rows, decisions = self._undecided()
        softmax = np.exp(decisions) / np.exp(decisions).sum(axis=1, keepdims=True)
        return bool(np.allclose(softmax, self._behind("predict_proba")(rows), rtol=1e-6, atol=1e-9))

    def _undecided(self) -> tuple[Rows, Rows]:
        """Returns rows at which a classifier's decisions lie between -3 and 3, as far as such rows exist, with these decisions."""
        weight, bias = self.affine
        wanted = np.random.default_rng(0).uniform(-3, 3, (16, len(bias)))
        rows = (wanted - bias) @ np.linalg.pinv(weight).T
        return rows, rows @ weight.T + bias

    def _behind(self, method: str) -> Function:
        score = scoring(self.inner, method)
        return lambda rows: score(self.transformed(rows))

    def after_steps(self) -> FittedEstimator:
        """Returns the last estimator of a scikit-learn pipeline alone, as if the outputs of the steps before it were its inputs.

        It is for pipelines with a step that is not affine, which cannot be folded into the weights of the last estimator.
        """
        last = self.inner.steps[-1][1]
        return FittedEstimator(last, width_of(last, described(self.estimator)))


def opened(estimator: Estimator, steps: tuple[Estimator, ...] = ()) -> tuple[Estimator, tuple[Estimator, ...]]:
    """Returns the innermost scikit-learn estimator inside pipelines, hyperparameter searches and wrappers, and the affine steps (such as
    scalers) in front of it.

    Raises:
        ValueError: a search was fitted without keeping its best estimator.
    """
    name = name_of(estimator)
    if name in SEARCHES:
        if not hasattr(estimator, "best_estimator_"):
            raise ValueError(
                f"estimator: {described(estimator)} was fitted with refit=False and keeps no estimator; fit it with refit=True"
            )
        return opened(estimator.best_estimator_, steps)
    if name in DELEGATES:
        return opened(getattr(estimator, DELEGATES[name]), steps)
    if name in ("RFE", "RFECV"):
        return opened(estimator.estimator_, (*steps, estimator))
    if name == "Pipeline" and linear_steps(estimator.steps[:-1]):
        acting = (step for _, step in estimator.steps[:-1] if step is not None and not isinstance(step, str))
        return opened(estimator.steps[-1][1], (*steps, *acting))
    return estimator, steps


def last_of(estimator: Estimator) -> Estimator:
    """Returns the scikit-learn estimator at the end of nested pipelines, or the given estimator if it is not a pipeline."""
    return last_of(opened(estimator.steps[-1][1])[0]) if name_of(estimator) == "Pipeline" else estimator
