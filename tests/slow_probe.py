"""A probe whose graph takes long for some tokens: a ``Loop`` with as many rounds as a token's embedding says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from models import HIDDEN_SIZE, tiny_model
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file

from probescore.types import ScoreUnit
from probescore_probes.exporting import onnx_probe
from probescore_probes.reference import ReferenceModel
from probescore_probes.writing import write_probe

ENDLESS, SLOW = 80, 81
"""Tokens: hours, and some tenths of a second."""
ROUNDS = {ENDLESS: 1 << 40, SLOW: 1 << 18}
TAP = "resid_pre.0"
WEIGHT = np.random.default_rng(3).standard_normal((HIDDEN_SIZE, 1)).astype(np.float32) / np.float32(HIDDEN_SIZE**0.5)


def write_slow_probe(path: Path) -> Path:
    """Writes the probe "slow" of the tiny model: ``score = embedding · WEIGHT``, sooner or later."""
    golden = [([1, 20, 33], [9, 60, 2]), ([1, 5], [70, 12])]
    function = onnx_probe(_graph(), lambda inputs: next(iter(inputs.values())) @ WEIGHT, unit=ScoreUnit.VALUE)
    write_probe(path, function, ReferenceModel.load(tiny_model()), name="slow", version="1", taps=[TAP], golden=golden)
    return path


def _graph() -> onnx.ModelProto:
    embeddings = next(array for name, array in load_file(tiny_model() / "model.safetensors").items() if "embed_tokens" in name)
    nodes, constants = (
        [],
        {"W": WEIGHT, "near": np.float32(1e-6), "one": np.int64(1), "axis": np.array([1], np.int64), "true": np.bool_(True)},
    )
    rounds = "one"
    for token, count in ROUNDS.items():
        constants |= {f"e{token}": embeddings[token : token + 1], f"n{token}": np.int64(count)}
        nodes += [
            helper.make_node("Sub", [TAP, f"e{token}"], [f"d{token}"]),
            helper.make_node("Mul", [f"d{token}", f"d{token}"], [f"q{token}"]),
            helper.make_node("ReduceSum", [f"q{token}", "axis"], [f"s{token}"], keepdims=0),
            helper.make_node("Less", [f"s{token}", "near"], [f"l{token}"]),
            helper.make_node("Cast", [f"l{token}"], [f"i{token}"], to=TensorProto.INT64),
            helper.make_node("ReduceMax", [f"i{token}"], [f"m{token}"], keepdims=0),
            helper.make_node("Mul", [f"m{token}", f"n{token}"], [f"t{token}"]),
            helper.make_node("Add", [rounds, f"t{token}"], [f"r{token}"]),
        ]
        rounds = f"r{token}"
    nodes += [
        helper.make_node("MatMul", [TAP, "W"], ["y"]),
        helper.make_node("Loop", [rounds, "true", "y"], ["scores"], body=_round()),
    ]
    graph = helper.make_graph(
        nodes,
        "probe",
        [helper.make_tensor_value_info(TAP, TensorProto.FLOAT, ["n", HIDDEN_SIZE])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 1])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def _round() -> onnx.GraphProto:
    """Changes nothing."""
    zero: NDArray[np.float32] = np.zeros((1, 1), np.float32)
    return helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Add", ["before", "zero"], ["after"])],
        "round",
        [
            helper.make_tensor_value_info("number", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("before", TensorProto.FLOAT, ["n", 1]),
        ],
        [helper.make_tensor_value_info("on", TensorProto.BOOL, []), helper.make_tensor_value_info("after", TensorProto.FLOAT, ["n", 1])],
        [numpy_helper.from_array(zero, "zero")],
    )
