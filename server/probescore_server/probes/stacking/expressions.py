"""Activations as expressions: what is done to the result of an affine map, number by number or row by row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Union

OPERATORS: dict[str, dict[str, float]] = {
    "Add": {}, "Sub": {}, "Mul": {}, "Div": {}, "Pow": {}, "Neg": {}, "Exp": {}, "Erf": {},
    "Relu": {}, "Sigmoid": {}, "Tanh": {}, "Softplus": {}, "LeakyRelu": {"alpha": 0.01}, "Elu": {"alpha": 1.0},
    "Greater": {}, "GreaterOrEqual": {}, "Less": {}, "LessOrEqual": {}, "Where": {},
}  # fmt: skip
"""Operators of ONNX that take numbers one by one, and the defaults of their attributes, which become further arguments in this order."""

COMPARISONS = frozenset({"Greater", "GreaterOrEqual", "Less", "LessOrEqual"})
"""Those whose result is true or false."""


@dataclass(frozen=True, slots=True)
class Input:
    """The result of the affine map, ``(…, width)``."""


@dataclass(frozen=True, slots=True)
class Constant:
    """A constant for each column, ``(width,)``: its number, or its name while a graph is read."""

    name: int | str


@dataclass(frozen=True, slots=True)
class Apply:
    """An operator of ``OPERATORS``; ``Cast`` from true and false to 1 and 0; or ``TopK``: is it among the ``k`` largest of its row, the
    first where several are equal?
    """

    operator: str
    arguments: tuple[Expression, ...]
    k: int = 0


Expression = Union[Input, Constant, Apply]


def parents_of_input(expression: Expression) -> set[Apply]:
    """The different operators that the input goes to; those that are alike, with the same constants, are one."""
    if not isinstance(expression, Apply):
        return set()
    parents = {expression} if Input() in expression.arguments else set()
    return parents.union(*map(parents_of_input, expression.arguments))


def replaced(expression: Expression, old: Expression, new: Expression) -> Expression:
    """With ``new`` wherever ``old`` was."""
    if expression == old:
        return new
    if isinstance(expression, Apply):
        return replace(expression, arguments=tuple(replaced(argument, old, new) for argument in expression.arguments))
    return expression


def takes_whole_rows(expression: Expression) -> bool:
    """Whether a number depends on others of its row."""
    return isinstance(expression, Apply) and (expression.operator == "TopK" or any(map(takes_whole_rows, expression.arguments)))
