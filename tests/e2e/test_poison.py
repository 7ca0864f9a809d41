"""What a client can send that is wrong: only its own call fails, the field is named, and nothing of the server shows."""

from __future__ import annotations

import re
import socket
from contextlib import suppress

import grpc
import pytest
from calls import SERVING, TIMEOUT, connected, details, group, health, ids, request, violated_field
from google.rpc.error_details_pb2 import ErrorInfo
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from models import BOS, MAX_POSITIONS, VOCAB_SIZE
from running_server import RunningServer

from probescore.v1 import probes_pb2, scoring_pb2, scoring_pb2_grpc, tensor_pb2

INT32, FLOAT32, BOOL, INT64 = (
    tensor_pb2.DATA_TYPE_INT32,
    tensor_pb2.DATA_TYPE_FLOAT32,
    tensor_pb2.DATA_TYPE_BOOL,
    tensor_pb2.DATA_TYPE_INT64,
)
Request = scoring_pb2.ScoreRequest
COMPLETION = "groups[0].completions[0]"


def tensor(dtype: int, shape: list[int], data: bytes) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(dtype=dtype, shape=shape, data=data)


def with_completion(**fields: object) -> Request:
    fields.setdefault("ids", ids(7, 8, 9))
    return request(scoring_pb2.RolloutGroup(prompt=scoring_pb2.Prompt(ids=ids(1)), completions=[scoring_pb2.Completion(**fields)]))


def with_ids(dtype: int, shape: list[int], data: bytes) -> Request:
    return with_completion(ids=tensor(dtype, shape, data))


def nested(depth: int) -> scoring_pb2.Completion:
    completion = scoring_pb2.Completion(ids=ids(7))
    if depth:
        completion.follow_ups.append(nested(depth - 1))
    return completion


POISON: dict[str, tuple[Request, str]] = {
    "no groups": (Request(), "groups"),
    "no completions": (request(group([1])), "groups[0].completions"),
    "id above the vocabulary": (request(group([1], [VOCAB_SIZE])), COMPLETION),
    "negative id": (request(group([1], [-1])), COMPLETION),
    "id above int32": (with_ids(INT64, [1], (2**40).to_bytes(8, "little")), COMPLETION),
    "most negative int64": (with_ids(INT64, [1], (2**63).to_bytes(8, "little")), COMPLETION),
    "ids of float": (with_ids(FLOAT32, [1], b"\0\0\x80\x7f"), COMPLETION),
    "NaN for ids": (with_ids(FLOAT32, [1], b"\0\0\xc0\x7f"), COMPLETION),
    "ids of no type": (with_ids(0, [1], b"\0\0\0\0"), COMPLETION),
    "ids of an unknown type": (with_ids(99, [1], b"\0\0\0\0"), COMPLETION),
    "too few bytes": (with_ids(INT32, [2], b"\0\0\0\0"), COMPLETION),
    "too many bytes": (with_ids(INT32, [1], b"\0" * 8), COMPLETION),
    "shape of 2**31": (with_ids(INT32, [2**31], b""), COMPLETION),
    "shape that overflows": (with_ids(INT32, [2**62, 2**62], b""), COMPLETION),
    "negative shape": (with_ids(INT32, [-1], b""), COMPLETION),
    "two axes": (with_ids(INT32, [1, 1], b"\0\0\0\0"), COMPLETION),
    "scalar": (with_ids(INT32, [], b"\0\0\0\0"), COMPLETION),
    "mask of the wrong length": (with_completion(mask=tensor(BOOL, [2], b"\1\1")), f"{COMPLETION}.mask"),
    "mask of neither 0 nor 1": (with_completion(mask=tensor(BOOL, [3], b"\1\2\0")), f"{COMPLETION}.mask"),
    "mask of int32": (with_completion(mask=tensor(INT32, [3], b"\0" * 12)), f"{COMPLETION}.mask"),
    "span beyond the end": (with_completion(spans=[scoring_pb2.Span(name="a", start=0, end=4)]), f"{COMPLETION}.spans[0]"),
    "span backwards": (with_completion(spans=[scoring_pb2.Span(name="a", start=2, end=1)]), f"{COMPLETION}.spans[0]"),
    "span without a name": (with_completion(spans=[scoring_pb2.Span(start=0, end=1)]), f"{COMPLETION}.spans[0]"),
    "span named twice": (with_completion(spans=[scoring_pb2.Span(name="a", end=1)] * 2), f"{COMPLETION}.spans[1]"),
    "span at 2**32 - 1": (with_completion(spans=[scoring_pb2.Span(name="a", end=2**32 - 1)]), f"{COMPLETION}.spans[0]"),
    "follow-ups nested too deep": (with_completion(follow_ups=[nested(9)]), f"{COMPLETION}.follow_ups[0]"),
    "longer than the model's positions": (request(group([1], [7] * MAX_POSITIONS)), COMPLETION),
    "unknown probe": (request(probes=["nobody"]), "probes[0]"),
    "probe name with NUL": (request(probes=["direction\0"]), "probes[0]"),
    "duplicate probe": (request(probes=["direction", "direction@1"]), "probes[1]"),
    "tokens of an unknown probe": (request(token_scores={"probes": ["nobody"]}), "token_scores.probes[0]"),
    "tokens of all and of some": (request(token_scores={"all": True, "probes": ["direction"]}), "token_scores.probes"),
    "unspecified reduction": (request(reductions=[{"kind": 0}]), "reductions[0]"),
    "unknown reduction": (request(reductions=[{"kind": 77}]), "reductions[0]"),
    "missing parameter": (request(reductions=[{"kind": probes_pb2.REDUCTION_KIND_TOPK_MEAN}]), "reductions[0]"),
    "NaN parameter": (request(reductions=[{"kind": probes_pb2.REDUCTION_KIND_EMA_MAX, "parameter": float("nan")}]), "reductions[0]"),
    "unneeded parameter": (request(reductions=[{"kind": probes_pb2.REDUCTION_KIND_MEAN, "parameter": 1}]), "reductions[0]"),
    "unknown scope": (request(scope=9), "scope"),
    "mask where the prompt is scored": (
        Request(groups=with_completion(mask=tensor(BOOL, [3], b"\1\1\1")).groups, scope=scoring_pb2.SCOPE_PROMPT),
        f"{COMPLETION}.mask",
    ),
    "priority above its range": (request(priority=101), "priority"),
    "priority below its range": (request(priority=-(2**31)), "priority"),
    "run_id too long": (request(run_id="é" * 129), "run_id"),
    "chat without messages": (
        request(scoring_pb2.RolloutGroup(prompt={"chat": {}}, completions=[{"ids": ids(7)}])),
        "groups[0].prompt",
    ),
}


