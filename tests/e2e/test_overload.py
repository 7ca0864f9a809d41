"""With the worker stopped in mid-batch: who is refused, and what a caller who leaves gives back."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from calls import SERVING, TIMEOUT, connected, details, eventually, group, health, numbers, request, total
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from running_server import RunningServer, start_server

from probescore.v1 import scoring_pb2

CALL_TOKENS = 10
ROOM = 5


@pytest.fixture(scope="module")
def server(model: Path, probe_file: Path) -> Iterator[RunningServer]:
    # a batch is larger than all that may wait, so that none is prepared beside the one that computes
    limits = {"max_rollout_tokens": CALL_TOKENS, "max_request_tokens": ROOM * CALL_TOKENS, "max_batch_tokens": 2 * ROOM * CALL_TOKENS}
    with start_server(model, [probe_file], **limits, max_queue_tokens=ROOM * CALL_TOKENS, keepalive_seconds=1) as running:
        yield running


@contextmanager
def stopped_worker(server: RunningServer) -> Iterator[None]:
    pid = server.worker_pid()
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def waiting_tokens(server: RunningServer) -> float:
    return total(server, "probescore_queue_tokens")


def in_flight(server: RunningServer) -> float:
    return total(server, "probescore_rpcs_in_flight")


_numbers = itertools.count()


def a_call() -> scoring_pb2.ScoreRequest:
    """Unlike every other: those that are identical are computed once."""
    number = next(_numbers)
    return request(group([1, 5, 6, 7], [8, 9, 10, 11, 12 + number // 64, 12 + number % 64]))


def score(answer: scoring_pb2.ScoreResponse) -> np.ndarray:
    return numbers(answer.groups[0].completions[0].scores[0].reduced)


def test_over_the_limit_exactly_the_excess_is_refused_at_once_and_health_stays_ok(server: RunningServer) -> None:
    with connected(server) as stub:
        with stopped_worker(server):
            computing = stub.Score.future(a_call(), timeout=TIMEOUT)
            eventually(lambda: in_flight(server) == 1 and waiting_tokens(server) == 0)
            asked = {stub.Score.future(message, timeout=TIMEOUT): message for message in [a_call() for _ in range(ROOM + 3)]}
            eventually(lambda: sum(call.done() for call in asked) == 3)
            assert health(server) == SERVING
            assert waiting_tokens(server) == ROOM * CALL_TOKENS
            for call in [call for call in asked if call.done()]:
                del asked[call]
                error = call.exception()
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert details(error, ErrorInfo)[0].reason == "QUEUE_FULL"
                assert details(error, RetryInfo)[0].retry_delay.ToMilliseconds() > 0
        assert computing.result().groups
        assert len(asked) == ROOM
        for call, message in asked.items():
            assert score(call.result()) == pytest.approx(score(stub.Score(message, timeout=TIMEOUT)))


@pytest.mark.parametrize("leave", ["cancel", "deadline"])
def test_a_caller_who_leaves_gives_back_the_room_of_what_waits(server: RunningServer, leave: str) -> None:
    with connected(server) as stub:
        with stopped_worker(server):
            computing = stub.Score.future(a_call(), timeout=TIMEOUT)
            eventually(lambda: in_flight(server) == 1)
            waiting = stub.Score.future(a_call(), timeout=TIMEOUT if leave == "cancel" else 0.5)
            eventually(lambda: waiting_tokens(server) == CALL_TOKENS or waiting.done())
            if leave == "cancel":
                waiting.cancel()
            eventually(lambda: waiting_tokens(server) == 0 and in_flight(server) == 1)
        assert computing.result().groups


def test_work_whose_deadline_passed_is_not_computed_and_neighbours_are(server: RunningServer) -> None:
    with connected(server) as stub:
        before = total(server, "probescore_batch_tokens_count")
        with stopped_worker(server):
            computing = stub.Score.future(a_call(), timeout=TIMEOUT)
            eventually(lambda: in_flight(server) == 1)
            expiring = stub.Score.future(a_call(), timeout=0.3)
            patient = stub.Score.future(a_call(), timeout=TIMEOUT)
            assert expiring.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert computing.result().groups
        assert patient.result().groups
    assert total(server, "probescore_batch_tokens_count") == before + 2


def test_a_caller_who_leaves_in_mid_batch_holds_up_nobody(server: RunningServer) -> None:
    with connected(server) as stub:
        with stopped_worker(server):
            leaving = stub.Score.future(a_call(), timeout=TIMEOUT)
            eventually(lambda: in_flight(server) == 1)
            leaving.cancel()
            eventually(lambda: in_flight(server) == 0)
            staying = stub.Score.future(a_call(), timeout=TIMEOUT)
            eventually(lambda: waiting_tokens(server) == CALL_TOKENS)
        assert staying.result().groups[0].completions[0].scores
    assert total(server, "probescore_cancelled_total") >= 1


STALLING_CLIENT = """
import sys, grpc
from probescore.v1 import scoring_pb2, scoring_pb2_grpc
stub = scoring_pb2_grpc.ScoringServiceStub(grpc.insecure_channel(sys.argv[1]))
stub.Score(scoring_pb2.ScoreRequest.FromString(bytes.fromhex(sys.argv[2])))
"""


def test_a_peer_that_no_longer_answers_loses_its_room(server: RunningServer) -> None:
    with connected(server) as stub:
        with stopped_worker(server):
            computing = stub.Score.future(a_call(), timeout=TIMEOUT)
            eventually(lambda: in_flight(server) == 1)
            peer = subprocess.Popen([sys.executable, "-c", STALLING_CLIENT, server.address, a_call().SerializeToString().hex()])
            try:
                eventually(lambda: waiting_tokens(server) == CALL_TOKENS)
                peer.send_signal(signal.SIGSTOP)  # its connection stays open, and nobody is behind it
                eventually(lambda: waiting_tokens(server) == 0 and in_flight(server) == 1)
            finally:
                peer.kill()
                peer.wait()
        assert computing.result().groups
