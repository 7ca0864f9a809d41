"""Which probe files an engine takes: each checked by itself, against the others, and against the model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import structlog

from probescore.reductions import Reduction
from probescore.types import Calibration, ModelInfo, ProbeInfo
from probescore_server.errors import ProbeRefused
from probescore_server.probes.format.manifest import Manifest
from probescore_server.probes.format.probe_file import ProbeFile, check_against_model, read_probe_file

logger = structlog.get_logger(__name__)

_ACCEPTABLE = frozenset({"model.fingerprint", "model.num_hidden_layers", "tokenizer_fingerprint"})
_SHOWN_IDS = 8


def read_probe_files(paths: Sequence[str | Path]) -> list[ProbeFile]:
    """Reads probe files; the same probe given twice is one.

    Returns:
        Sorted by name, then version.

    Raises:
        ProbeRefused: a file is refused by itself, or two have one name and version and other content.
    """
    probes: dict[str, ProbeFile] = {}
    for path in paths:
        probe = read_probe_file(path)
        first = probes.setdefault(probe.manifest.key, probe)
        if _digests(first) != _digests(probe):
            raise ProbeRefused(
                probe.file,
                "version",
                f"{probe.manifest.key} with other content than in {first.file}",
                "a version of its own for each content",
            )
    return [probes[key] for key in sorted(probes, key=lambda key: (probes[key].manifest.name, key))]


def is_accepted(manifest: Manifest, accept_mismatch: Collection[str]) -> bool:
    """Whether the operator named this probe, as ``name`` or ``name@version``."""
    return manifest.name in accept_mismatch or manifest.key in accept_mismatch


def check_accepted_names(probes: Sequence[ProbeFile], accept_mismatch: Collection[str]) -> None:
    """Raises ``ProbeRefused`` for a name of ``accept_mismatch`` that no probe has: it would be a typing mistake."""
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
    """Checks a probe against the model.

    Args:
        probe: to be served.
        model: that serves it.
        tokenizer_fingerprint: of the model's tokenizer; empty if it has none.
        accept_mismatch: names of probes whose mismatches the operator accepts.
        bos_token_id: of that tokenizer.
        further_special_ids: of that tokenizer's special tokens other than BOS, EOS and UNK.

    Returns:
        Fields that do not fit and that the operator accepts; and ``special_token_ids`` of a file that may have left out others.

    Raises:
        ProbeRefused: the first field that does not fit and is not accepted, or cannot be: a probe of another width cannot run.
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
        # served, since such files mostly mean those three; said in every answer, since some did not
        logger.warning("a probe file does not name its special tokens", probe=manifest.key, problem=problem)
        accepted.append("special_token_ids")
    return tuple(accepted)


def _unnamed_special_tokens(manifest: Manifest, further_special_ids: Collection[int]) -> str:
    """What is in doubt of a file from before manifests named the ids: it left out every special token of the tokenizer that served it."""
    if not (manifest.exclude_special_tokens and manifest.special_token_ids is None and further_special_ids):
        return ""
    ids = sorted(further_special_ids)
    shown = ", ".join(map(str, ids[:_SHOWN_IDS])) + (f" and {len(ids) - _SHOWN_IDS} more" if len(ids) > _SHOWN_IDS else "")
    return (
        "BOS, EOS and UNK alone are left out; the tokenizer that is served has further special tokens "
        f"({shown}), which older versions left out too: write the file again"
    )


def _explained(mismatch: ProbeRefused, manifest: Manifest, model: ModelInfo) -> ProbeRefused:
    """The refusal with whose each side is, and what can be done."""
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
    """What is told of a loaded probe."""
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
            )
            for record in manifest.calibrations
        ),
        accepted_mismatches=accepted_mismatches,
        manifest_json=manifest.model_dump_json(exclude={"golden"}),
    )


def _digests(probe: ProbeFile) -> tuple[str, str]:
    return probe.manifest.graph_sha256, probe.manifest.manifest_sha256
