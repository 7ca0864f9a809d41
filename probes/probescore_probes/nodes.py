"""Builds ONNX graphs node by node; the nodes and values get numbers as names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import DTypeLike, NDArray
from onnx import compose, helper, numpy_helper

OPSET = 18
ML_OPSET = 3

Array = NDArray[Any]
_Attribute = Any  # numbers, texts and lists of them


class Nodes:
    """Builder of an ONNX graph, which collects nodes and weights.

    Values are referred to by name. Each method that adds nodes returns the name of the value that they compute.

    Attributes:
        nodes: the nodes, in an order in which they can run.
        weights: the weights that the nodes read.
        inlines: whether some of the nodes come from another model.
    """

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.inlines = False
        self._types: dict[str, np.dtype[Any]] = {}

    def apply(self, operator: str, *inputs: str, domain: str = "", dtype: DTypeLike | None = None, **attributes: _Attribute) -> str:
        """Adds an operator with one result to an ONNX graph, and returns the result's name; the result has the dtype of the first input
        unless ``dtype`` is given.
        """
        name = f"value_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], domain=domain or None, **attributes))
        self._types[name] = np.dtype(dtype) if dtype is not None else self._type(inputs[0])
        return name

    def constant(self, array: Array) -> str:
        """Adds an array to an ONNX graph as a weight and returns its name."""
        name = f"weight_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(array).reshape(np.shape(array)), name))
        self._types[name] = np.asarray(array).dtype
        return name

    def number(self, value: float) -> str:
        """Adds a single number to an ONNX graph as a float64 weight and returns its name."""
        return self.constant(np.array(value, np.float64))

    def cast(self, x: str, dtype: DTypeLike) -> str:
        """Adds to an ONNX graph a conversion of a value to another dtype; a value that already has the dtype is returned unchanged."""
        if self._type(x) == np.dtype(dtype):
            return x
        return self.apply("Cast", x, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), dtype=dtype)

    def gemm(self, x: str, weight: Array, bias: Array, dtype: DTypeLike = np.float32) -> str:
        """Adds ONNX nodes for ``weight · x + bias``, computed in ``dtype``, with a weight ``(out, in)`` and a bias ``(out,)``
        in float64.
        """
        x = self.cast(x, dtype)
        return self.apply("Gemm", x, self.constant(weight.astype(dtype)), self.constant(bias.astype(dtype)), transB=1)

    def softmax(self, x: str) -> str:
        """Adds an ONNX node for the softmax over each row of a value."""
        return self.apply("Softmax", x, axis=1)

    def exact_sigmoid(self, x: str) -> str:
        """Adds ONNX nodes for a sigmoid in float64 that stays exact where ``x`` is far below 0.

        The ``Sigmoid`` operators of ONNX runtimes are cut off near 1e-8, which would change results that divide a sigmoid by a sum of
        sigmoids.
        """
        one = self.constant(np.array(1.0))
        return self.apply("Div", one, self.apply("Add", one, self.apply("Exp", self.apply("Neg", self.cast(x, np.float64)))))

    def log_sigmoid(self, x: str) -> str:
        """Adds ONNX nodes for ``log(sigmoid(x))``, without underflow where ``x`` is far below 0."""
        return self.apply("Neg", self.apply("Softplus", self.apply("Neg", x)))

    def columns(self, x: str, columns: Sequence[int]) -> str:
        """Adds an ONNX node that selects some columns of a value by their indices."""
        return self.apply("Gather", x, self.constant(np.array(columns, np.int64)), axis=1)

    def concat(self, columns: Sequence[str]) -> str:
        """Adds ONNX nodes that put several values side by side as columns, in float32."""
        return self.apply("Concat", *[self.cast(column, np.float32) for column in columns], axis=1)

    def mean(self, values: Sequence[str]) -> str:
        """Adds ONNX nodes for the mean of several values of one shape, in float32."""
        return self.weighted_mean(values, None)

    def weighted_mean(self, values: Sequence[str], weights: Sequence[float] | None) -> str:
        """Adds ONNX nodes for the weighted mean of values of one shape as ``numpy.average`` defines it, in float32."""
        share = np.full(len(values), 1 / len(values)) if weights is None else np.asarray(weights, np.float64) / np.sum(weights)
        parts = [
            self.apply("Mul", self.cast(value, np.float32), self.constant(np.array(part, np.float32)))
            for value, part in zip(values, share, strict=True)
        ]
        return parts[0] if len(parts) == 1 else self.apply("Sum", *parts)

    def normalised(self, columns: Sequence[str]) -> str:
        """Adds ONNX nodes that put columns ``(N, 1)`` side by side and divide each row by its sum, in float64; a row whose sum is 0 becomes
        equal shares.
        """
        every = self.apply("Concat", *[self.cast(column, np.float64) for column in columns], axis=1)
        total = self.apply("ReduceSum", every, self.constant(np.array([1])), keepdims=1)
        nothing = self.apply("Equal", total, self.constant(np.array(0.0)), dtype=np.bool_)
        even = self.constant(np.full(len(columns), 1 / len(columns)))
        safe = self.apply("Where", nothing, self.constant(np.array(1.0)), total, dtype=np.float64)
        return self.apply("Where", nothing, even, self.apply("Div", every, safe), dtype=np.float64)

    def interpolated(self, x: str, at: Array, values: Array) -> str:
        """Adds ONNX nodes for a function from ``(N, 1)`` to ``(N, 1)`` that interpolates linearly between points ``(at, values)``, and is
        constant before the first point and after the last.
        """
        at, values = np.asarray(at, np.float64), np.asarray(values, np.float64)
        if len(at) == 1:
            level = self.constant(values.astype(np.float32)[None])
            return self.apply("Add", self.apply("Mul", x, self.constant(np.zeros((1, 1), np.float32))), level)
        # each step between two points counts by the share of it that x has passed
        through = self.apply("Div", self.apply("Sub", self.cast(x, np.float64), self.constant(at[:-1])), self.constant(np.diff(at)))
        bounded = self.apply("Clip", through, self.constant(np.array(0.0)), self.constant(np.array(1.0)))
        return self.gemm(bounded, np.diff(values)[None], values[:1], np.float64)

    def trees(self, x: str, trees: Sequence[tuple[int, Array]], base: Array) -> str:
        """Adds an ONNX node for an ensemble of regression trees, whose result is ``base`` plus a number from each tree.

        Args:
            x: name of the value to read, ``(N, width)`` float32.
            trees: for each tree the column to which it adds, and its nodes as scikit-learn's histogram-based boosting stores them.
            base: constant terms, ``(columns,)``.
        """
        parts: dict[str, list[Any]] = {}

        def add(**row: _Attribute) -> None:
            for key, value in row.items():
                parts.setdefault(key, []).append(value)

        for tree, (target, nodes) in enumerate(trees):
            for number, node in enumerate(nodes):
                leaf = bool(node["is_leaf"])
                add(
                    nodes_treeids=tree,
                    nodes_nodeids=number,
                    nodes_featureids=0 if leaf else int(node["feature_idx"]),
                    nodes_values=0.0 if leaf else _float32_below(float(node["num_threshold"])),
                    nodes_modes="LEAF" if leaf else "BRANCH_LEQ",
                    nodes_truenodeids=0 if leaf else int(node["left"]),
                    nodes_falsenodeids=0 if leaf else int(node["right"]),
                )
                if leaf:
                    add(target_treeids=tree, target_nodeids=number, target_ids=target, target_weights=float(node["value"]))
        return self.apply(
            "TreeEnsembleRegressor",
            x,
            domain="ai.onnx.ml",
            n_targets=len(base),
            base_values=[float(number) for number in base],
            aggregate_function="SUM",
            post_transform="NONE",
            **parts,
        )

    def inline(self, model: onnx.ModelProto, x: str) -> str:
        """Adds to an ONNX graph those nodes of another ONNX model, which has one input, that the last output of this model needs, and
        returns the name of the output.
        """
        prefix = f"part_{len(self.nodes)}_"
        graph = compose.add_prefix(model, prefix).graph
        result: str = graph.output[-1].name
        wanted, kept = {result}, []
        for node in reversed(graph.node):
            if not wanted.isdisjoint(node.output):
                kept.append(node)
                wanted.update(_read_by(node))
        self.nodes.append(helper.make_node("Identity", [self.cast(x, np.float32)], [graph.input[0].name]))
        self.nodes.extend(reversed(kept))
        self.inlines = True
        self.weights.extend(weight for weight in graph.initializer if weight.name in wanted)
        return result

    def model(self, at: str, width: int, result: str) -> onnx.ModelProto:
        """Returns an ONNX model of the nodes that were added before: its input, named ``at``, is rows ``(N, width)`` float32, and its
        output is the value that ``result`` names.
        """
        inputs = [helper.make_tensor_value_info(at, onnx.TensorProto.FLOAT, ["n", width])]
        outputs = [helper.make_tensor_value_info(result, onnx.TensorProto.FLOAT, ["n", None])]
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("ai.onnx.ml", ML_OPSET)]
        return helper.make_model(helper.make_graph(self.nodes, "probe", inputs, outputs, self.weights), opset_imports=opsets)

    def _type(self, name: str) -> np.dtype[Any]:
        return self._types.get(name, np.dtype(np.float32))  # a value that no node computed is float32, as activations are


def _read_by(node: onnx.NodeProto) -> set[str]:
    inner = [part for attribute in node.attribute for graph in (attribute.g, *attribute.graphs) for part in graph.node]
    return set(node.input).union(*map(_read_by, inner), *([value.name for value in attribute.g.output] for attribute in node.attribute))


def _float32_below(threshold: float) -> float:
    """Returns the largest float32 that is not above a threshold; a float32 ``x`` is at most the one exactly if it is at most the other."""
    nearest = np.float32(np.clip(threshold, -np.finfo(np.float32).max, np.finfo(np.float32).max))
    return float(np.nextafter(nearest, np.float32(-np.inf)) if nearest > threshold else nearest)
