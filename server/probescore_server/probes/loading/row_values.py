"""Defines what can be known of the values in a probe's ONNX graph while the graph is followed to prove that it computes each row from that
row alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Union

import onnx
from numpy.typing import NDArray


@dataclass(frozen=True)
class RowsOnAxis:
    """State of a value in an ONNX graph that has ``rank`` axes and, along ``axis``, one entry for each input row, computed from that row
    alone.
    """

    axis: int
    rank: int

    @property
    def from_last(self) -> int:
        """Returns the axis along which the rows of tokens lie in a value of an ONNX graph, counted from the last axis as broadcasting
        counts: -1, -2, …
        """
        return self.axis - self.rank


@dataclass(frozen=True, eq=False)
class SameForAllInputs:
    """State of a value in an ONNX graph that is the same for every input of the graph, with its shape, and its numbers where these are
    known.
    """

    shape: tuple[int, ...]
    array: NDArray[Any] | None = None


@dataclass(frozen=True)
class ShapeSizes:
    """State of a value in an ONNX graph that holds sizes of another value's shape, as a vector or as one scalar; ``None`` stands for the
    number of rows.
    """

    sizes: tuple[int | None, ...]
    scalar: bool = False


Value = Union[RowsOnAxis, SameForAllInputs, ShapeSizes]


class NotProven(Exception):
    """Exception raised when an operator of a probe's graph could not be proven to compute each token's row from that row alone."""


@dataclass(frozen=True, eq=False)
class ProvenNode:
    """Value object with one node of an ONNX graph and what is known of its inputs.

    Attributes:
        proto: the node itself.
        inputs: what is known of each input, such as the axis along which rows of tokens lie; ``None`` if nothing is known.
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
        """Returns what is known of the input at an index of an ONNX node, if the input has an entry for each row of tokens; raises
        ``NotProven`` otherwise.
        """
        value = self.inputs[index]
        if not isinstance(value, RowsOnAxis):
            raise NotProven
        return value

    def same(self, index: int) -> SameForAllInputs:
        """Returns what is known of the input at an index of an ONNX node, if that input is the same for all inputs of the graph; raises
        ``NotProven`` otherwise.
        """
        value = self.inputs[index]
        if not isinstance(value, SameForAllInputs):
            raise NotProven
        return value

    def numbers(self, index: int) -> list[int]:
        """Returns the integers in the constant input at an index of an ONNX node; raises ``NotProven`` if the integers are not known."""
        array = self.same(index).array
        if array is None:
            raise NotProven
        return [int(number) for number in array.reshape(-1)]

    def axes(self, index: int = 1) -> list[int]:
        """Returns the axes on which an ONNX node's operator works, from an input or, in older operator sets, from an attribute.

        Raises ``NotProven`` if the axes are not known.
        """
        axes = self.numbers(index) if self.has(index) else self.attribute("axes")
        if not axes:
            raise NotProven
        return list(axes)
