"""Probe files crafted by hand, right or wrong in one place, with digests that are right unless a test says otherwise."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from probescore_server.probes.format.manifest import METADATA_KEY, Manifest, manifest_digest
from probescore_server.probes.format.probe_file import graph_digest

HIDDEN = 8
LAYERS = 4
FINGERPRINT = "sha256:" + "a" * 64
TOKENIZER = "sha256:" + "b" * 64

Fields = dict[str, Any]


def fields(**changes: Any) -> Fields:
    """A manifest's JSON for ``linear_graph()``; ``changes`` replace top-level fields."""
    return {
        "name": "cheating",
        "version": "1",
        "model": {"id": "tiny", "fingerprint": FINGERPRINT, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS},
        "tokenizer_fingerprint": TOKENIZER,
        "inputs": [{"hook": "resid_post", "layer": 1}],
        "output": {"unit": "logit", "labels": ["cheating"]},
        "reduce_on": "logit",
        "reduction": "mean",
        "golden": {"cases": [{"prompt_ids": [1, 5], "completion_ids": [6, 7, 8], "scores": [[0.5], [-1.25], [2.0]]}]},
    } | changes


def linear_graph(inputs: tuple[str, ...] = ("resid_post.1",), weight: np.ndarray | None = None) -> onnx.ModelProto:
    """The sum of the inputs, times a weight of one label."""
    weight = np.linspace(-1, 1, HIDDEN, dtype=np.float32).reshape(1, HIDDEN) if weight is None else weight
    graph = helper.make_graph(
        [helper.make_node("Sum", list(inputs), ["x"]), helper.make_node("Gemm", ["x", "weight"], ["scores"], transB=1)],
        "probe",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", HIDDEN]) for name in inputs],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 1])],
        [numpy_helper.from_array(weight, "weight")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def changed(change: Callable[[onnx.ModelProto], object]) -> onnx.ModelProto:
    model = linear_graph()
    change(model)
    return model


def craft(path: Path, model: onnx.ModelProto | None = None, written: Fields | None = None, *, keep_digests: bool = False) -> Path:
    """Writes a file that no check has seen; a manifest that is valid gets its digests."""
    model = copy.deepcopy(model or linear_graph())
    written = dict(written if written is not None else fields())
    if not keep_digests:
        written["graph_sha256"] = graph_digest(model.SerializeToString(deterministic=True))
        written["manifest_sha256"] = FINGERPRINT
        with contextlib.suppress(ValueError):  # an invalid manifest is refused before its digest is looked at
            written["manifest_sha256"] = manifest_digest(Manifest.model_validate_json(json.dumps(written)))
    model.metadata_props.add(key=METADATA_KEY, value=json.dumps(written))
    path.write_bytes(model.SerializeToString(deterministic=True))
    return path


def written_manifest(path: Path) -> Fields:
    (entry,) = onnx.load(path).metadata_props
    content: Fields = json.loads(entry.value)
    return content
