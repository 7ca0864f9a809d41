"""Defines the activation functions of networks as expressions over the result of an affine map.

An expression is computed number by number or row by row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Union

OPERATORS: dict[str, dict[str, float]] = {
    "Add": {}, "Sub": {}, "Mul": {}, "Div": {}, "Pow": {}, "Neg": {}, "Exp": {}, "Erf": {},
    "Relu": {}, "Sigmoid": {}, "Tanh": {}, "Softplus": {}, "LeakyRelu": {"alpha": 0.01}, "Elu": {"alpha": 1.0},
    "Greater": {}, "GreaterOrEqual": {}, "Less": {}, "LessOrEqual": {}, "Where": {},
}  # fmt: skip
"""Holds the ONNX operators that act number by number, with the defaults of their attributes.

In an expression, the attributes become further arguments, in the order given here.
"""

COMPARISONS = frozenset({"Greater", "GreaterOrEqual", "Less", "LessOrEqual"})
"""Lists those ONNX operators that act number by number (``OPERATORS``) whose result is true or false."""


@dataclass(frozen=True, slots=True)
class Input:
    """Expression that stands for the result of a layer's affine map, ``(…, width)``, the input of the layer's activation function."""


@dataclass(frozen=True, slots=True)
class Constant:
    """Expression that stands for a constant of an activation function, one number for each column, ``(width,)``.

    ``name`` is the constant's number, or the constant's name while a graph is read.
    """

    name: int | str


@dataclass(frozen=True, slots=True)
class Apply:
    """Expression that applies an operator to arguments, as part of an activation function.

    The operator is one of ``OPERATORS``, ``Cast`` or ``TopK``. ``Cast`` converts true and false to 1 and 0. ``TopK`` is true where a number
    is among the ``k`` largest of its row; of equal numbers the first ones count.
    """

    operator: str
    arguments: tuple[Expression, ...]
    k: int = 0


Expression = Union[Input, Constant, Apply]


def parents_of_input(expression: Expression) -> set[Apply]:
    """Returns the different operators that read the input directly; equal operators with the same constants count as one."""
    if not isinstance(expression, Apply):
        return set()
    parents = {expression} if Input() in expression.arguments else set()
    return parents.union(*map(parents_of_input, expression.arguments))


def replaced(expression: Expression, old: Expression, new: Expression) -> Expression:
    """Returns an expression of an activation function in which every occurrence of ``old`` is replaced by ``new``."""
    if expression == old:
        return new
    if isinstance(expression, Apply):
        return replace(expression, arguments=tuple(replaced(argument, old, new) for argument in expression.arguments))
    return expression


def takes_whole_rows(expression: Expression) -> bool:
    """Returns whether an expression of an activation function computes a number of a row from other numbers of the row, as softmax does."""
    return isinstance(expression, Apply) and (expression.operator == "TopK" or any(map(takes_whole_rows, expression.arguments)))
