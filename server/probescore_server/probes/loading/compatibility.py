"""Decides which probe files an engine accepts: each file is checked by itself, against the other files, and against the language model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import structlog

from probescore.reductions import Reduction
from probescore.types import CalibratedRollouts, Calibration, ModelInfo, ProbeInfo, version_order
from probescore_server.errors import ProbeRefused
from probescore_server.probes.format.manifest import CalibrationConditions, Manifest
from probescore_server.probes.format.probe_file import ProbeFile, check_against_model, read_probe_file

logger = structlog.get_logger(__name__)

_ACCEPTABLE = frozenset({"model.fingerprint", "model.num_hidden_layers", "tokenizer_fingerprint"})
_SHOWN_IDS = 8


def read_probe_files(files: Sequence[str | Path | ProbeFile]) -> list[ProbeFile]:
    """Reads several probe files, unless they are read already; a probe that occurs twice is kept once.

    Returns:
        The probes, sorted by name, then version.

    Raises:
        ProbeRefused: a file fails a check by itself, or two files have the same name and version but different content.
    """
    probes: dict[str, ProbeFile] = {}
    for file in files:
        probe = file if isinstance(file, ProbeFile) else read_probe_file(file)
        first = probes.setdefault(probe.manifest.key, probe)
        if _digests(first) != _digests(probe):
            raise other_content(probe.file, probe.manifest.key, first.file)
    return sorted(probes.values(), key=lambda probe: (probe.manifest.name, version_order(probe.manifest.version)))


def other_content(file: str, key: str, first: str) -> ProbeRefused:
    """Returns the refusal of a file with a probe whose name and version, ``key``, mean other content already, which ``first`` names."""
    return ProbeRefused(file, "version", f"{key} with other content than in {first}", "a version of its own for each content")


def is_accepted(manifest: Manifest, accept_mismatch: Collection[str]) -> bool:
    """Returns whether a probe is to be served even if it was made for another model.

    ``accept_mismatch`` is the operator's list of such probes, each given as ``name`` or as ``name@version``.
    """
    return manifest.name in accept_mismatch or manifest.key in accept_mismatch


def check_accepted_names(probes: Sequence[ProbeFile], accept_mismatch: Collection[str]) -> None:
    """Checks that every name in ``accept_mismatch`` belongs to a probe, since any other name is a typing mistake.

    ``accept_mismatch`` is the operator's list of the probes to be served even if they were made for another model.

    Raises:
        ProbeRefused: a name in the list belongs to no probe.
    """
    known = {name for probe in probes for name in (probe.manifest.name, probe.manifest.key)}
    for name in accept_mismatch:
        if name not in known:
            raise ProbeRefused(name, "accept_mismatch", "no such probe", f"one of {', '.join(sorted(known)) or 'none'}")


def check_fits(
    probe: ProbeFile,
    model: ModelInfo,
    tokenizer_fingerprint: str,
    accept_mismatch: Collection[str],
    *,
    bos_token_id: int | None,
    further_special_ids: Collection[int],
) -> tuple[str, ...]:
    """Checks that a probe can be served on the loaded language model.

    Args:
        probe: the probe file to check.
        model: description of the loaded language model.
        tokenizer_fingerprint: ``sha256:…`` of the model's tokenizer; empty if the model has none.
        accept_mismatch: names of the probes whose mismatches the operator accepts.
        bos_token_id: id of the tokenizer's BOS token; ``None`` if it has none.
        further_special_ids: ids of the tokenizer's special tokens other than BOS, EOS and UNK.

    Returns:
        Names of the fields that do not fit and whose mismatch the operator accepts. ``special_token_ids`` is among them for an older file
            that leaves out special tokens without listing their ids.

    Raises:
        ProbeRefused: a field does not fit, and is not accepted or cannot be accepted: a probe of another hidden size cannot run.
    """
    manifest = probe.manifest
    mismatches = check_against_model(
        probe,
        fingerprint=model.fingerprint,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_hidden_layers,
        tokenizer_fingerprint=tokenizer_fingerprint,
    )
    for mismatch in mismatches:
        if mismatch.field not in _ACCEPTABLE or not is_accepted(manifest, accept_mismatch):
            raise _explained(mismatch, manifest, model)
    if manifest.expects_bos and bos_token_id is None:
        raise ProbeRefused(probe.file, "expects_bos", "true", "false or null: the model's tokenizer has no BOS")
    largest = max(manifest.follow_up.token_ids, default=-1) if manifest.follow_up else -1
    if largest >= model.vocab_size:
        raise ProbeRefused(probe.file, "follow_up.token_ids", str(largest), f"ids below the vocabulary size {model.vocab_size}")
    accepted = [mismatch.field for mismatch in mismatches]
    if problem := _unnamed_special_tokens(manifest, further_special_ids):
        # The probe is served, since most such files mean BOS, EOS and UNK; every response reports it, since some files meant other tokens.
        logger.warning("a probe file does not name its special tokens", probe=manifest.key, problem=problem)
        accepted.append("special_token_ids")
    return tuple(accepted)


def _unnamed_special_tokens(manifest: Manifest, further_special_ids: Collection[int]) -> str:
    """Returns a warning about a probe file written before manifests listed special-token ids, or an empty text if none is due.

    When such a file was written, servers left out every special token of their tokenizer; today only BOS, EOS and UNK are left out.
    """
    if not (manifest.exclude_special_tokens and manifest.special_token_ids is None and further_special_ids):
        return ""
    ids = sorted(further_special_ids)
    shown = ", ".join(map(str, ids[:_SHOWN_IDS])) + (f" and {len(ids) - _SHOWN_IDS} more" if len(ids) > _SHOWN_IDS else "")
    return (
        "BOS, EOS and UNK alone are left out; the tokenizer that is served has further special tokens "
        f"({shown}), which older versions left out too: write the file again"
    )


def _explained(mismatch: ProbeRefused, manifest: Manifest, model: ModelInfo) -> ProbeRefused:
    """Returns the exception that refuses a probe file made for another model; its message states the model that the file was made for, the
    model that is served, and what the operator can do.
    """
    if mismatch.field.startswith("inputs"):
        return mismatch
    made_for, served = (f"{one.id} {one.revision}".strip() for one in (manifest.model, model))
    of = "the tokenizer of " if mismatch.field == "tokenizer_fingerprint" else ""
    remedy = f"serve {made_for}, or write the probe anew on the model that is served"
    if mismatch.field in _ACCEPTABLE:
        remedy += f", or, if you know that both give the same, accept it with --accept-mismatch {manifest.name}"
    return ProbeRefused(
        mismatch.file,
        mismatch.field,
        f"{mismatch.found} ({of}{made_for}, which {manifest.key} was made for)",
        f"{mismatch.expected} ({of}{served}, which is served): {remedy}",
    )


def probe_info(manifest: Manifest, accepted_mismatches: tuple[str, ...]) -> ProbeInfo:
    """Returns the description of a loaded probe that the server sends to clients."""
    return ProbeInfo(
        name=manifest.name,
        version=manifest.version,
        description=manifest.description,
        graph_sha256=manifest.graph_sha256,
        manifest_sha256=manifest.manifest_sha256,
        taps=manifest.taps,
        unit=manifest.reduce_on,
        output_per=manifest.output.per,
        labels=manifest.output.labels,
        default_reduction=None if manifest.reduction is None else Reduction.parse(manifest.reduction),
        calibrations=tuple(
            Calibration(
                threshold=record.threshold,
                false_positive_rate=record.false_positive_rate,
                false_positive_rate_low=record.false_positive_rate_low,
                false_positive_rate_high=record.false_positive_rate_high,
                negatives=record.negatives,
                dataset=record.dataset,
                reduction=None if record.reduction is None else Reduction.parse(record.reduction),
                label=record.label,
                conditions=None if record.conditions is None else _conditions(record.conditions),
            )
            for record in manifest.calibrations
        ),
        accepted_mismatches=accepted_mismatches,
        manifest_json=manifest.model_dump_json(exclude={"golden"}),
    )


def _conditions(recorded: CalibrationConditions) -> CalibratedRollouts:
    return CalibratedRollouts(
        groups=recorded.groups,
        dtype=recorded.dtype,
        shortest_prompt=recorded.shortest_prompt,
        longest_prompt=recorded.longest_prompt,
        shortest_completion=recorded.shortest_completion,
        longest_completion=recorded.longest_completion,
        prompt_forms=recorded.prompt_forms,
        prompt_shapes=tuple(shape.value for shape in recorded.prompt_shapes),
        generation_prompt_ids=recorded.generation_prompt_ids,
    )


def _digests(probe: ProbeFile) -> tuple[str, str]:
    return probe.manifest.graph_sha256, probe.manifest.manifest_sha256