def check_discreet(error: grpc.RpcError) -> None:
    """Nothing of the server's inside shows: no path, no traceback, no name of a Python exception."""
    shown = repr(error.details()) + repr([value for _, value in error.trailing_metadata() or ()])
    assert not re.search(r"Traceback|File \"|\.py\b|/tmp/|/home/|/usr/|site-packages|Error\(|Exception", shown), shown


def send(stub: scoring_pb2_grpc.ScoringServiceStub, method: str, message: Request) -> object:
    if method == "Score":
        return stub.Score(message, timeout=TIMEOUT)
    return list(stub.ScoreStream(scoring_pb2.ScoreStreamRequest(request=message), timeout=TIMEOUT))


@pytest.mark.parametrize("name", POISON)
@pytest.mark.parametrize("method", ["Score", "ScoreStream"])
def test_poison_is_refused_with_its_field_while_a_neighbour_is_scored(served: RunningServer, name: str, method: str) -> None:
    poison, field = POISON[name]
    with connected(served) as stub:
        neighbour = stub.Score.future(request(), timeout=TIMEOUT)
        with pytest.raises(grpc.RpcError) as refused:
            send(stub, method, poison)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert violated_field(refused.value).startswith(field)
        assert details(refused.value, ErrorInfo)[0].domain == "probescore"
        check_discreet(refused.value)
        assert neighbour.result().groups[0].completions[0].status == scoring_pb2.COMPLETION_STATUS_OK


@pytest.mark.parametrize("field", ["expected_model_fingerprint", "expected_tokenizer_fingerprint"])
def test_an_expected_fingerprint_that_is_not_the_servers_fails_the_call(served: RunningServer, field: str) -> None:
    with connected(served) as stub:
        with pytest.raises(grpc.RpcError) as refused:
            stub.Score(request(**{field: "sha256:" + "0" * 64}), timeout=TIMEOUT)
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        (info,) = details(refused.value, ErrorInfo)
        assert (info.reason, info.metadata["field"]) == ("MISMATCH", field)
        # and the one that it names is accepted
        assert stub.Score(request(**{field: info.metadata["found"]}), timeout=TIMEOUT).groups


def test_a_message_above_the_limit_is_refused(served: RunningServer) -> None:
    with connected(served) as stub, pytest.raises(grpc.RpcError) as refused:
        stub.Score(request(run_id="x" * 40_000_000), timeout=TIMEOUT)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_an_unknown_method_is_unimplemented(served: RunningServer) -> None:
    with grpc.insecure_channel(served.address) as channel, pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary("/probescore.v1.ScoringService/Nothing")(b"", timeout=TIMEOUT)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


# ------------------------------------------------------------------------------------------------------------------------- fuzz

