"""Ray Serve with two replicas on CPUs: the client and the scores are those of a plain server, whatever happens to a replica."""

from __future__ import annotations

import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import ray
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from models import HIDDEN_SIZE
from running_ray import RunningServe, free_ports, running_ray, serve_run, until
from steady_load import SteadyLoad

from probescore import (
    DeadlineExceededError,
    InvalidRequestError,
    MessageTooLargeError,
    ProbeClient,
    RolloutGroup,
    ServerError,
    StreamWindow,
)
from probescore_probes.exporting import linear_probe
from probescore_probes.reference import ReferenceModel
from probescore_probes.writing import write_probe
from probescore_server import Engine
from probescore_server.errors import StartupError
from probescore_server.front.health import SCORING_SERVICE
from probescore_server.ray import QueuedTokens, app

PROJECT = Path(__file__).parents[2]
CONFIGURATION = PROJECT / "docker" / "ray" / "serve.yaml"
PAGE = PROJECT / "docs/how-to/deploy/ray.md"
PROBE = "direction"
GROUPS = [RolloutGroup([1, 5, 6, 7], [[8, 9, 10], [11, 12]]), RolloutGroup([1, 20, 21], [[22, 23, 24, 25]])]
# more than a batch, so that some of it waits
MANY_GROUPS = [RolloutGroup([1, 5, index], [[8, 9, 10, 11]]) for index in range(40)]
START_SECONDS = 180.0

StartServe = Callable[..., RunningServe]


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    with running_ray():
        yield


@pytest.fixture
def start_serve(model: Path, probe_file: Path, tmp_path: Path) -> Iterator[StartServe]:
    """Runs ``serve run probescore_server.ray:app`` with settings of a server; it is stopped at the end of the test."""

    def start(**settings: object) -> RunningServe:
        (port,), metrics_ports = free_ports(1), free_ports(3)
        chosen = {
            "model": model,
            "probes": probe_file,
            "devices": "cpu",
            "threads_per_worker": 1,
            "port": port,
            "metrics_port": metrics_ports[0],
        }
        arguments = [f"{name}={value}" for name, value in {**chosen, **settings}.items()]
        where = {"port": port, "metrics_port": metrics_ports[0]}
        return running.enter_context(serve_run(tmp_path / "serve.log", "probescore_server.ray:app", *arguments, **where))

    with ExitStack() as running:
        yield start


def test_the_same_client_gets_the_same_scores(start_serve: StartServe, model: Path, probe_file: Path) -> None:
    expected = Engine.load(str(model), [probe_file]).score(GROUPS)
    serve = start_serve(min_replicas=2, max_message_bytes=5000, max_request_tokens=1000, max_rollout_tokens=1000)

    with ProbeClient(serve.address) as client:
        info = client.wait_until_ready(START_SECONDS)
        until(lambda: len(serve.replicas()) == 2, "there are two replicas")
        answers = [client.score(GROUPS) for _ in range(20)]
        streamed = sorted(client.score_stream(GROUPS), key=lambda one: (one.group_index, one.completion_index))
        with pytest.raises(InvalidRequestError) as unknown:
            client.score(GROUPS, probes=["nobody"])
        with pytest.raises(InvalidRequestError) as unknown_in_stream:
            list(client.score_stream(GROUPS, probes=["nobody"]))
        with pytest.raises(MessageTooLargeError):
            client.score([RolloutGroup([1], [[5] * 2000])])
        with pytest.raises(ServerError, match="its setting admin or readings_root is off") as no_readings:
            client.load_reading("policy", "step-0")

    assert info.probes == ("direction@1",)
    assert no_readings.value.reason == "READINGS_OFF"
    for answer in answers:
        np.testing.assert_allclose(answer.values(PROBE), expected.values(PROBE), rtol=0, atol=1e-4)
        assert answer.info.model_fingerprint == expected.info.model_fingerprint
    np.testing.assert_allclose([one.scores.scores[PROBE].reduced.item() for one in streamed], expected.values(PROBE), rtol=0, atol=1e-4)
    for error in (unknown.value, unknown_in_stream.value):
        assert (error.code, error.reason, error.violations[0].field) == ("INVALID_ARGUMENT", "UNKNOWN_PROBE", "probes[0]")
    assert all(serve.counted("grpc_server_handled_total", replica=replica, grpc_method="Score", grpc_code="OK") for replica in (0, 1))


