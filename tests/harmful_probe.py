"""A probe whose graph does not end, takes long, or takes much memory, for rollouts with certain tokens in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from models import BOS, HIDDEN_SIZE
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file

from probescore.types import ScoreUnit
from probescore_probes.exporting import onnx_probe
from probescore_probes.reference import ReferenceModel
from probescore_probes.writing import write_probe
from probescore_server.probes.format.probe_file import ProbeFile

ENDLESS, SLOW, HUNGRY = 77, 78, 79
"""Token ids: a graph that sees the first never ends, the second takes `slow_steps`, the third asks for `HUNGRY_BYTES`."""

HUNGRY_BYTES = 1 << 32

WEIGHT = np.random.default_rng(0).standard_normal((HIDDEN_SIZE, 1)).astype(np.float32)


def write_harmful_probe(path: Path, model: Path, *, slow_steps: int = 0) -> ProbeFile:
    """Reads the model's embeddings, so that it knows those tokens."""
    golden = [([BOS, 5, 6], [7, 8, 9]), ([BOS, 9], [17, 18])]
    probe = onnx_probe(_graph(_embeddings(model), slow_steps), lambda inputs: inputs["resid_pre.0"] @ WEIGHT, unit=ScoreUnit.LOGIT)
    return write_probe(path, probe, ReferenceModel.load(model), name="loop", version="1", taps=["resid_pre.0"], golden=golden)


def _embeddings(model: Path) -> np.ndarray:
    tensors = load_file(next(model.glob("*.safetensors")))
    return next(tensor for key, tensor in tensors.items() if "embed_tokens" in key)


def _graph(embeddings: np.ndarray, slow_steps: int) -> onnx.ModelProto:
    known = embeddings[[ENDLESS, SLOW, HUNGRY]].astype(np.float32)
    constants = {
        "weight": WEIGHT,
        "directions": known.T.copy(),  # (hidden_size, 3)
        "expected": (known * known).sum(axis=1),
        "close": np.float32(1e-3),
        "steps": np.array([2**62, slow_steps, 0], np.int64),
        "elements": np.array([0, 0, HUNGRY_BYTES // 4], np.int64),
        "none": np.zeros(3, np.int64),
        "yes": np.bool_(True),
        "zero": np.zeros(1, np.float32),
        "one": np.ones(1, np.float32),
    }
    body = helper.make_graph(
        [helper.make_node("Identity", ["going_on"], ["goes_on"]), helper.make_node("Add", ["counted", "one"], ["counts"])],
        "body",
        [
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            helper.make_tensor_value_info("going_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("counted", TensorProto.FLOAT, [1]),
        ],
        [helper.make_tensor_value_info("goes_on", TensorProto.BOOL, []), helper.make_tensor_value_info("counts", TensorProto.FLOAT, [1])],
    )
    nodes = [
        helper.make_node("MatMul", ["resid_pre.0", "directions"], ["along"]),
        helper.make_node("Sub", ["along", "expected"], ["away"]),
        helper.make_node("Abs", ["away"], ["distance"]),
        helper.make_node("ReduceMin", ["distance"], ["nearest"], axes=[0], keepdims=0),
        helper.make_node("Less", ["nearest", "close"], ["seen"]),
        helper.make_node("Where", ["seen", "steps", "none"], ["wanted"]),
        helper.make_node("ReduceMax", ["wanted"], ["trips"], keepdims=0),
        helper.make_node("Loop", ["trips", "yes", "zero"], ["count"], body=body),
        helper.make_node("Where", ["seen", "elements", "none"], ["asked"]),
        helper.make_node("ReduceMax", ["asked"], ["size"], keepdims=1),
        helper.make_node("Expand", ["zero", "size"], ["large"]),
        helper.make_node("ReduceSum", ["large"], ["sum"], keepdims=1),
        helper.make_node("Add", ["count", "sum"], ["all"]),
        helper.make_node("Mul", ["all", "zero"], ["nothing"]),
        helper.make_node("MatMul", ["resid_pre.0", "weight"], ["score"]),
        helper.make_node("Add", ["score", "nothing"], ["scores"]),
    ]
    graph = helper.make_graph(
        nodes,
        "loop",
        [helper.make_tensor_value_info("resid_pre.0", TensorProto.FLOAT, ["n", HIDDEN_SIZE])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 1])],
        [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
