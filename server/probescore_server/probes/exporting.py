"""Probes before they are files: the author's own code, and the ONNX graph that a server runs instead of it.

Golden vectors are computed with the author's code; the graph must then agree with it.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from numpy.typing import ArrayLike, NDArray

from probescore.types import ScoreUnit
from probescore_server.probes.graph import CU_SEQLENS, POSITIONS, SCORES, GraphInputs, Signature

if TYPE_CHECKING:
    from sklearn.base import BaseEstimator

_OPSET = 18
_ML_OPSET = 3


@dataclass(frozen=True, eq=False)
class ProbeFunction:
    """A probe as its author has it.

    Attributes:
        score: the author's own code: ``(N, labels)``, or ``(sequences, labels)`` where it pools; a missing last axis means one label.
        export: makes the graph for a signature.
        unit: of the scores.
    """

    score: Callable[[GraphInputs], NDArray[Any]]
    export: Callable[[Signature], onnx.ModelProto]
    unit: ScoreUnit


def linear_probe(weight: ArrayLike, bias: ArrayLike = 0.0, *, unit: ScoreUnit = ScoreUnit.LOGIT) -> ProbeFunction:
    """``score = weight · activation + bias``.

    Args:
        weight: ``(width,)`` or ``(labels, width)``; for several taps their activations are concatenated in order, so that ``width`` is
            ``taps × hidden_size``.
        bias: a number or ``(labels,)``.
        unit: ``LOGIT`` for logistic regression, ``VALUE`` for a direction.
    """
    matrix = np.atleast_2d(np.asarray(weight, np.float64))
    offset = np.broadcast_to(np.asarray(bias, np.float64), matrix.shape[:1])
    return ProbeFunction(lambda inputs: _concatenated(inputs) @ matrix.T + offset, lambda s: _linear_graph(matrix, offset, s), unit)


def torch_probe(module: torch.nn.Module, *, unit: ScoreUnit) -> ProbeFunction:
    """A module called with the taps' activations in order, then ``cu_seqlens`` and ``positions`` if the probe takes them.

    The module runs in evaluation mode and float32. It is exported by ``torch.export``, so that Python control flow must not depend on
    values; ``docs/probe-file.md`` shows attention written over ``cu_seqlens``.
    """
    scorer = _Scores(copy.deepcopy(module).float().cpu()).eval()

    def score(inputs: GraphInputs) -> NDArray[Any]:
        with torch.inference_mode():
            scores: NDArray[Any] = scorer(*(torch.from_numpy(np.ascontiguousarray(array)) for array in inputs.values())).numpy()
        return scores

    return ProbeFunction(score, lambda signature: _torch_graph(scorer, signature), unit)


def sklearn_probe(estimator: BaseEstimator) -> ProbeFunction:
    """A fitted scikit-learn estimator or pipeline, over the taps' activations concatenated in order.

    Binary linear classifiers (with or without a ``StandardScaler`` before them) score by their ``decision_function``, a logit where the
    loss is logistic; other classifiers by ``predict_proba`` (for two classes that of the second, else one label per class); regressors
    by ``predict``.
    """
    linear = _linear_form(estimator)
    if linear is not None:
        weight, bias, score, unit = linear
        return ProbeFunction(lambda inputs: score(_concatenated(inputs)), lambda s: _linear_graph(weight, bias, s), unit)
    if hasattr(estimator, "predict_proba"):
        binary = len(estimator.classes_) == 2

        def probabilities(inputs: GraphInputs) -> NDArray[Any]:
            every: NDArray[Any] = estimator.predict_proba(_concatenated(inputs))
            return every[:, 1:] if binary else every

        return ProbeFunction(probabilities, lambda s: _sklearn_graph(estimator, s, binary), ScoreUnit.PROBABILITY)
    return ProbeFunction(
        lambda inputs: estimator.predict(_concatenated(inputs)), lambda s: _sklearn_graph(estimator, s, False), ScoreUnit.VALUE
    )


def onnx_probe(graph: onnx.ModelProto | Path | str, score: Callable[[GraphInputs], NDArray[Any]], *, unit: ScoreUnit) -> ProbeFunction:
    """A graph that is ready, with the code that it was made from."""
    model = graph if isinstance(graph, onnx.ModelProto) else onnx.load(graph)
    return ProbeFunction(score, lambda _: model, unit)


class _Scores(torch.nn.Module):
    """Gives a module's scores their label axis and float32."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.module(*inputs)
        return (scores if scores.ndim == 2 else scores.unsqueeze(-1)).float()


def _concatenated(inputs: GraphInputs) -> NDArray[np.float64]:
    return np.concatenate([array for name, array in inputs.items() if name not in (CU_SEQLENS, POSITIONS)], axis=1).astype(np.float64)


def _linear_graph(weight: NDArray[np.float64], bias: NDArray[np.float64], signature: Signature) -> onnx.ModelProto:
    """One ``Gemm``, the form that the engine can stack with other probes of the same tap."""
    nodes, features = _features(signature)
    nodes.append(onnx.helper.make_node("Gemm", [features, "weight", "bias"], [SCORES], transB=1))
    weights = [onnx.numpy_helper.from_array(array.astype(np.float32), name) for array, name in ((weight, "weight"), (bias, "bias"))]
    return _model(nodes, signature, weights)


