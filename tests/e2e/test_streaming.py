"""ScoreStream over 1,000 groups: every answer once, in messages of bounded size, and a slow reader costs nobody memory."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from calls import TIMEOUT, connected, eventually, group, numbers, request, total
from models import BOS, HIDDEN_SIZE, VOCAB_SIZE
from running_server import RunningServer, start_server

from probescore import ProbeClient, RolloutGroup
from probescore.v1 import scoring_pb2
from probescore_probes.exporting import linear_probe
from probescore_probes.reference import ReferenceModel
from probescore_probes.writing import write_probe

GROUPS = 1000
LABELS = 512
TOKENS = 40
ANSWER_BYTES = GROUPS * TOKENS * LABELS * 4
MEMORY_BYTES = ANSWER_BYTES / 2
MAX_MESSAGE_BYTES = (1 << 20) + (1 << 17)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A probe with so many labels that the scores of all groups together would not fit in the memory that is allowed."""
    path = tmp_path_factory.mktemp("wide") / "wide.onnx"
    random = np.random.default_rng(0)
    golden = [([BOS, 5, 6], [7, 8, 9]), ([BOS, 9], [17, 18])]
    write_probe(
        path,
        linear_probe(random.standard_normal((LABELS, HIDDEN_SIZE))),
        ReferenceModel.load(model),
        name="wide",
        version="1",
        taps=["resid_post.0"],
        labels=[f"label{index}" for index in range(LABELS)],
        golden=golden,
    )
    with start_server(model, [path], max_rollout_tokens=512, max_batch_tokens=1024) as running:
        yield running


@pytest.fixture(scope="module")
def asked() -> scoring_pb2.ScoreStreamRequest:
    random = np.random.default_rng(1)
    groups = [group([BOS, *random.integers(4, VOCAB_SIZE, 3)], random.integers(4, VOCAB_SIZE, TOKENS)) for _ in range(GROUPS)]
    return scoring_pb2.ScoreStreamRequest(request=request(*groups, token_scores={"all": True}))


def resident(pid: int) -> int:
    return psutil.Process(pid).memory_info().rss


def test_every_answer_comes_once_and_a_slow_reader_bounds_the_memory_of_both_sides(
    server: RunningServer, asked: scoring_pb2.ScoreStreamRequest
) -> None:
    with connected(server) as stub:
        front, own = resident(server.pid), resident(os.getpid())
        seen: list[tuple[int, int]] = []
        most_front = most_own = 0
        stream = stub.ScoreStream(asked, timeout=10 * TIMEOUT)
        for number, message in enumerate(stream):
            assert message.ByteSize() <= MAX_MESSAGE_BYTES
            assert message.info.usage.tokens_computed > 0
            for scored in message.completions:
                assert numbers(scored.scores.scores[0].tokens).shape == (TOKENS, LABELS)
                seen.append((scored.group_index, scored.completion_index))
            if number == 0:
                stalled = wait_until_nothing_computes(server)
                assert stalled > GROUPS / 2  # most of the work waits for the reader
            most_front, most_own = max(most_front, resident(server.pid)), max(most_own, resident(os.getpid()))
    assert sorted(seen) == [(index, 0) for index in range(GROUPS)]
    assert most_front - front < MEMORY_BYTES
    assert most_own - own < MEMORY_BYTES
    assert total(server, "probescore_queue_rollouts") == 0


def wait_until_nothing_computes(server: RunningServer) -> float:
    """Rollouts left in the queue once it has stopped moving."""
    left = -1.0
    while left != (left := total(server, "probescore_queue_rollouts")):
        time.sleep(1)
    return left


def test_a_reader_who_leaves_ends_the_work(server: RunningServer, asked: scoring_pb2.ScoreStreamRequest) -> None:
    with connected(server) as stub:
        stream = stub.ScoreStream(asked, timeout=TIMEOUT)
        next(stream)
        stream.cancel()
        eventually(lambda: total(server, "probescore_queue_rollouts") == total(server, "probescore_rpcs_in_flight") == 0)


def test_a_stream_and_a_single_answer_say_the_same(server: RunningServer) -> None:
    groups = [RolloutGroup([BOS, 5], [[7, 8], [9], []]), RolloutGroup([], [[BOS, 6, 7]])]
    with ProbeClient(server.address, timeout=TIMEOUT) as client:
        whole = client.score(groups)
        pieces = {(one.group_index, one.completion_index): one.scores for one in client.score_stream(groups)}
    assert len(pieces) == 4
    for (i, j), scores in pieces.items():
        np.testing.assert_allclose(scores["wide"].reduced, whole.groups[i][j]["wide"].reduced, rtol=1e-4, atol=1e-4)
