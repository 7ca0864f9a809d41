"""Fitted scikit-learn estimators: which of their functions is a probe's score, and the ONNX nodes that compute it.

What is linear in form is told by what it does to zero and to each unit vector, in float64, so that scalers, projections and selections
before it fold into one ``Gemm``. Other forms are written here where skl2onnx cannot, and converted by skl2onnx where it can. Every graph
is compared with the estimator on random rows before it is used; what is not written, not converted or not equal is refused by name.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from probescore.types import ScoreUnit
from probescore_probes.nodes import ML_OPSET, OPSET, Nodes

if TYPE_CHECKING:
    from sklearn.base import BaseEstimator

Rows = NDArray[np.float64]
Function = Callable[[Rows], NDArray[Any]]
_Estimator = Any  # scikit-learn's classes have no types

FEATURES = "features"
"""What the nodes of an estimator read: activations side by side, ``(N, width)`` float32."""

_TOLERANCE = 1e-4  # of the scores' standard deviation, as golden vectors have it
_MOST_ROUNDING = 1e-2  # beyond this it is no rounding
_LARGEST, _LEAST_ROWS = 1e30, 8  # beyond the first, rows say nothing: float32 ends at 3e38
_METHODS = ("predict", "predict_proba", "decision_function", "transform")
_STEP = 1024.0  # a power of two, so that multiplying by it rounds nothing; large, so that what is added to everything hides little

# Linear in form by what they are; `_is_linear` has those for which it depends on a setting or on what they are made of.
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
_KERNEL_MACHINES = frozenset({"SVC", "NuSVC", "SVR", "NuSVR", "OneClassSVM", "KernelRidge"})
_SCALERS = frozenset({"StandardScaler", "MinMaxScaler", "MaxAbsScaler", "RobustScaler"})
_LINEAR_STEPS = _SCALERS | frozenset(
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
_SEARCHES = frozenset({"GridSearchCV", "RandomizedSearchCV", "HalvingGridSearchCV", "HalvingRandomSearchCV"})
_DELEGATES = {"FixedThresholdClassifier": "estimator_", "TunedThresholdClassifierCV": "estimator_", "SelfTrainingClassifier": "estimator_",
              "FrozenEstimator": "estimator", "RANSACRegressor": "estimator_"}  # fmt: skip

# Why scikit-learn's own cannot be probes, in the words of their author's problem.
_REFUSED = {
    "DummyClassifier": "it says the same of every activation; fit an estimator that reads its rows",
    "DummyRegressor": "it says the same of every activation; fit an estimator that reads its rows",
    "LabelPropagation": "it is a graph over the rows it was fitted on; fit a LogisticRegression on its transduction_",
    "LabelSpreading": "it is a graph over the rows it was fitted on; fit a LogisticRegression on its transduction_",
    "VotingClassifier": "it counts votes for classes, which are no scores; fit it with voting='soft'",
    "OneVsOneClassifier": "its scores are votes between pairs of classes; fit a OneVsRestClassifier of the same estimator",
    "OutputCodeClassifier": "it gives a class and no scores; fit a OneVsRestClassifier of the same estimator",
    "MultiOutputClassifier": "it gives a table of probabilities for each output; fit and write one probe for each",
    "ClassifierChain": "each of its classifiers reads the decisions of those before it; fit and write one probe for each output",
    "LocalOutlierFactor": "it keeps every row that it was fitted on; a OneClassSVM or an IsolationForest can be written",
    "RadiusNeighborsClassifier": "it has no score for rows far from those it was fitted on; a KNeighborsClassifier can be written",
    "RadiusNeighborsRegressor": "it has no score for rows far from those it was fitted on; a KNeighborsRegressor can be written",
    "CategoricalNB": "its features are categories, and activations are real numbers; a GaussianNB can be written",
}


@dataclass(frozen=True, eq=False)
class EstimatorScores:
    """What a fitted estimator says of activations.

    Attributes:
        score: its own code: ``(N, width)`` float64 to ``(N, columns)``.
        unit: of the scores.
        width: how many features it was fitted on.
        columns: of the scores.
        classes: those of a classifier, in their order, as text; the last ``columns`` of them are what the columns are about.
        weights: ``(columns, width)`` and ``(columns,)`` in float64 if it is an affine map and nothing else.
        nodes: what computes the scores from ``FEATURES``.
        result: the name of the scores there, ``(N, columns)`` float32.
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
    """Reads a fitted estimator.

    Binary classifiers that are linear in form, alone or after scalers, score by ``decision_function``: a logit where its sigmoid is their
    probability, else a value. Other classifiers score by ``predict_proba`` if they have it (for two classes that of the second, else
    one column for each), else by ``decision_function``; outlier detectors by ``decision_function``; regressors by ``predict``.

    Raises:
        TypeError: it is no scikit-learn estimator.
        ValueError: it is not fitted, has no scores, or no graph computes them; names the estimator, the reason and a remedy.
    """
    _check_fitted(estimator)
    name = _described(estimator)
    inner, _ = _opened(estimator)
    last = _last(inner)
    _refuse_by_name(last, name)
    width = _width(estimator, name)
    reader = _EstimatorWriter(estimator, width)
    kind = reader.kind(name)
    classes = () if isinstance(found := getattr(estimator, "classes_", ()), list) else tuple(str(label) for label in found)
    binary, linear = len(classes) == 2, _is_linear(inner)
    if kind == "classifier":
        _check_classes(estimator, width, classes, name)
        decides = linear and binary and all(_name(step) in _SCALERS for step in reader.steps)
        if hasattr(estimator, "predict_proba") and not decides:
            every = _scoring(estimator, "predict_proba")
            if binary:
                return _checked(name, lambda rows: every(rows)[:, 1:], ScoreUnit.PROBABILITY, width, classes, reader.second_probability)
            return _checked(name, every, ScoreUnit.PROBABILITY, width, classes, reader.probabilities)
        if not hasattr(estimator, "decision_function"):
            raise ValueError(f"estimator: {name} gives a class and no scores; fit a classifier with predict_proba or decision_function")
        if _name(last) in _KERNEL_MACHINES and not binary:
            raise ValueError(f"estimator: {name} cannot be written: {_REFUSED['OneVsOneClassifier']}")
        unit = ScoreUnit.LOGIT if linear and binary and hasattr(estimator, "predict_proba") and reader.is_logit() else ScoreUnit.VALUE
        score = _scoring(estimator, "decision_function")
    else:
        unit = ScoreUnit.VALUE
        score = _scoring(estimator, "decision_function" if kind == "outliers" else "predict")
    weights = reader.affine if linear else None
    if weights and not np.abs(weights[0]).max() > 1e-12 * np.abs(weights[1]).max():
        raise ValueError(f"estimator: {name} says the same of every activation: all of its weights are 0; fit it with less regularisation")
    build = reader.predictions if kind == "regressor" else reader.decisions
    return _checked(name, score, unit, width, classes if kind == "classifier" else (), build, weights)


