"""Imports ONNX graphs, made by any other tool, that compute scores from activations ``(N, width)``.

The inputs and outputs of such a graph are renamed and cast to the names and dtypes of a probe file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, compose, helper, numpy_helper
from onnx.inliner import inline_local_functions
from onnx.reference import ReferenceEvaluator

from probescore.types import ScoreUnit
from probescore_probes.exporting import ProbeFunction
from probescore_probes.importing.imported import NONLINEAR, Imported, ImportOptions, is_affine, named
from probescore_probes.importing.source import ProbeSource
from probescore_server.probes.format.graph import SCORES, GraphInputs, GraphSignature

_FLOATS: dict[int, Any] = {TensorProto.FLOAT: np.float32, TensorProto.DOUBLE: np.float64}
_GIVES_PROBABILITIES = ("Sigmoid", "Softmax")
_MANIFEST = "probescore.manifest"
_PREFIX = "imported_"


def is_graph(source: ProbeSource) -> bool:
    """Returns whether a file is an ONNX graph, which is told by the name's ending ``.onnx``."""
    return source.kind == "onnx"


def read_graph(source: ProbeSource, asked: ImportOptions) -> Imported:
    """Reads an ONNX graph with one input, or one for each tap (place in the model), and one output of floats.

    Golden vectors are computed with the unchanged graph.

    Raises:
        ValueError: the file is no ONNX model or already a probe file, its inputs or outputs are others, or it fails on the model's
            activations.
    """
    try:
        model = onnx.load(source.path, load_external_data=False)
        onnx.checker.check_model(model)
        model = inline_local_functions(model)
    except Exception as error:  # of protobuf's, or of the checker
        raise ValueError(f"{source.name}: no valid ONNX model with its weights inside ({type(error).__name__}); export it again") from None
    if any(entry.key == _MANIFEST for entry in model.metadata_props):
        raise ValueError(f"{source.name}: a probe file already; serve it as it is (see: probescore probes inspect)")
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    outputs = [value for value in model.graph.output if value.type.tensor_type.elem_type in _FLOATS]
    _check_ends(model, inputs, outputs, asked, source.name)
    read = _AsItCame(model, inputs, outputs[0].name)
    columns = read.columns(asked.hidden_size * len(asked.taps) // len(inputs), source.name)
    last = next((node.op_type for node in model.graph.node if outputs[0].name in node.output), "")
    unit = asked.unit or (ScoreUnit.PROBABILITY if last in _GIVES_PROBABILITIES else ScoreUnit.VALUE)
    notes: tuple[str, ...] = (
        () if asked.unit else (f"Its unit is not in the file: taken for a {unit.value}, since it ends in {last or 'no operator'}",)
    )
    function = ProbeFunction(read.score, read.export, unit, asked.hidden_size * len(asked.taps), columns)
    if len(inputs) > 1 or not is_affine(function, asked.hidden_size * len(asked.taps)):
        notes += (NONLINEAR,)
    return Imported(function, asked.taps, "an ONNX graph", named(asked, columns), notes=notes)


class _AsItCame:
    """Scoring function of an imported ONNX graph. It runs the graph under the graph's own input and output names, and exports the graph
    with the names of a probe file.
    """

    def __init__(self, model: onnx.ModelProto, inputs: list[onnx.ValueInfoProto], output: str) -> None:
        self._model, self._output = model, output
        self._inputs: dict[str, Any] = {value.name: _FLOATS[value.type.tensor_type.elem_type] for value in inputs}
        self._evaluator: Any = ReferenceEvaluator(model)

    def columns(self, width: int, where: str) -> int:
        """Returns how many scores an imported ONNX graph gives for each token, if each of its inputs has ``width`` features."""
        example = {name: np.random.default_rng(0).standard_normal((3, width)).astype(dtype) for name, dtype in self._inputs.items()}
        try:
            scores: Any = self._evaluator.run([self._output], example)[0]
        except Exception as error:  # whatever numpy raises inside the operators
            raise ValueError(
                f"{where}: does not run on rows of {width} numbers ({type(error).__name__}); give the model and taps that it was made for, "
                "and export it for any number of rows"
            ) from None
        if scores.ndim not in (1, 2) or len(scores) != 3:
            raise ValueError(f"{where}: gives scores of shape {scores.shape} for 3 tokens; export it so that it gives (tokens, labels)")
        return 1 if scores.ndim == 1 else int(scores.shape[1])

    def score(self, inputs: GraphInputs) -> NDArray[Any]:
        """Computes the scores ``(N, labels)`` that an imported ONNX graph gives, unchanged."""
        rows = list(inputs.values())
        given = rows if len(rows) == len(self._inputs) else [np.concatenate(rows, axis=1)]
        named_rows = {name: array.astype(dtype) for (name, dtype), array in zip(self._inputs.items(), given, strict=True)}
        scores: Any = self._evaluator.run([self._output], named_rows)[0]
        return np.asarray(scores).reshape(len(scores), -1)

    def export(self, signature: GraphSignature) -> onnx.ModelProto:
        """Returns an imported ONNX graph with the names and dtypes of inputs and output that a probe file needs."""
        inner = compose.add_prefix(self._model, _PREFIX)
        names = [str(tap) for tap in signature.taps]
        nodes = []
        if len(names) != len(self._inputs):
            nodes.append(helper.make_node("Concat", names, ["side_by_side"], axis=1))
            names = ["side_by_side"]
        for name, value, dtype in zip(names, self._inputs, self._inputs.values(), strict=True):
            nodes.append(helper.make_node("Cast", [name], [_PREFIX + value], to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype))))
        nodes += list(inner.graph.node)
        shape = numpy_helper.from_array(np.array([-1, signature.labels]), "shape_of_scores")
        nodes.append(helper.make_node("Cast", [_PREFIX + self._output], ["as_float"], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("Reshape", ["as_float", "shape_of_scores"], [SCORES]))
        weights = [*inner.graph.initializer, shape]
        graph = helper.make_graph(nodes, "probe", signature.inputs, [signature.output], weights)
        return helper.make_model(graph, opset_imports=list(self._model.opset_import))


def _check_ends(
    model: onnx.ModelProto, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto], asked: ImportOptions, where: str
) -> None:
    if not asked.taps:
        raise ValueError("tap: not given; a graph does not say which activations it takes: give one for each of its inputs, in order")
    others = [value.name for value in inputs if value.type.tensor_type.elem_type not in _FLOATS]
    if others or len(inputs) not in (1, len(asked.taps)):
        listed = ", ".join(value.name for value in inputs) or "none"
        raise ValueError(
            f"{where}: inputs {listed} for {len(asked.taps)} taps{f', of which {others[0]} takes no floats' if others else ''}; export "
            "it with one input of activations (N, width), or one for each tap"
        )
    if len(outputs) != 1:
        listed = ", ".join(value.name for value in model.graph.output)
        zipped = "; of scikit-learn, convert it with zipmap=False, or import the estimator itself" if not outputs else ""
        raise ValueError(f"{where}: outputs {listed}, of which {len(outputs)} are tensors of floats; export it with one{zipped}")
