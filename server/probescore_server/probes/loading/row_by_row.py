"""Proves of some probes' ONNX graphs that they compute row by row: no score depends on other rows of activations, on the number of rows, or
on a row's place among them.

The module follows the nodes of a graph one by one. A value of the graph is in one of three states: it is the same for every input; it has
one entry for each row along a known axis, computed from that row alone; or nothing is known of it. Every result computed from a value of
the last state is unknown too.
"""

from __future__ import annotations

import numpy as np
import onnx

from probescore.types import OutputPer
from probescore_server.probes.format.graph import POSITIONS, SCORES, GraphSignature
from probescore_server.probes.loading.row_rules import OPERATORS
from probescore_server.probes.loading.row_values import NotProven, ProvenNode, RowsOnAxis, SameForAllInputs, Value
from probescore_server.probes.stacking.graph_reader import read_network


def is_row_by_row(model: onnx.ModelProto, signature: GraphSignature) -> bool:
    """Returns whether the operators of a probe's graph prove that it computes row by row.

    Args:
        model: an ONNX model that passed ``check_graph`` and ``check_signature``.
        signature: the inputs and output of the same probe's graph.
    """
    return signature.per is OutputPer.TOKEN and (
        read_network(model, signature) is not None or _followed(model, signature) == RowsOnAxis(0, 2)
    )


def _followed(model: onnx.ModelProto, signature: GraphSignature) -> Value | None:
    """Follows a probe's graph from its inputs to its output, and returns the state of its scores that is thereby proven, such as the axis
    along which the rows of tokens lie.

    Returns ``None`` if nothing is proven of the scores.
    """
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {
        value.name: tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in value.type.tensor_type.shape.dim)
        for value in (*inferred.input, *inferred.value_info, *inferred.output)
        if value.type.tensor_type.HasField("shape")
    }
    values: dict[str, Value | None] = {str(tap): RowsOnAxis(0, 2) for tap in signature.taps}
    if signature.positions:
        values[POSITIONS] = RowsOnAxis(0, 1)
    for tensor in model.graph.initializer:
        values[tensor.name] = SameForAllInputs(tuple(tensor.dims), onnx.numpy_helper.to_array(tensor))
    for proto in model.graph.node:
        node = ProvenNode(proto, [values.get(name) for name in proto.input], [shapes.get(name, ()) for name in proto.input], opset)
        try:
            results = _results(node, [shapes.get(name) for name in proto.output])
        except (
            NotProven,
            LookupError,
            TypeError,
            ValueError,
        ):  # the last three come from a node of unusual form, of which nothing is certain either
            continue
        for name, value in zip(proto.output, results, strict=False):
            # where shape inference knows better than the rules do, nothing is certain
            if not isinstance(value, RowsOnAxis) or name not in shapes or len(shapes[name]) == value.rank:
                values[name] = value
    return values.get(SCORES)


def _results(node: ProvenNode, shapes: list[tuple[int | None, ...] | None]) -> list[Value]:
    if any(attribute.HasField("g") or attribute.graphs for attribute in node.proto.attribute):
        raise NotProven
    if node.proto.op_type == "Constant":
        return _constant(node)
    if all(isinstance(value, SameForAllInputs) for name, value in zip(node.proto.input, node.inputs, strict=True) if name):
        return [SameForAllInputs(_static(shape)) for shape in shapes]
    operator = OPERATORS.get(node.proto.op_type)
    if operator is None:
        raise NotProven
    return operator(node)


def _static(shape: tuple[int | None, ...] | None) -> tuple[int, ...]:
    if shape is None or any(size is None for size in shape):
        raise NotProven
    return tuple(size for size in shape if size is not None)


def _constant(node: ProvenNode) -> list[Value]:
    (attribute,) = node.proto.attribute
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, onnx.TensorProto):
        value = onnx.numpy_helper.to_array(value)
    elif not isinstance(value, (int, float)) and not (isinstance(value, list) and all(isinstance(each, (int, float)) for each in value)):
        raise NotProven
    return [SameForAllInputs(np.shape(value), np.asarray(value))]