# ------------------------------------------------------------------------------------------------------------ what an estimator is


def _name(estimator: object) -> str:
    """Of scikit-learn's class; none for a subclass that scores or transforms in its own way."""
    kind = type(estimator)
    known = next((base for base in kind.__mro__ if base.__module__.split(".")[0] == "sklearn"), None)
    if known is None or any(
        inspect.getattr_static(kind, method, None) is not inspect.getattr_static(known, method, None) for method in _METHODS
    ):
        return ""
    return known.__name__


def _described(estimator: object) -> str:
    """How an author would name it: ``Pipeline(StandardScaler, SVC)``."""
    parts = [part for _, part in getattr(estimator, "steps", ())]
    if not parts:
        inner = getattr(estimator, "estimator", None)
        parts = [inner] if inner is not None and not isinstance(inner, str) else []
    names = ", ".join(part if isinstance(part, str) else _described(part) for part in parts if part is not None)
    return f"{type(estimator).__name__}({names})" if names else type(estimator).__name__


def _check_fitted(estimator: object) -> None:
    from sklearn.base import BaseEstimator
    from sklearn.exceptions import NotFittedError
    from sklearn.utils.validation import check_is_fitted

    if isinstance(estimator, type):
        raise TypeError(
            f"estimator: the class {estimator.__name__}; give an object of it that was fitted: {estimator.__name__}().fit(x, y)"
        )
    if not isinstance(estimator, BaseEstimator):
        raise TypeError(
            f"estimator: a {type(estimator).__name__}, which is no scikit-learn estimator; see torch_probe, linear_probe, onnx_probe"
        )
    try:
        check_is_fitted(estimator)
    except NotFittedError:
        raise ValueError(f"estimator: {_described(estimator)} is not fitted; call fit(x, y) first") from None
    except TypeError:
        raise ValueError(f"estimator: {_described(estimator)} cannot be fitted, and so not be a probe") from None


