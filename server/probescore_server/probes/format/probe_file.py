"""Reads and writes probe files, and makes every check of a probe file that needs no language model.

A probe file is an ``.onnx`` file with the probe's manifest inside, and beside it the adapter that the probe brings, if it does. This module
imports neither torch nor onnxruntime and executes no graph: a file that passes its checks is well-formed, but not yet trusted.
``check_against_model`` compares the probe with a model, and the engine recomputes the probe's golden vectors (rollouts with scores of the
author's code).
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from pydantic import ValidationError

from probescore_server.errors import ProbeRefused
from probescore_server.files import (
    MAX_PROBE_FILE_BYTES,
    UnreadableFile,
    adapter_path,
    read_adapter_beside,
    read_regular_file,
    write_atomically,
)
from probescore_server.probes.format.complaints import first_complaint
from probescore_server.probes.format.graph import GraphSignature, check_graph, check_signature
from probescore_server.probes.format.manifest import METADATA_KEY, Manifest, manifest_digest

MAX_FILE_BYTES = MAX_PROBE_FILE_BYTES
"""Limits the size of a probe file, in bytes."""

UNSEALED = "sha256:" + "0" * 64
"""Text that stands in for the two digests of a probe's manifest until ``write_probe_file`` computes them."""


@dataclass(frozen=True)
class ProbeFile:
    """Value object with the contents of a probe file that passed every check which needs no language model.

    Attributes:
        file: the file's name as the operator gave it, for messages.
        manifest: the manifest that was read from the file.
        graph: the serialised ONNX ``ModelProto`` without ``metadata_props``, over which ``manifest.graph_sha256`` is computed.
        adapter: the content of the file with the adapter that the probe brings, over which ``manifest.adapter.sha256`` is computed;
            ``None`` = it brings none.
    """

    file: str
    manifest: Manifest
    graph: bytes
    adapter: bytes | None = None


def read_probe_file(path: Path | str, *, max_bytes: int = MAX_FILE_BYTES) -> ProbeFile:
    """Reads a probe file and makes every check that needs no language model.

    Raises:
        ProbeRefused: the file fails a check; the error names the file, the field, the value found and the value expected.
    """
    file = str(path)
    try:
        data, adapter = read_regular_file(path, max_bytes), read_adapter_beside(path)
    except UnreadableFile as error:
        raise ProbeRefused(file, error.field, error.found, error.expected) from None
    return parse_probe_file(data, file, adapter)


def parse_probe_file(data: bytes, file: str, adapter: bytes | None = None) -> ProbeFile:
    """Parses and checks the bytes of a probe file as ``read_probe_file`` does.

    Args:
        data: the bytes.
        file: the name that messages use.
        adapter: the bytes of the adapter that lies beside the file; ``None`` = none does.

    Raises:
        ProbeRefused: the bytes fail a check; the error names the file, the field, the value found and the value expected.
    """
    model = _parse_onnx(data, file)
    manifest = _parse_manifest(model, file)
    del model.metadata_props[:]
    graph = model.SerializeToString(deterministic=True)
    for field, found, expected in (
        ("graph_sha256", manifest.graph_sha256, graph_digest(graph)),
        ("manifest_sha256", manifest.manifest_sha256, manifest_digest(manifest)),
    ):
        if found != expected:
            raise ProbeRefused(file, field, found, f"{expected}, which is that of the file's content: it was changed after it was written")
    _check_adapter(manifest, adapter, file)
    check_signature(model, GraphSignature.of(manifest), file)
    check_graph(model, file)
    check_golden(manifest, file)
    return ProbeFile(file, manifest, graph, adapter)


