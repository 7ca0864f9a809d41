"""Determines which scikit-learn estimators are an affine map of their input, and the weight and bias of the map.

The weight and bias are measured in float64 from the results for zero and for each unit vector, so that scalers, projections and selections
of columns are part of the map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from probescore_probes.estimators.methods import Function, Rows
from probescore_probes.estimators.names import DELEGATES, KERNEL_MACHINES, SEARCHES, Estimator, name_of

STEP = 1024.0  # a power of two, so that multiplying by it rounds nothing; large, so that a large bias hides little

# Classes that are always linear in form; `is_linear` handles those for which it depends on a setting or on their parts.
_LINEAR = frozenset(
    {
        "ARDRegression",
        "BayesianRidge",
        "CCA",
        "ElasticNet",
        "ElasticNetCV",
        "HuberRegressor",
        "Lars",
        "LarsCV",
        "Lasso",
        "LassoCV",
        "LassoLars",
        "LassoLarsCV",
        "LassoLarsIC",
        "LinearDiscriminantAnalysis",
        "LinearRegression",
        "LinearSVC",
        "LinearSVR",
        "LogisticRegression",
        "LogisticRegressionCV",
        "MultiTaskElasticNet",
        "MultiTaskElasticNetCV",
        "MultiTaskLasso",
        "MultiTaskLassoCV",
        "OrthogonalMatchingPursuit",
        "OrthogonalMatchingPursuitCV",
        "PassiveAggressiveClassifier",
        "PassiveAggressiveRegressor",
        "Perceptron",
        "PLSCanonical",
        "PLSRegression",
        "QuantileRegressor",
        "Ridge",
        "RidgeClassifier",
        "RidgeClassifierCV",
        "RidgeCV",
        "SGDClassifier",
        "SGDOneClassSVM",
        "SGDRegressor",
        "TheilSenRegressor",
    }
)
SCALERS = frozenset({"StandardScaler", "MinMaxScaler", "MaxAbsScaler", "RobustScaler"})
_LINEAR_STEPS = SCALERS | frozenset(
    {
        "FactorAnalysis",
        "FastICA",
        "GaussianRandomProjection",
        "GenericUnivariateSelect",
        "IncrementalPCA",
        "LinearDiscriminantAnalysis",
        "NeighborhoodComponentsAnalysis",
        "PCA",
        "PLSCanonical",
        "PLSRegression",
        "RFE",
        "RFECV",
        "SelectFdr",
        "SelectFpr",
        "SelectFromModel",
        "SelectFwe",
        "SelectKBest",
        "SelectPercentile",
        "SequentialFeatureSelector",
        "SparseRandomProjection",
        "TruncatedSVD",
        "VarianceThreshold",
    }
)


def is_linear(estimator: Estimator) -> bool:
    """Returns whether an estimator's ``decision_function``, or else its ``predict``, is an affine map of its input, judged by its class."""
    name = name_of(estimator)
    if name in DELEGATES:
        return is_linear(getattr(estimator, DELEGATES[name]))
    match name:
        case _ if name in _LINEAR:
            return True
        case _ if name in KERNEL_MACHINES:
            return bool(estimator.kernel == "linear") and len(getattr(estimator, "classes_", ())) <= 2
        case "NearestCentroid":
            return bool(estimator.metric == "euclidean") and len(estimator.classes_) == 2
        case "TweedieRegressor":
            return bool(estimator.link == "identity" or (estimator.link == "auto" and estimator.power <= 0))
        case "Pipeline":
            return linear_steps(estimator.steps[:-1]) and is_linear(estimator.steps[-1][1])
        case _ if name in SEARCHES:
            return is_linear(getattr(estimator, "best_estimator_", None))
        case "RFE" | "RFECV":
            return is_linear(estimator.estimator_)
        case "OneVsRestClassifier" | "MultiOutputRegressor" | "RegressorChain" | "VotingRegressor" | "BaggingRegressor":
            return all(map(is_linear, estimator.estimators_))
        case "TransformedTargetRegressor":
            plain = estimator.func is None and estimator.inverse_func is None
            scaled = estimator.transformer is None or _linear_step(estimator.transformer_)
            return plain and scaled and is_linear(estimator.regressor_)
    return False


def linear_steps(steps: Sequence[tuple[str, Any]]) -> bool:
    """Returns whether all steps of a scikit-learn pipeline, or all parts of a union of transformers, are affine maps."""
    return all(_linear_step(step) for _, step in steps)


def _linear_step(step: Estimator) -> bool:
    """Returns whether the method ``transform`` of a scikit-learn transformer is an affine map of its input."""
    match name_of(step):
        case "MinMaxScaler" | "MaxAbsScaler":
            return not getattr(step, "clip", False)
        case name if name in _LINEAR_STEPS:
            return True
        case "Pipeline":
            return linear_steps(step.steps)
        case "FeatureUnion":
            return linear_steps(step.transformer_list)
        case "ColumnTransformer":
            return linear_steps([(name, part) for name, part, _ in step.transformers_ if not (isinstance(part, str) and part == "drop")])
        case "FunctionTransformer":
            return bool(step.func is None)
        case "SimpleImputer":  # activations are finite, so that nothing is imputed
            return bool(np.isscalar(step.missing_values) and np.isnan(step.missing_values) and not step.add_indicator)
    return step is None or (isinstance(step, str) and step == "passthrough")


def affine_map(function: Function, width: int) -> tuple[Rows, Rows]:
    """Measures the weight ``(columns, width)`` and bias ``(columns,)``, float64, of a function that is an affine map of its rows."""
    bias = np.asarray(function(np.zeros((1, width))), np.float64)[0]
    columns = []
    for start in range(0, width, 256):
        rows = np.zeros((min(256, width - start), width))
        rows[np.arange(len(rows)), start + np.arange(len(rows))] = STEP
        columns.append((np.asarray(function(rows), np.float64) - bias) / STEP)
    return np.concatenate(columns).T.copy(), bias