def _width(estimator: object, name: str) -> int:
    """How many features it was fitted on; a pipeline says it through the first of its steps that knows."""
    parts = [estimator, *(step for _, step in getattr(estimator, "steps", ()))]
    width = next((part.n_features_in_ for part in parts if hasattr(part, "n_features_in_")), None)
    if width is None:
        raise ValueError(f"estimator: {name} has no n_features_in_; fit it on an array (rows, features)")
    return int(width)


def _check_classes(estimator: _Estimator, width: int, classes: tuple[str, ...], name: str) -> None:
    """A classifier of one label for each row."""
    if len(classes) == 1:
        raise ValueError(
            f"estimator: {name} was fitted on one class only ({classes[0]}); fit it on examples with and without the behaviour"
        )
    if not classes or np.ndim(_called(estimator, "predict", np.zeros((1, width)))) != 1:
        raise ValueError(f"estimator: {name} was fitted on several labels for each row; fit and write one probe for each")


def _refuse_by_name(estimator: _Estimator, name: str) -> None:
    if _name(estimator) in _KERNEL_MACHINES and estimator.kernel not in ("linear", "rbf", "poly", "polynomial", "sigmoid"):
        shown = repr(estimator.kernel) if isinstance(estimator.kernel, str) else getattr(estimator.kernel, "__name__", "of another kind")
        raise ValueError(f"estimator: {name} cannot be written: its kernel is {shown}; fit one with kernel linear, rbf, poly or sigmoid")
    reason = _REFUSED.get(_name(estimator))
    if reason is not None and not (_name(estimator) == "VotingClassifier" and estimator.voting == "soft"):
        raise ValueError(f"estimator: {name} cannot be written: {reason}")


def _opened(estimator: _Estimator, steps: tuple[_Estimator, ...] = ()) -> tuple[_Estimator, tuple[_Estimator, ...]]:
    """The estimator at the end of pipelines, searches and wrappers, and the affine steps in front of it."""
    name = _name(estimator)
    if name in _SEARCHES:
        if not hasattr(estimator, "best_estimator_"):
            raise ValueError(
                f"estimator: {_described(estimator)} was fitted with refit=False and keeps no estimator; fit it with refit=True"
            )
        return _opened(estimator.best_estimator_, steps)
    if name in _DELEGATES:
        return _opened(getattr(estimator, _DELEGATES[name]), steps)
    if name in ("RFE", "RFECV"):
        return _opened(estimator.estimator_, (*steps, estimator))
    if name == "Pipeline" and _linear_steps(estimator.steps[:-1]):
        acting = (step for _, step in estimator.steps[:-1] if step is not None and not isinstance(step, str))
        return _opened(estimator.steps[-1][1], (*steps, *acting))
    return estimator, steps


def _last(estimator: _Estimator) -> _Estimator:
    """What ends a pipeline whose steps are not all affine."""
    return _last(_opened(estimator.steps[-1][1])[0]) if _name(estimator) == "Pipeline" else estimator


def _is_linear(estimator: _Estimator) -> bool:
    """Whether its ``decision_function``, or else its ``predict``, is an affine map of its input, by the kind that it is."""
    name = _name(estimator)
    if name in _DELEGATES:
        return _is_linear(getattr(estimator, _DELEGATES[name]))
    match name:
        case _ if name in _LINEAR:
            return True
        case _ if name in _KERNEL_MACHINES:
            return bool(estimator.kernel == "linear") and len(getattr(estimator, "classes_", ())) <= 2
        case "NearestCentroid":
            return bool(estimator.metric == "euclidean") and len(estimator.classes_) == 2
        case "TweedieRegressor":
            return bool(estimator.link == "identity" or (estimator.link == "auto" and estimator.power <= 0))
        case "Pipeline":
            return _linear_steps(estimator.steps[:-1]) and _is_linear(estimator.steps[-1][1])
        case _ if name in _SEARCHES:
            return _is_linear(getattr(estimator, "best_estimator_", None))
        case "RFE" | "RFECV":
            return _is_linear(estimator.estimator_)
        case "OneVsRestClassifier" | "MultiOutputRegressor" | "RegressorChain" | "VotingRegressor" | "BaggingRegressor":
            return all(map(_is_linear, estimator.estimators_))
        case "TransformedTargetRegressor":
            plain = estimator.func is None and estimator.inverse_func is None
            scaled = estimator.transformer is None or _linear_step(estimator.transformer_)
            return plain and scaled and _is_linear(estimator.regressor_)
    return False