def write_probe_file(
    path: Path | str, graph: onnx.ModelProto, manifest: Manifest, *, adapter: bytes | None = None, replace: bool = True
) -> ProbeFile:
    """Writes a probe file: a graph with its manifest inside, sealed with digests of both, once it passes every check of
    ``read_probe_file``.

    Args:
        path: where to write; the file is replaced in one step, so that no reader ever sees half a file. A reader that comes between an
            adapter and its probe refuses the two, whose digests do not agree, and may read them again.
        graph: the ONNX model, as ``docs/reference/probe-file.md`` describes it; its ``metadata_props`` are dropped.
        manifest: the probe's manifest; its two digests are computed here, and ``UNSEALED`` may stand in for them.
        adapter: the content of the adapter that the manifest states, which is written beside the file (``adapter_path``); ``None`` = none,
            and one that lies there is removed.
        replace: whether any file at ``path`` may be replaced; if false, only a probe file of another name or version is replaced.

    Raises:
        ProbeRefused: a reader would refuse the file, or the file at ``path`` must not be replaced; nothing is written.
    """
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    del model.metadata_props[:]
    sealed = manifest.model_copy(
        update={
            "graph_sha256": graph_digest(model.SerializeToString(deterministic=True)),
            "manifest_sha256": manifest_digest(manifest),
        }
    )
    entry = model.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, sealed.model_dump_json()
    data = model.SerializeToString(deterministic=True)
    target = Path(path)
    if len(data) > MAX_FILE_BYTES:
        raise ProbeRefused(str(path), "file size", f"{len(data)} bytes", f"at most {MAX_FILE_BYTES}")
    probe = parse_probe_file(data, str(path), adapter)
    if not replace and os.path.lexists(target) and _keeps(target, probe):
        return probe
    if adapter is not None:
        write_atomically(adapter_path(target), adapter)
    write_atomically(target, data)
    if adapter is None:
        adapter_path(target).unlink(missing_ok=True)
    return probe


def _keeps(path: Path, probe: ProbeFile) -> bool:
    """Returns whether the file at a path already holds exactly the given probe.

    Raises:
        ProbeRefused: the file has other content under the same name and version, or is not a probe file.
    """
    try:
        there = read_probe_file(path)
    except ProbeRefused as refusal:
        found = f"something else than a probe file ({refusal.field}: {refusal.found})"
        raise ProbeRefused(str(path), "file", found, "nothing, or a probe file of another name or version, to replace") from None
    if there.manifest.key != probe.manifest.key:
        return False
    if (there.graph, there.manifest) != (probe.graph, probe.manifest):  # the manifest has the adapter's digest in it
        raise ProbeRefused(str(path), "version", f"{there.manifest.key} there with other content", "a new version for new content")
    return True


def check_against_model(
    probe: ProbeFile, *, fingerprint: str, hidden_size: int, num_hidden_layers: int, tokenizer_fingerprint: str
) -> list[ProbeRefused]:
    """Compares a probe file with the language model that is to serve it, and lists every field that does not fit.

    In each entry, ``found`` is the value in the file and ``expected`` is the value of the model. The list is empty if everything fits. The
    caller may accept a fingerprint (digest) of the model or tokenizer that differs; a probe with another ``model.hidden_size``, or with
    ``inputs[…].layer`` beyond the model's decoder blocks, cannot run. An empty ``tokenizer_fingerprint`` stands for a model without a
    tokenizer, and matches no probe.
    """
    manifest = probe.manifest
    compared: list[tuple[str, object, object]] = [
        ("model.hidden_size", manifest.model.hidden_size, hidden_size),
        ("model.num_hidden_layers", manifest.model.num_hidden_layers, num_hidden_layers),
        ("model.fingerprint", manifest.model.fingerprint, fingerprint),
        ("tokenizer_fingerprint", manifest.tokenizer_fingerprint, tokenizer_fingerprint or "a tokenizer, and the model has none"),
    ]
    mismatches = [ProbeRefused(probe.file, field, str(found), str(expected)) for field, found, expected in compared if found != expected]
    mismatches += [
        ProbeRefused(probe.file, f"inputs[{index}].layer", str(entry.layer), f"below {num_hidden_layers}")
        for index, entry in enumerate(manifest.inputs)
        if entry.layer is not None and entry.layer >= num_hidden_layers
    ]
    return mismatches


