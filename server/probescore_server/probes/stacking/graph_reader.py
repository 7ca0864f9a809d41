"""Reads a probe's graph as a network of layers, if the graph certainly has this form; a graph with any other node is not changed.

The nodes are followed one by one, and each value is described as an expression over the latest affine map of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx

from probescore_server.probes.format.graph import SCORES, GraphSignature
from probescore_server.probes.stacking.expressions import COMPARISONS, OPERATORS, Apply, Constant, Expression, Input
from probescore_server.probes.stacking.layered_network import Affine, Array, Network, NotANetwork, RowValue, mapped, network_of, selected


def read_network(model: onnx.ModelProto, signature: GraphSignature) -> Network | None:
    """Returns the layers of a probe's graph, or ``None`` if the graph is not certainly a network of layers.

    Args:
        model: an ONNX model that passed ``check_graph`` and ``check_signature``.
        signature: the inputs and output of the same probe's graph.
    """
    if len(signature.taps) != 1 or signature.cu_seqlens or signature.positions:
        return None
    try:
        return _GraphReader(model.graph, str(signature.taps[0]), signature.hidden_size).network(signature.labels)
    except NotANetwork:
        return None


@dataclass(frozen=True, eq=False)
class _JoinedColumns:
    """Value in a graph that consists of several values placed side by side, ``(tokens, sum of their widths)``."""

    parts: tuple[RowValue, ...]


@dataclass(frozen=True, eq=False)
class _Shape:
    """Value in a probe's graph that holds the shape of another value, ``(tokens, width)``."""

    width: int


@dataclass(frozen=True, eq=False)
class _Zeros:
    """Value in a probe's graph that consists of zeros, ``(tokens, width)``."""

    width: int


@dataclass(frozen=True, eq=False)
class _LargestPlaces:
    """Value in a graph that holds the indices of the largest numbers of each row, as ``TopK`` returns them."""

    affine: Affine
    kept: Expression


_Value = Any  # an array, or one of the classes above


class _GraphReader:
    """Reader that follows the nodes of one graph from its input to its scores; the nodes are in topological order, as ONNX requires."""

    def __init__(self, graph: onnx.GraphProto, tap: str, hidden_size: int) -> None:
        self._graph = graph
        self._values: dict[str, _Value] = {tap: RowValue.of_tap(hidden_size)}
        for tensor in graph.initializer:
            self._values[tensor.name] = onnx.numpy_helper.to_array(tensor)

    def network(self, labels: int) -> Network:
        for node in self._graph.node:
            read = _NODES.get(node.op_type) or (_elementwise if node.op_type in OPERATORS else None)
            if read is None:
                if SCORES in node.output:
                    raise NotANetwork
                continue  # what depends on it will find that its value is missing
            attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
            try:
                results = read(_ReadNode(node, attributes, [self._values.get(name) for name in node.input]))
            except NotANetwork:
                if SCORES in node.output:
                    raise
                continue
            self._values.update(zip(node.output, results, strict=False))
        network = network_of(_rows(self._values.get(SCORES)))
        if len(network.layers[-1].bias) != labels:
            raise NotANetwork
        return network


@dataclass(frozen=True, eq=False)
class _ReadNode:
    proto: onnx.NodeProto
    attributes: Mapping[str, Any]
    inputs: list[_Value]

    def rows(self, index: int = 0) -> RowValue:
        return _rows(self.inputs[index])

    def constant(self, index: int) -> Array:
        value = self.inputs[index] if index < len(self.inputs) else None
        if not isinstance(value, np.ndarray):
            raise NotANetwork
        return value

    def has(self, index: int) -> bool:
        return index < len(self.proto.input) and self.proto.input[index] != ""


def _rows(value: _Value, axes: str = "rows") -> RowValue:
    if not isinstance(value, RowValue) or value.kept is not None or value.axes != axes:
        raise NotANetwork
    return value


# ----------------------------------------------------------------------------------------------------------------------- the nodes


