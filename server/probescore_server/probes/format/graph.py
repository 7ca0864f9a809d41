"""Checks that an ONNX model has the form that a probe's graph must have for a server to run it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from probescore.types import OutputPer, Tap
from probescore_server.errors import ProbeRefused
from probescore_server.probes.format.manifest import Manifest
from probescore_server.probes.format.operators import refused_operator

SCORES = "scores"
CU_SEQLENS = "cu_seqlens"
POSITIONS = "positions"

GraphInputs = Mapping[str, NDArray[Any]]
"""Holds the arrays given to a probe's graph in one run, a dictionary keyed by input name, in the order of the graph's inputs.

Each tap (place in the model)'s activations come first, ``(N, hidden_size)`` float32; then ``cu_seqlens`` and ``positions``, int64, where
the graph takes them.
"""

# The versions that onnxruntime 1.20, the oldest that a server may run, can load: https://onnxruntime.ai/docs/reference/compatibility.html
OPSETS = {"": range(7, 22), "ai.onnx.ml": range(1, 5)}
IR_VERSIONS = range(4, 11)

_FLOATING = {number for name, number in onnx.TensorProto.DataType.items() if "FLOAT" in name or name == "DOUBLE"}


class GraphFailed(Exception):
    """Exception raised when an operator of a probe's graph fails on its input; the message is safe to send to clients."""


class WrongShape(GraphFailed):
    """Exception raised when a probe's graph gives too few or too many scores to be matched to tokens or rollouts."""


def checked_scores(scores: NDArray[Any], rows: int, labels: int) -> NDArray[Any]:
    """Returns the scores that a run of a probe's graph gave, after a check that they have the shape ``(rows, labels)``; a row is for a
    token or a rollout.

    Raises:
        WrongShape: the scores have another shape.
    """
    if scores.shape != (rows, labels):
        raise WrongShape(f"scores of shape {scores.shape} where {(rows, labels)} is due")
    return scores


def check_graph(model: onnx.ModelProto, file: str) -> None:
    """Checks that an ONNX model is valid, complete in one file, made of standard operators, and free of NaN and infinite weights.

    Raises:
        ProbeRefused: a check fails; the error names the fault that was found.
    """
    _check_versions(model, file)
    graphs = list(subgraphs(model.graph))
    _check_operators(model, graphs, file)
    for tensor in _tensors(graphs):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            raise ProbeRefused(file, "graph", f"external data for tensor {tensor.name!r}", "every weight inside the file")
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # the checker's C++ part raises a handful of unrelated types
        raise ProbeRefused(file, "graph", f"an invalid ONNX model: {_first_line(error)}", "one that onnx.checker accepts") from None
    _check_weights(graphs, file)


@dataclass(frozen=True)
class GraphSignature:
    """Value object with the signature of a probe's graph: its taps, hidden size, labels and optional inputs.

    A tap is a point in the language model where the probe reads activations.
    """

    taps: tuple[Tap, ...]
    hidden_size: int
    labels: int
    cu_seqlens: bool = False
    positions: bool = False
    per: OutputPer = OutputPer.TOKEN

    @classmethod
    def of(cls, manifest: Manifest) -> GraphSignature:
        """Returns the signature (names and sizes of inputs and output) that a probe's manifest states for the probe's ONNX graph."""
        return cls(
            taps=manifest.taps,
            hidden_size=manifest.model.hidden_size,
            labels=len(manifest.output.labels),
            cu_seqlens=manifest.cu_seqlens,
            positions=manifest.positions,
            per=manifest.output.per,
        )

    @property
    def inputs(self) -> list[onnx.ValueInfoProto]:
        """Returns the declarations of a probe graph's inputs, in order.

        A size that differs between runs of the graph, such as the number of tokens, is given as a name in place of a number.
        """
        declare = onnx.helper.make_tensor_value_info
        values = [declare(str(tap), onnx.TensorProto.FLOAT, ("tokens", self.hidden_size)) for tap in self.taps]
        if self.cu_seqlens:
            values.append(declare(CU_SEQLENS, onnx.TensorProto.INT64, ("sequences + 1",)))
        if self.positions:
            values.append(declare(POSITIONS, onnx.TensorProto.INT64, ("tokens",)))
        return values

    @property
    def output(self) -> onnx.ValueInfoProto:
        """Returns the declaration of a probe graph's only output, ``scores``: float32, ``(tokens, labels)`` or ``(sequences, labels)``."""
        rows = "sequences" if self.per is OutputPer.ROLLOUT else "tokens"
        return onnx.helper.make_tensor_value_info(SCORES, onnx.TensorProto.FLOAT, (rows, self.labels))


def check_signature(model: onnx.ModelProto, signature: GraphSignature, file: str) -> None:
    """Checks the names, order, dtypes, ranks and sizes of a graph's inputs and output against what the probe's manifest states.

    Raises:
        ProbeRefused: an input or output differs; the error names it.
    """
    for kind, found, expected in (
        ("input", list(model.graph.input), signature.inputs),
        ("output", list(model.graph.output), [signature.output]),
    ):
        names = [value.name for value in found]
        if names != [value.name for value in expected]:
            raise ProbeRefused(file, f"graph {kind}s", _listed(names), f"{_listed([value.name for value in expected])}, in this order")
        for value, wanted in zip(found, expected, strict=True):
            if not _fits(value, wanted):
                raise ProbeRefused(file, f"graph {kind} {value.name!r}", _described(value), _described(wanted))
    given = {value.name for value in model.graph.input}
    for tensor in model.graph.initializer:
        if tensor.name in given:
            raise ProbeRefused(file, f"graph input {tensor.name!r}", "an initializer of the same name", "an input that must be given")


def subgraphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yields an ONNX graph and every graph inside its control flow, such as the branches of an ``If``."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from subgraphs(inner)


def _check_versions(model: onnx.ModelProto, file: str) -> None:
    if not model.HasField("graph") or not model.graph.node:
        raise ProbeRefused(file, "graph", "no operators", "an ONNX graph")
    if model.ir_version not in IR_VERSIONS:
        raise ProbeRefused(file, "graph ir_version", str(model.ir_version), f"{IR_VERSIONS[0]} to {IR_VERSIONS[-1]}")
    for opset in model.opset_import:
        domain = "" if opset.domain == "ai.onnx" else opset.domain
        if domain not in OPSETS:
            raise ProbeRefused(file, "graph opset_import", f"operator domain {domain!r}", "only 'ai.onnx' and 'ai.onnx.ml'")
        if opset.version not in OPSETS[domain]:
            versions = OPSETS[domain]
            raise ProbeRefused(
                file, "graph opset_import", f"{domain or 'ai.onnx'} {opset.version}", f"versions {versions[0]} to {versions[-1]}"
            )


def _check_operators(model: onnx.ModelProto, graphs: Sequence[onnx.GraphProto], file: str) -> None:
    if model.functions:
        function = model.functions[0]
        raise ProbeRefused(
            file, "graph functions", f"local function {function.domain}.{function.name}", "none: inline them with onnx.inliner"
        )
    if model.training_info:
        raise ProbeRefused(file, "graph training_info", "training graphs", "none")
    if (refused := refused_operator(graphs)) is not None:
        raise ProbeRefused(file, "graph", *refused)


def _check_weights(graphs: Sequence[onnx.GraphProto], file: str) -> None:
    """Refuses NaN in any weight of a graph, and infinity in any weight of more than one element.

    A constant of one element may be infinite, as attention masks use it.
    """
    for name, numbers in _numbers(graphs):
        if np.isnan(numbers).any():
            raise ProbeRefused(file, f"graph weight {name!r}", f"{int(np.isnan(numbers).sum())} NaN", "finite numbers")
        if numbers.size > 1 and np.isinf(numbers).any():
            raise ProbeRefused(file, f"graph weight {name!r}", f"{int(np.isinf(numbers).sum())} infinite numbers", "finite numbers")


def _tensors(graphs: Sequence[onnx.GraphProto]) -> Iterator[onnx.TensorProto]:
    for graph in graphs:
        yield from graph.initializer
        sparse = list(graph.sparse_initializer)
        for attribute in (attribute for node in graph.node for attribute in node.attribute):
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            sparse += [*([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []), *attribute.sparse_tensors]
        for tensor in sparse:
            yield tensor.values
            yield tensor.indices


def _numbers(graphs: Sequence[onnx.GraphProto]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields every floating-point weight, constant and attribute of a list of graphs, each with its name."""
    for tensor in _tensors(graphs):
        if tensor.data_type in _FLOATING:
            numbers = onnx.numpy_helper.to_array(tensor)
            yield tensor.name, numbers if numbers.dtype.kind == "f" else numbers.astype(np.float32)
    for node in (node for graph in graphs for node in graph.node):
        for attribute in node.attribute:
            if attribute.type in (onnx.AttributeProto.FLOAT, onnx.AttributeProto.FLOATS):
                floats = attribute.floats if attribute.type == onnx.AttributeProto.FLOATS else [attribute.f]
                yield f"{node.op_type}.{attribute.name}", np.array(floats, np.float32)


def _fits(found: onnx.ValueInfoProto, expected: onnx.ValueInfoProto) -> bool:
    tensor, wanted = found.type.tensor_type, expected.type.tensor_type
    if not found.type.HasField("tensor_type") or tensor.elem_type != wanted.elem_type or not tensor.HasField("shape"):
        return False
    sizes, wanted_sizes = ([dim.dim_value if dim.HasField("dim_value") else None for dim in t.shape.dim] for t in (tensor, wanted))
    return sizes == wanted_sizes


def _described(value: onnx.ValueInfoProto) -> str:
    if not value.type.HasField("tensor_type"):
        return f"a {value.type.WhichOneof('value') or 'value without a type'}"
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return f"{_dtype(tensor.elem_type)} without a shape"
    sizes = [str(dim.dim_value) if dim.HasField("dim_value") else dim.dim_param or "?" for dim in tensor.shape.dim]
    return f"{_dtype(tensor.elem_type)} ({', '.join(sizes)})"


def _dtype(elem_type: int) -> str:
    return onnx.TensorProto.DataType.Name(elem_type).lower() if elem_type in onnx.TensorProto.DataType.values() else f"type {elem_type}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