def _linear_steps(steps: Sequence[tuple[str, Any]]) -> bool:
    return all(_linear_step(step) for _, step in steps)


def _linear_step(step: _Estimator) -> bool:
    """Whether its ``transform`` is an affine map."""
    match _name(step):
        case "MinMaxScaler" | "MaxAbsScaler":
            return not getattr(step, "clip", False)
        case name if name in _LINEAR_STEPS:
            return True
        case "Pipeline":
            return _linear_steps(step.steps)
        case "FeatureUnion":
            return _linear_steps(step.transformer_list)
        case "ColumnTransformer":
            return _linear_steps([(name, part) for name, part, _ in step.transformers_ if not (isinstance(part, str) and part == "drop")])
        case "FunctionTransformer":
            return bool(step.func is None)
        case "SimpleImputer":  # activations are finite, so that nothing is imputed
            return bool(np.isscalar(step.missing_values) and np.isnan(step.missing_values) and not step.add_indicator)
    return step is None or (isinstance(step, str) and step == "passthrough")


def _called(estimator: _Estimator, method: str, rows: Rows) -> NDArray[Any]:
    """What a method says of rows, without warnings that it was fitted on named columns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="X does not have valid feature names")
        said: NDArray[Any] = getattr(estimator, method)(rows)
    return said


def _scoring(estimator: _Estimator, method: str) -> Function:
    """The estimator's own method, always ``(N, columns)``."""
    return lambda rows: np.asarray(_called(estimator, method, rows), np.float64).reshape(len(rows), -1)


# ----------------------------------------------------------------------------------------------------------------------- its graph


