"""What is known of a value inside a graph while it is followed to prove that the graph computes row by row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Union

import onnx
from numpy.typing import NDArray


@dataclass(frozen=True)
class RowsOnAxis:
    """A value of ``rank`` axes with an entry for each row along ``axis``."""

    axis: int
    rank: int

    @property
    def from_last(self) -> int:
        """The axis counted from the last, as broadcasting counts: -1, -2, …"""
        return self.axis - self.rank


@dataclass(frozen=True, eq=False)
class SameForAllInputs:
    """A value that is the same for every input, and what it is if that is at hand."""

    shape: tuple[int, ...]
    array: NDArray[Any] | None = None


@dataclass(frozen=True)
class ShapeSizes:
    """Some sizes of a shape, ``None`` for the number of rows; as a vector, or a single one as a scalar."""

    sizes: tuple[int | None, ...]
    scalar: bool = False


Value = Union[RowsOnAxis, SameForAllInputs, ShapeSizes]


class NotProven(Exception):
    """Nothing is certain of a result."""


@dataclass(frozen=True, eq=False)
class ProvenNode:
    """A node, and what is known of its inputs, of which ``None`` is nothing.

    Attributes:
        shapes: of the inputs, by shape inference; ``None`` for a size that it does not know.
        opset: version of the operators.
    """

    proto: onnx.NodeProto
    inputs: list[Value | None]
    shapes: list[tuple[int | None, ...]]
    opset: int

    def attribute(self, name: str, default: Any = None) -> Any:  # noqa: ANN401
        """An attribute of the node."""
        found = [onnx.helper.get_attribute_value(attribute) for attribute in self.proto.attribute if attribute.name == name]
        return found[0] if found else default

    def has(self, index: int) -> bool:
        """Whether an optional input is there."""
        return index < len(self.proto.input) and self.proto.input[index] != ""

    def rows(self, index: int = 0) -> RowsOnAxis:
        """An input that has an entry for each row; raises ``NotProven`` for any other."""
        value = self.inputs[index]
        if not isinstance(value, RowsOnAxis):
            raise NotProven
        return value

    def same(self, index: int) -> SameForAllInputs:
        """An input that is the same for every input of the graph; raises ``NotProven`` for any other."""
        value = self.inputs[index]
        if not isinstance(value, SameForAllInputs):
            raise NotProven
        return value

    def numbers(self, index: int) -> list[int]:
        """The integers of a constant."""
        array = self.same(index).array
        if array is None:
            raise NotProven
        return [int(number) for number in array.reshape(-1)]

    def axes(self, index: int = 1) -> list[int]:
        """Where an operator works, as an input or, in older versions, an attribute says."""
        axes = self.numbers(index) if self.has(index) else self.attribute("axes")
        if not axes:
            raise NotProven
        return list(axes)
