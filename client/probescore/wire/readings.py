"""Converts descriptions of readings (whose activations the probes read) to and from protobuf messages."""

from __future__ import annotations

from probescore.types import LoadedReading, Reading
from probescore.v1 import admin_pb2, scoring_pb2
from probescore.wire.enums import READING_KINDS, member_of

# ---------------------------------------------------------------------------------------------------------------------- writing


def reading_to_proto(reading: Reading) -> scoring_pb2.Reading:
    """Converts the description of a reading to a protobuf message."""
    return scoring_pb2.Reading(
        name=reading.name,
        id=reading.id,
        kind=READING_KINDS[reading.kind],
        step=reading.step,
        model_fingerprint=reading.model_fingerprint,
        golden_verified=reading.golden_verified,
        changed_layers=reading.changed_layers,
        unseen_tensors=reading.unseen_tensors,
    )


def loaded_reading_to_proto(loaded: LoadedReading) -> admin_pb2.LoadReadingResponse:
    """Converts the result of loading a reading to the response of the RPC ``LoadReading``."""
    return admin_pb2.LoadReadingResponse(
        reading=reading_to_proto(loaded.reading),
        replaced=None if loaded.replaced is None else reading_to_proto(loaded.replaced),
        golden_drift=dict(loaded.golden_drift),
        device_bytes=loaded.device_bytes,
    )


# ---------------------------------------------------------------------------------------------------------------------- reading


def reading_from_proto(message: scoring_pb2.Reading, field: str) -> Reading:
    """Converts a protobuf message to the description of a reading; ``field`` is the path of the message in the response, for error
    messages.

    Raises:
        MessageError: the kind is unknown.
    """
    return Reading(
        name=message.name,
        id=message.id,
        kind=member_of(READING_KINDS, message.kind, f"{field}.kind"),
        step=message.step if message.HasField("step") else None,
        model_fingerprint=message.model_fingerprint,
        golden_verified=message.golden_verified,
        changed_layers=tuple(message.changed_layers),
        unseen_tensors=message.unseen_tensors,
    )


def loaded_reading_from_proto(message: admin_pb2.LoadReadingResponse) -> LoadedReading:
    """Converts the response of the RPC ``LoadReading`` to the result of loading a reading.

    Raises:
        MessageError: the message violates the contract.
    """
    return LoadedReading(
        reading=reading_from_proto(message.reading, "reading"),
        replaced=reading_from_proto(message.replaced, "replaced") if message.HasField("replaced") else None,
        golden_drift=dict(message.golden_drift),
        device_bytes=message.device_bytes,
    )