@dataclass(frozen=True, eq=False)
class _EstimatorWriter:
    """Writes the nodes of an estimator behind affine steps.

    Args:
        estimator: as it was given, or a part of what was given.
        width: of the rows that enter the first step.
        before: the affine steps in front of it.
    """

    estimator: Any
    width: int
    before: tuple[Any, ...] = ()

    @cached_property
    def _parts(self) -> tuple[_Estimator, tuple[_Estimator, ...]]:
        return _opened(self.estimator, self.before)

    @property
    def inner(self) -> _Estimator:
        """The estimator at the end of its pipelines, searches and wrappers."""
        return self._parts[0]

    @property
    def steps(self) -> tuple[_Estimator, ...]:
        """The affine steps in front of that."""
        return self._parts[1]

    def kind(self, name: str) -> str:
        """``classifier``, ``regressor`` or ``outliers``."""
        from sklearn.base import is_classifier, is_outlier_detector, is_regressor

        for kind, holds in (("classifier", is_classifier), ("regressor", is_regressor), ("outliers", is_outlier_detector)):
            if holds(self.estimator):
                return kind
        if _name(self.inner) in ("PLSCanonical", "CCA"):
            return "regressor"
        raise ValueError(
            f"estimator: {name} is no classifier, regressor or outlier detector, and has no scores; fit a Pipeline that ends in one"
        )

    def part(self, estimator: _Estimator) -> _EstimatorWriter:
        """A part of the innermost estimator, behind the same steps."""
        return _EstimatorWriter(estimator, self.width, self.steps)

    def transformed(self, rows: Rows) -> Rows:
        """What the steps make of rows."""
        for step in self.steps:
            rows = np.asarray(_called(step, "transform", rows), np.float64)
        return rows

    @cached_property
    def affine(self) -> tuple[Rows, Rows]:
        """Weight ``(columns, width)`` and bias ``(columns,)`` of what ``_is_linear`` says is an affine map."""
        method = "decision_function" if hasattr(self.inner, "decision_function") else "predict"
        return _affine_map(self._behind(method), self.width)

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
        score = _scoring(self.inner, method)
        return lambda rows: score(self.transformed(rows))

    def input(self, nodes: Nodes, x: str) -> str:
        """The steps' result as a float64 value."""
        x = nodes.cast(x, np.float64)
        if not self.steps:
            return x
        if all(_name(step) in _SCALERS for step in self.steps):
            bias = self.transformed(np.zeros((1, self.width)))[0]
            scale = (self.transformed(np.full((1, self.width), _STEP))[0] - bias) / _STEP
            return nodes.apply("Add", nodes.apply("Mul", x, nodes.constant(scale)), nodes.constant(bias))
        return nodes.gemm(x, *_affine_map(self.transformed, self.width), np.float64)

    # Each of these adds nodes and names their result: (N, classes), (N, 1) and so on, in float32 or float64.

    def second_probability(self, nodes: Nodes, x: str) -> str:
        """Of two classes, ``(N, 1)``."""
        inner = self.inner
        if _name(inner) == "Pipeline":
            return self._after_steps().second_probability(nodes, self._through_steps(nodes, x))
        if _is_linear(inner) and self.is_logit():
            return nodes.apply("Sigmoid", nodes.gemm(x, *self.affine))
        if _name(inner) == "CalibratedClassifierCV":
            return nodes.mean([self._calibrated(nodes, x, member)[0] for member in inner.calibrated_classifiers_])
        if _name(inner) == "HistGradientBoostingClassifier":
            return nodes.apply("Sigmoid", self._boosted(nodes, x))
        if _name(inner) == "OneVsRestClassifier" and len(inner.estimators_) == 1:
            return self.part(inner.estimators_[0]).second_probability(nodes, x)
        if _name(inner) == "VotingClassifier":
            return nodes.weighted_mean(
                [self.part(member).second_probability(nodes, x) for member in inner.estimators_], inner._weights_not_none
            )
        return nodes.columns(self.probabilities(nodes, x), [1])

    def probabilities(self, nodes: Nodes, x: str) -> str:
        """Of every class, ``(N, classes)``."""
        inner = self.inner
        match _name(inner):
            case "Pipeline":
                return self._after_steps().probabilities(nodes, self._through_steps(nodes, x))
            case _ if _is_linear(inner) and len(inner.classes_) > 2:
                decisions = nodes.gemm(x, *self.affine)
                return nodes.softmax(decisions if self.is_softmax() else nodes.log_sigmoid(decisions))
            case "CalibratedClassifierCV":
                members = [nodes.normalised(self._calibrated(nodes, x, member)) for member in inner.calibrated_classifiers_]
                return nodes.mean(members)
            case "HistGradientBoostingClassifier" if len(inner.classes_) > 2:
                return nodes.softmax(self._boosted(nodes, x))
            case "VotingClassifier":
                return nodes.weighted_mean(
                    [self.part(member).probabilities(nodes, x) for member in inner.estimators_], inner._weights_not_none
                )
            case "OneVsRestClassifier" if not inner.multilabel_:
                columns = [self.part(member).second_probability(nodes, x) for member in inner.estimators_]
                return nodes.normalised(columns)
            case "GaussianNB":
                x = self.input(nodes, x)
                # which have the dtype of the rows that it was fitted on
                mean, variance, prior = (np.asarray(fitted, np.float64) for fitted in (inner.theta_, inner.var_, inner.class_prior_))
                quadratic, linear = -0.5 / variance, mean / variance
                constant = np.log(prior) - 0.5 * (np.log(2 * np.pi * variance) + mean**2 / variance).sum(axis=1)
                squares = nodes.gemm(nodes.apply("Mul", x, x), quadratic, constant, np.float64)
                return nodes.softmax(nodes.apply("Add", squares, nodes.apply("MatMul", x, nodes.constant(linear.T))))
        return self._by_skl2onnx(nodes, x, "predict_proba")

    def decisions(self, nodes: Nodes, x: str) -> str:
        """Of a classifier or an outlier detector without probabilities."""
        inner = self.inner
        match _name(inner):
            case "Pipeline":
                return self._after_steps().decisions(nodes, self._through_steps(nodes, x))
            case _ if _is_linear(inner):
                return nodes.gemm(x, *self.affine)
            case name if name in _KERNEL_MACHINES and np.ravel(inner.intercept_).size == 1:
                return self._kernel(nodes, x, inner.support_vectors_, inner.dual_coef_, inner.intercept_, inner._gamma)
            case "OneVsRestClassifier":
                return nodes.concat([self.part(member).decisions(nodes, x) for member in inner.estimators_])
            case "EllipticEnvelope":
                # the squared distance through a square root of the inverse covariance, so that nothing large cancels
                values, vectors = np.linalg.eigh(inner.precision_)
                root = (vectors * np.sqrt(np.maximum(values, 0))).T
                away = nodes.gemm(self.input(nodes, x), root, -root @ inner.location_, np.float64)
                return nodes.gemm(nodes.apply("Mul", away, away), -np.ones((1, len(root))), np.array([-inner.offset_]), np.float64)
        return self._by_skl2onnx(nodes, x, "decision_function")

    def predictions(self, nodes: Nodes, x: str) -> str:
        """Of a regressor."""
        inner = self.inner
        match _name(inner):
            case "Pipeline":
                return self._after_steps().predictions(nodes, self._through_steps(nodes, x))
            case _ if _is_linear(inner):
                return nodes.gemm(x, *self.affine)
            case "SVR" | "NuSVR":
                return self._kernel(nodes, x, inner.support_vectors_, inner.dual_coef_, inner.intercept_, inner._gamma)
            case "KernelRidge":
                gamma = 1 / inner.n_features_in_ if inner.gamma is None else inner.gamma
                dual = np.atleast_2d(inner.dual_coef_.T)
                return self._kernel(nodes, x, inner.X_fit_, dual, np.zeros(len(dual)), gamma)
            case "HistGradientBoostingRegressor":
                raw = self._boosted(nodes, x)
                return nodes.apply("Exp", raw) if inner.loss in ("poisson", "gamma") else raw
            case "VotingRegressor":
                return nodes.weighted_mean(
                    [self.part(member).predictions(nodes, x) for member in inner.estimators_], inner._weights_not_none
                )
        return self._by_skl2onnx(nodes, x, "predict")

    def _kernel(self, nodes: Nodes, x: str, support: Rows, dual: Rows, bias: Rows, gamma: float) -> str:
        """``Σ dual · kernel(x, support) + bias``, in float64."""
        inner = self.inner
        x, support = self.input(nodes, x), np.asarray(support, np.float64)
        products = nodes.apply("MatMul", x, nodes.constant(support.T.copy()))
        match inner.kernel:
            case "linear":
                kernel = products
            case "rbf":
                lengths = nodes.apply("ReduceSum", nodes.apply("Mul", x, x), nodes.constant(np.array([1])), keepdims=1)
                distance = nodes.apply(
                    "Sub",
                    nodes.apply("Add", lengths, nodes.constant((support**2).sum(axis=1))),
                    nodes.apply("Mul", products, nodes.number(2)),
                )
                kernel = nodes.apply("Exp", nodes.apply("Mul", distance, nodes.number(-gamma)))
            case "poly" | "polynomial":
                kernel = nodes.apply(
                    "Pow",
                    nodes.apply("Add", nodes.apply("Mul", products, nodes.number(gamma)), nodes.number(inner.coef0)),
                    nodes.number(inner.degree),
                )
            case _:
                kernel = nodes.apply(
                    "Tanh", nodes.apply("Add", nodes.apply("Mul", products, nodes.number(gamma)), nodes.number(inner.coef0))
                )
        return nodes.gemm(kernel, np.asarray(dual, np.float64), np.asarray(bias, np.float64), np.float64)

    def _boosted(self, nodes: Nodes, x: str) -> str:
        """The raw scores of histogram-based gradient boosting, ``(N, 1)`` or ``(N, classes)``."""
        inner = self.inner
        if inner.is_categorical_ is not None and np.any(inner.is_categorical_):
            raise ValueError(
                f"estimator: {_described(self.estimator)} was fitted with categorical features, and activations are real numbers"
            )
        trees = [(target, predictor.nodes) for iteration in inner._predictors for target, predictor in enumerate(iteration)]
        return nodes.trees(nodes.cast(self.input(nodes, x), np.float32), trees, np.ravel(inner._baseline_prediction))

    def _calibrated(self, nodes: Nodes, x: str, member: _Estimator) -> list[str]:
        """What the calibrators of one member say: ``(N, 1)`` for each class, or for the second of two alone."""
        reader, calibrators = self.part(member.estimator), member.calibrators
        classes, by_decision = len(member.classes), hasattr(member.estimator, "decision_function")
        if len(member.estimator.classes_) != classes:
            raise ValueError(
                f"estimator: {_described(self.estimator)}: one of its folds lacks a class; fit it with fewer folds or more examples"
            )
        if member.method == "temperature":
            if classes > 2 or not by_decision:
                raise ValueError(
                    f"estimator: {_described(self.estimator)} with method='temperature' can be written for two classes with decisions; "
                    "use method='sigmoid'"
                )
            # of the decision d it makes the logits (-d, d)
            return [nodes.apply("Sigmoid", self._scaled_decision(nodes, x, reader, 2 * calibrators[0].beta_, 0.0))]
        if by_decision and member.method == "sigmoid" and classes == 2:
            return [nodes.apply("Sigmoid", self._scaled_decision(nodes, x, reader, -calibrators[0].a_, -calibrators[0].b_))]
        if by_decision:
            scores = nodes.gemm(x, *reader.affine, np.float64) if _is_linear(reader.inner) else reader.decisions(nodes, x)
        else:
            scores = reader.second_probability(nodes, x) if classes == 2 else reader.probabilities(nodes, x)
        scores = nodes.cast(scores, np.float64)  # far from the training data all classes are near 0, and their shares are what counts
        columns = [scores] if classes == 2 else [nodes.columns(scores, [index]) for index in range(classes)]
        return [_calibrator(nodes, column, calibrator) for column, calibrator in zip(columns, calibrators, strict=True)]

    def _scaled_decision(self, nodes: Nodes, x: str, reader: _EstimatorWriter, scale: float, shift: float) -> str:
        """``scale · decision + shift`` of two classes; one ``Gemm`` where the decision is linear."""
        if _is_linear(reader.inner):
            weight, bias = reader.affine
            return nodes.gemm(x, scale * weight, scale * bias + shift)
        return nodes.gemm(reader.decisions(nodes, x), np.array([[scale]]), np.array([shift]))

    def _after_steps(self) -> _EstimatorWriter:
        """What ends a pipeline whose steps are not all affine."""
        last = self.inner.steps[-1][1]
        return _EstimatorWriter(last, _width(last, _described(self.estimator)))

    def _through_steps(self, nodes: Nodes, x: str) -> str:
        """The result of the steps of a pipeline that are not all affine, by skl2onnx."""
        steps = [step for _, step in self.inner.steps[:-1] if step is not None and not isinstance(step, str)]
        return self._converted(nodes, x, (*self.steps, *steps), "transform")

    def _by_skl2onnx(self, nodes: Nodes, x: str, method: str) -> str:
        return self._converted(nodes, x, (*self.steps, self.inner), method)

    def _converted(self, nodes: Nodes, x: str, steps: Sequence[_Estimator], method: str) -> str:
        """What some steps, or steps and an estimator, make of rows, by skl2onnx."""
        from skl2onnx import to_onnx
        from skl2onnx.common.data_types import FloatTensorType
        from sklearn.pipeline import make_pipeline

        name = _described(self.estimator)
        _refuse_by_name(self.inner, name)
        try:
            with quietly("skl2onnx"):
                model = to_onnx(
                    make_pipeline(*steps) if len(steps) > 1 else steps[0],
                    initial_types=[("x", FloatTensorType([None, self.width]))],
                    options={"zipmap": False} if method == "predict_proba" else None,
                    target_opset={"": OPSET, "ai.onnx.ml": ML_OPSET},
                )
        except Exception:  # whatever a converter raises for what it does not know
            raise ValueError(_no_conversion(name, "skl2onnx does not convert it")) from None
        if model.functions or any(node.domain not in ("", "ai.onnx.ml") for node in model.graph.node):
            raise ValueError(_no_conversion(name, "skl2onnx makes operators of it that are not standard ONNX"))
        return nodes.inline(model, x)


