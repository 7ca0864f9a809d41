"""Defines a probe before it is written to a file: the author's own code, and the ONNX graph that a server runs in place of this code.

Golden vectors are scores of a few rollouts computed with the author's code; the graph must give the same scores.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from numpy.typing import ArrayLike, NDArray

from probescore.types import ScoreUnit
from probescore_probes import arguments
from probescore_probes.estimators.scores import FEATURES, EstimatorScores, estimator_scores
from probescore_probes.exporter_warnings import quietly
from probescore_probes.nodes import ML_OPSET, OPSET
from probescore_server.probes.format.graph import CU_SEQLENS, POSITIONS, SCORES, GraphInputs, GraphSignature

if TYPE_CHECKING:
    from sklearn.base import BaseEstimator


@dataclass(frozen=True, eq=False)
class ProbeFunction:
    """Value object with a probe as its author made it, returned by ``linear_probe``, ``torch_probe``, ``sklearn_probe`` and ``onnx_probe``.

    Attributes:
        score: the author's own code, a function from the graph's inputs to scores, ``(N, labels)``, or ``(sequences, labels)`` if the probe
            pools; a missing last axis means one label.
        export: function that makes the ONNX graph for a signature.
        unit: unit of the scores.
        width: number of features in each input row, of all taps (places in the model) together; ``None`` if not known before the probe
            runs.
        columns: number of scores of each row; ``None`` if not known before the probe runs.
        classes: classes of a classifier as its training data names them, in order; the scores are those of the last ``columns`` classes.
    """

    score: Callable[[GraphInputs], NDArray[Any]]
    export: Callable[[GraphSignature], onnx.ModelProto]
    unit: ScoreUnit
    width: int | None = None
    columns: int | None = None
    classes: tuple[str, ...] = ()


def linear_probe(weight: ArrayLike, bias: ArrayLike = 0.0, *, unit: ScoreUnit = ScoreUnit.LOGIT) -> ProbeFunction:
    """Makes a linear probe, ``score = weight · activation + bias``.

    Args:
        weight: ``(width,)`` or ``(labels, width)``; the activations of several taps (points in the language model) are concatenated in
            order, so that ``width`` is ``taps × hidden_size``.
        bias: a number or ``(labels,)``.
        unit: ``LOGIT`` for logistic regression, ``VALUE`` for a direction.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has the wrong shape, is not finite, or is beyond float32.
    """
    matrix = _weights(weight, "weight", "(width,) or (labels, width)")
    if matrix.ndim not in (1, 2):
        raise ValueError(f"weight: shape {matrix.shape}; give (width,) or (labels, width)")
    matrix = np.atleast_2d(matrix)
    offset = _weights(bias, "bias", "a number or (labels,)")
    if offset.ndim > 1 or offset.size not in (1, len(matrix)):
        raise ValueError(f"bias: shape {offset.shape} for {len(matrix)} rows of weights; give a number or ({len(matrix)},)")
    offset = np.broadcast_to(offset, matrix.shape[:1])
    return ProbeFunction(
        lambda inputs: _concatenated(inputs) @ matrix.T + offset,
        lambda s: _linear_graph(matrix, offset, s),
        arguments.unit(unit, "unit"),
        width=matrix.shape[1],
        columns=len(matrix),
    )


def torch_probe(module: torch.nn.Module, *, unit: ScoreUnit) -> ProbeFunction:
    """Makes a probe from a torch module that reads a language model's activations at one tap (a point in the model) or several.

    The module is called with the activations of each tap in order, then ``cu_seqlens`` and ``positions`` if the probe takes these inputs.
    The module runs in evaluation mode and float32. The module is exported by ``torch.export``, so that Python control flow must not depend
    on values; ``docs/how-to/write-a-probe-over-tokens.md`` shows attention written over ``cu_seqlens``.

    Args:
        module: maps activations ``(N, hidden_size)`` float32 of each tap to scores ``(N, labels)``, or ``(sequences, labels)`` if the
            module pools; a missing last axis means one label.
        unit: unit of the scores.

    Raises:
        TypeError: ``module`` is not a torch module, or ``unit`` is not a ``ScoreUnit``.
        ValueError: a weight is not finite.
    """
    arguments.of_kind(module, "module", torch.nn.Module, "give a torch.nn.Module; a function becomes one as its forward")
    unit = arguments.unit(unit, "unit")
    for name, weight in module.state_dict().items():
        if isinstance(weight, torch.Tensor) and weight.is_floating_point() and not bool(weight.isfinite().all()):
            raise ValueError(f"module: its weight {name!r} has NaN or infinite numbers; fit it again")
    scorer = _ScoresModule(copy.deepcopy(module).float().cpu()).eval()

    def score(inputs: GraphInputs) -> NDArray[Any]:
        with torch.inference_mode():
            scores: NDArray[Any] = scorer(*(torch.from_numpy(np.ascontiguousarray(array)) for array in inputs.values())).numpy()
        return scores

    return ProbeFunction(score, lambda signature: _torch_graph(scorer, signature), unit)


def sklearn_probe(estimator: BaseEstimator) -> ProbeFunction:
    """Makes a probe from a fitted scikit-learn estimator or pipeline.

    The estimator reads the activations of all taps (points in the language model), concatenated in order.

    Linear classifiers of two classes (alone or behind scalers) score by their ``decision_function``, which is a logit if its sigmoid is the
    classifier's probability. Other classifiers score by ``predict_proba`` if they have this method: by the probability of the second of two
    classes, or with one label for each of several classes. Regressors score by ``predict``. ``docs/reference/estimators.md`` has a table of
    all estimators.

    Raises:
        TypeError: the value is not a scikit-learn estimator.
        ValueError: the estimator is not fitted, or cannot be converted to a graph; the error names the estimator, the reason and what to do
            instead.
    """
    read = estimator_scores(estimator)

    def export(signature: GraphSignature) -> onnx.ModelProto:
        return _linear_graph(*read.weights, signature) if read.weights else _estimator_graph(read, signature)

    return ProbeFunction(lambda inputs: read.score(_concatenated(inputs)), export, read.unit, read.width, read.columns, read.classes)


def onnx_probe(graph: onnx.ModelProto | Path | str, score: Callable[[GraphInputs], NDArray[Any]], *, unit: ScoreUnit) -> ProbeFunction:
    """Makes a probe from a finished ONNX graph and the code from which the graph was made.

    Args:
        graph: the ONNX model, or the path of its file.
        score: the author's own code, a function from the graph's inputs to scores, ``(N, labels)``, or ``(sequences, labels)`` if the probe
            pools.
        unit: unit of the scores.

    Raises:
        TypeError: ``graph`` is not a model or path, ``score`` is not a function, or ``unit`` is not a ``ScoreUnit``.
        ValueError: ``graph`` is a path at which there is no ONNX model.
    """
    if not callable(score):
        raise TypeError(f"score: {arguments.kind_of(score)} ({arguments.shown(score)}); give the function that the graph was made from")
    unit = arguments.unit(unit, "unit")
    if isinstance(graph, onnx.ModelProto):
        return ProbeFunction(score, lambda _: graph, unit)
    if not isinstance(graph, (str, Path)):
        raise TypeError(
            f"graph: {arguments.kind_of(graph)} ({arguments.shown(graph)}); give an onnx.ModelProto or the path of an .onnx file"
        )
    try:
        model = onnx.load(graph)
    except OSError as error:
        raise ValueError(
            f"graph: {str(graph)!r} cannot be read ({error.strerror or type(error).__name__}); give the path of an .onnx file"
        ) from None
    except Exception:  # raised by protobuf, or by the loader of weights beside the file
        raise ValueError(f"graph: {str(graph)!r} is not an ONNX model with all of its weights inside; save it as one .onnx file") from None
    return ProbeFunction(score, lambda _: model, unit)


def _weights(given: ArrayLike, argument: str, shape: str) -> NDArray[np.float64]:
    array = arguments.numbers(given, argument, f"weights {shape}")
    largest = np.abs(array).max()
    if largest > np.finfo(np.float32).max:
        raise ValueError(
            f"{argument}: a number as large as {largest:.3g}; a graph computes in float32, which ends at 3.4e38: scale the probe down"
        )
    return array


class _ScoresModule(torch.nn.Module):
    """Torch module that wraps another torch module so that the scores are float32 and have an axis of labels."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.module(*inputs)
        return (scores if scores.ndim == 2 else scores.unsqueeze(-1)).float()


