"""A fitted estimator taken apart: the affine steps in front, and what is at the end of pipelines, searches and wrappers."""

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
    """A fitted estimator behind affine steps.

    Args:
        estimator: as it was given, or a part of what was given.
        width: of the rows that enter the first step.
        before: the affine steps in front of it.
    """

    estimator: Any
    width: int
    before: tuple[Any, ...] = ()

    @cached_property
    def _parts(self) -> tuple[Estimator, tuple[Estimator, ...]]:
        return opened(self.estimator, self.before)

    @property
    def inner(self) -> Estimator:
        """The estimator at the end of its pipelines, searches and wrappers."""
        return self._parts[0]

    @property
    def steps(self) -> tuple[Estimator, ...]:
        """The affine steps in front of that."""
        return self._parts[1]

    def kind(self, name: str) -> str:
        """``classifier``, ``regressor`` or ``outliers``."""
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
        """A part of the innermost estimator, behind the same steps."""
        return FittedEstimator(estimator, self.width, self.steps)

    def transformed(self, rows: Rows) -> Rows:
        """What the steps make of rows."""
        for step in self.steps:
            rows = np.asarray(called(step, "transform", rows), np.float64)
        return rows

    @cached_property
    def affine(self) -> tuple[Rows, Rows]:
        """Weight ``(columns, width)`` and bias ``(columns,)`` of what ``is_linear`` says is an affine map."""
        method = "decision_function" if hasattr(self.inner, "decision_function") else "predict"
        return affine_map(self._behind(method), self.width)

    def is_logit(self) -> bool:
        """Whether the sigmoid of an affine decision is the second class's probability."""
        weight, _ = self.affine
        if len(weight) != 1 or not weight.any():
            return False
        rows, decisions = self._undecided()
        return bool(np.allclose(1 / (1 + np.exp(-decisions[:, 0])), self._behind("predict_proba")(rows)[:, 1], rtol=1e-6, atol=1e-9))

    def is_softmax(self) -> bool:
        """Whether the probabilities of several classes are the softmax of affine decisions, not the shares of their sigmoids."""
        rows, decisions = self._undecided()
        softmax = np.exp(decisions) / np.exp(decisions).sum(axis=1, keepdims=True)
        return bool(np.allclose(softmax, self._behind("predict_proba")(rows), rtol=1e-6, atol=1e-9))

    def _undecided(self) -> tuple[Rows, Rows]:
        """Rows whose decisions are between -3 and 3, as far as there are such, and these decisions."""
        weight, bias = self.affine
        wanted = np.random.default_rng(0).uniform(-3, 3, (16, len(bias)))
        rows = (wanted - bias) @ np.linalg.pinv(weight).T
        return rows, rows @ weight.T + bias

    def _behind(self, method: str) -> Function:
        score = scoring(self.inner, method)
        return lambda rows: score(self.transformed(rows))

    def after_steps(self) -> FittedEstimator:
        """What ends a pipeline whose steps are not all affine."""
        last = self.inner.steps[-1][1]
        return FittedEstimator(last, width_of(last, described(self.estimator)))


def opened(estimator: Estimator, steps: tuple[Estimator, ...] = ()) -> tuple[Estimator, tuple[Estimator, ...]]:
    """The estimator at the end of pipelines, searches and wrappers, and the affine steps in front of it."""
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
    """What ends a pipeline whose steps are not all affine."""
    return last_of(opened(estimator.steps[-1][1])[0]) if name_of(estimator) == "Pipeline" else estimator