def _no_conversion(name: str, why: str) -> str:
    return (
        f"estimator: {name} cannot be written: {why}; fit another estimator (docs/reference/estimators.md lists them), "
        "or make the ONNX graph yourself and use onnx_probe"
    )


def _affine_map(function: Function, width: int) -> tuple[Rows, Rows]:
    """Weight and bias of a function that is an affine map of its rows."""
    bias = np.asarray(function(np.zeros((1, width))), np.float64)[0]
    columns = []
    for start in range(0, width, 256):
        rows = np.zeros((min(256, width - start), width))
        rows[np.arange(len(rows)), start + np.arange(len(rows))] = _STEP
        columns.append((np.asarray(function(rows), np.float64) - bias) / _STEP)
    return np.concatenate(columns).T.copy(), bias


def _calibrator(nodes: Nodes, scores: str, calibrator: _Estimator) -> str:
    """A fitted sigmoid or isotonic calibrator, ``(N, 1)`` float64 to the same."""
    if hasattr(calibrator, "a_"):
        weight, bias = np.array([[-calibrator.a_]], np.float64), np.array([-calibrator.b_], np.float64)
        return nodes.exact_sigmoid(nodes.gemm(scores, weight, bias, np.float64))
    return nodes.interpolated(scores, calibrator.X_thresholds_, calibrator.y_thresholds_)


