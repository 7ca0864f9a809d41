"""Defines networks of layers, each an affine map followed by an activation, and builds the layers while a probe's graph is read.

Linear probes, multilayer perceptrons and features of sparse autoencoders all have this form, so that many of them can be computed at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probescore_server.probes.stacking.expressions import Apply, Constant, Expression, Input, parents_of_input, replaced, takes_whole_rows

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Layer:
    """Value object with one layer of a network, which computes ``activation(weight · x + bias)``.

    Attributes:
        weight: ``(out, in)`` float32.
        bias: ``(out,)`` float32.
        activation: expression applied to the affine map's result; its constants are numbered.
        constants: constants of the activation, ``(out,)`` float32 each.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    activation: Expression
    constants: tuple[NDArray[np.float32], ...]


@dataclass(frozen=True, eq=False)
class Network:
    """Value object with the layers that compute the same scores as a probe's graph.

    Attributes:
        layers: at least one layer; the first reads rows of ``hidden_size``, the last gives one score per label.
        centre: mean that the graph subtracts from its rows, ``(hidden_size,)`` float32; 0 if it subtracts none.
        spread: scale by which the graph divides its rows, ``(hidden_size,)`` float32; 1 if it divides by none.
    """

    layers: tuple[Layer, ...]
    centre: NDArray[np.float32]
    spread: NDArray[np.float32]


class NotANetwork(Exception):
    """Exception raised when a probe's graph has a part that cannot certainly be read as layers of a network."""


@dataclass(frozen=True, eq=False)
class Affine:
    """Latest affine map found while a graph is read, ``weight · x + bias``.

    Attributes:
        layers: the layers before the map.
        weight: ``(out, in)``; before the first matrix product, the diagonal of a diagonal matrix, ``(hidden_size,)``.
        bias: ``(out,)``.
        centre: mean that the graph subtracts from its rows, as in ``Network``.
        spread: scale by which the graph divides its rows, as in ``Network``.
    """

    layers: tuple[Layer, ...]
    weight: Array
    bias: Array
    centre: Array
    spread: Array

    @property
    def width(self) -> int:
        """Returns the number of columns of the result of the affine map, ``weight · x + bias``."""
        return len(self.bias)


@dataclass(frozen=True, eq=False)
class RowValue:
    """Value in a graph that has one row for each token: an expression over the latest affine map.

    Attributes:
        affine: the latest affine map.
        expression: computation applied to the map's result so far.
        constants: constants of the expression, a dictionary keyed by name, ``(width,)`` each.
        axes: ``rows`` for ``(tokens, width)``, ``flat`` for ``(tokens,)``, ``turned`` for ``(width, tokens)``.
        kept: if the value holds only the largest numbers of each row, as ``TopK`` gives them, the condition that selects these numbers.
    """

    affine: Affine
    expression: Expression
    constants: Mapping[str, Array]
    axes: str = "rows"
    kept: Expression | None = None

    @classmethod
    def of_tap(cls, hidden_size: int) -> RowValue:
        """Returns the value that stands for the activations at a tap (point in the language model), ``(tokens, hidden_size)``."""
        zeros, ones = np.zeros(hidden_size), np.ones(hidden_size)
        return cls(Affine((), ones, zeros, zeros, ones), Input(), {})


def network_of(scores: RowValue) -> Network:
    """Returns the network of layers that computes a probe's scores, given as a value in the probe's graph.

    Raises:
        NotANetwork: there is no matrix among the layers, or a weight or constant is beyond the range of float32.
    """
    scores = _settled(scores)
    if scores.affine.weight.ndim == 1:
        raise NotANetwork
    return Network((*scores.affine.layers, _layer(scores)), _float32(scores.affine.centre), _float32(scores.affine.spread))


def _settled(value: RowValue) -> RowValue:
    """Folds additions and multiplications by constants, which a graph applies to a value before anything else, into the weights and
    the bias of the affine map that the value stands for, in float64.
    """
    while len(parents := parents_of_input(value.expression)) == 1:
        (parent,) = parents
        change = _scale_and_shift(parent, value.constants)
        if change is None:
            break
        scale, shift = change
        affine = value.affine
        if not (scale == 1).all():
            weight = affine.weight.astype(np.float64)
            affine = replace(affine, weight=weight * scale if weight.ndim == 1 else weight * scale[:, None], bias=affine.bias * scale)
        affine = replace(affine, bias=affine.bias + shift)
        value = replace(value, affine=affine, expression=replaced(value.expression, parent, Input()))
    return value