ALLOWED = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION}
METHODS = (
    "/probescore.v1.ScoringService/Score",
    "/probescore.v1.ScoringService/ScoreStream",
    "/probescore.v1.ScoringService/GetServerInfo",
    "/probescore.v1.ScoringService/ListProbes",
    "/grpc.health.v1.Health/Check",
)
VALID = request(
    group([BOS, 5, 6], [7, 8, 9], [7]), probes=["direction"], token_scores={"all": True}, run_id="r", step=3
).SerializeToString()
fuzzed = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


def answered(server: RunningServer, method: str, message: bytes) -> None:
    """Sends bytes; the answer is scores or a discreet refusal."""
    with grpc.insecure_channel(server.address) as channel:
        call = channel.unary_stream(method)(message, timeout=TIMEOUT)
        with suppress(grpc.RpcError):
            list(call)
        if call.code() is not grpc.StatusCode.OK:
            assert call.code() in ALLOWED | ({grpc.StatusCode.NOT_FOUND} if "Health" in method else set()), call.details()
            check_discreet(call)


@fuzzed
@given(method=st.sampled_from(METHODS), message=st.binary(max_size=200))
@example(method=METHODS[0], message=b"\xff" * 8)
def test_random_bytes_as_a_message_are_answered_or_refused(served: RunningServer, method: str, message: bytes) -> None:
    answered(served, method, message)


@fuzzed
@given(changes=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=6), length=st.integers(0, len(VALID)))
def test_a_valid_message_with_bytes_changed_or_cut_off_is_answered_or_refused(
    served: RunningServer, changes: list[tuple[int, int]], length: int
) -> None:
    message = bytearray(VALID)
    for position, value in changes:
        message[position] = value
    answered(served, METHODS[0], bytes(message[: length or None]))


Tensors = st.builds(
    tensor,
    st.integers(-1, 7),
    st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 6), max_size=3),
    st.binary(max_size=40),
)
Continuations = st.recursive(
    st.builds(scoring_pb2.Completion, id=st.text(max_size=5), ids=Tensors, mask=st.none() | Tensors)
    | st.builds(scoring_pb2.Completion, text=st.text(max_size=8))
    | st.builds(scoring_pb2.Completion, id_list=st.builds(tensor_pb2.TokenIds, ids=st.lists(st.integers(0, 2**32 - 1), max_size=4))),
    lambda inner: st.builds(
        scoring_pb2.Completion,
        id_list=st.just(tensor_pb2.TokenIds(ids=[7, 8])),
        follow_ups=st.lists(inner, max_size=2),
        spans=st.lists(st.builds(scoring_pb2.Span, name=st.text(max_size=3), start=st.integers(0, 3), end=st.integers(0, 3)), max_size=2),
    ),
    max_leaves=5,
)
Prompts = (
    st.builds(scoring_pb2.Prompt, ids=Tensors)
    | st.builds(
        scoring_pb2.Prompt, text=st.builds(scoring_pb2.Text, text=st.text(max_size=9) | st.just("<s> w9"), add_special_tokens=st.booleans())
    )
    | st.builds(
        scoring_pb2.Prompt, chat=st.builds(lambda role, text: {"messages": [{"role": role, "content": text}]}, st.text(), st.text())
    )
    | st.builds(scoring_pb2.Prompt)
)
Requests = st.builds(
    Request,
    groups=st.lists(
        st.builds(scoring_pb2.RolloutGroup, prompt=Prompts, completions=st.lists(Continuations, min_size=1, max_size=3)),
        min_size=1,
        max_size=2,
    ),
    probes=st.sampled_from([[], ["direction"], ["direction@1"], ["direction@2"]]) | st.lists(st.text(max_size=4), max_size=2),
    reductions=st.lists(
        st.builds(probes_pb2.Reduction, kind=st.integers(-1, 12), parameter=st.none() | st.floats()),
        max_size=2,
    ),
    token_scores=st.builds(scoring_pb2.TokenScores, all=st.booleans()),
    scope=st.integers(-1, 5),
    return_token_ids=st.booleans(),
    return_token_texts=st.booleans(),
    priority=st.integers(-110, 110),
    run_id=st.text(max_size=5),
)


@fuzzed
@given(message=Requests)
def test_any_request_is_answered_or_refused(served: RunningServer, message: Request) -> None:
    answered(served, METHODS[0], message.SerializeToString())


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(noise=st.binary(max_size=500), polite=st.booleans())
def test_random_bytes_at_the_port_harm_nobody(served: RunningServer, noise: bytes, polite: bool) -> None:
    host, _, port = served.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=TIMEOUT) as connection:
        connection.sendall((b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" if polite else b"") + noise)
    assert health(served) == SERVING


def test_after_all_this_nothing_was_logged_as_a_fault(served: RunningServer) -> None:
    assert [event for event in served.events() if event["level"] == "error"] == []
