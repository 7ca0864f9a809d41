"""Maps the exceptions of the server's core to gRPC statuses; no other module does so."""

from __future__ import annotations

from dataclasses import dataclass

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from probescore.wire.contract import ERROR_DOMAIN
from probescore_server.errors import (
    CoreError,
    DeadlineExpired,
    FailedPrecondition,
    InternalFault,
    InvalidRequest,
    LimitExceeded,
    Mismatch,
    OutOfMemory,
    QueueFull,
    ReadingIncomplete,
    ReadingRefused,
    ServerBusy,
    WorkerLost,
    WorkerLostTwice,
    WorkerUnavailable,
)

# Statuses travel as HTTP/2 headers, of which peers accept 8 KiB in all. These hold the text twice in base64 and once percent-encoded.
MAX_TEXT_BYTES = 1000

CODES: dict[type[CoreError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    LimitExceeded: grpc.StatusCode.INVALID_ARGUMENT,
    ReadingRefused: grpc.StatusCode.INVALID_ARGUMENT,
    Mismatch: grpc.StatusCode.FAILED_PRECONDITION,
    FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ServerBusy: grpc.StatusCode.RESOURCE_EXHAUSTED,
    WorkerUnavailable: grpc.StatusCode.UNAVAILABLE,
    WorkerLost: grpc.StatusCode.UNAVAILABLE,
    ReadingIncomplete: grpc.StatusCode.UNAVAILABLE,
    WorkerLostTwice: grpc.StatusCode.INTERNAL,
    OutOfMemory: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeadlineExpired: grpc.StatusCode.DEADLINE_EXCEEDED,
    InternalFault: grpc.StatusCode.INTERNAL,
}


@dataclass(frozen=True)
class RpcStatus:
    """Value object with the status that ends an RPC, as the arguments of ``grpc.aio.ServicerContext.abort``."""

    code: grpc.StatusCode
    details: str
    trailing_metadata: tuple[tuple[str, str | bytes], ...]


def status_of(error: CoreError) -> RpcStatus:
    """Returns the gRPC status of an error, with the details ``ErrorInfo`` and, where they apply, ``BadRequest`` or ``RetryInfo``.

    The status's trailing metadata contain these details as a serialised ``google.rpc.Status``.
    """
    code = CODES[type(error)]
    text = _shorten(str(error))
    info = ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN)
    details: list[Message] = [info]
    metadata: list[tuple[str, str | bytes]] = []
    if isinstance(error, LimitExceeded | ServerBusy):
        info.metadata.update(limit=error.limit, value=str(error.value), maximum=str(error.maximum))
    match error:
        case InvalidRequest():
            violation = BadRequest.FieldViolation(field=error.field, description=_shorten(error.problem))
            details.append(BadRequest(field_violations=[violation]))
        case Mismatch():
            info.metadata.update(field=error.field, found=error.found, expected=_shorten(error.expected))
        case OutOfMemory():
            info.metadata.update(tokens=str(error.tokens))
        case WorkerLostTwice():
            info.metadata.update(field=error.field, doing=error.doing)
            # The field is named so that a client can leave out the rollout at fault and have the rest scored.
            details.append(BadRequest(field_violations=[BadRequest.FieldViolation(field=error.field, description=_shorten(str(error)))]))
        case InternalFault():
            info.metadata.update(incident=error.incident)
        case QueueFull() | ServerBusy() | WorkerUnavailable() | ReadingIncomplete():
            milliseconds = round(1000 * error.retry_seconds)
            details.append(RetryInfo(retry_delay=Duration(seconds=milliseconds // 1000, nanos=milliseconds % 1000 * 1_000_000)))
            metadata.append(("grpc-retry-pushback-ms", str(milliseconds)))
    status = Status(code=code.value[0], message=text, details=[_pack(detail) for detail in details])
    return RpcStatus(code, text, (*metadata, ("grpc-status-details-bin", status.SerializeToString())))


def _pack(detail: Message) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(detail)
    return packed


def _shorten(text: str) -> str:
    encoded = text.encode()
    return text if len(encoded) <= MAX_TEXT_BYTES else encoded[:MAX_TEXT_BYTES].decode(errors="ignore") + "…"