@contextmanager
def quietly(exporter: str) -> Iterator[None]:
    """Without an exporter's warnings on what it is built from; what a probe's author must know is raised.

    Args:
        exporter: the name of its logger.
    """
    logger = logging.getLogger(exporter)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


# ------------------------------------------------------------------------------------------------------------------------ the check


def _checked(
    name: str,
    score: Function,
    unit: ScoreUnit,
    width: int,
    classes: tuple[str, ...],
    build: Callable[[Nodes, str], str],
    weights: tuple[Rows, Rows] | None = None,
) -> EstimatorScores:
    """With nodes that give the estimator's own scores on random rows of several sizes."""
    random = np.random.default_rng(0)
    rows = np.concatenate([scale * random.standard_normal((24, width)) for scale in (0.1, 1, 10, 100)]).astype(np.float32)
    try:
        expected = score(rows.astype(np.float64))
    except Exception as error:  # of the estimator's own code, or of whatever functions an author put into it
        raise ValueError(
            f"estimator: {name} cannot score rows of {width} numbers ({type(error).__name__}); fit it on an array (rows, {width}) of floats"
        ) from None
    if classes and expected.shape[1] != (1 if len(classes) == 2 else len(classes)):
        raise ValueError(
            f"estimator: {name} gives {expected.shape[1]} scores for its {len(classes)} classes; fit and write one probe for each"
        )
    nodes = Nodes()
    result = nodes.cast(build(nodes, FEATURES), np.float32)
    # what rounding of the rows alone changes, float32 may change too
    moved = score(rows * (1 + 1e-6 * random.standard_normal(rows.shape)))
    _check_same(nodes, result, rows, expected, np.abs(moved - expected), name)
    return EstimatorScores(score, unit, width, expected.shape[1], classes, weights, nodes, result)


