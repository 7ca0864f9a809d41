"""Probe files: how to write one, and how to read one.

    from sklearn.linear_model import LogisticRegression
    from probescore_server.probes import ReferenceModel, sklearn_probe, write_probe

    model = ReferenceModel.load("Qwen/Qwen3-4B")                           # plain Hugging Face, float32
    activations = model.completion_activations(rollouts, "resid_post.18")  # [(prompt_ids, completion_ids), …] → [(tokens, width), …]
    probe = LogisticRegression(max_iter=1000).fit([rows.mean(axis=0) for rows in activations], cheated)
    write_probe(
        "cheating.onnx", sklearn_probe(probe), model, name="cheating", version="1", taps=["resid_post.18"], golden=rollouts[:4]
    )

Reading needs neither torch nor transformers, so what writes is imported only when it is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from probescore_server.probes.calibration import calibrate, evaluate_auroc
    from probescore_server.probes.exporting import ProbeFunction, linear_probe, onnx_probe, sklearn_probe, torch_probe
    from probescore_server.probes.fingerprints import model_fingerprint
    from probescore_server.probes.manifest import CalibrationRecord, Context, Evaluation, FollowUp, Manifest, Tolerance, Training
    from probescore_server.probes.probe_file import ProbeFile, check_against_model, read_probe_file, write_probe_file
    from probescore_server.probes.reference import ReferenceModel, reference_activations
    from probescore_server.probes.writing import write_probe

__all__ = [
    "CalibrationRecord",
    "Context",
    "Evaluation",
    "FollowUp",
    "Manifest",
    "ProbeFile",
    "ProbeFunction",
    "ReferenceModel",
    "Tolerance",
    "Training",
    "calibrate",
    "check_against_model",
    "evaluate_auroc",
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
    "calibration": ("calibrate", "evaluate_auroc"),
    "exporting": ("ProbeFunction", "linear_probe", "onnx_probe", "sklearn_probe", "torch_probe"),
    "fingerprints": ("model_fingerprint",),
    "manifest": ("CalibrationRecord", "Context", "Evaluation", "FollowUp", "Manifest", "Tolerance", "Training"),
    "probe_file": ("ProbeFile", "check_against_model", "read_probe_file", "write_probe_file"),
    "reference": ("ReferenceModel", "reference_activations"),
    "writing": ("write_probe",),
}


def __getattr__(name: str) -> object:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
