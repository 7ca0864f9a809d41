"""Determines which method of a fitted estimator gives a probe's scores, and the unit of these scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from probescore.types import ScoreUnit
from probescore_probes.estimators import graph_writer
from probescore_probes.estimators.comparison import check_same
from probescore_probes.estimators.fitted import FittedEstimator, last_of, opened
from probescore_probes.estimators.linear import SCALERS, is_linear
from probescore_probes.estimators.methods import Function, Rows, scoring
from probescore_probes.estimators.names import KERNEL_MACHINES, described, name_of
from probescore_probes.estimators.refusals import REASONS, check_classes, check_fitted, refuse_by_name, width_of
from probescore_probes.nodes import Nodes

if TYPE_CHECKING:
    from sklearn.base import BaseEstimator

FEATURES = "features"
"""Name of the value that the ONNX nodes of an estimator read: the activations of all taps (places in the model) side by side, float32."""


@dataclass(frozen=True, eq=False)
class EstimatorScores:
    """Value object with a fitted estimator's scoring function and the ONNX nodes that compute the same scores.

    Attributes:
        score: the estimator's own code, from ``(N, width)`` float64 to ``(N, columns)``.
        unit: unit of the scores.
        width: number of features on which the estimator was fitted.
        columns: number of scores of each row.
        classes: classes of a classifier as text, in order; the scores are those of the last ``columns`` classes.
        weights: weight ``(columns, width)`` and bias ``(columns,)``, float64, if the estimator is an affine map; otherwise ``None``.
        nodes: the nodes that compute the scores from ``FEATURES``.
        result: name of the value in ``nodes`` that holds the scores, ``(N, columns)`` float32.
    """

    score: Function
    unit: ScoreUnit
    width: int
    columns: int
    classes: tuple[str, ...]
    weights: tuple[Rows, Rows] | None
    nodes: Nodes
    result: str


def estimator_scores(estimator: BaseEstimator) -> EstimatorScores:
    """Finds the scores of a fitted scikit-learn estimator, and builds the ONNX nodes that compute these scores.

    Binary classifiers that are linear in form, alone or after scalers, score by ``decision_function``. The unit of these scores is a logit
    if its sigmoid is the classifier's probability, and a plain value otherwise. Other classifiers score by ``predict_proba`` if they have
    this method: by the probability of the second of two classes, or with one column for each of several classes. Classifiers without
    ``predict_proba`` and outlier detectors score by ``decision_function``, and regressors by ``predict``.

    Raises:
        TypeError: the value is not a scikit-learn estimator.
        ValueError: the estimator is not fitted, has no scores, or no graph computes its scores; the error names the estimator, the reason
            and a remedy.
    """
    check_fitted(estimator)
    name = described(estimator)
    inner, _ = opened(estimator)
    last = last_of(inner)
    refuse_by_name(last, name)
    width = width_of(estimator, name)
    fitted = FittedEstimator(estimator, width)
    kind = fitted.kind(name)
    classes = () if isinstance(found := getattr(estimator, "classes_", ()), list) else tuple(str(label) for label in found)
    binary, linear = len(classes) == 2, is_linear(inner)
    if kind == "classifier":
        check_classes(estimator, width, classes, name)
        decides = linear and binary and all(name_of(step) in SCALERS for step in fitted.steps)
        if hasattr(estimator, "predict_proba") and not decides:
            every = scoring(estimator, "predict_proba")
            if binary:
                return _checked(
                    name,
                    lambda rows: every(rows)[:, 1:],
                    ScoreUnit.PROBABILITY,
                    width,
                    classes,
                    partial(graph_writer.second_probability, fitted),
                )
            return _checked(name, every, ScoreUnit.PROBABILITY, width, classes, partial(graph_writer.probabilities, fitted))
        if not hasattr(estimator, "decision_function"):
            raise ValueError(f"estimator: {name} gives a class and no scores; fit a classifier with predict_proba or decision_function")
        if name_of(last) in KERNEL_MACHINES and not binary:
            raise ValueError(f"estimator: {name} cannot be written: {REASONS['OneVsOneClassifier']}")
        unit = ScoreUnit.LOGIT if linear and binary and hasattr(estimator, "predict_proba") and fitted.is_logit() else ScoreUnit.VALUE
        score = scoring(estimator, "decision_function")
    else:
        unit = ScoreUnit.VALUE
        score = scoring(estimator, "decision_function" if kind == "outliers" else "predict")
    weights = fitted.affine if linear else None
    if weights and not np.abs(weights[0]).max() > 1e-12 * np.abs(weights[1]).max():
        raise ValueError(f"estimator: {name} says the same of every activation: all of its weights are 0; fit it with less regularisation")
    build = partial(graph_writer.predictions if kind == "regressor" else graph_writer.decisions, fitted)
    return _checked(name, score, unit, width, classes if kind == "classifier" else (), build, weights)


def _checked(
    name: str,
    score: Function,
    unit: ScoreUnit,
    width: int,
    classes: tuple[str, ...],
    build: Callable[[Nodes, str], str],
    weights: tuple[Rows, Rows] | None = None,
) -> EstimatorScores:
    """Returns a fitted estimator's scores and ONNX nodes, after a check that both give the same scores on random rows of several sizes.

    Raises:
        ValueError: the estimator's own code fails, or the nodes give other scores.
    """
    random = np.random.default_rng(0)
    rows = np.concatenate([scale * random.standard_normal((24, width)) for scale in (0.1, 1, 10, 100)]).astype(np.float32)
    try:
        expected = score(rows.astype(np.float64))
    except Exception as error:  # raised by the estimator's own code, or by functions that an author put into it
        raise ValueError(
            f"estimator: {name} cannot score rows of {width} numbers ({type(error).__name__}); fit it on an array (rows, {width}) of floats"
        ) from None
    if classes and expected.shape[1] != (1 if len(classes) == 2 else len(classes)):
        raise ValueError(
            f"estimator: {name} gives {expected.shape[1]} scores for its {len(classes)} classes; fit and write one probe for each"
        )
    nodes = Nodes()
    result = nodes.cast(build(nodes, FEATURES), np.float32)
    # a change that rounding of the rows alone causes may be caused by float32 too
    moved = score(rows * (1 + 1e-6 * random.standard_normal(rows.shape)))
    check_same(nodes, FEATURES, result, rows, expected, np.abs(moved - expected), name)
    return EstimatorScores(score, unit, width, expected.shape[1], classes, weights, nodes, result)