def _features(signature: Signature) -> tuple[list[onnx.NodeProto], str]:
    names = [str(tap) for tap in signature.taps]
    return ([], names[0]) if len(names) == 1 else ([onnx.helper.make_node("Concat", names, ["features"], axis=1)], "features")


def _model(nodes: list[onnx.NodeProto], signature: Signature, weights: list[onnx.TensorProto]) -> onnx.ModelProto:
    graph = onnx.helper.make_graph(nodes, "probe", signature.inputs, [signature.output], weights)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", _OPSET)])


def _torch_graph(scorer: torch.nn.Module, signature: Signature) -> onnx.ModelProto:
    # Sizes that coincide with nothing else, so that the exporter takes none of them for a constant.
    lengths = (4, 3, 6)
    example = [torch.randn(sum(lengths), signature.hidden_size) for _ in signature.taps]
    rows = torch.export.Dim("tokens")
    shapes: list[dict[int, torch.export.Dim]] = [{0: rows} for _ in signature.taps]
    if signature.cu_seqlens:
        example.append(torch.tensor([0, *np.cumsum(lengths)]))
        shapes.append({0: torch.export.Dim("boundaries", min=2)})
    if signature.positions:
        example.append(torch.arange(sum(lengths)))
        shapes.append({0: rows})
    with _quietly():
        program: Any = torch.onnx.export(
            scorer,
            tuple(example),
            input_names=[value.name for value in signature.inputs],
            output_names=[SCORES],
            opset_version=_OPSET,
            dynamo=True,
            dynamic_shapes=(tuple(shapes),),
            external_data=False,
            verbose=False,
        )
    return _declared(program.model_proto, signature)


def _linear_form(
    estimator: BaseEstimator,
) -> tuple[NDArray[np.float64], NDArray[np.float64], Callable[..., NDArray[Any]], ScoreUnit] | None:
    """Weight, bias, the estimator's own function and its unit, if it is linear after standardisation."""
    from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge, RidgeClassifier, SGDClassifier
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import LinearSVC

    steps = [step for _, step in estimator.steps] if isinstance(estimator, Pipeline) else [estimator]
    last = steps[-1]
    classifies = isinstance(last, (LogisticRegression, SGDClassifier, RidgeClassifier, LinearSVC)) and len(last.classes_) == 2
    if not classifies and not isinstance(last, (LinearRegression, Ridge)):
        return None
    if not all(type(step) is StandardScaler for step in steps[:-1]):
        return None
    weight = np.atleast_2d(np.asarray(last.coef_, np.float64))
    bias = np.broadcast_to(np.asarray(last.intercept_, np.float64), weight.shape[:1])
    for scaler in reversed(steps[:-1]):
        weight = weight / scaler.scale_ if scaler.with_std else weight
        bias = bias - weight @ scaler.mean_ if scaler.with_mean else bias  # mean_ is there even if it is not subtracted
    logistic = isinstance(last, LogisticRegression) or (isinstance(last, SGDClassifier) and last.loss == "log_loss")
    return weight, bias, estimator.decision_function if classifies else estimator.predict, ScoreUnit.LOGIT if logistic else ScoreUnit.VALUE


def _sklearn_graph(estimator: BaseEstimator, signature: Signature, second_column: bool) -> onnx.ModelProto:
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import FloatTensorType

    classifies = hasattr(estimator, "predict_proba")
    converted = to_onnx(
        estimator,
        initial_types=[("all_features", FloatTensorType([None, len(signature.taps) * signature.hidden_size]))],
        options={"zipmap": False} if classifies else None,
        target_opset={"": _OPSET, "ai.onnx.ml": _ML_OPSET},
    )
    scores = converted.graph.output[-1].name
    nodes, features = _features(signature)
    nodes.append(onnx.helper.make_node("Identity", [features], ["all_features"]))
    nodes += converted.graph.node
    weights = list(converted.graph.initializer)
    if second_column:
        weights.append(onnx.numpy_helper.from_array(np.array([1]), "second_class"))
        nodes.append(onnx.helper.make_node("Gather", [scores, "second_class"], [SCORES], axis=1))
    else:
        nodes.append(onnx.helper.make_node("Identity", [scores], [SCORES]))
    model = _model(nodes, signature, weights)
    model.opset_import.append(onnx.helper.make_opsetid("ai.onnx.ml", _ML_OPSET))
    return model


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporter's warnings on what it is built from; what a probe's author must know is raised."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _declared(model: onnx.ModelProto, signature: Signature) -> onnx.ModelProto:
    """With inputs and output declared as the signature has them; the exporter writes sizes like ``s0 - 1``."""
    declared = onnx.ModelProto()
    declared.CopyFrom(model)
    del declared.graph.input[:], declared.graph.output[:]
    declared.graph.input.extend(signature.inputs)
    declared.graph.output.append(signature.output)
    return declared