def _elementwise(node: _ReadNode) -> list[_Value]:
    """Reads a node whose operator acts number by number, on one value and constants or on several expressions over the same affine map,
    while a probe's graph is read as a network of layers.
    """
    known = [value for value in node.inputs if isinstance(value, RowValue)]
    if not known or any(value.affine is not known[0].affine or value.axes != known[0].axes for value in known):
        raise NotANetwork
    first = known[0]
    if first.axes == "turned" or any(value.kept != first.kept for value in known):
        raise NotANetwork
    constants = {name: number for value in known for name, number in value.constants.items()}
    arguments: list[Expression] = []
    for index, value in enumerate(node.inputs):
        if isinstance(value, RowValue):
            arguments.append(value.expression)
        else:
            # A constant is named for its use here, since columns selected later read another part of the same constant.
            name = f"{node.proto.output[0]} {index}"
            constants[name] = _per_column(node.constant(index), first)
            arguments.append(Constant(name))
    for attribute in OPERATORS[node.proto.op_type]:
        name = f"{node.proto.output[0]} {attribute}"
        constants[name] = np.array([node.attributes.get(attribute, OPERATORS[node.proto.op_type][attribute])])
        arguments.append(Constant(name))
    return [replace(first, expression=Apply(node.proto.op_type, tuple(arguments)), constants=constants)]


def _per_column(constant: Array, value: RowValue) -> Array:
    """Returns a constant that broadcasts over the rows of a value without changing its shape, as ``(width,)`` or ``(1,)``."""
    flat = value.axes == "flat"
    # the largest numbers of a row are not in the order of its columns
    width = 1 if flat or value.kept is not None else value.affine.width
    if constant.dtype != np.float32 or constant.ndim > (1 if flat else 2) or constant.size not in (1, width):
        raise NotANetwork
    if constant.ndim == 2 and constant.shape[0] != 1:
        raise NotANetwork
    return constant.reshape(-1)


def _constant(node: _ReadNode) -> list[_Value]:
    (value,) = node.attributes.values()
    if isinstance(value, onnx.TensorProto):
        return [onnx.numpy_helper.to_array(value)]
    if isinstance(value, (int, float)):
        return [np.array(value, np.float32 if isinstance(value, float) else np.int64)]
    if isinstance(value, list) and all(isinstance(number, (int, float)) for number in value):
        return [np.array(value, np.float32 if any(isinstance(number, float) for number in value) else np.int64)]
    raise NotANetwork


def _gemm(node: _ReadNode) -> list[_Value]:
    if node.attributes.get("transA", 0):
        raise NotANetwork
    weight = node.constant(1) if node.attributes.get("transB", 0) else node.constant(1).T
    value = node.rows()
    bias = np.zeros(len(weight), np.float32)
    if node.has(2):
        offset = node.constant(2)
        if offset.ndim > 2 or (offset.ndim == 2 and offset.shape[0] != 1) or offset.size not in (1, len(weight)):
            raise NotANetwork
        bias = np.broadcast_to(offset.reshape(-1), bias.shape) * node.attributes.get("beta", 1.0)
    alpha = node.attributes.get("alpha", 1.0)
    return [mapped(value, weight if alpha == 1 else weight.astype(np.float64) * alpha, bias)]


def _matmul(node: _ReadNode) -> list[_Value]:
    matrix = node.constant(1)
    if matrix.ndim == 1:
        return [mapped(node.rows(), matrix[None], np.zeros(1), "flat")]
    if matrix.ndim != 2:
        raise NotANetwork
    return [mapped(node.rows(), matrix.T, np.zeros(matrix.shape[1]))]


def _linear_regressor(node: _ReadNode) -> list[_Value]:
    if node.attributes.get("post_transform", b"NONE") != b"NONE":
        raise NotANetwork
    weight = np.array(node.attributes["coefficients"], np.float32).reshape(node.attributes.get("targets", 1), -1)
    return [mapped(node.rows(), weight, np.array(node.attributes.get("intercepts", [0.0] * len(weight)), np.float32))]


