"""Describes what is known of a value inside a graph while the graph is followed to prove that it computes row by row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Union

import onnx
from numpy.typing import NDArray


@dataclass(frozen=True)
class RowsOnAxis:
    """Describes a value in a graph that has an entry for each input row along ``axis``, made of that row alone; it has ``rank`` axes."""

    axis: int
    rank: int

    @property
    def from_last(self) -> int:
        """Holds the axis of the rows counted from the last axis, as broadcasting counts: -1, -2, …"""
        return self.axis - self.rank


@dataclass(frozen=True, eq=False)
class SameForAllInputs:
    """Describes a value in a graph that is the same for every input, by its shape, and by its numbers where they are known."""

    shape: tuple[int, ...]
    array: NDArray[Any] | None = None


@dataclass(frozen=True)
class ShapeSizes:
    """Describes a value in a graph that holds sizes of a shape, as a vector or as one scalar; ``None`` stands for the number of rows."""

    sizes: tuple[int | None, ...]
    scalar: bool = False


Value = Union[RowsOnAxis, SameForAllInputs, ShapeSizes]


class NotProven(Exception):
    """Reports that an operator could not be proven to compute row by row."""


@dataclass(frozen=True, eq=False)
class ProvenNode:
    """Holds one node of an ONNX graph and what is known of its inputs.

    Attributes:
        proto: the node itself.
        inputs: what is known of each input; ``None`` if nothing is.
        shapes: shape of each input, from shape inference; ``None`` for a size that it does not know.
        opset: version of the operator set.
    """

    proto: onnx.NodeProto
    inputs: list[Value | None]
    shapes: list[tuple[int | None, ...]]
    opset: int

    def attribute(self, name: str, default: Any = None) -> Any:  # noqa: ANN401
        """Returns an attribute of the node, or ``default`` if the node does not have it."""
        found = [onnx.helper.get_attribute_value(attribute) for attribute in self.proto.attribute if attribute.name == name]
        return found[0] if found else default

    def has(self, index: int) -> bool:
        """Returns whether the node has the optional input at this index."""
        return index < len(self.proto.input) and self.proto.input[index] != ""

    def rows(self, index: int = 0) -> RowsOnAxis:
        """Returns the input at this index if it has an entry for each row; raises ``NotProven`` otherwise."""
        value = self.inputs[index]
        if not isinstance(value, RowsOnAxis):
            raise NotProven
        return value

    def same(self, index: int) -> SameForAllInputs:
        """Returns the input at this index if it is the same for every input of the graph; raises ``NotProven`` otherwise."""
        value = self.inputs[index]
        if not isinstance(value, SameForAllInputs):
            raise NotProven
        return value

    def numbers(self, index: int) -> list[int]:
        """Returns the integers of a constant input; raises ``NotProven`` if they are not known."""
        array = self.same(index).array
        if array is None:
            raise NotProven
        return [int(number) for number in array.reshape(-1)]

    def axes(self, index: int = 1) -> list[int]:
        """Returns the axes that an operator works on, which an input or, in older operator sets, an attribute holds.

        Raises ``NotProven`` if they are not known.
        """
        axes = self.numbers(index) if self.has(index) else self.attribute("axes")
        if not axes:
            raise NotProven
        return list(axes)