def test_health_is_that_of_a_replica(start_serve: StartServe) -> None:
    serve = start_serve()
    with ProbeClient(serve.address) as client:
        client.wait_until_ready(START_SECONDS)

    with grpc.insecure_channel(serve.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        found = health.Check(health_pb2.HealthCheckRequest(service=SCORING_SERVICE), timeout=START_SECONDS)

    assert found.status == health_pb2.HealthCheckResponse.SERVING


def test_a_call_whose_deadline_passes_is_withdrawn(start_serve: StartServe) -> None:
    serve = start_serve(max_batch_tokens=8)
    many = [RolloutGroup([1, 5, index % 90, index // 90], [[8, 9, 10]]) for index in range(2000)]

    with ProbeClient(serve.address) as client:
        client.wait_until_ready(START_SECONDS)
        with pytest.raises(DeadlineExceededError):
            client.score(many, timeout=1.0)

    until(lambda: serve.counted("probescore_queue_rollouts") == 0, "nothing waits any more")
    assert serve.counted("grpc_server_handled_total", grpc_method="Score", grpc_code="OK") == 0


def test_a_replica_that_is_killed_under_load_fails_no_call(start_serve: StartServe) -> None:
    serve = start_serve(min_replicas=2, max_batch_tokens=32)
    with ProbeClient(serve.address) as client:
        client.wait_until_ready(START_SECONDS)
        until(lambda: len(serve.replicas()) == 2, "there are two replicas")
        with SteadyLoad(client, MANY_GROUPS, PROBE) as load:
            load.wait_for_answers(10)
            busy_replica(serve).kill()
            load.wait_for_answers(10)
            until(lambda: len(serve.replicas()) == 2, "Ray has replaced it")
            load.wait_for_answers(10)

    assert load.failures == []


def test_a_stream_that_loses_its_replica_goes_on_with_another(start_serve: StartServe) -> None:
    serve = start_serve(min_replicas=2, max_batch_tokens=32)
    with ProbeClient(serve.address) as client:
        client.wait_until_ready(START_SECONDS)
        until(lambda: len(serve.replicas()) == 2, "there are two replicas")
        answers = client.score_stream(MANY_GROUPS * 100, window=StreamWindow(groups_per_call=1000))
        streamed = [next(answers)]
        busy_replica(serve).kill()
        streamed += answers

    assert sorted(one.group_index for one in streamed) == list(range(100 * len(MANY_GROUPS)))


def test_while_tokens_wait_a_second_replica_is_started(model: Path, probe_file: Path, tmp_path: Path) -> None:
    configuration = yaml.safe_load(CONFIGURATION.read_text())
    (port,), metrics_ports = free_ports(1), free_ports(3)
    application = configuration["applications"][0]
    configuration["grpc_options"]["port"] = port
    application["args"] |= {"model": str(model), "probes": str(probe_file), "dtype": "float32"}
    application["args"] |= {"devices": "cpu", "threads_per_worker": 1, "metrics_port": metrics_ports[0], "max_batch_tokens": 64}
    policy = {"policy_function": "probescore_server.ray:QueuedTokens", "policy_kwargs": {"target": 50}}
    scaling = {"min_replicas": 1, "max_replicas": 2, "upscale_delay_s": 1, "look_back_period_s": 2, "policy": policy}
    application["deployments"] = [{"name": "probescore", "autoscaling_config": scaling}]
    written = tmp_path / "serve.yaml"
    written.write_text(yaml.safe_dump(configuration))
    with (
        serve_run(tmp_path / "serve.log", written, port=port, metrics_port=metrics_ports[0]) as serve,
        ProbeClient(serve.address) as client,
    ):
        client.wait_until_ready(START_SECONDS)
        assert len(serve.replicas()) == 1
        with SteadyLoad(client, MANY_GROUPS, PROBE) as load:
            answered = {"grpc_method": "Score", "grpc_code": "OK"}
            until(lambda: serve.counted("grpc_server_handled_total", replica=1, **answered) > 0, "the second replica answers calls")

    assert load.failures == []


def test_every_replica_follows_a_folder_that_is_watched(start_serve: StartServe, model: Path, probe_file: Path, tmp_path: Path) -> None:
    folder, newer = tmp_path / "probes", tmp_path / "newer.onnx"
    folder.mkdir()
    shutil.copyfile(probe_file, folder / "direction.onnx")
    golden = [([1, 5, 6], [7, 8, 9]), ([1, 9], [17, 18])]
    weight = np.random.default_rng(1).standard_normal(HIDDEN_SIZE).astype(np.float32)
    reference = ReferenceModel.load(model)
    write_probe(newer, linear_probe(weight), reference, name=PROBE, version="2", taps=["resid_post.2"], golden=golden)
    expected = {key: Engine.load(str(model), [file]).score(GROUPS).values(PROBE) for key, file in (("@1", probe_file), ("@2", newer))}
    serve = start_serve(probes=folder, watch_probes=0.2, min_replicas=2)

    def put(file: Path) -> None:
        partial = shutil.copyfile(file, folder / ".partial")
        Path(partial).replace(folder / "direction.onnx")

    def followed(outcome: str) -> bool:
        return all(serve.counted("probescore_reloads_total", replica=replica, outcome=outcome) for replica in (0, 1))

    def check(probe: str, version: str) -> None:
        for answer in [client.score(GROUPS, probes=[probe]) for _ in range(20)]:
            assert [each.key for each in answer.info.probes] == [PROBE + version]
            np.testing.assert_allclose(answer.values(PROBE), expected[version], rtol=0, atol=1e-4)

    with ProbeClient(serve.address) as client:
        client.wait_until_ready(START_SECONDS)
        until(lambda: len(serve.replicas()) == 2, "there are two replicas")
        until(lambda: all(serve.counted("probescore_ready", replica=replica) for replica in (0, 1)), "both can score")
        check(PROBE, "@1")
        put(newer)
        until(lambda: followed("changed"), "both have followed")
        check(PROBE, "@2")
        check(f"{PROBE}@1", "@1")  # a run that began with it goes on with it, whichever replica has the call
        put(Path(__file__))
        until(lambda: followed("refused"), "both have refused what is no probe")
        check(PROBE, "@2")


@pytest.mark.parametrize(
    ("queued", "now", "wanted"), [(0, 1, 0), (100, 1, 1), (101, 1, 2), (350, 2, 4), (120, 2, 2), (40, 2, 1), (0, 4, 3)]
)
def test_replicas_grow_in_proportion_to_what_waits_and_shrink_one_at_a_time(queued: int, now: int, wanted: int) -> None:
    context = SimpleNamespace(
        aggregated_metrics={"queued_tokens": {"one": queued - queued // 2, "other": queued // 2}}, target_num_replicas=now
    )

    replicas, _ = QueuedTokens(target=100)(context)

    assert replicas == wanted


@pytest.mark.parametrize(
    ("setting", "value"),
    [("interceptors", "my.auth:interceptor"), ("admin", True), ("allow_activations", ["*"]), ("max_replicas", 0), ("no_such", 1)],
)
def test_what_means_nothing_here_is_refused(setting: str, value: object) -> None:
    with pytest.raises(StartupError, match=setting):
        app({"model": "m", setting: value})


def test_readings_need_admin_as_anywhere_and_admin_alone_is_refused() -> None:
    """Ray's proxy would have one replica sleep, or reload its probes."""
    with pytest.raises(StartupError, match="readings_root is of no use without admin"):
        app({"model": "m", "readings_root": "/readings"})
    with pytest.raises(StartupError, match=r"admin: cannot be set .* unless readings_root is set, .* run probescore serve inside"):
        app({"model": "m", "admin": True})


def test_a_plain_server_inside_a_ray_job(model: Path, probe_file: Path) -> None:
    """The actor of docs/how-to/deploy/ray.md."""
    written = next(block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "class ProbeServer" in block)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(written, names)  # noqa: S102 - what the page says is what is tested
    port, metrics_port = free_ports(2)
    flags = ["--devices", "cpu", "--metrics-port", str(metrics_port)]
    environment = {"env_vars": {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}}

    server = (
        names["ProbeServer"]
        .options(num_gpus=0, runtime_env=environment)
        .remote(str(model), str(probe_file), *flags, host="127.0.0.1", port=port)
    )
    with ProbeClient(ray.get(server.get_address.remote(), timeout=START_SECONDS)) as client:
        client.wait_until_ready(START_SECONDS)
        assert client.score(GROUPS).values(PROBE).shape == (3,)
    ray.kill(server)

    until(lambda: not is_taken(port), "the server ended with its actor")


def busy_replica(serve: RunningServe) -> psutil.Process:
    """One of two, in which calls wait."""
    numbers = until(lambda: [one for one in (0, 1) if serve.counted("probescore_queue_tokens", replica=one)], "calls wait in a replica")
    port = serve.metrics_port + numbers[0]
    return next(replica for replica in serve.replicas() if port in {one.laddr.port for one in replica.net_connections()})


def is_taken(port: int) -> bool:
    with socket.socket() as probing:
        return probing.connect_ex(("127.0.0.1", port)) == 0