def _concatenated(inputs: GraphInputs) -> NDArray[np.float64]:
    return np.concatenate([array for name, array in inputs.items() if name not in (CU_SEQLENS, POSITIONS)], axis=1).astype(np.float64)


def _linear_graph(weight: NDArray[np.float64], bias: NDArray[np.float64], signature: GraphSignature) -> onnx.ModelProto:
    """Builds the ONNX graph of a linear probe, which is a single ``Gemm`` node.

    The engine can compute a graph of this form together with other probes that read the same tap, which is a point in the language model.
    """
    nodes, features = _features(signature)
    nodes.append(onnx.helper.make_node("Gemm", [features, "weight", "bias"], [SCORES], transB=1))
    weights = [onnx.numpy_helper.from_array(array.astype(np.float32), name) for array, name in ((weight, "weight"), (bias, "bias"))]
    return _model(nodes, signature, weights)


def _features(signature: GraphSignature) -> tuple[list[onnx.NodeProto], str]:
    names = [str(tap) for tap in signature.taps]
    return ([], names[0]) if len(names) == 1 else ([onnx.helper.make_node("Concat", names, [FEATURES], axis=1)], FEATURES)


def _model(nodes: list[onnx.NodeProto], signature: GraphSignature, weights: list[onnx.TensorProto]) -> onnx.ModelProto:
    graph = onnx.helper.make_graph(nodes, "probe", signature.inputs, [signature.output], weights)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)])