def _check_same(nodes: Nodes, result: str, rows: NDArray[np.float32], expected: Rows, rounding: Rows, name: str) -> None:
    finite = (np.abs(expected) < _LARGEST).all(axis=1)
    if finite.sum() < _LEAST_ROWS:
        raise ValueError(f"estimator: {name} gives scores that are not finite on {int((~finite).sum())} of {len(rows)} random rows")
    rows, expected, rounding = rows[finite], expected[finite], rounding[finite]
    graph = "the graph that skl2onnx makes of it" if nodes.inlines else "the graph that probescore makes of it"
    try:
        with np.errstate(all="ignore"):
            (found,) = ReferenceEvaluator(nodes.model(FEATURES, rows.shape[1], result)).run(None, {FEATURES: rows})
    except Exception as error:  # whatever numpy raises inside the operators
        raise ValueError(_no_conversion(name, f"{graph} does not run ({type(error).__name__})")) from None
    found = np.asarray(found)
    if found.shape != expected.shape:
        raise ValueError(_no_conversion(name, f"{graph} gives scores {found.shape}, not {expected.shape}"))
    spread = expected.std(axis=0)
    spread = np.where(spread > 0, spread, 1 + np.abs(expected[0]))
    allowed = _TOLERANCE + np.minimum(np.nan_to_num(rounding / spread, nan=np.inf), _MOST_ROUNDING)
    off = np.abs(found - expected) / spread
    if not (off <= allowed).all():
        worst = float(np.nan_to_num(off, nan=np.inf).max())
        raise ValueError(_no_conversion(name, f"{graph} is {worst:.2g} standard deviations off on random rows"))
