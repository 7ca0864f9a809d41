"""Every error of the core has a status; what travels fits into HTTP/2 headers."""

from __future__ import annotations

import pickle

import pytest
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc import StatusCode

from probescore_server.errors import (
    CoreError,
    DeadlineExpired,
    InternalFault,
    InvalidRequest,
    LimitExceeded,
    Mismatch,
    OutOfMemory,
    QueueFull,
    ServerBusy,
    WorkerUnavailable,
)
from probescore_server.front.status_codes import status_of

ERRORS = [
    (InvalidRequest("groups[0]", "is wrong"), StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    (InvalidRequest("groups[0]", "is long", "TOO_LONG"), StatusCode.INVALID_ARGUMENT, "TOO_LONG"),
    (LimitExceeded("groups[0]", 5, "spans", "max_spans", 4, "send fewer"), StatusCode.INVALID_ARGUMENT, "LIMIT_EXCEEDED"),
    (LimitExceeded("groups", 5, "tokens", "max_request_tokens", 4, "send fewer", "TOO_LONG"), StatusCode.INVALID_ARGUMENT, "TOO_LONG"),
    (Mismatch("expected_model_fingerprint", "a", "b"), StatusCode.FAILED_PRECONDITION, "MISMATCH"),
    (QueueFull(5, 4, 1.25), StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
    (ServerBusy(5, "calls", "max_calls", 4, 1.0), StatusCode.RESOURCE_EXHAUSTED, "BUSY"),
    (WorkerUnavailable("down", 0.5), StatusCode.UNAVAILABLE, "WORKER_UNAVAILABLE"),
    (OutOfMemory(9), StatusCode.RESOURCE_EXHAUSTED, "OUT_OF_MEMORY"),
    (DeadlineExpired("late"), StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXPIRED"),
    (InternalFault("0a1b"), StatusCode.INTERNAL, "INTERNAL"),
]


def parts(error: CoreError) -> tuple[Status, dict[str, Message]]:
    status = Status.FromString(dict(status_of(error).trailing_metadata)["grpc-status-details-bin"])
    found: dict[str, Message] = {}
    for packed in status.details:
        for kind in (ErrorInfo, BadRequest, RetryInfo):
            detail = kind()
            if packed.Unpack(detail):
                found[kind.__name__] = detail
    return status, found


@pytest.mark.parametrize(("error", "code", "reason"), ERRORS, ids=lambda value: type(value).__name__)
def test_an_error_has_a_code_and_a_reason(error: CoreError, code: StatusCode, reason: str) -> None:
    status, found = parts(error)
    assert status_of(error).code is code
    assert status.code == code.value[0]
    assert status.message == status_of(error).details == str(error)
    assert (found["ErrorInfo"].reason, found["ErrorInfo"].domain) == (reason, "probescore")


def test_a_wrong_request_names_its_field() -> None:
    _, found = parts(InvalidRequest("groups[2].completions[0].mask", "has 3 entries"))
    (violation,) = found["BadRequest"].field_violations
    assert (violation.field, violation.description) == ("groups[2].completions[0].mask", "has 3 entries")


def test_what_may_succeed_later_says_when_to_retry_to_people_and_to_grpc() -> None:
    for error, milliseconds in ((QueueFull(5, 4, 1.25), 1250), (WorkerUnavailable("down", 61.0), 61_000)):
        _, found = parts(error)
        assert found["RetryInfo"].retry_delay.ToMilliseconds() == milliseconds
        assert ("grpc-retry-pushback-ms", str(milliseconds)) in status_of(error).trailing_metadata


def test_what_does_not_fit_alone_names_its_tokens_and_does_not_ask_for_a_retry() -> None:
    _, found = parts(OutOfMemory(123))
    assert found["ErrorInfo"].metadata["tokens"] == "123"
    assert "123 tokens" in str(OutOfMemory(123))
    assert "RetryInfo" not in found


def test_a_fault_shows_its_incident_and_nothing_else() -> None:
    _, found = parts(InternalFault("0a1b"))
    assert dict(found["ErrorInfo"].metadata) == {"incident": "0a1b"}


@pytest.mark.parametrize("letter", ["a", "é", "€", "😀"])
def test_long_texts_are_cut_so_that_the_status_fits_into_headers(letter: str) -> None:
    status = status_of(InvalidRequest("probes[0]", letter * 100_000))
    base64 = sum(len(value) for _, value in status.trailing_metadata) * 4 / 3
    percent_encoded = 3 * len(status.details.encode())
    assert base64 + percent_encoded < 8 * 1024
    assert status.details.endswith("…")


def test_a_request_above_a_limit_names_field_value_limit_and_remedy() -> None:
    error = LimitExceeded("groups[0].spans", 5, "spans", "max_spans", 4, "send fewer")
    _, found = parts(error)
    assert dict(found["ErrorInfo"].metadata) == {"limit": "max_spans", "value": "5", "maximum": "4"}
    (violation,) = found["BadRequest"].field_violations
    assert (violation.field, violation.description) == ("groups[0].spans", "5 spans; the limit max_spans is 4: send fewer")
    crossed = pickle.loads(pickle.dumps(error))  # from a worker
    assert (str(crossed), crossed.reason, crossed.maximum) == (str(error), "LIMIT_EXCEEDED", 4)


def test_a_busy_server_names_its_limit_and_says_when_to_come_back() -> None:
    _, found = parts(ServerBusy(5, "calls", "max_calls", 4, 1.5))
    assert dict(found["ErrorInfo"].metadata) == {"limit": "max_calls", "value": "5", "maximum": "4"}
    assert found["RetryInfo"].retry_delay.ToMilliseconds() == 1500