def check_golden(manifest: Manifest, file: str) -> None:
    """Checks that a probe's golden scores (those that the author's code gave for token ids stored in the probe file) can reveal a wrong
    score: there are two rows of scores or more, and no label has the same score in every row.

    Raises:
        ProbeRefused: there are too few rows, or all scores of a label are the same.
    """
    rows = manifest.golden.score_rows
    if len(rows) < 2:
        raise ProbeRefused(file, "golden.cases", f"{len(rows)} row of scores", "at least 2: one number has no spread to compare with")
    # Below this spread the float32 rounding of the scores themselves exceeds any tolerance, so that nothing would be checked.
    too_small = rows.std(axis=0) <= 1e-6 * abs(rows).max(axis=0)
    for label, constant in zip(manifest.output.labels, too_small, strict=True):
        if constant:
            raise ProbeRefused(file, "golden.cases", f"constant scores for label {label!r}", "scores that differ, or nothing is checked")


def _check_adapter(manifest: Manifest, adapter: bytes | None, file: str) -> None:
    """Checks that the adapter beside a probe file is the one that its manifest states."""
    name = adapter_path(file).name
    if manifest.adapter is None:
        if adapter is not None:
            raise ProbeRefused(file, "adapter", f"{name} beside a probe that brings no adapter", "a probe that states it, or no such file")
        return
    if adapter is None:
        raise ProbeRefused(file, "adapter", f"no file {name}", "the adapter that the probe brings, beside the probe file")
    found = adapter_digest(adapter)
    if found != manifest.adapter.sha256:
        problem = f"{found}, the digest of {name}"
        raise ProbeRefused(file, "adapter.sha256", problem, f"{manifest.adapter.sha256}, that of the adapter which the probe was made with")


def adapter_digest(adapter: bytes) -> str:
    """Returns the digest, ``sha256:…``, of the content of an adapter's file."""
    return "sha256:" + hashlib.sha256(adapter).hexdigest()


def graph_digest(graph: bytes) -> str:
    """Returns the digest, ``sha256:…``, of the bytes of a probe's ONNX graph, which was serialised deterministically without
    ``metadata_props``.
    """
    return "sha256:" + hashlib.sha256(graph).hexdigest()


def _parse_onnx(data: bytes, file: str) -> onnx.ModelProto:
    if len(data) == 0:
        raise ProbeRefused(file, "file", "an empty file", "an ONNX model")
    # Some pickles parse as protobuf, as a message of unknown fields; so they are recognised before anything is parsed.
    if data[:1] == b"\x80" and data[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise ProbeRefused(file, "file", "a Python pickle", "an ONNX model: pickles can run code and are never opened")
    if data[:4] == b"PK\x03\x04":
        raise ProbeRefused(file, "file", "a zip archive, as torch.save writes", "an ONNX model: pickles can run code and are never opened")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except (DecodeError, ValueError):
        raise ProbeRefused(file, "file", "bytes that do not parse: another format, or a truncated file", "an ONNX model") from None
    return model


def _parse_manifest(model: onnx.ModelProto, file: str) -> Manifest:
    written = [entry.value for entry in model.metadata_props if entry.key == METADATA_KEY]
    if len(written) != 1:
        raise ProbeRefused(file, "manifest", f"{len(written)} entries {METADATA_KEY!r} in metadata_props", "exactly one")
    try:
        return Manifest.model_validate_json(written[0])
    except ValidationError as error:
        raise _refusal(error, written[0], file) from None


def _refusal(error: ValidationError, written: str, file: str) -> ProbeRefused:
    malformed = error.errors(include_url=False)[0]["type"] == "json_invalid"
    field, found, expected = first_complaint(error, None if malformed else json.loads(written))
    return ProbeRefused(file, field or "manifest", found, expected)
