"""Builds the ONNX nodes that compute a fitted estimator's scores.

The nodes come from skl2onnx where it can convert the estimator, and are written here where it cannot. Each function adds nodes that read
the value named ``x``, ``(N, width)``, and returns the name of the nodes' result, float32 or float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from probescore_probes.estimators.conversion import converted
from probescore_probes.estimators.fitted import FittedEstimator
from probescore_probes.estimators.kernels import kernel_scores
from probescore_probes.estimators.linear import SCALERS, STEP, affine_map, is_linear
from probescore_probes.estimators.names import KERNEL_MACHINES, Estimator, described, name_of
from probescore_probes.estimators.refusals import refuse_by_name
from probescore_probes.nodes import Nodes


def second_probability(fitted: FittedEstimator, nodes: Nodes, x: str) -> str:
    """Adds ONNX nodes for the probability of the second class of a two-class classifier, ``(N, 1)``."""
    inner = fitted.inner
    if name_of(inner) == "Pipeline":
        return second_probability(fitted.after_steps(), nodes, _through_steps(fitted, nodes, x))
    if is_linear(inner) and fitted.is_logit():
        return nodes.apply("Sigmoid", nodes.gemm(x, *fitted.affine))
    if name_of(inner) == "CalibratedClassifierCV":
        return nodes.mean([_calibrated(fitted, nodes, x, member)[0] for member in inner.calibrated_classifiers_])
    if name_of(inner) == "HistGradientBoostingClassifier":
        return nodes.apply("Sigmoid", _boosted(fitted, nodes, x))
    if name_of(inner) == "OneVsRestClassifier" and len(inner.estimators_) == 1:
        return second_probability(fitted.part(inner.estimators_[0]), nodes, x)
    if name_of(inner) == "VotingClassifier":
        return nodes.weighted_mean(
            [second_probability(fitted.part(member), nodes, x) for member in inner.estimators_], inner._weights_not_none
        )
    return nodes.columns(probabilities(fitted, nodes, x), [1])


def probabilities(fitted: FittedEstimator, nodes: Nodes, x: str) -> str:
    """Adds ONNX nodes for the probability of every class of a classifier, ``(N, classes)``."""
    inner = fitted.inner
    match name_of(inner):
        case "Pipeline":
            return probabilities(fitted.after_steps(), nodes, _through_steps(fitted, nodes, x))
        case _ if is_linear(inner) and len(inner.classes_) > 2:
            decisions = nodes.gemm(x, *fitted.affine)
            return nodes.softmax(decisions if fitted.is_softmax() else nodes.log_sigmoid(decisions))
        case "CalibratedClassifierCV":
            members = [nodes.normalised(_calibrated(fitted, nodes, x, member)) for member in inner.calibrated_classifiers_]
            return nodes.mean(members)
        case "HistGradientBoostingClassifier" if len(inner.classes_) > 2:
            return nodes.softmax(_boosted(fitted, nodes, x))
        case "VotingClassifier":
            return nodes.weighted_mean(
                [probabilities(fitted.part(member), nodes, x) for member in inner.estimators_], inner._weights_not_none
            )
        case "OneVsRestClassifier" if not inner.multilabel_:
            columns = [second_probability(fitted.part(member), nodes, x) for member in inner.estimators_]
            return nodes.normalised(columns)
        case "GaussianNB":
            x = _after_affine_steps(fitted, nodes, x)
            # these parameters have the dtype of the rows that the estimator was fitted on
            mean, variance, prior = (np.asarray(parameter, np.float64) for parameter in (inner.theta_, inner.var_, inner.class_prior_))
            quadratic, linear = -0.5 / variance, mean / variance
            constant = np.log(prior) - 0.5 * (np.log(2 * np.pi * variance) + mean**2 / variance).sum(axis=1)
            squares = nodes.gemm(nodes.apply("Mul", x, x), quadratic, constant, np.float64)
            return nodes.softmax(nodes.apply("Add", squares, nodes.apply("MatMul", x, nodes.constant(linear.T))))
    return _by_skl2onnx(fitted, nodes, x, "predict_proba")


def decisions(fitted: FittedEstimator, nodes: Nodes, x: str) -> str:
    """Adds ONNX nodes for the decision function of a classifier or outlier detector that has no probabilities, ``(N, columns)``."""
    inner = fitted.inner
    match name_of(inner):
        case "Pipeline":
            return decisions(fitted.after_steps(), nodes, _through_steps(fitted, nodes, x))
        case _ if is_linear(inner):
            return nodes.gemm(x, *fitted.affine)
        case name if name in KERNEL_MACHINES and np.ravel(inner.intercept_).size == 1:
            return _support_vector_scores(fitted, nodes, x)
        case "OneVsRestClassifier":
            return nodes.concat([decisions(fitted.part(member), nodes, x) for member in inner.estimators_])
        case "EllipticEnvelope":
            # the squared distance is computed through a square root of the inverse covariance, so that no large numbers cancel
            values, vectors = np.linalg.eigh(inner.precision_)
            root = (vectors * np.sqrt(np.maximum(values, 0))).T
            away = nodes.gemm(_after_affine_steps(fitted, nodes, x), root, -root @ inner.location_, np.float64)
            return nodes.gemm(nodes.apply("Mul", away, away), -np.ones((1, len(root))), np.array([-inner.offset_]), np.float64)
    return _by_skl2onnx(fitted, nodes, x, "decision_function")


def predictions(fitted: FittedEstimator, nodes: Nodes, x: str) -> str:
    """Adds ONNX nodes for the predictions of a regressor, ``(N, columns)``."""
    inner = fitted.inner
    match name_of(inner):
        case "Pipeline":
            return predictions(fitted.after_steps(), nodes, _through_steps(fitted, nodes, x))
        case _ if is_linear(inner):
            return nodes.gemm(x, *fitted.affine)
        case "SVR" | "NuSVR":
            return _support_vector_scores(fitted, nodes, x)
        case "KernelRidge":
            gamma = 1 / inner.n_features_in_ if inner.gamma is None else inner.gamma
            dual = np.atleast_2d(inner.dual_coef_.T)
            return kernel_scores(inner, nodes, _after_affine_steps(fitted, nodes, x), inner.X_fit_, dual, np.zeros(len(dual)), gamma)
        case "HistGradientBoostingRegressor":
            raw = _boosted(fitted, nodes, x)
            return nodes.apply("Exp", raw) if inner.loss in ("poisson", "gamma") else raw
        case "VotingRegressor":
            return nodes.weighted_mean(
                [predictions(fitted.part(member), nodes, x) for member in inner.estimators_], inner._weights_not_none
            )
    return _by_skl2onnx(fitted, nodes, x, "predict")


def _support_vector_scores(fitted: FittedEstimator, nodes: Nodes, x: str) -> str:
    """Adds ONNX nodes for the scores of a support vector machine, ``(N, 1)``."""
    machine, x = fitted.inner, _after_affine_steps(fitted, nodes, x)
    return kernel_scores(machine, nodes, x, machine.support_vectors_, machine.dual_coef_, machine.intercept_, machine._gamma)


def _boosted(fitted: FittedEstimator, nodes: Nodes, x: str) -> str:
    """Adds ONNX nodes for the raw scores of histogram-based gradient boosting, ``(N, 1)`` or ``(N, classes)``."""
    inner = fitted.inner
    if inner.is_categorical_ is not None and np.any(inner.is_categorical_):
        raise ValueError(f"estimator: {described(fitted.estimator)} was fitted with categorical features, and activations are real numbers")
    trees = [(target, predictor.nodes) for iteration in inner._predictors for target, predictor in enumerate(iteration)]
    return nodes.trees(nodes.cast(_after_affine_steps(fitted, nodes, x), np.float32), trees, np.ravel(inner._baseline_prediction))


def _calibrated(fitted: FittedEstimator, nodes: Nodes, x: str, member: Estimator) -> list[str]:
    """Adds ONNX nodes for one member of a calibrated classifier: ``(N, 1)`` for each class, or for the second of two classes only."""
    part, calibrators = fitted.part(member.estimator), member.calibrators
    classes, by_decision = len(member.classes), hasattr(member.estimator, "decision_function")
    if len(member.estimator.classes_) != classes:
        raise ValueError(
            f"estimator: {described(fitted.estimator)}: one of its folds lacks a class; fit it with fewer folds or more examples"
        )
    if member.method == "temperature":
        if classes > 2 or not by_decision:
            raise ValueError(
                f"estimator: {described(fitted.estimator)} with method='temperature' can be written for two classes with decisions; "
                "use method='sigmoid'"
            )
        # scikit-learn turns the decision d into the logits (-d, d)
        return [nodes.apply("Sigmoid", _scaled_decision(part, nodes, x, 2 * calibrators[0].beta_, 0.0))]
    if by_decision and member.method == "sigmoid" and classes == 2:
        return [nodes.apply("Sigmoid", _scaled_decision(part, nodes, x, -calibrators[0].a_, -calibrators[0].b_))]
    if by_decision:
        scores = nodes.gemm(x, *part.affine, np.float64) if is_linear(part.inner) else decisions(part, nodes, x)
    else:
        scores = second_probability(part, nodes, x) if classes == 2 else probabilities(part, nodes, x)
    scores = nodes.cast(scores, np.float64)  # far from the training data all classes are near 0, and only their shares count
    columns = [scores] if classes == 2 else [nodes.columns(scores, [index]) for index in range(classes)]
    return [_calibrator(nodes, column, calibrator) for column, calibrator in zip(columns, calibrators, strict=True)]


def _scaled_decision(fitted: FittedEstimator, nodes: Nodes, x: str, scale: float, shift: float) -> str:
    """Adds ONNX nodes that scale and shift the decision function of a two-class classifier; one ``Gemm`` if the decision function is
    linear.
    """
    if is_linear(fitted.inner):
        weight, bias = fitted.affine
        return nodes.gemm(x, scale * weight, scale * bias + shift)
    return nodes.gemm(decisions(fitted, nodes, x), np.array([[scale]]), np.array([shift]))


def _through_steps(fitted: FittedEstimator, nodes: Nodes, x: str) -> str:
    """Adds ONNX nodes, made by skl2onnx, for the steps of a pipeline that are not all affine."""
    steps = [step for _, step in fitted.inner.steps[:-1] if step is not None and not isinstance(step, str)]
    return _converted(fitted, nodes, x, (*fitted.steps, *steps), "transform")


def _by_skl2onnx(fitted: FittedEstimator, nodes: Nodes, x: str, method: str) -> str:
    """Adds ONNX nodes, made by skl2onnx, for the result of one method of a scikit-learn estimator, such as ``predict``."""
    return _converted(fitted, nodes, x, (*fitted.steps, fitted.inner), method)


def _converted(fitted: FittedEstimator, nodes: Nodes, x: str, steps: Sequence[Estimator], method: str) -> str:
    name = described(fitted.estimator)
    refuse_by_name(fitted.inner, name)
    return converted(steps, method, nodes, x, fitted.width, name)


def _after_affine_steps(fitted: FittedEstimator, nodes: Nodes, x: str) -> str:
    """Adds ONNX nodes for the affine steps that are applied before an estimator, ``(N, features)`` float64."""
    x = nodes.cast(x, np.float64)
    if not fitted.steps:
        return x
    if all(name_of(step) in SCALERS for step in fitted.steps):
        bias = fitted.transformed(np.zeros((1, fitted.width)))[0]
        scale = (fitted.transformed(np.full((1, fitted.width), STEP))[0] - bias) / STEP
        return nodes.apply("Add", nodes.apply("Mul", x, nodes.constant(scale)), nodes.constant(bias))
    return nodes.gemm(x, *affine_map(fitted.transformed, fitted.width), np.float64)


def _calibrator(nodes: Nodes, scores: str, calibrator: Estimator) -> str:
    """Adds ONNX nodes for a fitted sigmoid or isotonic calibrator, from ``(N, 1)`` to ``(N, 1)`` float64."""
    if hasattr(calibrator, "a_"):
        weight, bias = np.array([[-calibrator.a_]], np.float64), np.array([-calibrator.b_], np.float64)
        return nodes.exact_sigmoid(nodes.gemm(scores, weight, bias, np.float64))
    return nodes.interpolated(scores, calibrator.X_thresholds_, calibrator.y_thresholds_)