def _scale_and_shift(parent: Apply, constants: Mapping[str, Array]) -> tuple[Array, Array] | None:
    """Returns the factor and the summand with which an operator changes its only non-constant input; ``None`` for other operators."""
    first, *others = parent.arguments
    if parent.operator == "Neg":
        return np.array([-1.0]), np.zeros(1)
    if len(others) != 1 or not any(isinstance(argument, Constant) for argument in parent.arguments):
        return None
    (name,) = (argument.name for argument in parent.arguments if isinstance(argument, Constant))
    number = constants[str(name)].astype(np.float64)
    one, nothing = np.ones_like(number), np.zeros_like(number)
    match parent.operator, isinstance(first, Input):
        case "Add", _:
            return one, number
        case "Sub", True:
            return one, -number
        case "Sub", False:
            return -one, number
        case "Mul", _:
            return number, nothing
        case "Div", True if (number != 0).all():
            return 1 / number, nothing
    return None


def _layer(value: RowValue) -> Layer:
    names: dict[str, int] = {}
    activation = _numbered(value.expression, names)
    constants = tuple(_float32(np.broadcast_to(value.constants[name], value.affine.bias.shape)) for name in names)
    return Layer(_float32(value.affine.weight), _float32(value.affine.bias), activation, constants)


def _numbered(expression: Expression, names: dict[str, int]) -> Expression:
    """Replaces the names of constants by numbers, so that graphs which differ only in names have the same expressions."""
    if isinstance(expression, Constant):
        return Constant(names.setdefault(str(expression.name), len(names)))
    if isinstance(expression, Apply):
        return replace(expression, arguments=tuple(_numbered(argument, names) for argument in expression.arguments))
    return expression


def mapped(value: RowValue, weight: Array, bias: Array, axes: str = "rows") -> RowValue:
    """Applies ``weight · value + bias`` to a value while a graph is read as layers.

    Two affine maps with no activation between them become one layer; after an activation, a new layer begins.

    Args:
        value: the value to map, with axes ``rows``.
        weight: ``(out, in)``.
        bias: ``(out,)``.
        axes: axes of the result.

    Raises:
        NotANetwork: the sizes differ, or an activation comes before the first matrix.
    """
    value = _settled(value)
    affine = value.affine
    if weight.ndim != 2 or weight.shape[1] != affine.width:
        raise NotANetwork
    if not isinstance(value.expression, Input):
        if affine.weight.ndim == 1:
            raise NotANetwork  # an activation before the first matrix
        return RowValue(replace(affine, layers=(*affine.layers, _layer(value)), weight=weight, bias=bias), Input(), {}, axes)
    bias = bias + weight @ affine.bias if affine.bias.any() else bias
    if affine.weight.ndim == 2:
        return RowValue(replace(affine, weight=weight.astype(np.float64) @ affine.weight, bias=bias), Input(), {}, axes)
    if not affine.weight.all():
        raise NotANetwork
    centre, spread = -affine.bias / affine.weight, 1 / affine.weight
    if not (affine.weight == 1).all():
        weight = weight.astype(np.float64) * affine.weight
    return RowValue(replace(affine, weight=weight, bias=bias, centre=centre, spread=spread), Input(), {}, axes)


def selected(value: RowValue, columns: Array, axes: str = "rows") -> RowValue:
    """Returns the value that a ``Gather`` or ``Slice`` of an ONNX graph selects: some columns of another value, in the order given.

    Args:
        value: a value with one row per token, whose columns are selected.
        columns: indices of the columns, ``(C,)``; negative ones count from the last.
        axes: ``rows`` for a result of shape ``(tokens, C)``, ``flat`` for ``(tokens,)``, ``turned`` for ``(C, tokens)``.

    Raises:
        NotANetwork: there is no such column.
    """
    value = _settled(value)
    width = value.affine.width
    if columns.ndim != 1 or columns.size == 0 or columns.min() < -width or columns.max() >= width:
        raise NotANetwork
    if value.affine.weight.ndim == 1 or takes_whole_rows(value.expression):
        weight = np.zeros((columns.size, width), np.float32)
        weight[np.arange(columns.size), columns] = 1
        return mapped(value, weight, np.zeros(columns.size), axes)
    affine = replace(value.affine, weight=value.affine.weight[columns], bias=value.affine.bias[columns])
    constants = {name: np.broadcast_to(number, (width,))[columns] for name, number in value.constants.items()}
    return RowValue(affine, value.expression, constants, axes)


def _float32(array: Array) -> NDArray[np.float32]:
    converted = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(converted).all():
        raise NotANetwork
    return converted
