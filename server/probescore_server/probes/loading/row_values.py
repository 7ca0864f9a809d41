"""Defines the known states of a graph's values while the graph is followed to prove that it computes row by row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Union

import onnx
from numpy.typing import NDArray


@dataclass(frozen=True)
class RowsOnAxis:
    """State of a graph's value that has ``rank`` axes and, along ``axis``, one entry for each input row, computed from that row alone."""

    axis: int
    rank: int

    @property
    def from_last(self) -> int:
        """Returns the axis along which a value's rows lie, counted from the last axis as broadcasting counts: -1, -2, …"""
        return self.axis - self.rank


@dataclass(frozen=True, eq=False)
class SameForAllInputs:
    """State of a graph's value that is the same for every input: its shape, and its numbers where these are known."""

    shape: tuple[int, ...]
    array: NDArray[Any] | None = None


@dataclass(frozen=True)
class ShapeSizes:
    """State of a graph's value that holds sizes of a shape, as a vector or as one scalar; ``None`` stands for the number of rows."""

    sizes: tuple[int | None, ...]
    scalar: bool = False


Value = Union[RowsOnAxis, SameForAllInputs, ShapeSizes]


class NotProven(Exception):
    """Exception raised when an operator of a probe's graph could not be proven to compute each token's row from that row alone."""


@dataclass(frozen=True, eq=False)
class ProvenNode:
    """Value object with one node of an ONNX graph and the known states of its inputs.

    Attributes:
        proto: the node itself.
        inputs: known state of each input; ``None`` if nothing is known.
        shapes: shape of each input, from shape inference; ``None`` for an unknown size.
        opset: version of the graph's operator set.
    """

    proto: onnx.NodeProto
    inputs: list[Value | None]
    shapes: list[tuple[int | None, ...]]
    opset: int

    def attribute(self, name: str, default: Any = None) -> Any:  # noqa: ANN401
        """Returns an attribute of an ONNX node, or ``default`` if the node does not have the attribute."""
        found = [onnx.helper.get_attribute_value(attribute) for attribute in self.proto.attribute if attribute.name == name]
        return found[0] if found else default

    def has(self, index: int) -> bool:
        """Returns whether an ONNX node has the optional input at the given index."""
        return index < len(self.proto.input) and self.proto.input[index] != ""

    def rows(self, index: int = 0) -> RowsOnAxis:
        """Returns the state of the input at this index if the input has an entry for each row; raises ``NotProven`` otherwise."""
        value = self.inputs[index]
        if not isinstance(value, RowsOnAxis):
            raise NotProven
        return value

    def same(self, index: int) -> SameForAllInputs:
        """Returns the state of the input at this index if it is the same for all inputs of the graph; raises ``NotProven`` otherwise."""
        value = self.inputs[index]
        if not isinstance(value, SameForAllInputs):
            raise NotProven
        return value

    def numbers(self, index: int) -> list[int]:
        """Returns the integers of a constant input of an ONNX node; raises ``NotProven`` if the integers are not known."""
        array = self.same(index).array
        if array is None:
            raise NotProven
        return [int(number) for number in array.reshape(-1)]

    def axes(self, index: int = 1) -> list[int]:
        """Returns the axes on which an operator works, from an input or, in older operator sets, from an attribute.

        Raises ``NotProven`` if the axes are not known.
        """
        axes = self.numbers(index) if self.has(index) else self.attribute("axes")
        if not axes:
            raise NotProven
        return list(axes)
