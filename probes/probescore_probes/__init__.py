"""Makes probe files: turns a classifier that was fitted on a language model's activations into a checked file for the server.

    from sklearn.linear_model import LogisticRegression
    from probescore_probes import ReferenceModel, sklearn_probe, write_probe

    model = ReferenceModel.load("Qwen/Qwen3-4B")                           # plain Hugging Face, float32
    activations = model.completion_activations(rollouts, "resid_post.18")  # [(prompt_ids, completion_ids), …] → [(tokens, width), …]
    probe = LogisticRegression(max_iter=1000).fit([rows.mean(axis=0) for rows in activations], cheated)
    write_probe(
        "cheating.onnx", sklearn_probe(probe), model, name="cheating", version="1", taps=["resid_post.18"], golden=rollouts[:4]
    )

Reading a probe file needs neither torch nor transformers. Therefore the functions that write probe files are imported only when used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from probescore_probes.exporting import ProbeFunction, linear_probe, onnx_probe, sklearn_probe, torch_probe
    from probescore_probes.reference import ReferenceModel, reference_activations
    from probescore_probes.serve_check import ServeCheck
    from probescore_probes.writing import write_probe
    from probescore_server.probes.format.fingerprints import model_fingerprint
    from probescore_server.probes.format.manifest import CalibrationRecord, Context, Evaluation, FollowUp, Manifest, Tolerance, Training
    from probescore_server.probes.format.probe_file import ProbeFile, check_against_model, read_probe_file, write_probe_file

__all__ = [
    "CalibrationRecord",
    "Context",
    "Evaluation",
    "FollowUp",
    "Manifest",
    "ProbeFile",
    "ProbeFunction",
    "ReferenceModel",
    "ServeCheck",
    "Tolerance",
    "Training",
    "check_against_model",
    "linear_probe",
    "model_fingerprint",
    "onnx_probe",
    "read_probe_file",
    "reference_activations",
    "sklearn_probe",
    "torch_probe",
    "write_probe",
    "write_probe_file",
]

_MODULES = {
    "probescore_probes.exporting": ("ProbeFunction", "linear_probe", "onnx_probe", "sklearn_probe", "torch_probe"),
    "probescore_probes.reference": ("ReferenceModel", "reference_activations"),
    "probescore_probes.serve_check": ("ServeCheck",),
    "probescore_probes.writing": ("write_probe",),
    "probescore_server.probes.format.fingerprints": ("model_fingerprint",),
    "probescore_server.probes.format.manifest": (
        "CalibrationRecord",
        "Context",
        "Evaluation",
        "FollowUp",
        "Manifest",
        "Tolerance",
        "Training",
    ),
    "probescore_server.probes.format.probe_file": ("ProbeFile", "check_against_model", "read_probe_file", "write_probe_file"),
}


def __getattr__(name: str) -> object:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
