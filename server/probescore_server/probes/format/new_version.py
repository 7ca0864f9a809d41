"""Writes new versions of probe files in which only thresholds and measured qualities change; the ONNX graph stays equal byte for byte."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx

from probescore_server.errors import ProbeRefused
from probescore_server.probes.format.manifest import CalibrationRecord, Evaluation
from probescore_server.probes.format.probe_file import ProbeFile, write_probe_file


def write_new_version(
    path: Path | str,
    probe: ProbeFile,
    *,
    version: str,
    calibrations: Sequence[CalibrationRecord] | None = None,
    evaluations: Sequence[Evaluation] | None = None,
) -> ProbeFile:
    """Writes a probe file's graph and golden vectors (rollouts with scores of the author's code) under another version, with other
    thresholds or measured qualities.

    Args:
        path: path of the new file; an existing file is replaced if it is a probe file of another name or version, or equal to the new file.
        probe: the previous version.
        version: version of the new file; files with the same name and version must be equal.
        calibrations: all thresholds of the new version; those of the previous version by default.
        evaluations: all measured qualities of the new version; those of the previous version by default.

    Raises:
        ProbeRefused: the version is that of ``probe``, a reader would refuse the file, or an existing file must not be replaced; nothing is
            written.
    """
    manifest = probe.manifest
    if version == manifest.version:
        raise ProbeRefused(probe.file, "version", f"{manifest.key} for other content", "another version: one never stands for other bytes")
    changes: dict[str, object] = {"version": version}
    if calibrations is not None:
        changes["calibrations"] = tuple(calibrations)
    if evaluations is not None:
        changes["evaluations"] = tuple(evaluations)
    return write_probe_file(
        path, onnx.load_model_from_string(probe.graph), manifest.model_copy(update=changes), adapter=probe.adapter, replace=False
    )
