"""Readings change though a call never ends: loads wait for it a bounded time, nothing is half changed, and changes keep their order."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from read_twice import Served
from running_server import RunningServer, start_server
from served_readings import ReadingsClient, failed_with, failure, numbers, of
from test_readings_recover import slow_groups
from written_adapters import WrittenAdapter

from probescore import Completion, RolloutGroup, Span
from probescore.reductions import Reduction
from probescore.types import Reading, StreamedCompletion
from probescore.v1 import admin_pb2, admin_pb2_grpc, scoring_pb2_grpc

DRAIN_SECONDS = 1.0
MAX_READINGS = 2
LONGEST = 20.0
REDUCTIONS = tuple(Reduction.parse(f"topk_mean({count})") for count in range(1, 17))


@pytest.fixture(scope="module")
def root(llama: Served, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("readings")
    for seed in range(4):
        WrittenAdapter.random(llama.model, ["q_proj", "v_proj"], seed=seed).write(root / f"step-{seed}")
    return root


@pytest.fixture(scope="module")
def server(llama: Served, root: Path) -> Iterator[RunningServer]:
    with start_server(
        llama.model,
        [llama.probe("middle")],
        admin=True,
        readings_root=root,
        max_batch_tokens=1024,
        max_rollout_tokens=256,
        max_readings=MAX_READINGS,
        drain_seconds=DRAIN_SECONDS,
    ) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[ReadingsClient]:
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0)]  # a connection holds little that nobody reads
    with grpc.insecure_channel(server.address, options=options) as channel:
        connected = ReadingsClient(scoring_pb2_grpc.ScoringServiceStub(channel), admin_pb2_grpc.ProbeAdminServiceStub(channel))
        yield connected
        for name in connected.readings():
            if name != "frozen":
                connected.unload(name)


@pytest.fixture(scope="module")
def groups() -> list[RolloutGroup]:
    """Their scores are larger than what a connection holds of a stream that nobody reads."""
    spans = tuple(Span(f"{index:060}", index % 8, 40) for index in range(32))
    return [replace(group, completions=[Completion(ids, spans=spans) for ids in group.completions]) for group in slow_groups(24)]


class HungStream:
    """A stream of which one answer is read, until the rest is."""

    def __init__(self, client: ReadingsClient, groups: list[RolloutGroup], name: str = "policy") -> None:
        self.expected = len([completion for group in groups for completion in group.completions])
        self.name = name
        self._answers = client.stream(name, groups=groups, reductions=REDUCTIONS)
        self.seen: list[StreamedCompletion] = [next(self._answers)]

    def read(self) -> Reading:
        """Reads the rest; returns the reading that all of it is of."""
        self.seen += self._answers
        assert len(self.seen) == self.expected
        (readings,) = {piece.info.readings for piece in self.seen}
        assert np.isfinite(numbers([piece.scores for piece in self.seen], self.name)).all()
        return readings[0]


class InThread:
    """A call in a thread of its own."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.outcome: Any = None
        self._call = call
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.outcome = self._call()
        except grpc.RpcError as error:
            self.outcome = failed_with(error)

    def is_under_way(self) -> bool:
        return self._thread.is_alive()

    def result(self) -> Any:
        self._thread.join(LONGEST)
        assert not self.is_under_way(), "it hangs"
        return self.outcome


def test_an_in_place_load_gives_up_and_changes_nothing(client: ReadingsClient, groups: list[RolloutGroup]) -> None:
    first = client.load("policy", "step-0").reading
    before = of(client.score("policy"), "policy")
    stream = HungStream(client, groups)
    loading = InThread(lambda: client.load("policy", "step-1", in_place=True))
    time.sleep(0.3)
    scoring = InThread(lambda: client.score("policy"))
    started = time.monotonic()
    failed = loading.result()
    assert time.monotonic() - started < DRAIN_SECONDS + 5
    assert (failed.code, failed.reason) == ("FAILED_PRECONDITION", "READING_IN_USE")
    assert "'policy'" in failed.text
    assert "1 s at most (drain_seconds)" in failed.text
    np.testing.assert_array_equal(of(scoring.result(), "policy"), before)
    assert client.readings()["policy"] == first
    np.testing.assert_array_equal(of(client.score("policy"), "policy"), before)
    beside = client.load("policy", "step-1")  # nobody has to wait for this
    assert beside.replaced == first
    assert stream.read() == first
    assert client.load("policy", "step-2", in_place=True).replaced == beside.reading


def test_who_gives_up_an_in_place_load_first_has_changed_nothing(client: ReadingsClient, groups: list[RolloutGroup]) -> None:
    first = client.load("policy", "step-0").reading
    stream = HungStream(client, groups)
    request = admin_pb2.LoadReadingRequest(name="policy", path="step-1", in_place=True)
    with pytest.raises(grpc.RpcError) as given_up:
        client.admin.LoadReading(request, timeout=DRAIN_SECONDS / 4)
    assert given_up.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert stream.read() == first  # within drain_seconds
    time.sleep(DRAIN_SECONDS)
    assert client.readings()["policy"] == first


def test_versions_that_calls_hold_are_bounded(client: ReadingsClient, groups: list[RolloutGroup], server: RunningServer) -> None:
    """A trainer that replaces the policy again and again, under streams that nobody reads, is stopped by a limit, and not by memory."""
    streams, loaded = [], []
    for step in range(MAX_READINGS + 1):
        loaded.append(client.load("policy", f"step-{step}").reading)
        streams.append(HungStream(client, groups))
    for name, in_place in (("policy", False), ("policy", True), ("other", False)):
        failed = failure(lambda: client.load(name, "step-3", in_place=in_place))  # noqa: B023 - called at once
        assert (failed.code, failed.reason) == ("FAILED_PRECONDITION", "READING_IN_USE")
        assert f"{MAX_READINGS} versions" in failed.text
        assert "max_readings" in failed.text
    assert client.readings()["policy"] == loaded[-1]
    client.score("frozen", "policy")
    assert streams[0].read() == loaded[0]
    assert client.load("policy", "step-3").replaced == loaded[-1]
    assert [stream.read() for stream in streams[1:]] == loaded[1:]


@pytest.mark.parametrize("in_place", [False, True])
def test_unloading_waits_for_the_load_before_it(client: ReadingsClient, server: RunningServer, in_place: bool) -> None:
    """Whatever came last decides what a name means, also if both were under way at once."""
    first = client.load("policy", "step-0").reading
    (worker,) = [child for child in psutil.Process(server.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    worker.send_signal(signal.SIGSTOP)
    try:
        loading = InThread(lambda: client.load("policy", "step-1", in_place=in_place))
        time.sleep(0.3)
        unloading = InThread(lambda: client.unload("policy"))
        time.sleep(0.3)
        again = InThread(lambda: client.load("policy", "step-2", in_place=in_place))
        time.sleep(0.3)
        assert unloading.is_under_way()
    finally:
        worker.send_signal(signal.SIGCONT)
    loaded = loading.result()
    assert loaded.replaced == first
    assert unloading.result() == loaded.reading
    assert again.result().replaced is None
    assert client.readings()["policy"] == again.result().reading
    assert client.unload("policy") == again.result().reading
    assert failure(lambda: client.unload("policy")).reason == "UNKNOWN_READING"
    assert failure(lambda: client.score("policy")).reason == "UNKNOWN_READING"
