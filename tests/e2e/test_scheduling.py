"""What the scheduler promises, over a real server: shared work, short memory, long rollouts, and batches that are prepared ahead."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from calls import TIMEOUT, connected, eventually, group, numbers, request, total
from models import BOS, HIDDEN_SIZE, MAX_POSITIONS, VOCAB_SIZE
from running_server import RunningServer

from probescore import OutOfMemoryError, ProbeClient, RolloutGroup
from probescore.v1 import scoring_pb2
from probescore_probes.exporting import linear_probe
from probescore_probes.reference import ReferenceModel
from probescore_probes.writing import write_probe

StartServer = Callable[..., RunningServer]


def score(answer: scoring_pb2.ScoreResponse) -> np.ndarray:
    return numbers(answer.groups[0].completions[0].scores[0].reduced)


@contextmanager
def stopped_worker(server: RunningServer) -> Iterator[None]:
    pid = server.worker_pid()
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextmanager
def short_of_memory(pid: int, spare_bytes: int) -> Iterator[None]:
    """Lets a process map only so much more than it has."""
    before = resource.prlimit(pid, resource.RLIMIT_AS)
    resource.prlimit(pid, resource.RLIMIT_AS, (psutil.Process(pid).memory_info().vms + spare_bytes, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_AS, before)


def rollouts(count: int, length: int = MAX_POSITIONS - 1) -> list[RolloutGroup]:
    random = np.random.default_rng(count)
    return [RolloutGroup([BOS], [random.integers(4, VOCAB_SIZE, length)]) for _ in range(count)]


LABELS = 8192
BYTES_OF_SCORES = MAX_POSITIONS * LABELS * 4
"""Of one rollout by `wide_probe`, per token. Computing and packing them takes four times as much, of which some is there from before."""


@pytest.fixture(scope="module")
def wide_probe(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wide") / "wide.onnx"
    weight = np.random.default_rng(0).standard_normal((LABELS, HIDDEN_SIZE))
    golden = [([BOS, 5, 6], [7, 8, 9]), ([BOS, 9], [17, 18])]
    labels = [f"label{index}" for index in range(LABELS)]
    write_probe(
        path,
        linear_probe(weight),
        ReferenceModel.load(model),
        name="wide",
        version="1",
        taps=["resid_post.2"],
        labels=labels,
        golden=golden,
    )
    return path


def in_flight(server: RunningServer) -> float:
    return total(server, "probescore_rpcs_in_flight")


def test_identical_rollouts_of_two_clients_are_computed_once(served: RunningServer) -> None:
    message = request(group([BOS, 70, 71], [72, 73, 74]))
    with connected(served) as first, connected(served) as second:
        with stopped_worker(served):
            calls = [stub.Score.future(message, timeout=TIMEOUT) for stub in (first, second)]
            eventually(lambda: in_flight(served) == 2)
        answers = [call.result() for call in calls]
    usages = [answer.info.usage for answer in answers]
    assert sorted((usage.tokens_computed + usage.tokens_cached, usage.tokens_shared) for usage in usages) == [(0, 6), (6, 0)]
    np.testing.assert_array_equal(score(answers[0]), score(answers[1]))


def test_the_prompt_that_two_waiting_calls_share_is_computed_once(served: RunningServer) -> None:
    prompt = [BOS, *range(20, 60)]
    with connected(served) as stub:
        with stopped_worker(served):
            calls = [stub.Score.future(request(group([BOS, 80], [81])), timeout=TIMEOUT)]
            eventually(lambda: in_flight(served) == 1)
            calls += [stub.Score.future(request(group(prompt, [last, 9])), timeout=TIMEOUT) for last in (7, 8)]
            eventually(lambda: total(served, "probescore_queue_rollouts") == 2)
        usages = [call.result().info.usage for call in calls[1:]]
    assert sum(usage.tokens_computed + usage.tokens_cached for usage in usages) == len(prompt) + 4
    assert sum(usage.tokens_shared for usage in usages) == len(prompt)


def test_a_batch_for_which_memory_is_short_is_split_until_it_fits_and_the_next_ones_are_smaller(
    start_server: StartServer, model: Path, wide_probe: Path
) -> None:
    server = start_server(model, [wide_probe], max_batch_tokens=3 * MAX_POSITIONS)
    groups = rollouts(3)
    with ProbeClient(server.address, timeout=TIMEOUT) as client:
        ample = client.score(groups)
        with short_of_memory(server.worker_pid(), 6 * BYTES_OF_SCORES):
            scarce = client.score(groups, token_scores="all")
            assert total(server, "probescore_out_of_memory_total") > 0
            assert total(server, "probescore_batch_budget_tokens") < 3 * MAX_POSITIONS
        np.testing.assert_allclose(scarce.values("wide"), ample.values("wide"), rtol=1e-4, atol=1e-4)
        assert client.get_server_info().workers[0].restarts == 0


def test_a_rollout_that_does_not_fit_alone_fails_by_name_and_the_server_goes_on(
    start_server: StartServer, model: Path, wide_probe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # left to itself, malloc keeps what the first rollout took, which may be enough for the second
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000000")
    server = start_server(model, [wide_probe])
    before, long = rollouts(2)
    with ProbeClient(server.address, timeout=TIMEOUT) as client:
        client.score([before])  # or what fails is what torch prepares for a new shape
        with short_of_memory(server.worker_pid(), 0), pytest.raises(OutOfMemoryError, match="a rollout of 512 tokens"):
            client.score([long], token_scores="all")
        assert np.isfinite(client.score([long], token_scores="all").values("wide")).all()
        assert client.get_server_info().workers[0].restarts == 0


def test_a_rollout_longer_than_a_batch_is_scored_whole(
    served: RunningServer, start_server: StartServer, model: Path, probe_file: Path
) -> None:
    server = start_server(model, [probe_file], max_batch_tokens=64)
    groups = rollouts(3, length=400)
    with ProbeClient(server.address, timeout=TIMEOUT) as small, ProbeClient(served.address, timeout=TIMEOUT) as large:
        ours, theirs = (client.score(groups, token_scores="all") for client in (small, large))
    assert total(server, "probescore_batch_tokens_count") == 3
    for (mine,), (other,) in zip(ours.groups, theirs.groups, strict=True):
        np.testing.assert_allclose(mine["direction"].tokens, other["direction"].tokens, rtol=1e-4, atol=1e-4)


def test_a_worker_that_dies_takes_what_it_computed_with_it_and_not_what_it_had_prepared(
    start_server: StartServer, model: Path, probe_file: Path
) -> None:
    server = start_server(model, [probe_file], max_batch_tokens=4)
    with connected(server) as stub:
        os.kill(server.worker_pid(), signal.SIGSTOP)
        computing = stub.Score.future(request(group([BOS, 5, 6], [7])), timeout=TIMEOUT)
        eventually(lambda: in_flight(server) == 1)
        prepared = stub.Score.future(request(group([BOS, 5, 7], [7])), timeout=TIMEOUT)
        eventually(lambda: total(server, "probescore_batch_tokens_count") == 2)
        os.kill(server.worker_pid(), signal.SIGKILL)
        assert computing.exception().code() is grpc.StatusCode.UNAVAILABLE
        assert np.isfinite(score(prepared.result())).all()
