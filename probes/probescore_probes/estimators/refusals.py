"""Refuses estimators that cannot be probes, with messages that give the reason and what to fit instead."""

from __future__ import annotations

import numpy as np

from probescore_probes.estimators.methods import called
from probescore_probes.estimators.names import KERNEL_MACHINES, Estimator, described, name_of

REASONS = {
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


def check_fitted(estimator: object) -> None:
    """Checks that a value is a fitted scikit-learn estimator.

    Raises:
        TypeError: the value is not an estimator of scikit-learn.
        ValueError: the estimator is not fitted, or cannot be fitted.
    """
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
        raise ValueError(f"estimator: {described(estimator)} is not fitted; call fit(x, y) first") from None
    except TypeError:
        raise ValueError(f"estimator: {described(estimator)} cannot be fitted, and so not be a probe") from None


def width_of(estimator: object, name: str) -> int:
    """Returns the number of features on which an estimator was fitted; for a pipeline, the number of its first step that states one.

    Raises:
        ValueError: the estimator does not state the number of features on which it was fitted.
    """
    parts = [estimator, *(step for _, step in getattr(estimator, "steps", ()))]
    width = next((part.n_features_in_ for part in parts if hasattr(part, "n_features_in_")), None)
    if width is None:
        raise ValueError(f"estimator: {name} has no n_features_in_; fit it on an array (rows, features)")
    return int(width)


def check_classes(estimator: Estimator, width: int, classes: tuple[str, ...], name: str) -> None:
    """Checks that a classifier was fitted on several classes, with one class for each row.

    Raises:
        ValueError: the classifier was fitted on one class only, or on several labels for each row.
    """
    if len(classes) == 1:
        raise ValueError(
            f"estimator: {name} was fitted on one class only ({classes[0]}); fit it on examples with and without the behaviour"
        )
    if not classes or np.ndim(called(estimator, "predict", np.zeros((1, width)))) != 1:
        raise ValueError(f"estimator: {name} was fitted on several labels for each row; fit and write one probe for each")


def refuse_by_name(estimator: Estimator, name: str) -> None:
    """Refuses an estimator if its class or its kernel is one that cannot be a probe.

    Raises:
        ValueError: the estimator cannot be a probe; the error gives the reason and what to fit instead.
    """
    if name_of(estimator) in KERNEL_MACHINES and estimator.kernel not in ("linear", "rbf", "poly", "polynomial", "sigmoid"):
        shown = repr(estimator.kernel) if isinstance(estimator.kernel, str) else getattr(estimator.kernel, "__name__", "of another kind")
        raise ValueError(f"estimator: {name} cannot be written: its kernel is {shown}; fit one with kernel linear, rbf, poly or sigmoid")
    reason = REASONS.get(name_of(estimator))
    if reason is not None and not (name_of(estimator) == "VotingClassifier" and estimator.voting == "soft"):
        raise ValueError(f"estimator: {name} cannot be written: {reason}")


def no_conversion(name: str, why: str) -> str:
    """Returns the error message for a scikit-learn estimator for which no ONNX graph with the correct scores could be made."""
    return (
        f"estimator: {name} cannot be written: {why}; fit another estimator (docs/reference/estimators.md lists them), "
        "or make the ONNX graph yourself and use onnx_probe"
    )