def _linear_classifier(node: _ReadNode) -> list[_Value]:
    """Reads an ONNX ``LinearClassifier`` as a linear layer, with a sigmoid if ``post_transform`` is ``LOGISTIC``.

    The classifier's first output, the predicted class, is not read.

    Raises:
        NotANetwork: another ``post_transform``, such as softmax, mixes the scores of classes, or there is one class only.
    """
    transform = node.attributes.get("post_transform", b"NONE")
    classes = node.attributes.get("classlabels_ints") or node.attributes.get("classlabels_strings") or []
    weight = np.array(node.attributes["coefficients"], np.float32).reshape(len(classes) or 1, -1)
    bias = np.array(node.attributes.get("intercepts", []), np.float32)
    if transform not in (b"NONE", b"LOGISTIC") or len(classes) < 2 or bias.shape != weight.shape[:1]:
        raise NotANetwork
    scores = mapped(node.rows(), weight, bias)
    return [None, replace(scores, expression=Apply("Sigmoid", (Input(),))) if transform == b"LOGISTIC" else scores]


def _scaler(node: _ReadNode) -> list[_Value]:
    value = node.rows()
    names = [f"{node.proto.output[0]} {attribute}" for attribute in ("offset", "scale")]
    numbers = [_per_column(np.array(node.attributes[attribute], np.float32), value) for attribute in ("offset", "scale")]
    expression = Apply("Mul", (Apply("Sub", (value.expression, Constant(names[0]))), Constant(names[1])))
    return [replace(value, expression=expression, constants={**value.constants, **dict(zip(names, numbers, strict=True))})]


def _same(node: _ReadNode) -> list[_Value]:
    if node.has(1):
        raise NotANetwork  # this Dropout may be in training mode
    return [node.inputs[0]]


def _cast(node: _ReadNode) -> list[_Value]:
    value = node.inputs[0]
    if not isinstance(value, RowValue) or node.attributes["to"] != onnx.TensorProto.FLOAT:
        raise NotANetwork
    is_bool = isinstance(value.expression, Apply) and value.expression.operator in COMPARISONS
    return [replace(value, expression=Apply("Cast", (value.expression,))) if is_bool else value]


def _top_k(node: _ReadNode) -> list[_Value]:
    value, k = node.rows(), node.constant(1).reshape(-1)
    axis, largest = node.attributes.get("axis", -1), node.attributes.get("largest", 1)
    if axis not in (1, -1) or not largest or k.size != 1 or not 1 <= k[0] <= value.affine.width:
        raise NotANetwork
    kept = Apply("TopK", (value.expression,), int(k[0]))
    return [replace(value, kept=kept), _LargestPlaces(value.affine, kept)]


def _scatter(node: _ReadNode) -> list[_Value]:
    """Reads an ONNX node ``ScatterElements`` that puts the largest numbers of each row back to their places among zeros, as a top-k
    activation does.
    """
    data, places, updates = node.inputs[:3]
    if not isinstance(places, _LargestPlaces) or not isinstance(updates, RowValue) or updates.affine is not places.affine:
        raise NotANetwork
    if updates.kept != places.kept or node.attributes.get("axis", 0) not in (1, -1) or node.attributes.get("reduction", b"none") != b"none":
        raise NotANetwork
    if _zeros_width(data) != places.affine.width:
        raise NotANetwork
    nothing = f"{node.proto.output[0]} nothing"
    expression = Apply("Where", (places.kept, updates.expression, Constant(nothing)))
    return [replace(updates, expression=expression, constants={**updates.constants, nothing: np.zeros(1, np.float32)}, kept=None)]


def _zeros_width(value: _Value) -> int:
    """Returns the number of columns of a graph's value that certainly consists of zeros, or -1 for any other value."""
    if isinstance(value, _Zeros):
        return value.width
    if isinstance(value, RowValue) and isinstance(value.expression, Apply) and value.expression.operator == "Mul" and value.axes == "rows":
        factors = [value.constants[str(factor.name)] for factor in value.expression.arguments if isinstance(factor, Constant)]
        if any(not factor.any() for factor in factors):
            return value.affine.width
    return -1


def _shape(node: _ReadNode) -> list[_Value]:
    if node.attributes.get("start", 0) or "end" in node.attributes:
        raise NotANetwork
    return [_Shape(node.rows().affine.width)]


def _expand(node: _ReadNode) -> list[_Value]:
    shape = node.inputs[1]
    if not isinstance(shape, _Shape) or node.constant(0).size != 1 or node.constant(0).any():
        raise NotANetwork
    return [_Zeros(shape.width)]


def _constant_of_shape(node: _ReadNode) -> list[_Value]:
    shape, filling = node.inputs[0], node.attributes.get("value")
    if not isinstance(shape, _Shape) or (filling is not None and onnx.numpy_helper.to_array(filling).any()):
        raise NotANetwork
    return [_Zeros(shape.width)]


