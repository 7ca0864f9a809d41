"""Nobody waits for somebody else's work: a neighbour's small call beside what a server takes at most, and after what was given up."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from calls import TIMEOUT, connected, eventually, group, ids, request, total
from models import BOS, tiny_model
from running_server import RunningServer, start_server
from slow_probe import ENDLESS, write_slow_probe

from probescore.v1 import probes_pb2, scoring_pb2

LARGE_TEXT = 3_000_000


@pytest.fixture(scope="module")
def server(probe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    slow = write_slow_probe(tmp_path_factory.mktemp("slow") / "slow.onnx")
    # so many tokens that texts of megabytes may be tokenised
    limits = {"max_rollout_tokens": 1_048_576, "max_request_tokens": 2_097_152}
    with start_server(tiny_model(), [probe_file, slow], **limits) as running:
        yield running


def of_texts(*completions: str) -> scoring_pb2.ScoreRequest:
    prompt = scoring_pb2.Prompt(ids=ids(BOS))
    completed = [scoring_pb2.Completion(text=text) for text in completions]
    return request(scoring_pb2.RolloutGroup(prompt=prompt, completions=completed), probes=["direction"])


def in_flight(server: RunningServer) -> float:
    return total(server, "probescore_rpcs_in_flight")


def words(size: int) -> str:
    return ("w7 w8 w9 " * (size // 9 + 1))[:size]


MANY_TEXTS = [words(10_000) for _ in range(400)]


@pytest.mark.parametrize("large", [[words(LARGE_TEXT)], MANY_TEXTS], ids=["one text", "many texts"])
def test_a_small_text_is_answered_before_large_ones(server: RunningServer, large: list[str]) -> None:
    ended: list[str] = []
    with connected(server) as mine, connected(server) as neighbours:
        big = mine.Score.future(of_texts(*large), timeout=TIMEOUT)
        big.add_done_callback(lambda _: ended.append("large"))
        eventually(lambda: in_flight(server) == 1)
        assert neighbours.Score(of_texts("w7 w8 w9 w10"), timeout=TIMEOUT).groups
        ended.append("small")
        assert big.code() is grpc.StatusCode.INVALID_ARGUMENT  # longer than the model's positions, which its ids tell
    assert ended[0] == "small"


def test_texts_that_nobody_waits_for_are_not_tokenised_to_their_end(server: RunningServer) -> None:
    """Many requests leave early; were each tokenised all the same, the one behind them would wait for minutes."""
    texts = [words(16_000) for _ in range(1000)]
    with connected(server) as stub:
        leaving = [stub.Score.future(of_texts(*texts), timeout=1.0) for _ in range(8)]
        assert all(call.code() is grpc.StatusCode.DEADLINE_EXCEEDED for call in leaving)
        with pytest.raises(grpc.RpcError) as refused:
            stub.Score(of_texts(words(20_000)), timeout=TIMEOUT)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # it was tokenised, and is too long


@pytest.mark.parametrize("leave", ["deadline", "cancel"])
def test_a_graph_whose_caller_left_holds_up_nobody(server: RunningServer, leave: str) -> None:
    endless = request(group([BOS, 5], [50, ENDLESS]), probes=["slow"])
    with connected(server) as stub:
        call = stub.Score.future(endless, timeout=1.0 if leave == "deadline" else TIMEOUT)
        eventually(lambda: in_flight(server) == 1)
        time.sleep(0.3)  # until the graph runs
        if leave == "cancel":
            call.cancel()
        answer = stub.Score(request(group([BOS, 5], [50, 51]), probes=["slow"]), timeout=TIMEOUT)
        assert answer.groups[0].completions[0].scores
        assert call.done()
        assert call.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)


def test_a_neighbour_is_answered_before_the_largest_request_of_spans(server: RunningServer) -> None:
    """24 kB of spans for each of some completions, under every reduction that a request may have: batch by batch, others between."""
    spans = [scoring_pb2.Span(name=f"s{index}", start=0, end=400) for index in range(1024)]
    completions = [scoring_pb2.Completion(ids=ids(*[10 + (index + shift) % 60 for index in range(400)]), spans=spans) for shift in range(4)]
    kinds = [probes_pb2.REDUCTION_KIND_EMA_MAX, probes_pb2.REDUCTION_KIND_WINDOW_MAX_MEAN, probes_pb2.REDUCTION_KIND_TOPK_MEAN]
    reductions = [probes_pb2.Reduction(kind=kind, parameter=1) for kind in kinds]
    large = request(
        scoring_pb2.RolloutGroup(prompt=scoring_pb2.Prompt(ids=ids(BOS)), completions=completions),
        reductions=reductions,
        probes=["direction"],
    )
    ended: list[str] = []
    with connected(server) as mine, connected(server) as neighbours:
        big = mine.Score.future(large, timeout=TIMEOUT)
        big.add_done_callback(lambda _: ended.append("large"))
        eventually(lambda: in_flight(server) == 1)
        assert neighbours.Score(request(probes=["direction"]), timeout=TIMEOUT).groups
        ended.append("small")
        answer = big.result()
    assert ended[0] == "small"
    assert list(answer.groups[0].completions[0].scores[0].reduced.shape) == [1025, 3, 1]


def test_a_neighbour_is_answered_before_the_largest_request_of_short_completions(server: RunningServer) -> None:
    """Six bytes of a message each, and a forward each."""
    short = [scoring_pb2.Completion(ids=ids(4 + index % 90, 4 + index // 90 % 90)) for index in range(3000)]
    large = request(scoring_pb2.RolloutGroup(prompt=scoring_pb2.Prompt(ids=ids(BOS)), completions=short), probes=["direction"])
    with connected(server) as mine, connected(server) as neighbours:
        big = mine.Score.future(large, timeout=3 * TIMEOUT)
        eventually(lambda: total(server, "probescore_queue_rollouts") > 0)
        assert neighbours.Score(request(probes=["direction"]), timeout=3 * TIMEOUT).groups
        assert not big.done()
        big.cancel()


def test_calls_are_answered_while_the_largest_request_is_read(server: RunningServer) -> None:
    """On the loop, reading it would hold up every other call."""
    large = request(group([BOS], *[[10 + index % 60] * 60 for index in range(16_384)]), probes=["direction"])
    answered: list[float] = []
    with connected(server) as mine, connected(server) as neighbours:
        neighbours.GetServerInfo(scoring_pb2.GetServerInfoRequest(), timeout=TIMEOUT)
        big = mine.Score.future(large, timeout=TIMEOUT)
        over = threading.Event()
        big.add_done_callback(lambda _: over.set())
        while not over.is_set():
            began = time.monotonic()
            neighbours.GetServerInfo(scoring_pb2.GetServerInfoRequest(), timeout=TIMEOUT)
            answered.append(time.monotonic() - began)
        assert big.result().groups
    assert len(answered) > 5
