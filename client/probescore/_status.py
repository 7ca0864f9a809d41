"""Converts a failed RPC to an exception that tells the reason, from the RPC's ``google.rpc.Status`` and the details in that status."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from probescore.errors import (
    AuthenticationError,
    DeadlineExceededError,
    FieldViolation,
    InvalidRequestError,
    MessageTooLargeError,
    MismatchError,
    OutOfMemoryError,
    OverloadedError,
    ProbescoreError,
    ServerError,
    UnavailableError,
)
from probescore.wire import MessageError
from probescore.wire.contract import ERROR_DOMAIN

OUT_OF_MEMORY = "OUT_OF_MEMORY"
_MISMATCHES = {"MISMATCH", "READING_MISMATCH"}
"""Reasons of a failed precondition that mean that the server has something else than the request expects."""
DETAILS_KEY = "grpc-status-details-bin"

_BY_CODE: dict[grpc.StatusCode, type[ProbescoreError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.FAILED_PRECONDITION: MismatchError,
    grpc.StatusCode.UNAUTHENTICATED: AuthenticationError,
    grpc.StatusCode.PERMISSION_DENIED: AuthenticationError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    # a server that stops cancels calls that it has not begun (grpc/grpc#41785); a caller who cancels does not wait for the answer
    grpc.StatusCode.CANCELLED: UnavailableError,
}

Detail = TypeVar("Detail", bound=Message)


class FailedCall(Protocol):
    """Interface (Protocol) of a failed RPC: the methods that the RPC errors of ``grpc`` and of ``grpc.aio`` have in common."""

    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...


def error_from_call(call: FailedCall) -> ProbescoreError:
    """Returns the exception for an RPC that ended with a status other than OK."""
    code, status = call.code(), _status_details(call)
    info = _detail(status, error_details_pb2.ErrorInfo())
    request = _detail(status, error_details_pb2.BadRequest())
    retry = _detail(status, error_details_pb2.RetryInfo())
    ours = info is not None and info.domain == ERROR_DOMAIN
    kind = _BY_CODE.get(code, ServerError)
    if kind is OverloadedError and not ours:
        # gRPC itself refuses a large message with the code of an overload, but without our details
        kind = MessageTooLargeError
    elif info is not None and ours and info.reason == OUT_OF_MEMORY:
        kind = OutOfMemoryError
    elif kind is MismatchError and info is not None and ours and info.reason not in _MISMATCHES:
        kind = ServerError  # something must be done on the server first
    return kind(
        call.details() or code.name,
        code=code.name,
        reason=info.reason if info is not None and ours else "",
        violations=_violations(request, info if ours else None),
        retry_seconds=retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9 if retry else None,
    )


def _violations(request: error_details_pb2.BadRequest | None, info: error_details_pb2.ErrorInfo | None) -> tuple[FieldViolation, ...]:
    if request is not None:
        return tuple(FieldViolation(entry.field, entry.description) for entry in request.field_violations)
    if info is not None and "field" in info.metadata:  # a mismatch, which is no fault of the request
        found, expected = info.metadata.get("found", "another"), info.metadata.get("expected", "what was asked for")
        return (FieldViolation(info.metadata["field"], f"the server runs {found}, the request expects {expected}"),)
    return ()


def invalid_request(error: MessageError) -> InvalidRequestError:
    """Returns the exception for a value that the client refused before sending it; the exception is the same as if the server had refused
    the value.
    """
    violation = FieldViolation(error.field, error.problem)
    return InvalidRequestError(str(error), "INVALID_ARGUMENT", "INVALID_REQUEST", (violation,))


def malformed_answer(problem: object) -> ServerError:
    """Returns the exception for a response that violates the protobuf contract."""
    return ServerError(f"the server's answer breaks the contract: {problem}", "INTERNAL", "MALFORMED_ANSWER")


def _status_details(call: FailedCall) -> status_pb2.Status:
    status = status_pb2.Status()
    for key, value in call.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            try:
                status.ParseFromString(value)
            except DecodeError:
                status.Clear()
    return status


def _detail(status: status_pb2.Status, detail: Detail) -> Detail | None:
    for packed in status.details:
        if packed.Is(detail.DESCRIPTOR):
            try:
                packed.Unpack(detail)
            except DecodeError:
                continue
            return detail
    return None
