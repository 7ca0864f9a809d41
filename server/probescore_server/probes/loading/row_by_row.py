"""Graphs that certainly compute row by row: no score depends on another row, on how many there are, or on its place among them.

The nodes are followed one by one. Of each value is known that it is the same for every input, or along which axis it has one entry for each
row, made of that row alone. Of everything else nothing is known, and whatever is made of that is unknown too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Union

import numpy as np
import onnx
from numpy.typing import NDArray

from probescore.types import OutputPer
from probescore_server.probes.format.graph import POSITIONS, SCORES, GraphSignature
from probescore_server.probes.stacking.graph_reader import read_network


def is_row_by_row(model: onnx.ModelProto, signature: GraphSignature) -> bool:
    """Whether the operators of a graph prove it.

    Args:
        model: passed ``check_graph`` and ``check_signature``.
        signature: of the same probe.
    """
    return signature.per is OutputPer.TOKEN and (
        read_network(model, signature) is not None or _followed(model, signature) == _RowsOnAxis(0, 2)
    )


@dataclass(frozen=True)
class _RowsOnAxis:
    """A value of ``rank`` axes with an entry for each row along ``axis``."""

    axis: int
    rank: int

    @property
    def from_last(self) -> int:
        """The axis counted from the last, as broadcasting counts: -1, -2, …"""
        return self.axis - self.rank


@dataclass(frozen=True, eq=False)
class _SameForAllInputs:
    """A value that is the same for every input, and what it is if that is at hand."""

    shape: tuple[int, ...]
    array: NDArray[Any] | None = None


@dataclass(frozen=True)
class _ShapeSizes:
    """Some sizes of a shape, ``None`` for the number of rows; as a vector, or a single one as a scalar."""

    sizes: tuple[int | None, ...]
    scalar: bool = False


_Value = Union[_RowsOnAxis, _SameForAllInputs, _ShapeSizes]


class _NotProven(Exception):
    """Nothing is certain of a result."""


@dataclass(frozen=True, eq=False)
class _ProvenNode:
    proto: onnx.NodeProto
    inputs: list[_Value | None]
    shapes: list[tuple[int | None, ...]]
    opset: int

    def attribute(self, name: str, default: Any = None) -> Any:  # noqa: ANN401
        found = [onnx.helper.get_attribute_value(attribute) for attribute in self.proto.attribute if attribute.name == name]
        return found[0] if found else default

    def has(self, index: int) -> bool:
        return index < len(self.proto.input) and self.proto.input[index] != ""

    def rows(self, index: int = 0) -> _RowsOnAxis:
        value = self.inputs[index]
        if not isinstance(value, _RowsOnAxis):
            raise _NotProven
        return value

    def same(self, index: int) -> _SameForAllInputs:
        value = self.inputs[index]
        if not isinstance(value, _SameForAllInputs):
            raise _NotProven
        return value

    def numbers(self, index: int) -> list[int]:
        """The integers of a constant."""
        array = self.same(index).array
        if array is None:
            raise _NotProven
        return [int(number) for number in array.reshape(-1)]

    def axes(self, index: int = 1) -> list[int]:
        """Where an operator works, as an input or, in older versions, an attribute says."""
        axes = self.numbers(index) if self.has(index) else self.attribute("axes")
        if not axes:
            raise _NotProven
        return list(axes)


def _followed(model: onnx.ModelProto, signature: GraphSignature) -> _Value | None:
    """What is known of the scores."""
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {
        value.name: tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in value.type.tensor_type.shape.dim)
        for value in (*inferred.input, *inferred.value_info, *inferred.output)
        if value.type.tensor_type.HasField("shape")
    }
    values: dict[str, _Value | None] = {str(tap): _RowsOnAxis(0, 2) for tap in signature.taps}
    if signature.positions:
        values[POSITIONS] = _RowsOnAxis(0, 1)
    for tensor in model.graph.initializer:
        values[tensor.name] = _SameForAllInputs(tuple(tensor.dims), onnx.numpy_helper.to_array(tensor))
    for proto in model.graph.node:
        node = _ProvenNode(proto, [values.get(name) for name in proto.input], [shapes.get(name, ()) for name in proto.input], opset)
        try:
            results = _results(node, [shapes.get(name) for name in proto.output])
        except (_NotProven, LookupError, TypeError, ValueError):  # or something of an unusual form, of which nothing is certain either
            continue
        for name, value in zip(proto.output, results, strict=False):
            # where shape inference knows better than what is said below, nothing is certain
            if not isinstance(value, _RowsOnAxis) or name not in shapes or len(shapes[name]) == value.rank:
                values[name] = value
    return values.get(SCORES)


def _results(node: _ProvenNode, shapes: list[tuple[int | None, ...] | None]) -> list[_Value]:
    if any(attribute.HasField("g") or attribute.graphs for attribute in node.proto.attribute):
        raise _NotProven
    if node.proto.op_type == "Constant":
        return _constant(node)
    if all(isinstance(value, _SameForAllInputs) for name, value in zip(node.proto.input, node.inputs, strict=True) if name):
        return [_SameForAllInputs(_static(shape)) for shape in shapes]
    operator = _OPERATORS.get(node.proto.op_type)
    if operator is None:
        raise _NotProven
    return operator(node)


def _static(shape: tuple[int | None, ...] | None) -> tuple[int, ...]:
    if shape is None or any(size is None for size in shape):
        raise _NotProven
    return tuple(size for size in shape if size is not None)


def _constant(node: _ProvenNode) -> list[_Value]:
    (attribute,) = node.proto.attribute
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, onnx.TensorProto):
        value = onnx.numpy_helper.to_array(value)
    elif not isinstance(value, (int, float)) and not (isinstance(value, list) and all(isinstance(each, (int, float)) for each in value)):
        raise _NotProven
    return [_SameForAllInputs(np.shape(value), np.asarray(value))]


# ----------------------------------------------------------------------------------------------------------------------- the operators


def _elementwise(node: _ProvenNode) -> list[_Value]:
    """Numbers at the same place, as broadcasting brings them there."""
    given = [value for name, value in zip(node.proto.input, node.inputs, strict=True) if name]
    rows = [value for value in given if isinstance(value, _RowsOnAxis)]
    if not rows:
        raise _NotProven
    rank = rows[0].rank
    for value in given:
        if isinstance(value, _RowsOnAxis) and value.from_last == rows[0].from_last:
            rank = max(rank, value.rank)
        elif isinstance(value, _SameForAllInputs) and (len(value.shape) < -rows[0].from_last or value.shape[rows[0].from_last] == 1):
            rank = max(rank, len(value.shape))
        else:
            raise _NotProven
    return [_RowsOnAxis(rank + rows[0].from_last, rank)]


def _apart(axes: list[int], rows: _RowsOnAxis) -> set[int]:
    """Axes counted from the first; that of the rows must not be among them."""
    counted = {axis % rows.rank for axis in axes}
    if rows.axis in counted:
        raise _NotProven
    return counted


def _without(axes: set[int], rows: _RowsOnAxis, keepdims: int) -> _RowsOnAxis:
    return rows if keepdims else _RowsOnAxis(rows.axis - sum(axis < rows.axis for axis in axes), rows.rank - len(axes))


def _reduce(node: _ProvenNode) -> list[_Value]:
    rows = node.rows()
    return [_without(_apart(node.axes(), rows), rows, node.attribute("keepdims", 1))]


def _arg(node: _ProvenNode) -> list[_Value]:
    rows = node.rows()
    return [_without(_apart([node.attribute("axis", 0)], rows), rows, node.attribute("keepdims", 1))]


def _softmax(node: _ProvenNode) -> list[_Value]:
    rows = node.rows()
    axis = node.attribute("axis", -1 if node.opset >= 13 else 1) % rows.rank
    if rows.axis == axis or (node.opset < 13 and rows.axis > axis):  # all from the axis on are one
        raise _NotProven
    return [rows]


def _layer_normalization(node: _ProvenNode) -> list[_Value]:
    rows = node.rows()
    axis = node.attribute("axis", -1) % rows.rank
    others = [node.same(index) for index in range(1, len(node.inputs)) if node.has(index)]
    if rows.axis >= axis or any(len(value.shape) > rows.rank - axis for value in others):
        raise _NotProven
    return [rows]


def _cum_sum(node: _ProvenNode) -> list[_Value]:
    rows = node.rows()
    _apart(node.numbers(1), rows)
    return [rows]


def _matmul(node: _ProvenNode) -> list[_Value]:
    left, right = node.inputs
    if isinstance(left, _RowsOnAxis) and isinstance(right, _SameForAllInputs) and left.from_last < -1 and len(right.shape) in (1, 2):
        return [left if len(right.shape) == 2 else _RowsOnAxis(left.axis, left.rank - 1)]
    if (
        isinstance(left, _SameForAllInputs)
        and isinstance(right, _RowsOnAxis)
        and len(left.shape) == 2
        and right.rank > 1
        and right.from_last != -2
    ):
        return [right]
    if isinstance(left, _RowsOnAxis) and left == right and left.from_last < -2:
        return [left]
    raise _NotProven


def _gemm(node: _ProvenNode) -> list[_Value]:
    if node.rows() != _RowsOnAxis(0, 2) or node.attribute("transA", 0):
        raise _NotProven
    node.same(1)
    if node.has(2) and node.inputs[2] != _RowsOnAxis(0, 2):
        shape = node.same(2).shape
        if len(shape) == 2 and shape[0] != 1:
            raise _NotProven
    return [_RowsOnAxis(0, 2)]


def _gather(node: _ProvenNode) -> list[_Value]:
    data, places = node.inputs[:2]
    axis = node.attribute("axis", 0)
    if isinstance(data, _ShapeSizes) and isinstance(places, _SameForAllInputs):
        chosen = tuple(data.sizes[place] for place in node.numbers(1))
        return [_ShapeSizes(chosen, scalar=places.shape == ())]
    if isinstance(data, _SameForAllInputs) and isinstance(places, _RowsOnAxis):
        return [_RowsOnAxis(axis % len(data.shape) + places.axis, len(data.shape) + places.rank - 1)]
    rows, more = node.rows(), len(node.same(1).shape) - 1
    (axis,) = _apart([axis], rows)
    return [_RowsOnAxis(rows.axis + (more if axis < rows.axis else 0), rows.rank + more)]


def _elements(node: _ProvenNode) -> list[_Value]:
    """Of ``GatherElements`` and ``ScatterElements``: places in the same row."""
    rows = node.rows()
    _apart([node.attribute("axis", 0)], rows)
    if any(value != rows for value in node.inputs):
        raise _NotProven
    return [rows]


def _slice(node: _ProvenNode) -> list[_Value]:
    given = node.inputs[0]
    if isinstance(given, _ShapeSizes) and node.opset >= 10:
        starts, ends, steps = (node.numbers(index) if node.has(index) else [1] for index in (1, 2, 4))
        return [_ShapeSizes(given.sizes[starts[0] : ends[0] : steps[0]])]
    rows = node.rows()
    _apart(node.axes(3), rows)
    if not all(isinstance(value, _SameForAllInputs) for name, value in zip(node.proto.input[1:], node.inputs[1:], strict=True) if name):
        raise _NotProven
    return [rows]


def _split(node: _ProvenNode) -> list[_Value]:
    rows = node.rows()
    _apart([node.attribute("axis", 0)], rows)
    return [rows for _ in node.proto.output]


def _concat(node: _ProvenNode) -> list[_Value]:
    if any(isinstance(value, _ShapeSizes) for value in node.inputs):
        parts = [value.sizes if isinstance(value, _ShapeSizes) else tuple(node.numbers(index)) for index, value in enumerate(node.inputs)]
        return [_ShapeSizes(tuple(size for part in parts for size in part))]
    rows = node.rows()
    _apart([node.attribute("axis")], rows)
    if any(value != rows for value in node.inputs):
        raise _NotProven
    return [rows]


def _transpose(node: _ProvenNode) -> list[_Value]:
    rows = node.rows()
    order = list(node.attribute("perm", range(rows.rank)[::-1]))
    return [_RowsOnAxis(order.index(rows.axis), rows.rank)]


def _unsqueeze(node: _ProvenNode) -> list[_Value]:
    if isinstance(node.inputs[0], _ShapeSizes) and node.inputs[0].scalar:
        return [_ShapeSizes(node.inputs[0].sizes)]
    rows, axes = node.rows(), node.axes()
    rank = rows.rank + len(axes)
    added = {axis % rank for axis in axes}
    return [_RowsOnAxis([axis for axis in range(rank) if axis not in added][rows.axis], rank)]


def _squeeze(node: _ProvenNode) -> list[_Value]:
    if isinstance(node.inputs[0], _ShapeSizes) and len(node.inputs[0].sizes) == 1:
        return [_ShapeSizes(node.inputs[0].sizes, scalar=True)]
    rows = node.rows()
    return [_without(_apart(node.axes(), rows), rows, keepdims=0)]


def _shape(node: _ProvenNode) -> list[_Value]:
    rows, shape = node.rows(), node.shapes[0]
    if len(shape) != rows.rank or any(size is None for axis, size in enumerate(shape) if axis != rows.axis):
        raise _NotProven
    sizes = tuple(None if axis == rows.axis else size for axis, size in enumerate(shape))
    return [_ShapeSizes(sizes[node.attribute("start", 0) : node.attribute("end", rows.rank)])]


def _rows_of(sizes: tuple[int | None, ...]) -> _RowsOnAxis:
    if sum(size is None for size in sizes) != 1:
        raise _NotProven
    return _RowsOnAxis(sizes.index(None), len(sizes))


def _constant_of_shape(node: _ProvenNode) -> list[_Value]:
    shape = node.inputs[0]
    if not isinstance(shape, _ShapeSizes) or shape.scalar:
        raise _NotProven
    return [_rows_of(shape.sizes)]


def _expand(node: _ProvenNode) -> list[_Value]:
    given, shape = node.inputs
    if isinstance(shape, _ShapeSizes) and not shape.scalar:
        filled = _rows_of(shape.sizes)
        if isinstance(given, _RowsOnAxis) and given.from_last == filled.from_last:
            rank = max(given.rank, filled.rank)
        elif isinstance(given, _SameForAllInputs) and (len(given.shape) < -filled.from_last or given.shape[filled.from_last] == 1):
            rank = max(len(given.shape), filled.rank)
        else:
            raise _NotProven
        return [_RowsOnAxis(rank + filled.from_last, rank)]
    rows, sizes = node.rows(), node.numbers(1)
    if len(sizes) >= -rows.from_last and sizes[rows.from_last] != 1:
        raise _NotProven
    rank = max(rows.rank, len(sizes))
    return [_RowsOnAxis(rank + rows.from_last, rank)]


def _reshape(node: _ProvenNode) -> list[_Value]:
    """With the rows first, before and after."""
    given, shape = node.inputs
    if isinstance(given, _ShapeSizes) and isinstance(shape, _SameForAllInputs) and len(given.sizes) == 1 and node.numbers(1) in ([-1], [1]):
        return [_ShapeSizes(given.sizes)]
    if node.rows().axis != 0 or node.attribute("allowzero", 0):
        raise _NotProven
    sizes: list[int | None] = [*shape.sizes] if isinstance(shape, _ShapeSizes) and not shape.scalar else [*node.numbers(1)]
    others = [size for size in node.shapes[0][1:] if size is not None]
    known = len(others) == len(node.shapes[0]) - 1 == node.rows().rank - 1
    rest = [size for size in sizes[1:] if size is not None]
    if len(rest) != len(sizes) - 1:
        raise _NotProven
    if sizes[0] not in (None, 0) and not (
        sizes[0] == -1 and known and all(size > 0 for size in rest) and math.prod(rest) == math.prod(others)
    ):
        raise _NotProven
    return [_RowsOnAxis(0, len(sizes))]


def _flatten(node: _ProvenNode) -> list[_Value]:
    if node.rows().axis != 0 or node.attribute("axis", 1) != 1:
        raise _NotProven
    return [_RowsOnAxis(0, 2)]


def _top_k(node: _ProvenNode) -> list[_Value]:
    rows = node.rows()
    node.same(1)
    _apart([node.attribute("axis", -1)], rows)
    return [rows, rows]


def _einsum(node: _ProvenNode) -> list[_Value]:
    """Where one letter is that of the rows, in every value that has any and in the result."""
    terms, arrow, result = node.attribute("equation").decode().replace(" ", "").partition("->")
    letters, named = set(), terms.split(",")
    if not arrow or "." in terms or len(named) != len(node.inputs):
        raise _NotProven
    for term, value in zip(named, node.inputs, strict=True):
        if isinstance(value, _RowsOnAxis) and len(term) == value.rank and term.count(term[value.axis]) == 1:
            letters.add(term[value.axis])
        elif not isinstance(value, _SameForAllInputs):
            raise _NotProven
    if len(letters) != 1 or result.count(*letters) != 1:
        raise _NotProven
    (letter,) = letters
    if any(letter in term for term, value in zip(named, node.inputs, strict=True) if isinstance(value, _SameForAllInputs)):
        raise _NotProven
    return [_RowsOnAxis(result.index(letter), len(result))]


def _first(node: _ProvenNode) -> list[_Value]:
    """The first result has the form of the first input; the others are constants."""
    for index in range(1, len(node.inputs)):
        if node.has(index):
            node.same(index)
    return [node.rows()]


def _batch_normalization(node: _ProvenNode) -> list[_Value]:
    if node.rows().axis != 0 or node.rows().rank < 2:
        raise _NotProven
    return _first(node)


def _table(*ranks: int) -> Callable[[_ProvenNode], list[_Value]]:
    """Operators over tables, a row of features each; of the ranks that their results have."""

    def results(node: _ProvenNode) -> list[_Value]:
        if node.rows() != _RowsOnAxis(0, 2):
            raise _NotProven
        for index in range(1, len(node.inputs)):
            node.same(index)
        return [_RowsOnAxis(0, rank) for rank in ranks]

    return results


_ELEMENTWISE = """
    Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Ceil Celu Clip Cos Cosh Div Elu
    Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish
    Mod Mul Neg Not Or PRelu Pow Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Sub Sum Tan Tanh
    ThresholdedRelu Where Xor
"""
_REDUCTIONS = """
    ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare
"""
_OPERATORS: dict[str, Callable[[_ProvenNode], list[_Value]]] = {
    **dict.fromkeys(_ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(_REDUCTIONS.split(), _reduce),
    **dict.fromkeys(("ArgMax", "ArgMin"), _arg),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), _softmax),
    **dict.fromkeys(("GatherElements", "ScatterElements"), _elements),
    **dict.fromkeys(("Cast", "CastLike", "Dropout", "Identity"), _first),
    **dict.fromkeys(("LinearClassifier", "SVMClassifier", "TreeEnsembleClassifier"), _table(1, 2)),
    **dict.fromkeys(("ArrayFeatureExtractor", "LinearRegressor", "SVMRegressor", "TreeEnsemble", "TreeEnsembleRegressor"), _table(2)),
    **dict.fromkeys(("Binarizer", "Imputer", "Normalizer", "Scaler"), _table(2)),
    "BatchNormalization": _batch_normalization,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "CumSum": _cum_sum,
    "Einsum": _einsum,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Gemm": _gemm,
    "LayerNormalization": _layer_normalization,
    "MatMul": _matmul,
    "Reshape": _reshape,
    "Shape": _shape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "TopK": _top_k,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
