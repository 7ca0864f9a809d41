"""Every limit that ``GetServerInfo`` tells: just inside a request is answered, just outside it is refused by the limit's name."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import psutil
import pytest
from calls import SERVING, TIMEOUT, connected, details, eventually, group, health, ids, request, total, violated_field
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from models import BOS
from running_server import RunningServer, start_server

from probescore import Limits, OverloadedError, ProbeClient, RolloutGroup
from probescore.v1 import probes_pb2, scoring_pb2, tensor_pb2

LIMITS = {
    "max_rollout_tokens": 64,
    "max_request_tokens": 96,
    "max_request_rollouts": 6,
    "max_follow_ups": 3,
    "max_reductions": 3,
    "max_spans": 4,
    "max_span_scores": 60,
    "max_request_values": 40,
    "max_text_bytes_per_token": 2,
    "max_chat_messages": 3,
    "max_chat_seconds": 5.0,
    "max_calls": 3,
    "max_in_flight_bytes": 4096,
    "max_connections": 50,
    "max_calls_per_connection": 50,
}
PROMPT = [BOS, 5]


@pytest.fixture(scope="module")
def server(model: Path, probe_file: Path) -> Iterator[RunningServer]:
    with start_server(model, [probe_file], **LIMITS) as running:
        yield running


def completion(tokens: int = 2, **fields: object) -> scoring_pb2.Completion:
    return scoring_pb2.Completion(ids=ids(*range(10, 10 + tokens)), **fields)


def one_group(*completions: scoring_pb2.Completion, **options: object) -> scoring_pb2.ScoreRequest:
    return request(scoring_pb2.RolloutGroup(prompt=scoring_pb2.Prompt(ids=ids(*PROMPT)), completions=completions), **options)


def spans(count: int, tokens: int) -> list[scoring_pb2.Span]:
    return [scoring_pb2.Span(name=f"s{index}", start=0, end=tokens) for index in range(count)]


def chain(length: int) -> list[scoring_pb2.Completion]:
    return [completion(1, follow_ups=chain(length - 1))] if length else []


def reductions(count: int) -> list[probes_pb2.Reduction]:
    return [probes_pb2.Reduction(kind=probes_pb2.REDUCTION_KIND_TOPK_MEAN, parameter=1 + index) for index in range(count)]


def text(size: int) -> scoring_pb2.Completion:
    return scoring_pb2.Completion(text=("w7 " * size)[:size])


def chat(messages: int, content: str = "w7") -> scoring_pb2.ScoreRequest:
    said = [scoring_pb2.ChatMessage(role="user", content=content) for _ in range(messages)]
    prompt = scoring_pb2.Prompt(chat=scoring_pb2.Chat(messages=said))
    return request(scoring_pb2.RolloutGroup(prompt=prompt, completions=[completion()]))


CASES = {
    # by case: the limit, what is just inside it, what is just outside, and the field that is named
    "completions": ("max_request_rollouts", one_group(*[completion()] * 6), one_group(*[completion()] * 7), "groups"),
    "groups": ("max_request_rollouts", request(*[group(PROMPT, [9])] * 6), request(*[group(PROMPT, [9])] * 7), "groups"),
    "follow-ups of all": (
        "max_request_rollouts",
        one_group(*[completion(follow_ups=[completion(1)])] * 3),
        one_group(*[completion(follow_ups=[completion(1)])] * 3, completion()),
        "groups",
    ),
    "empty completions": (
        "max_request_rollouts",
        one_group(*[scoring_pb2.Completion()] * 6),
        one_group(*[scoring_pb2.Completion()] * 7),
        "groups",
    ),
    "follow-ups side by side": (
        "max_follow_ups",
        one_group(completion(follow_ups=[completion(1)] * 3)),
        one_group(completion(follow_ups=[completion(1)] * 4)),
        "groups[0].completions[0].follow_ups",
    ),
    "follow-ups of follow-ups": (
        "max_follow_ups",
        one_group(completion(), completion(follow_ups=chain(3))),
        one_group(completion(), completion(follow_ups=chain(4))),
        "groups[0].completions[1].follow_ups",
    ),
    "reductions": ("max_reductions", request(reductions=reductions(3)), request(reductions=reductions(4)), "reductions"),
    "spans": (
        "max_spans",
        one_group(completion(spans=spans(4, 1))),
        one_group(completion(spans=spans(5, 1))),
        "groups[0].completions[0].spans",
    ),
    "spans of a follow-up": (
        "max_spans",
        one_group(completion(follow_ups=[completion(spans=spans(4, 1))])),
        one_group(completion(follow_ups=[completion(spans=spans(5, 1))])),
        "groups[0].completions[0].follow_ups[0].spans",
    ),
    "what spans read": (
        "max_span_scores",
        one_group(completion(15, spans=spans(4, 15))),
        one_group(completion(16, spans=spans(4, 16))),
        "groups[0].completions[0].spans",
    ),
    "what spans read, by reduction": (
        "max_span_scores",
        one_group(completion(10, spans=spans(3, 10)), reductions=reductions(2)),
        one_group(completion(10, spans=spans(3, 10)), reductions=reductions(3)),
        "groups[0].completions[0].spans",
    ),
    "tokens that spans read again": (
        "max_request_tokens",  # 2 of the prompt, 32 and 15 of completions, 47 again
        one_group(completion(32), completion(15, spans=spans(4, 15)), completion(2, spans=[])),
        one_group(completion(32), completion(15, spans=spans(4, 15)), completion(3, spans=[])),
        "groups",
    ),
    "numbers per token": (
        "max_request_values",
        one_group(completion(39), token_scores=scoring_pb2.TokenScores(all=True)),
        one_group(completion(40), token_scores=scoring_pb2.TokenScores(all=True)),
        "groups",
    ),
    "numbers per span and reduction": (
        "max_request_values",
        one_group(*[completion(spans=spans(3, 1))] * 3, completion(), reductions=reductions(3)),
        one_group(*[completion(spans=spans(3, 1))] * 3, completion(spans=spans(1, 1)), reductions=reductions(3)),
        "groups",
    ),
    "numbers of the prompt": (
        "max_request_values",
        request(group(range(1, 40), [9]), token_scores=scoring_pb2.TokenScores(all=True), scope="SCOPE_PROMPT"),
        request(group(range(1, 41), [9]), token_scores=scoring_pb2.TokenScores(all=True), scope="SCOPE_PROMPT"),
        "groups",
    ),
    "a text": (
        "max_text_bytes_per_token × max_rollout_tokens",
        one_group(text(128)),
        one_group(text(129)),
        "groups[0].completions[0]",
    ),
    "all texts": (
        "max_text_bytes_per_token × max_request_tokens",
        one_group(text(100), text(92)),
        one_group(text(100), text(93)),
        "groups",
    ),
    "messages of a chat": ("max_chat_messages", chat(3), chat(4), "groups[0].prompt.chat.messages"),
    "a rendered chat": (
        "max_text_bytes_per_token × max_rollout_tokens",
        chat(1, "w7 " * 35),
        chat(1, "w7 " * 40),  # 120 bytes, and what the template adds
        "groups[0].prompt",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_just_inside_is_answered_and_just_outside_refused_by_name(server: RunningServer, case: str) -> None:
    limit, inside, outside, field = CASES[case]
    with connected(server) as stub:
        assert stub.Score(inside, timeout=TIMEOUT).groups
        for call in (
            lambda: stub.Score(outside, timeout=TIMEOUT),
            lambda: list(stub.ScoreStream(scoring_pb2.ScoreStreamRequest(request=outside), timeout=TIMEOUT)),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                call()
            error = refused.value
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert violated_field(error) == field
            assert limit in error.details()
            (info,) = details(error, ErrorInfo)
            assert info.reason in ("LIMIT_EXCEEDED", "TOO_LONG")
            assert info.metadata["limit"] == limit
            assert int(info.metadata["value"]) > int(info.metadata["maximum"]) > 0


def test_the_server_tells_every_limit(server: RunningServer) -> None:
    with ProbeClient(server.address) as client:
        told = dataclasses.asdict(client.get_server_info().limits)
    assert {name: told[name] for name in LIMITS} == LIMITS
    assert set(told) == {field.name for field in dataclasses.fields(Limits)}
    assert all(told.values())


@pytest.mark.parametrize(
    "hostile",
    {
        "names of probes": scoring_pb2.ScoreRequest(groups=[group(PROMPT, [9])], probes=["direction"] * 100_000),
        "wanted scores": scoring_pb2.ScoreRequest(
            groups=[group(PROMPT, [9])], token_scores=scoring_pb2.TokenScores(probes=["direction"] * 100_000)
        ),
        "axes of a shape": one_group(
            scoring_pb2.Completion(ids=tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_INT32, shape=[0] * 1_000_000))
        ),
    }.items(),
    ids=lambda case: case[0],
)
def test_lists_without_end_are_refused(served: RunningServer, hostile: tuple[str, scoring_pb2.ScoreRequest]) -> None:
    with connected(served) as stub, pytest.raises(grpc.RpcError) as refused:
        stub.Score(hostile[1], timeout=TIMEOUT)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


# ------------------------------------------------------------------------------------------------------------ calls, bytes, connections


@contextmanager
def stopped_worker(server: RunningServer) -> Iterator[None]:
    os.kill(server.worker_pid(), signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.worker_pid(), signal.SIGCONT)


def busy(call: grpc.Future, limit: str) -> None:
    error = call.exception()
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    (info,) = details(error, ErrorInfo)
    assert (info.reason, info.metadata["limit"]) == ("BUSY", limit)
    assert details(error, RetryInfo)[0].retry_delay.ToMilliseconds() > 0


def test_calls_over_the_limit_are_refused_at_once_and_health_answers(server: RunningServer) -> None:
    with connected(server) as stub:
        with stopped_worker(server):
            accepted = [stub.Score.future(request(group(PROMPT, [20 + index])), timeout=TIMEOUT) for index in range(3)]
            eventually(lambda: total(server, "probescore_rpcs_in_flight") == 3)
            busy(stub.Score.future(request(), timeout=TIMEOUT), "max_calls")
            assert health(server) == SERVING
            with ProbeClient(server.address, restart_budget=0) as client, pytest.raises(OverloadedError):
                client.score([RolloutGroup(PROMPT, [[9]])])
        assert all(call.result().groups for call in accepted)
        assert stub.Score(request(), timeout=TIMEOUT).groups


def test_bytes_over_the_limit_are_refused_at_once_and_a_single_large_request_is_not(server: RunningServer) -> None:
    large = request(group(PROMPT, [9]))
    large.groups[0].completions[0].id = "x" * 4096
    with connected(server) as stub:
        with stopped_worker(server):
            accepted = stub.Score.future(large, timeout=TIMEOUT)
            eventually(lambda: total(server, "probescore_rpcs_in_flight") == 1)
            busy(stub.Score.future(request(), timeout=TIMEOUT), "max_in_flight_bytes")
        assert accepted.result().groups
        assert stub.Score(request(), timeout=TIMEOUT).groups


@pytest.fixture(scope="module")
def narrow(model: Path, probe_file: Path) -> Iterator[RunningServer]:
    with start_server(model, [probe_file], max_connections=2, max_calls_per_connection=2) as running:
        yield running


def test_connections_over_the_limit_are_closed_and_room_comes_back(narrow: RunningServer) -> None:
    with ExitStack() as open_ones:
        stubs = [open_ones.enter_context(connected(narrow)) for _ in range(2)]
        assert all(stub.Score(request(), timeout=TIMEOUT).groups for stub in stubs)
        with connected(narrow) as third, pytest.raises(grpc.RpcError) as refused:
            third.Score(request(), timeout=TIMEOUT)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert all(stub.Score(request(), timeout=TIMEOUT).groups for stub in stubs)
    with connected(narrow) as again:
        assert again.Score(request(), timeout=TIMEOUT, wait_for_ready=True).groups


def test_calls_over_the_limit_of_a_connection_wait_in_the_client(narrow: RunningServer) -> None:
    with connected(narrow) as stub, connected(narrow) as other:
        assert stub.Score(request(), timeout=TIMEOUT, wait_for_ready=True).groups
        assert other.Score(request(), timeout=TIMEOUT, wait_for_ready=True).groups
        with stopped_worker(narrow):
            calls = [stub.Score.future(request(group(PROMPT, [20 + index])), timeout=TIMEOUT) for index in range(4)]
            eventually(lambda: total(narrow, "probescore_rpcs_in_flight") == 2)
            calls.append(other.Score.future(request(), timeout=TIMEOUT))
            eventually(lambda: total(narrow, "probescore_rpcs_in_flight") == 3)
        assert all(call.result().groups for call in calls)


@pytest.mark.parametrize("algorithm", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_what_a_small_message_inflates_to_counts(served: RunningServer, algorithm: grpc.Compression) -> None:
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(served.address, options=options, compression=algorithm) as channel:
        score = channel.unary_unary("/probescore.v1.ScoringService/Score", None, scoring_pb2.ScoreResponse.FromString)
        message = request()
        message.groups[0].completions[0].id = "x" * 1_000_000
        assert score(message.SerializeToString(), timeout=TIMEOUT).groups
        message.groups[0].completions[0].id = "x" * 200_000_000
        before = psutil.Process(served.pid).memory_info().rss
        with pytest.raises(grpc.RpcError) as refused:
            score(message.SerializeToString(), timeout=TIMEOUT)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert psutil.Process(served.pid).memory_info().rss - before < 120_000_000
        message.groups[0].completions[0].id = "x"
        assert score(message.SerializeToString(), timeout=TIMEOUT).groups
