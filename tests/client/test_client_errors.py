"""A failed call becomes the exception that says why."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from scripted_server import Refusal, Service, error_info, group, queue_full, retry_info, serving

from probescore import (
    AuthenticationError,
    DeadlineExceededError,
    FieldViolation,
    InvalidRequestError,
    MessageTooLargeError,
    MismatchError,
    OutOfMemoryError,
    OverloadedError,
    ProbeClient,
    ProbescoreError,
    ServerError,
    TransientError,
    UnavailableError,
    errors,
)
from probescore.v1 import scoring_pb2


def bad_request(*violations: tuple[str, str]) -> error_details_pb2.BadRequest:
    fields = [error_details_pb2.BadRequest.FieldViolation(field=field, description=problem) for field, problem in violations]
    return error_details_pb2.BadRequest(field_violations=fields)


def failure(client: Any, service: Service, refusal: Refusal) -> ProbescoreError:
    service.script = [refusal] * 9
    with pytest.raises(ProbescoreError) as raised:
        client.score([group([1])])
    return raised.value


@pytest.fixture
def client(client_class: Any, address: str) -> Any:
    with client_class(address, timeout=20, restart_budget=0) as opened:
        yield opened


def test_an_invalid_request_names_its_fields(client: Any, service: Service) -> None:
    violations = bad_request(("groups[0].prompt", "is too long"), ("run_id", "has 300 bytes; at most 256"))
    details = (error_info("INVALID_REQUEST"), violations)

    error = failure(client, service, Refusal(grpc.StatusCode.INVALID_ARGUMENT, "groups[0].prompt: is too long", details))

    assert type(error) is InvalidRequestError
    assert isinstance(error, ValueError)
    assert (error.code, error.reason, error.field) == ("INVALID_ARGUMENT", "INVALID_REQUEST", "groups[0].prompt")
    assert error.violations[1] == FieldViolation("run_id", "has 300 bytes; at most 256")
    assert str(error) == "groups[0].prompt: is too long"
    assert len(service.requests) == 1


def test_a_mismatch_names_what_differs(client: Any, service: Service) -> None:
    info = error_info("MISMATCH")
    info.metadata.update(field="expected_model_fingerprint", found="sha256:a", expected="sha256:b")

    error = failure(client, service, Refusal(grpc.StatusCode.FAILED_PRECONDITION, "another model", (info,)))

    assert type(error) is MismatchError
    assert error.violations == (FieldViolation("expected_model_fingerprint", "the server runs sha256:a, the request expects sha256:b"),)


def test_an_overload_says_when_to_come_back(client: Any, service: Service) -> None:
    error = failure(client, service, queue_full(retry_seconds=1.5))

    assert type(error) is OverloadedError
    assert (error.reason, error.retry_seconds) == ("QUEUE_FULL", 1.5)


def test_a_rollout_too_large_for_the_device_is_no_overload_and_is_not_tried_again(client: Any, service: Service) -> None:
    refusal = Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "a rollout of 9 tokens does not fit", (error_info("OUT_OF_MEMORY"),))

    error = failure(client, service, refusal)

    assert type(error) is OutOfMemoryError
    assert not isinstance(error, TransientError)
    assert len(service.requests) == 1


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.FAILED_PRECONDITION, MismatchError),
        (grpc.StatusCode.UNAUTHENTICATED, AuthenticationError),
        (grpc.StatusCode.PERMISSION_DENIED, AuthenticationError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceededError),
        (grpc.StatusCode.UNAVAILABLE, UnavailableError),
        (grpc.StatusCode.CANCELLED, UnavailableError),
        (grpc.StatusCode.INTERNAL, ServerError),
        (grpc.StatusCode.UNKNOWN, ServerError),
        (grpc.StatusCode.UNIMPLEMENTED, ServerError),
        (grpc.StatusCode.DATA_LOSS, ServerError),
    ],
)
def test_every_status_has_its_exception_also_without_details(client: Any, service: Service, code: grpc.StatusCode, kind: type) -> None:
    error = failure(client, service, Refusal(code, "no reason given"))

    assert type(error) is kind
    assert (str(error), error.code, error.reason, error.field, error.retry_seconds) == ("no reason given", code.name, "", "", None)


def test_an_answer_above_the_limit_of_bytes_is_told_apart_from_an_overload(client_class: Any, service: Service) -> None:
    # given a server whose own limit is 1 kB: gRPC refuses the request before the service sees it
    with (
        serving(service, max_receive_message_length=1000) as address,
        client_class(address, restart_budget=0) as client,
        pytest.raises(MessageTooLargeError) as raised,
    ):
        client.score([group(range(1000))])

    assert raised.value.code == "RESOURCE_EXHAUSTED"
    assert service.requests == []


def test_details_of_another_domain_are_not_ours(client: Any, service: Service) -> None:
    details = (error_info("QUOTA", domain="proxy.example"),)

    error = failure(client, service, Refusal(grpc.StatusCode.INTERNAL, "quota", details))

    assert error.reason == ""


@pytest.mark.parametrize("raw", [b"", b"\xff\xff\xff", b"\x1a\x02\xff\xff"])
def test_details_that_cannot_be_read_leave_the_status(client: Any, service: Service, raw: bytes) -> None:
    error = failure(client, service, Refusal(grpc.StatusCode.INVALID_ARGUMENT, "wrong", raw_details=raw))

    assert type(error) is InvalidRequestError
    assert str(error) == "wrong"


def test_a_detail_whose_content_cannot_be_read_is_left_out(client: Any, service: Service) -> None:

    broken = any_pb2.Any(type_url="type.googleapis.com/google.rpc.BadRequest", value=b"\xff\xff")
    raw = status_pb2.Status(details=[broken]).SerializeToString()

    assert failure(client, service, Refusal(grpc.StatusCode.INVALID_ARGUMENT, "wrong", raw_details=raw)).violations == ()


def test_a_value_refused_before_it_is_sent_looks_as_if_the_server_had_refused_it(client: Any, service: Service) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        client.score([group([1], [0.5])])

    assert (raised.value.code, raised.value.reason) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
    assert raised.value.field == "groups[0].completions[1].ids"
    assert service.requests == []


@pytest.mark.parametrize(
    "answer",
    [
        scoring_pb2.ScoreResponse(),
        scoring_pb2.ScoreResponse(groups=[scoring_pb2.GroupScores(completions=[scoring_pb2.CompletionScores(status=1)] * 2)]),
        scoring_pb2.ScoreResponse(groups=[scoring_pb2.GroupScores(completions=[scoring_pb2.CompletionScores()])]),
    ],
    ids=["no group", "a completion too many", "no status"],
)
def test_an_answer_that_breaks_the_contract_is_the_servers_fault(client: Any, service: Service, answer: Any) -> None:
    service.script = [lambda _: answer]
    with pytest.raises(ServerError, match="breaks the contract") as raised:
        client.score([group([1])])
    assert raised.value.reason == "MALFORMED_ANSWER"


def every_kind(root: type[ProbescoreError] = ProbescoreError) -> list[type[ProbescoreError]]:
    return [root, *(kind for child in root.__subclasses__() for kind in every_kind(child))]


@pytest.mark.parametrize("kind", every_kind())
@pytest.mark.parametrize("duplicate", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))], ids=["copy", "pickle"])
def test_every_exception_survives_the_way_to_another_process(kind: type[ProbescoreError], duplicate: Any) -> None:
    error = kind("message", "UNAVAILABLE", "REASON", (FieldViolation("a", "b"),), 2.5)

    copied = duplicate(error)

    assert type(copied) is kind
    assert vars(copied) == vars(error)
    assert str(copied) == "message"


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    for kind in every_kind():
        assert kind.__name__ in (errors.__doc__ or "")
    assert issubclass(UnavailableError, TransientError)
    assert issubclass(OverloadedError, TransientError)
    assert issubclass(DeadlineExceededError, TimeoutError)


def test_an_error_shows_no_trace_of_grpc(address: str, service: Service) -> None:
    service.script = [Refusal(grpc.StatusCode.INTERNAL, "broken", (retry_info(1),))]
    with ProbeClient(address) as client, pytest.raises(ServerError) as raised:
        client.score([group([1])])
    assert raised.value.__context__ is None