def _torch_graph(scorer: _ScoresModule, signature: GraphSignature) -> onnx.ModelProto:
    # These sizes equal no other size, so that the exporter takes none of them for a constant.
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
    try:
        with quietly("torch.onnx"):
            program: Any = torch.onnx.export(
                scorer,
                tuple(example),
                input_names=[value.name for value in signature.inputs],
                output_names=[SCORES],
                opset_version=OPSET,
                dynamo=True,
                dynamic_shapes=(tuple(shapes),),
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # whatever the exporter or the module raises
        name = type(scorer.module).__name__
        raise ValueError(
            f"module: {name} cannot be exported to ONNX ({type(error).__name__}): its forward must not depend on numbers "
            "by Python's if, for or .item(), and must take any number of tokens; "
            "docs/how-to/write-a-probe-over-tokens.md shows how attention is written"
        ) from error
    return _declared(program.model_proto, signature)


def _estimator_graph(read: EstimatorScores, signature: GraphSignature) -> onnx.ModelProto:
    nodes, features = _features(signature)
    if features != FEATURES:
        nodes.append(onnx.helper.make_node("Identity", [features], [FEATURES]))
    nodes += [*read.nodes.nodes, onnx.helper.make_node("Identity", [read.result], [SCORES])]
    model = _model(nodes, signature, read.nodes.weights)
    model.opset_import.append(onnx.helper.make_opsetid("ai.onnx.ml", ML_OPSET))
    return model


def _declared(model: onnx.ModelProto, signature: GraphSignature) -> onnx.ModelProto:
    """Replaces a model's declarations of inputs and output with those of the signature; the exporter writes sizes such as ``s0 - 1``."""
    declared = onnx.ModelProto()
    declared.CopyFrom(model)
    del declared.graph.input[:], declared.graph.output[:]
    declared.graph.input.extend(signature.inputs)
    declared.graph.output.append(signature.output)
    return declared
