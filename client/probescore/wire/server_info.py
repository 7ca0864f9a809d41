"""Converts descriptions of a server and results of its administration (``sleep``, ``wake`` and reloading) to and from protobuf messages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, fields

from probescore.types import (
    CalibratedRollouts,
    Calibration,
    Limits,
    ModelInfo,
    ProbeInfo,
    RefusedProbeFile,
    ReloadedProbes,
    ServerInfo,
    Tap,
    Transfer,
    WorkerInfo,
)
from probescore.v1 import admin_pb2, probes_pb2, scoring_pb2
from probescore.wire.enums import OUTPUTS, UNITS, member_of, reduction_from_proto, reduction_to_proto
from probescore.wire.readings import reading_from_proto, reading_to_proto

# ---------------------------------------------------------------------------------------------------------------------- writing


def server_info_to_proto(info: ServerInfo) -> scoring_pb2.GetServerInfoResponse:
    """Converts the description of a server to the response of the RPC ``GetServerInfo``."""
    model, limits = info.model, info.limits
    return scoring_pb2.GetServerInfoResponse(
        server_version=info.server_version,
        model=scoring_pb2.ModelInfo(
            id=model.id,
            revision=model.revision,
            fingerprint=model.fingerprint,
            model_type=model.model_type,
            hidden_size=model.hidden_size,
            num_hidden_layers=model.num_hidden_layers,
            num_loaded_layers=model.num_loaded_layers,
            vocab_size=model.vocab_size,
            max_position_embeddings=model.max_position_embeddings,
        ),
        tokenizer_fingerprint=info.tokenizer_fingerprint,
        limits=scoring_pb2.Limits(**asdict(limits)),
        workers=[
            scoring_pb2.WorkerInfo(
                device=worker.device,
                dtype=worker.dtype,
                execution_path=worker.execution_path,
                ready=worker.ready,
                restarts=worker.restarts,
                asleep=worker.asleep,
            )
            for worker in info.workers
        ],
        probes=info.probes,
        activation_taps=info.activation_taps,
        retired_probes=info.retired_probes,
        readings=[reading_to_proto(reading) for reading in info.readings],
    )


def transfers_to_proto(transfers: Iterable[Transfer]) -> list[admin_pb2.Transfer]:
    """Converts records of the memory that each device of a server freed or allocated to the messages in ``SleepResponse`` and
    ``WakeResponse``.
    """
    return [
        admin_pb2.Transfer(
            device=transfer.device, seconds=transfer.seconds, weight_bytes=transfer.weight_bytes, device_bytes=transfer.device_bytes
        )
        for transfer in transfers
    ]


def reloaded_to_proto(reloaded: ReloadedProbes) -> admin_pb2.ReloadResponse:
    """Converts a description of the changes that a server's reload of its probes made to the response of the RPC ``Reload``."""
    return admin_pb2.ReloadResponse(
        added=reloaded.added,
        retired=reloaded.retired,
        dropped=reloaded.dropped,
        current_probes=reloaded.current_probes,
        retired_probes=reloaded.retired_probes,
        refused=[
            admin_pb2.RefusedProbeFile(file=each.file, field=each.field, found=each.found, expected=each.expected)
            for each in reloaded.refused
        ],
        seconds=reloaded.seconds,
    )


def probes_to_proto(probes: Iterable[ProbeInfo]) -> probes_pb2.ListProbesResponse:
    """Converts the descriptions of the loaded probes to the response of the RPC ``ListProbes``."""
    return probes_pb2.ListProbesResponse(probes=[_probe_to_proto(probe) for probe in probes])


def _probe_to_proto(probe: ProbeInfo) -> probes_pb2.ProbeInfo:
    return probes_pb2.ProbeInfo(
        name=probe.name,
        version=probe.version,
        description=probe.description,
        graph_sha256=probe.graph_sha256,
        manifest_sha256=probe.manifest_sha256,
        taps=[probes_pb2.Tap(hook=tap.hook, layer=tap.layer) for tap in probe.taps],
        unit=UNITS[probe.unit],
        output_per=OUTPUTS[probe.output_per],
        labels=probe.labels,
        default_reduction=None if probe.default_reduction is None else reduction_to_proto(probe.default_reduction),
        calibrations=[
            probes_pb2.Calibration(
                threshold=calibration.threshold,
                false_positive_rate=calibration.false_positive_rate,
                false_positive_rate_low=calibration.false_positive_rate_low,
                false_positive_rate_high=calibration.false_positive_rate_high,
                negatives=calibration.negatives,
                dataset=calibration.dataset,
                reduction=None if calibration.reduction is None else reduction_to_proto(calibration.reduction),
                label=calibration.label,
                conditions=None if calibration.conditions is None else _conditions_to_proto(calibration.conditions),
            )
            for calibration in probe.calibrations
        ],
        accepted_mismatches=probe.accepted_mismatches,
        manifest_json=probe.manifest_json,
        retired=probe.retired,
    )


def _conditions_to_proto(conditions: CalibratedRollouts) -> probes_pb2.CalibrationConditions:
    return probes_pb2.CalibrationConditions(
        groups=conditions.groups,
        dtype=conditions.dtype,
        shortest_prompt=conditions.shortest_prompt,
        longest_prompt=conditions.longest_prompt,
        shortest_completion=conditions.shortest_completion,
        longest_completion=conditions.longest_completion,
        prompt_forms=conditions.prompt_forms,
        prompt_shapes=conditions.prompt_shapes,
        generation_prompt_ids=conditions.generation_prompt_ids,
    )