def _gather(node: _ReadNode) -> list[_Value]:
    value, columns = node.inputs[0], node.constant(1)
    axis = node.attributes.get("axis", 0)
    if isinstance(value, RowValue) and value.axes == "turned" and axis == 0 and columns.ndim == 1:
        return [selected(replace(value, axes="rows"), columns, "turned")]
    if axis not in (1, -1) or columns.ndim > 1:
        raise NotANetwork
    axes, columns = ("rows", columns) if columns.ndim == 1 else ("flat", columns.reshape(1))
    if not isinstance(value, _JoinedColumns):
        return [selected(_rows(value), columns, axes)]
    ends = np.cumsum([part.affine.width for part in value.parts])
    part = int(np.searchsorted(ends, columns.min(), side="right"))
    first = ends[part] - value.parts[part].affine.width if part < len(ends) else 0
    if columns.min() < 0 or part == len(ends) or columns.max() >= ends[part]:
        raise NotANetwork
    return [selected(value.parts[part], columns - first, axes)]


def _gather_nd(node: _ReadNode) -> list[_Value]:
    places = node.constant(1)
    if node.attributes.get("batch_dims", 0) or places.ndim != 2 or places.shape[1] != 1:
        raise NotANetwork
    return [selected(replace(_rows(node.inputs[0], "turned"), axes="rows"), places[:, 0], "turned")]


def _slice(node: _ReadNode) -> list[_Value]:
    value = node.rows()
    starts, ends, axes, steps = (node.constant(index) if node.has(index) else np.ones(1, np.int64) for index in (1, 2, 3, 4))
    if not node.has(3) or any(each.size != 1 for each in (starts, ends, axes, steps)) or axes.item() not in (1, -1):
        raise NotANetwork
    if steps.item() < 1:
        raise NotANetwork
    return [selected(value, np.arange(value.affine.width)[starts.item() : ends.item() : steps.item()])]


def _concat(node: _ReadNode) -> list[_Value]:
    if node.attributes["axis"] not in (1, -1):
        raise NotANetwork
    return [_JoinedColumns(tuple(_rows(value) for value in node.inputs))]


def _transpose(node: _ReadNode) -> list[_Value]:
    value = node.inputs[0]
    if not isinstance(value, RowValue) or value.axes == "flat" or value.kept is not None or node.attributes.get("perm", [1, 0]) != [1, 0]:
        raise NotANetwork
    return [replace(value, axes="turned" if value.axes == "rows" else "rows")]


def _axes(node: _ReadNode) -> list[int]:
    axes = node.constant(1).reshape(-1).tolist() if node.has(1) else node.attributes.get("axes", [])
    return [int(axis) for axis in axes]


def _squeeze(node: _ReadNode) -> list[_Value]:
    value = node.rows()
    if _axes(node) not in ([1], [-1]) or value.affine.width != 1:
        raise NotANetwork
    return [replace(value, axes="flat")]


def _unsqueeze(node: _ReadNode) -> list[_Value]:
    value = _rows(node.inputs[0], "flat")
    if _axes(node) not in ([1], [-1]):
        raise NotANetwork
    return [replace(value, axes="rows")]


def _reshape(node: _ReadNode) -> list[_Value]:
    value, shape = node.inputs[0], node.constant(1).tolist()
    if not isinstance(value, RowValue) or value.kept is not None or value.affine.width != 1 or value.axes == "turned":
        raise NotANetwork
    if shape not in ([-1], [-1, 1]) or node.attributes.get("allowzero", 0):
        raise NotANetwork
    return [replace(value, axes="flat" if shape == [-1] else "rows")]


_NODES: dict[str, Callable[[_ReadNode], list[_Value]]] = {
    "Cast": _cast,
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Dropout": _same,
    "Expand": _expand,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Gemm": _gemm,
    "Identity": _same,
    "LinearClassifier": _linear_classifier,
    "LinearRegressor": _linear_regressor,
    "MatMul": _matmul,
    "Reshape": _reshape,
    "Scaler": _scaler,
    "ScatterElements": _scatter,
    "Shape": _shape,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "TopK": _top_k,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
