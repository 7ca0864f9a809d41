"""Readings when workers die, servers sleep and probes change: what is answered is right, or it is said that it is lost."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from calls import TIMEOUT, eventually, total
from read_twice import Served
from running_server import START_SECONDS, RunningServer, start_server
from served_readings import ReadingsClient, failed_with, failure, numbers, of
from written_adapters import WrittenAdapter

from probescore import RolloutGroup
from probescore.types import LoadedReading
from probescore.v1 import admin_pb2

ATOL = 1e-4

Start = Callable[..., RunningServer]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readings")


@pytest.fixture(scope="module")
def server(llama: Served, root: Path) -> Iterator[RunningServer]:
    """Two workers with one probe."""
    with start_server(
        llama.model, [llama.probe("middle")], admin=True, devices="cpu,cpu", readings_root=root, worker_restart_seconds=0.05
    ) as running:
        yield running


@pytest.fixture(scope="module")
def small(llama: Served, root: Path) -> Iterator[RunningServer]:
    """One worker of small batches."""
    with start_server(
        llama.model, [llama.probe("middle")], admin=True, readings_root=root, max_batch_tokens=1024, max_rollout_tokens=256
    ) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[ReadingsClient]:
    with ReadingsClient.of(server) as connected:
        until_up(connected)
        yield connected
        for name in connected.readings():
            if name != "frozen":
                connected.unload(name)


@pytest.fixture
def adapters(llama: Served, root: Path) -> Iterator[list[WrittenAdapter]]:
    made = [WrittenAdapter.random(llama.model, ["q_proj", "v_proj"], seed=seed) for seed in range(2)]
    for seed, adapter in enumerate(made):
        adapter.write(root / f"step-{seed}")
    yield made
    for entry in root.iterdir():
        if entry.is_symlink():
            entry.unlink()
        else:
            shutil.rmtree(entry)


def until_up(client: ReadingsClient) -> None:
    """Waits until every worker can score."""
    eventually(lambda: all(worker.ready for worker in client.info().workers), 2 * START_SECONDS)


def workers(server: RunningServer) -> list[psutil.Process]:
    return [child for child in psutil.Process(server.pid).children() if "spawn_main" in " ".join(child.cmdline())]


def restart(server: RunningServer, client: ReadingsClient) -> None:
    """Kills every worker, and waits until others are up."""
    before = sum(worker.restarts for worker in client.info().workers)
    for worker in workers(server):
        worker.kill()
    eventually(lambda: sum(worker.restarts for worker in client.info().workers) == before + 2, 2 * START_SECONDS)
    until_up(client)


# ------------------------------------------------------------------------------------------------------------------- restart


def test_a_restarted_worker_reads_again_and_what_changed_is_lost(
    server: RunningServer, client: ReadingsClient, adapters: list[WrittenAdapter], root: Path
) -> None:
    lost = total(server, "probescore_readings_lost_total")
    (root / "latest").symlink_to("step-0")
    loaded = {name: client.load(name, path, step=3).reading for name, path in (("policy", "latest"), ("other", "step-1"))}
    before = client.score("frozen", "policy", "other")
    (root / "latest").unlink()
    (root / "latest").symlink_to("step-1")  # what was loaded is read again, not what the link means by then
    restart(server, client)
    after = client.score("frozen", "policy", "other")
    assert after.info.readings == before.info.readings
    for name in ("frozen", *loaded):
        np.testing.assert_allclose(of(after, name), of(before, name), rtol=0, atol=ATOL)

    adapters[1].write(root / "step-0")  # a trainer that writes to the same place
    restart(server, client)
    failed = failure(lambda: client.score("frozen", "policy"))
    assert (failed.code, failed.reason) == ("FAILED_PRECONDITION", "READING_LOST")
    assert "'policy' was lost" in failed.text
    assert str(root) not in failed.text
    assert failure(lambda: client.unload("policy")).reason == "READING_LOST"
    assert [*client.readings()] == ["frozen", "other"]
    np.testing.assert_allclose(of(client.score("other"), "other"), of(before, "other"), rtol=0, atol=ATOL)
    np.testing.assert_allclose(of(client.score(), "frozen"), of(before, "frozen"), rtol=0, atol=ATOL)
    assert total(server, "probescore_readings_lost_total") == lost + 1
    assert total(server, "probescore_readings") == 1
    event = server.events("reading lost")[-1]
    assert (event["readings"], event["id"]) == (["policy"], loaded["policy"].id)

    client.load("policy", "step-0")  # and it may come again
    np.testing.assert_allclose(of(client.score("policy"), "policy"), of(before, "other"), rtol=0, atol=ATOL)


def test_one_worker_that_cannot_read_again_takes_the_reading_from_all(
    server: RunningServer, client: ReadingsClient, adapters: list[WrittenAdapter], root: Path
) -> None:
    client.load("policy", "step-0")
    shutil.rmtree(root / "step-0")
    workers(server)[0].kill()
    eventually(lambda: [*client.readings()] == ["frozen"], 2 * START_SECONDS)
    for _ in range(8):  # whichever worker
        assert failure(lambda: client.score("policy")).reason == "READING_LOST"


def test_calls_under_way_that_mean_a_lost_reading_fail(
    server: RunningServer, client: ReadingsClient, adapters: list[WrittenAdapter], root: Path
) -> None:
    client.load("policy", "step-0")
    shutil.rmtree(root / "step-0")
    for worker in workers(server):
        worker.send_signal(signal.SIGSTOP)
    ended: dict[str, object] = {}

    def score(*readings: str) -> None:
        with ReadingsClient.of(server) as other:
            try:
                ended[readings[-1]] = of(other.score(*readings), "frozen")
            except grpc.RpcError as error:
                ended[readings[-1]] = failed_with(error)

    threads = [threading.Thread(target=score, args=readings) for readings in (("frozen", "policy"), ("frozen",))]
    for thread in threads:
        thread.start()
    eventually(lambda: total(server, "probescore_rpcs_in_flight") >= 2)
    for worker in workers(server):
        worker.kill()
    for thread in threads:
        thread.join()
    assert ended["policy"].reason in ("READING_LOST", "WORKER_UNAVAILABLE")  # the latter if it was computing
    if not isinstance(ended["frozen"], np.ndarray):
        assert ended["frozen"].reason == "WORKER_UNAVAILABLE"
    eventually(lambda: [*client.readings()] == ["frozen"], 2 * START_SECONDS)


def test_a_worker_that_dies_while_it_loads_leaves_everything_as_it_was(
    server: RunningServer, client: ReadingsClient, adapters: list[WrittenAdapter]
) -> None:
    failures = total(server, "probescore_reading_loads_total", 'outcome="failed"')
    before = client.load("policy", "step-0").reading
    scores = of(client.score("policy"), "policy")
    for in_place in (False, True):
        victim = workers(server)[0]
        victim.send_signal(signal.SIGSTOP)
        failed: list[object] = []
        loading = threading.Thread(
            target=lambda: failed.append(failure(lambda: client.load("policy", "step-1", in_place=in_place)))  # noqa: B023 - joined here
        )
        loading.start()
        time.sleep(1.0)  # the other worker has loaded it
        victim.kill()
        loading.join()
        assert (failed[0].code, failed[0].reason) == ("UNAVAILABLE", "WORKER_UNAVAILABLE")
        assert failed[0].retry_seconds is not None
        until_up(client)
        if in_place:
            assert failure(lambda: client.score("policy")).reason == "UNKNOWN_READING"
        else:
            assert client.readings()["policy"] == before
            for _ in range(4):
                np.testing.assert_allclose(of(client.score("policy"), "policy"), scores, rtol=0, atol=ATOL)
    assert client.load("policy", "step-0").reading == before
    np.testing.assert_allclose(of(client.score("policy"), "policy"), scores, rtol=0, atol=ATOL)
    assert total(server, "probescore_reading_loads_total", 'outcome="failed"') == failures + 2


def test_a_reading_that_kills_a_worker_at_its_start_does_not_keep_the_server_down(
    server: RunningServer, client: ReadingsClient, adapters: list[WrittenAdapter], root: Path
) -> None:
    client.load("policy", "step-0")
    before = of(client.score(), "frozen")
    weights = root / "step-0" / "adapter_model.safetensors"
    weights.unlink()
    os.mkfifo(weights)  # is refused at once, and never waited for
    restart(server, client)
    assert failure(lambda: client.score("policy")).reason == "READING_LOST"
    np.testing.assert_allclose(of(client.score(), "frozen"), before, rtol=0, atol=ATOL)


# --------------------------------------------------------------------------------------------------------------------- sleep


def test_a_server_that_sleeps_keeps_its_readings_and_loads_none(
    server: RunningServer, client: ReadingsClient, adapters: list[WrittenAdapter]
) -> None:
    died, lost = len(server.events("worker died")), len(server.events("reading lost"))
    loaded = client.load("policy", "step-0").reading
    before = client.score("frozen", "policy")
    client.admin.Sleep(admin_pb2.SleepRequest(), timeout=TIMEOUT)
    for in_place in (False, True):
        failed = failure(lambda: client.load("policy", "step-1", in_place=in_place))  # noqa: B023 - called at once
        assert (failed.code, failed.reason) == ("FAILED_PRECONDITION", "ASLEEP")
    assert client.readings()["policy"] == loaded
    client.admin.Wake(admin_pb2.WakeRequest(), timeout=TIMEOUT)
    after = client.score("frozen", "policy")
    for name in ("frozen", "policy"):
        np.testing.assert_allclose(of(after, name), of(before, name), rtol=0, atol=ATOL)
    client.admin.Sleep(admin_pb2.SleepRequest(), timeout=TIMEOUT)
    client.unload("policy")
    workers(server)[0].kill()
    eventually(lambda: len(server.events("worker died")) == died + 1)
    with pytest.raises(grpc.RpcError):  # the one that died is started again
        client.admin.Wake(admin_pb2.WakeRequest(), timeout=TIMEOUT)
    until_up(client)
    np.testing.assert_allclose(of(client.score(), "frozen"), of(before, "frozen"), rtol=0, atol=ATOL)
    assert len(server.events("reading lost")) == lost


# ------------------------------------------------------------------------------------------------------------------ versions


def slow_groups(count: int) -> list[RolloutGroup]:
    """Groups that take many batches, whose results are larger than what a server keeps for a reader who is behind."""
    random = np.random.default_rng(0)
    return [RolloutGroup([1, *random.integers(4, 90, 8)], [random.integers(4, 90, 40).tolist() for _ in range(8)]) for _ in range(count)]


def test_a_stream_keeps_the_version_that_it_began_with(small: RunningServer, root: Path, adapters: list[WrittenAdapter]) -> None:
    with ReadingsClient.of(small) as client:
        groups = slow_groups(16)
        first = client.load("policy", "step-0").reading
        expected = of(client.score("policy", groups=groups), "policy")
        pieces = client.stream("policy", groups=groups)
        seen = [next(pieces)]
        second = client.load("policy", "step-1").reading
        client.unload("policy")
        shutil.rmtree(root / "step-0")
        seen += pieces
        assert {piece.info.readings for piece in seen} == {(first,)}
        seen.sort(key=lambda piece: (piece.group_index, piece.completion_index))
        np.testing.assert_allclose(numbers([piece.scores for piece in seen], "policy"), expected, rtol=0, atol=ATOL)
        assert second.id != first.id


def test_in_place_waits_for_the_calls_that_began_and_holds_those_that_come(small: RunningServer, adapters: list[WrittenAdapter]) -> None:
    with ReadingsClient.of(small) as client:
        groups = slow_groups(64)
        first = client.load("policy", "step-0").reading
        pieces = client.stream("policy", groups=groups, token_scores="all")
        seen = [next(pieces)]
        loaded: list[LoadedReading] = []
        loading = threading.Thread(target=lambda: loaded.append(client.load("policy", "step-1", in_place=True)))
        loading.start()
        time.sleep(0.3)
        later: list[object] = []
        scoring = threading.Thread(target=lambda: later.append(client.score("policy")))
        scoring.start()
        client.score("frozen")  # nobody else waits
        seen += pieces
        assert {piece.info.readings for piece in seen} == {(first,)}
        loading.join()
        scoring.join()
        assert loaded[0].replaced == first
        assert later[0].info.readings == (loaded[0].reading,)


# -------------------------------------------------------------------------------------------------------------- probes beside


def test_probes_change_beside_readings_and_descriptions_follow(llama: Served, root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "probes"
    folder.mkdir()
    shutil.copy(llama.probe("early"), folder)
    adapter = WrittenAdapter.random(llama.model, ["q_proj"], layers_to_transform=[1])
    adapter.write(root / "deep")
    with (
        start_server(
            llama.model, [folder, llama.probe("middle")], admin=True, readings_root=root, deeper_probes="load", devices="cpu,cpu"
        ) as server,
        ReadingsClient.of(server) as client,
    ):
        until_up(client)
        loaded = client.load("policy", "deep").reading
        before = client.score("policy", probes=("middle",))
        assert (loaded.changed_layers, loaded.golden_verified) == ((1,), False)
        shutil.copy(llama.probe("last"), folder)  # needs one more block than are loaded
        reloaded = client.admin.Reload(admin_pb2.ReloadRequest(), timeout=4 * TIMEOUT)
        assert list(reloaded.added) == ["last@1"]
        assert len(server.events("a deeper worker has taken over")) == 2
        after = client.score("policy", probes=("middle",))
        assert after.info.readings == before.info.readings
        np.testing.assert_allclose(of(after, "policy"), of(before, "policy"), rtol=0, atol=ATOL)
        both = client.score("frozen", "policy", probes=("last",))
        assert np.abs(of(both, "policy") - of(both, "frozen")).max() > 1e-3
        assert not server.events("reading lost")