# ---------------------------------------------------------------------------------------------------------------------- reading


def server_info_from_proto(message: scoring_pb2.GetServerInfoResponse) -> ServerInfo:
    """Converts the response of the RPC ``GetServerInfo`` to the description of a server.

    Raises:
        MessageError: the message violates the contract.
    """
    model, limits = message.model, message.limits
    return ServerInfo(
        server_version=message.server_version,
        model=ModelInfo(
            id=model.id,
            revision=model.revision,
            fingerprint=model.fingerprint,
            model_type=model.model_type,
            hidden_size=model.hidden_size,
            num_hidden_layers=model.num_hidden_layers,
            num_loaded_layers=model.num_loaded_layers,
            vocab_size=model.vocab_size,
            max_position_embeddings=model.max_position_embeddings,
        ),
        tokenizer_fingerprint=message.tokenizer_fingerprint,
        limits=Limits(**{limit.name: getattr(limits, limit.name) for limit in fields(Limits)}),
        workers=tuple(
            WorkerInfo(
                device=worker.device,
                dtype=worker.dtype,
                execution_path=worker.execution_path,
                ready=worker.ready,
                restarts=worker.restarts,
                asleep=worker.asleep,
            )
            for worker in message.workers
        ),
        probes=tuple(message.probes),
        activation_taps=tuple(message.activation_taps),
        retired_probes=tuple(message.retired_probes),
        readings=tuple(reading_from_proto(reading, f"readings[{index}]") for index, reading in enumerate(message.readings)),
    )


def transfers_from_proto(transfers: Iterable[admin_pb2.Transfer]) -> tuple[Transfer, ...]:
    """Converts the messages in ``SleepResponse`` and ``WakeResponse`` to records of the memory that each device of a server freed or
    allocated.
    """
    return tuple(Transfer(entry.device, entry.seconds, entry.weight_bytes, entry.device_bytes) for entry in transfers)


def reloaded_from_proto(message: admin_pb2.ReloadResponse) -> ReloadedProbes:
    """Converts the response of the RPC ``Reload`` to a description of the changes that a server's reload of its probes made."""
    return ReloadedProbes(
        added=tuple(message.added),
        retired=tuple(message.retired),
        dropped=tuple(message.dropped),
        current_probes=tuple(message.current_probes),
        retired_probes=tuple(message.retired_probes),
        refused=tuple(RefusedProbeFile(each.file, each.field, each.found, each.expected) for each in message.refused),
        seconds=message.seconds,
    )


def probes_from_proto(message: probes_pb2.ListProbesResponse) -> tuple[ProbeInfo, ...]:
    """Converts the response of the RPC ``ListProbes`` to descriptions of the loaded probes.

    Raises:
        MessageError: the message violates the contract.
    """
    return tuple(_probe_from_proto(probe, f"probes[{index}]") for index, probe in enumerate(message.probes))


def _probe_from_proto(message: probes_pb2.ProbeInfo, field: str) -> ProbeInfo:
    has_default = message.HasField("default_reduction")
    return ProbeInfo(
        name=message.name,
        version=message.version,
        description=message.description,
        graph_sha256=message.graph_sha256,
        manifest_sha256=message.manifest_sha256,
        taps=tuple(Tap(tap.hook, tap.layer if tap.HasField("layer") else None) for tap in message.taps),
        unit=member_of(UNITS, message.unit, f"{field}.unit"),
        output_per=member_of(OUTPUTS, message.output_per, f"{field}.output_per"),
        labels=tuple(message.labels),
        default_reduction=reduction_from_proto(message.default_reduction, f"{field}.default_reduction") if has_default else None,
        calibrations=tuple(
            _calibration_from_proto(calibration, f"{field}.calibrations[{index}]") for index, calibration in enumerate(message.calibrations)
        ),
        accepted_mismatches=tuple(message.accepted_mismatches),
        manifest_json=message.manifest_json,
        retired=message.retired,
    )


def _calibration_from_proto(message: probes_pb2.Calibration, field: str) -> Calibration:
    return Calibration(
        threshold=message.threshold,
        false_positive_rate=message.false_positive_rate,
        false_positive_rate_low=message.false_positive_rate_low,
        false_positive_rate_high=message.false_positive_rate_high,
        negatives=message.negatives,
        dataset=message.dataset,
        reduction=reduction_from_proto(message.reduction, f"{field}.reduction") if message.HasField("reduction") else None,
        label=message.label,
        conditions=_conditions_from_proto(message.conditions) if message.HasField("conditions") else None,
    )


def _conditions_from_proto(message: probes_pb2.CalibrationConditions) -> CalibratedRollouts:
    return CalibratedRollouts(
        groups=message.groups,
        dtype=message.dtype,
        shortest_prompt=message.shortest_prompt,
        longest_prompt=message.longest_prompt,
        shortest_completion=message.shortest_completion,
        longest_completion=message.longest_completion,
        prompt_forms=tuple(message.prompt_forms),
        prompt_shapes=tuple(message.prompt_shapes),
        generation_prompt_ids=tuple(message.generation_prompt_ids),
    )
