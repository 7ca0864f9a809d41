"""Defines, for each ONNX operator, the rule that proves that the operator computes row by row.

``OPERATORS`` maps an operator's name to its rule: a function from the known states of the inputs to those of the results.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from probescore_server.probes.loading.row_values import NotProven, ProvenNode, RowsOnAxis, SameForAllInputs, ShapeSizes, Value


def _elementwise(node: ProvenNode) -> list[Value]:
    """Proves that an operator on numbers at the same place, after broadcasting, computes row by row; all rows must lie on the same axis."""
    given = [value for name, value in zip(node.proto.input, node.inputs, strict=True) if name]
    rows = [value for value in given if isinstance(value, RowsOnAxis)]
    if not rows:
        raise NotProven
    rank = rows[0].rank
    for value in given:
        if isinstance(value, RowsOnAxis) and value.from_last == rows[0].from_last:
            rank = max(rank, value.rank)
        elif isinstance(value, SameForAllInputs) and (len(value.shape) < -rows[0].from_last or value.shape[rows[0].from_last] == 1):
            rank = max(rank, len(value.shape))
        else:
            raise NotProven
    return [RowsOnAxis(rank + rows[0].from_last, rank)]


def _apart(axes: list[int], rows: RowsOnAxis) -> set[int]:
    """Returns an operator's axes counted from the first; raises ``NotProven`` if the axis along which the rows of tokens lie is among them,
    since rows would then be mixed.
    """
    counted = {axis % rows.rank for axis in axes}
    if rows.axis in counted:
        raise NotProven
    return counted


def _without(axes: set[int], rows: RowsOnAxis, keepdims: int) -> RowsOnAxis:
    return rows if keepdims else RowsOnAxis(rows.axis - sum(axis < rows.axis for axis in axes), rows.rank - len(axes))


def _reduce(node: ProvenNode) -> list[Value]:
    rows = node.rows()
    return [_without(_apart(node.axes(), rows), rows, node.attribute("keepdims", 1))]


def _arg(node: ProvenNode) -> list[Value]:
    rows = node.rows()
    return [_without(_apart([node.attribute("axis", 0)], rows), rows, node.attribute("keepdims", 1))]


def _softmax(node: ProvenNode) -> list[Value]:
    rows = node.rows()
    axis = node.attribute("axis", -1 if node.opset >= 13 else 1) % rows.rank
    if rows.axis == axis or (node.opset < 13 and rows.axis > axis):  # before opset 13, all axes from this one on are normalised together
        raise NotProven
    return [rows]


def _layer_normalization(node: ProvenNode) -> list[Value]:
    rows = node.rows()
    axis = node.attribute("axis", -1) % rows.rank
    others = [node.same(index) for index in range(1, len(node.inputs)) if node.has(index)]
    if rows.axis >= axis or any(len(value.shape) > rows.rank - axis for value in others):
        raise NotProven
    return [rows]


def _cum_sum(node: ProvenNode) -> list[Value]:
    rows = node.rows()
    _apart(node.numbers(1), rows)
    return [rows]


def _matmul(node: ProvenNode) -> list[Value]:
    left, right = node.inputs
    if isinstance(left, RowsOnAxis) and isinstance(right, SameForAllInputs) and left.from_last < -1 and len(right.shape) in (1, 2):
        return [left if len(right.shape) == 2 else RowsOnAxis(left.axis, left.rank - 1)]
    if (
        isinstance(left, SameForAllInputs)
        and isinstance(right, RowsOnAxis)
        and len(left.shape) == 2
        and right.rank > 1
        and right.from_last != -2
    ):
        return [right]
    if isinstance(left, RowsOnAxis) and left == right and left.from_last < -2:
        return [left]
    raise NotProven


def _gemm(node: ProvenNode) -> list[Value]:
    if node.rows() != RowsOnAxis(0, 2) or node.attribute("transA", 0):
        raise NotProven
    node.same(1)
    if node.has(2) and node.inputs[2] != RowsOnAxis(0, 2):
        shape = node.same(2).shape
        if len(shape) == 2 and shape[0] != 1:
            raise NotProven
    return [RowsOnAxis(0, 2)]


def _gather(node: ProvenNode) -> list[Value]:
    data, places = node.inputs[:2]
    axis = node.attribute("axis", 0)
    if isinstance(data, ShapeSizes) and isinstance(places, SameForAllInputs):
        chosen = tuple(data.sizes[place] for place in node.numbers(1))
        return [ShapeSizes(chosen, scalar=places.shape == ())]
    if isinstance(data, SameForAllInputs) and isinstance(places, RowsOnAxis):
        return [RowsOnAxis(axis % len(data.shape) + places.axis, len(data.shape) + places.rank - 1)]
    rows, more = node.rows(), len(node.same(1).shape) - 1
    (axis,) = _apart([axis], rows)
    return [RowsOnAxis(rows.axis + (more if axis < rows.axis else 0), rows.rank + more)]


def _elements(node: ProvenNode) -> list[Value]:
    """Proves that ``GatherElements`` or ``ScatterElements`` computes row by row, since it reads or writes places in the same row."""
    rows = node.rows()
    _apart([node.attribute("axis", 0)], rows)
    if any(value != rows for value in node.inputs):
        raise NotProven
    return [rows]


def _slice(node: ProvenNode) -> list[Value]:
    given = node.inputs[0]
    if isinstance(given, ShapeSizes) and node.opset >= 10:
        starts, ends, steps = (node.numbers(index) if node.has(index) else [1] for index in (1, 2, 4))
        return [ShapeSizes(given.sizes[starts[0] : ends[0] : steps[0]])]
    rows = node.rows()
    _apart(node.axes(3), rows)
    if not all(isinstance(value, SameForAllInputs) for name, value in zip(node.proto.input[1:], node.inputs[1:], strict=True) if name):
        raise NotProven
    return [rows]


def _split(node: ProvenNode) -> list[Value]:
    rows = node.rows()
    _apart([node.attribute("axis", 0)], rows)
    return [rows for _ in node.proto.output]


def _concat(node: ProvenNode) -> list[Value]:
    if any(isinstance(value, ShapeSizes) for value in node.inputs):
        parts = [value.sizes if isinstance(value, ShapeSizes) else tuple(node.numbers(index)) for index, value in enumerate(node.inputs)]
        return [ShapeSizes(tuple(size for part in parts for size in part))]
    rows = node.rows()
    _apart([node.attribute("axis")], rows)
    if any(value != rows for value in node.inputs):
        raise NotProven
    return [rows]


def _transpose(node: ProvenNode) -> list[Value]:
    rows = node.rows()
    order = list(node.attribute("perm", range(rows.rank)[::-1]))
    return [RowsOnAxis(order.index(rows.axis), rows.rank)]


def _unsqueeze(node: ProvenNode) -> list[Value]:
    if isinstance(node.inputs[0], ShapeSizes) and node.inputs[0].scalar:
        return [ShapeSizes(node.inputs[0].sizes)]
    rows, axes = node.rows(), node.axes()
    rank = rows.rank + len(axes)
    added = {axis % rank for axis in axes}
    return [RowsOnAxis([axis for axis in range(rank) if axis not in added][rows.axis], rank)]


def _squeeze(node: ProvenNode) -> list[Value]:
    if isinstance(node.inputs[0], ShapeSizes) and len(node.inputs[0].sizes) == 1:
        return [ShapeSizes(node.inputs[0].sizes, scalar=True)]
    rows = node.rows()
    return [_without(_apart(node.axes(), rows), rows, keepdims=0)]


def _shape(node: ProvenNode) -> list[Value]:
    rows, shape = node.rows(), node.shapes[0]
    if len(shape) != rows.rank or any(size is None for axis, size in enumerate(shape) if axis != rows.axis):
        raise NotProven
    sizes = tuple(None if axis == rows.axis else size for axis, size in enumerate(shape))
    return [ShapeSizes(sizes[node.attribute("start", 0) : node.attribute("end", rows.rank)])]


def _rows_of(sizes: tuple[int | None, ...]) -> RowsOnAxis:
    if sum(size is None for size in sizes) != 1:
        raise NotProven
    return RowsOnAxis(sizes.index(None), len(sizes))


def _constant_of_shape(node: ProvenNode) -> list[Value]:
    shape = node.inputs[0]
    if not isinstance(shape, ShapeSizes) or shape.scalar:
        raise NotProven
    return [_rows_of(shape.sizes)]


def _expand(node: ProvenNode) -> list[Value]:
    given, shape = node.inputs
    if isinstance(shape, ShapeSizes) and not shape.scalar:
        filled = _rows_of(shape.sizes)
        if isinstance(given, RowsOnAxis) and given.from_last == filled.from_last:
            rank = max(given.rank, filled.rank)
        elif isinstance(given, SameForAllInputs) and (len(given.shape) < -filled.from_last or given.shape[filled.from_last] == 1):
            rank = max(len(given.shape), filled.rank)
        else:
            raise NotProven
        return [RowsOnAxis(rank + filled.from_last, rank)]
    rows, sizes = node.rows(), node.numbers(1)
    if len(sizes) >= -rows.from_last and sizes[rows.from_last] != 1:
        raise NotProven
    rank = max(rows.rank, len(sizes))
    return [RowsOnAxis(rank + rows.from_last, rank)]


def _reshape(node: ProvenNode) -> list[Value]:
    """Proves that an ONNX ``Reshape`` keeps the rows of different tokens apart, where they lie on the first axis before and after."""
    given, shape = node.inputs
    if isinstance(given, ShapeSizes) and isinstance(shape, SameForAllInputs) and len(given.sizes) == 1 and node.numbers(1) in ([-1], [1]):
        return [ShapeSizes(given.sizes)]
    if node.rows().axis != 0 or node.attribute("allowzero", 0):
        raise NotProven
    sizes: list[int | None] = [*shape.sizes] if isinstance(shape, ShapeSizes) and not shape.scalar else [*node.numbers(1)]
    others = [size for size in node.shapes[0][1:] if size is not None]
    known = len(others) == len(node.shapes[0]) - 1 == node.rows().rank - 1
    rest = [size for size in sizes[1:] if size is not None]
    if len(rest) != len(sizes) - 1:
        raise NotProven
    if sizes[0] not in (None, 0) and not (
        sizes[0] == -1 and known and all(size > 0 for size in rest) and math.prod(rest) == math.prod(others)
    ):
        raise NotProven
    return [RowsOnAxis(0, len(sizes))]


def _flatten(node: ProvenNode) -> list[Value]:
    if node.rows().axis != 0 or node.attribute("axis", 1) != 1:
        raise NotProven
    return [RowsOnAxis(0, 2)]


def _top_k(node: ProvenNode) -> list[Value]:
    rows = node.rows()
    node.same(1)
    _apart([node.attribute("axis", -1)], rows)
    return [rows, rows]


def _einsum(node: ProvenNode) -> list[Value]:
    """Proves that ``Einsum`` computes row by row if one letter is the axis of the rows in the result and in every input that has rows."""
    terms, arrow, result = node.attribute("equation").decode().replace(" ", "").partition("->")
    letters, named = set(), terms.split(",")
    if not arrow or "." in terms or len(named) != len(node.inputs):
        raise NotProven
    for term, value in zip(named, node.inputs, strict=True):
        if isinstance(value, RowsOnAxis) and len(term) == value.rank and term.count(term[value.axis]) == 1:
            letters.add(term[value.axis])
        elif not isinstance(value, SameForAllInputs):
            raise NotProven
    if len(letters) != 1 or result.count(*letters) != 1:
        raise NotProven
    (letter,) = letters
    if any(letter in term for term, value in zip(named, node.inputs, strict=True) if isinstance(value, SameForAllInputs)):
        raise NotProven
    return [RowsOnAxis(result.index(letter), len(result))]


def _first(node: ProvenNode) -> list[Value]:
    """Proves that an operator computes row by row if its first result has the form of its first input and other inputs are constants."""
    for index in range(1, len(node.inputs)):
        if node.has(index):
            node.same(index)
    return [node.rows()]


def _batch_normalization(node: ProvenNode) -> list[Value]:
    if node.rows().axis != 0 or node.rows().rank < 2:
        raise NotProven
    return _first(node)


def _table(*ranks: int) -> Callable[[ProvenNode], list[Value]]:
    """Returns the rule for operators that compute each row of a table by itself; ``ranks`` are the numbers of axes of the results."""

    def results(node: ProvenNode) -> list[Value]:
        if node.rows() != RowsOnAxis(0, 2):
            raise NotProven
        for index in range(1, len(node.inputs)):
            node.same(index)
        return [RowsOnAxis(0, rank) for rank in ranks]

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
OPERATORS: dict[str, Callable[[ProvenNode], list[Value]]] = {
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
