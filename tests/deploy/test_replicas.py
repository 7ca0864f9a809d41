"""Two plain replicas behind one client: a rolling restart loses no call, whichever way the client finds them."""

from __future__ import annotations

import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from name_server import NameServer
from prometheus_client.parser import text_string_to_metric_families
from running_server import RunningServer
from running_server import start_server as start
from steady_load import SteadyLoad

from probescore import ProbeClient, RolloutGroup

StartServer = Callable[..., RunningServer]
GROUPS = [RolloutGroup([1, 5, 6, 7], [[8, 9, 10], [11, 12]]), RolloutGroup([1, 20, 21], [[22, 23, 24, 25]])]
PROBE = "direction"
SECONDS = 120.0


@pytest.fixture
def start_replica(model: Path, probe_file: Path) -> Iterator[StartServer]:
    """Starts a server of the model on an address; all that a test started are stopped at its end."""
    with ExitStack() as running:
        yield lambda host, port: running.enter_context(start(model, [probe_file], host=host, port=port))


def test_replicas_restarted_one_after_the_other_lose_no_call(start_replica: StartServer) -> None:
    ports = [free_port(), free_port()]
    replicas = [start_replica("127.0.0.1", port) for port in ports]
    with ProbeClient([replica.address for replica in replicas]) as client, SteadyLoad(client, GROUPS, PROBE) as load:
        load.wait_for_answers(20)
        for number, port in enumerate(ports):
            assert replicas[number].stop() == 0
            load.wait_for_answers(20)
            replicas[number] = start_replica("127.0.0.1", port)
            wait_for_calls(replicas[number])
    assert load.failures == []


def test_replicas_replaced_under_a_name_lose_no_call(start_replica: StartServer) -> None:
    """As a Deployment does it: a new one becomes ready, the name forgets an old one, which then ends."""
    port = free_port()
    old = [start_replica(host, port) for host in ("127.0.0.1", "127.0.0.2")]
    with (
        NameServer(["127.0.0.1", "127.0.0.2"]) as names,
        ProbeClient(f"dns://{names.authority}/scoring.test:{port}") as client,
        SteadyLoad(client, GROUPS, PROBE) as load,
    ):
        for replica in old:
            wait_for_calls(replica)
        new = [start_replica("127.0.0.3", port)]
        names.addresses = ["127.0.0.2", "127.0.0.3"]
        assert old[0].stop() == 0
        new.append(start_replica("127.0.0.4", port))
        names.addresses = ["127.0.0.3", "127.0.0.4"]
        assert old[1].stop() == 0
        for replica in new:
            wait_for_calls(replica)
    assert load.failures == []


def free_port() -> int:
    """Free at every address of this machine."""
    with socket.create_server(("", 0)) as listening:
        return int(listening.getsockname()[1])


def calls_answered(replica: RunningServer) -> float:
    with urllib.request.urlopen(f"http://{replica.metrics_address}/metrics", timeout=SECONDS) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return sum(
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == "grpc_server_handled_total" and sample.labels["grpc_method"] == "Score" and sample.labels["grpc_code"] == "OK"
        )


def wait_for_calls(replica: RunningServer) -> None:
    """Waits until the replica has answered some of the load."""
    end = time.monotonic() + SECONDS
    while calls_answered(replica) == 0:
        assert time.monotonic() < end, f"no call reached {replica.address} in {SECONDS} s"
        time.sleep(0.1)
