"""From start to end: readiness, drains, deaths, and starts that must fail."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from calls import NOT_SERVING, SERVING, TIMEOUT, connected, details, eventually, health, request, total
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from models import tiny_model
from running_server import RunningServer, launch

from probescore import AsyncProbeClient, DeadlineExceededError, ProbeClient, RolloutGroup, UnavailableError
from probescore.v1 import probes_pb2, scoring_pb2

StartServer = Callable[..., RunningServer]
SERVICE = "probescore.v1.ScoringService"


# ------------------------------------------------------------------------------------------------------------------- readiness


def test_it_listens_at_once_and_serves_when_a_worker_has_passed_its_tests(start_server: StartServer, model: Path, probe_file: Path) -> None:
    server = start_server(model, [probe_file], wait=False)
    assert health(server) == health(server, SERVICE) == NOT_SERVING
    with connected(server) as stub, pytest.raises(grpc.RpcError) as refused:
        stub.GetServerInfo(scoring_pb2.GetServerInfoRequest(), timeout=TIMEOUT)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert details(refused.value, RetryInfo)
    server.wait_for("serving")
    assert health(server) == health(server, SERVICE) == SERVING


def test_it_is_alive_while_it_loads_and_while_no_worker_is_left(start_server: StartServer, model: Path, probe_file: Path) -> None:
    alive = "grpc.health.v1.Health"
    server = start_server(model, [probe_file], wait=False, worker_restart_seconds=60)
    assert (health(server), health(server, alive)) == (NOT_SERVING, SERVING)
    server.wait_for("serving")
    os.kill(server.worker_pid(), signal.SIGKILL)
    eventually(lambda: health(server) == NOT_SERVING)
    assert health(server, alive) == SERVING


def test_the_front_process_never_loads_torch(served: RunningServer) -> None:
    with connected(served) as stub:
        stub.Score(request(), timeout=TIMEOUT)
    mapped = {Path(entry.path).name for entry in psutil.Process(served.pid).memory_maps()}
    worker = {Path(entry.path).name for entry in psutil.Process(served.worker_pid()).memory_maps()}
    heavy = ("libtorch", "onnxruntime", "tokenizers")
    assert [name for name in mapped if any(word in name for word in heavy)] == []
    assert [name for name in worker if "libtorch" in name]  # the check would see it


def test_importing_the_front_loads_no_torch() -> None:
    check = "import sys, probescore_server.front.server; print({'torch', 'transformers', 'onnxruntime', 'onnx'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout.strip() == "set()"


def test_info_names_the_model_without_its_path(served: RunningServer, model: Path) -> None:
    with connected(served) as stub:
        info = stub.GetServerInfo(scoring_pb2.GetServerInfoRequest(), timeout=TIMEOUT)
    assert info.model.id == model.name
    assert list(info.probes) == ["direction@1"]
    assert [(worker.device, worker.ready, worker.restarts) for worker in info.workers] == [("cpu", True, 0)]


def test_a_unix_socket_serves_and_a_second_server_does_not_take_it_over(
    start_server: StartServer, model: Path, probe_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "probescore.sock"
    with socket.socket(socket.AF_UNIX) as left_behind:  # by a server that was killed
        left_behind.bind(str(path))
    server = start_server(model, [probe_file], unix_socket=path)
    with connected(server) as stub:
        assert stub.Score(request(), timeout=TIMEOUT).groups
    with launch(["--model", str(model), "--unix-socket", str(path), "--metrics-port", "0"]) as second:
        assert second.process.wait(TIMEOUT) == 1
        assert "another server" in second.log.read_text()
    assert health(server) == SERVING


# ------------------------------------------------------------------------------------------------------------------------ ends


def test_sigterm_under_load_finishes_what_was_accepted_and_exits_0(start_server: StartServer, model: Path, probe_file: Path) -> None:
    server = start_server(model, [probe_file])
    watched: list[int] = []
    channel = grpc.insecure_channel(server.address)
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
    watching = threading.Thread(target=lambda: watched.extend(answer.status for answer in watch))
    watching.start()
    eventually(lambda: watched == [SERVING])
    with connected(server) as stub:
        os.kill(server.worker_pid(), signal.SIGSTOP)
        accepted = [stub.Score.future(request(), timeout=TIMEOUT) for _ in range(8)]
        eventually(lambda: total(server, "probescore_rpcs_in_flight") == 8 + 1)  # and the watch
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("draining")
        watching.join(TIMEOUT)
        assert watched[-1] == NOT_SERVING
        with connected(server) as late, pytest.raises(grpc.RpcError) as refused:
            late.Score(request(), timeout=TIMEOUT)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        os.kill(server.worker_pid(), signal.SIGCONT)
        assert all(call.result().groups for call in accepted)
    channel.close()
    assert server.process.wait(TIMEOUT) == 0


def test_a_drain_ends_after_drain_seconds_and_a_second_signal_ends_it_at_once(
    start_server: StartServer, model: Path, probe_file: Path
) -> None:
    server = start_server(model, [probe_file], drain_seconds=3600)
    worker = server.worker_pid()
    with connected(server) as stub:
        os.kill(worker, signal.SIGSTOP)
        stuck = stub.Score.future(request(), timeout=TIMEOUT)
        eventually(lambda: total(server, "probescore_rpcs_in_flight") == 1)
        server.process.send_signal(signal.SIGINT)
        server.wait_for("draining")
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(TIMEOUT) == 0
        assert stuck.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    assert not psutil.pid_exists(worker)


def test_a_worker_does_not_outlive_a_front_process_that_is_killed(start_server: StartServer, model: Path, probe_file: Path) -> None:
    server = start_server(model, [probe_file])
    worker = psutil.Process(server.worker_pid())
    server.stop(signal.SIGKILL)
    eventually(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)


# ---------------------------------------------------------------------------------------------------------------------- deaths


def test_kill_of_the_worker_in_mid_batch_fails_its_calls_and_it_comes_back(
    start_server: StartServer, model: Path, probe_file: Path
) -> None:
    server = start_server(model, [probe_file])
    with connected(server) as stub:
        before = stub.Score(request(), timeout=TIMEOUT)
        os.kill(server.worker_pid(), signal.SIGSTOP)
        hit = stub.Score.future(request(), timeout=TIMEOUT)
        eventually(lambda: total(server, "probescore_rpcs_in_flight") == 1)
        os.kill(server.worker_pid(), signal.SIGKILL)
        error = hit.exception()
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert details(error, ErrorInfo)[0].reason == "WORKER_UNAVAILABLE"
        assert details(error, RetryInfo)[0].retry_delay.ToMilliseconds() > 0
        server.wait_for("not serving")
        assert health(server) == NOT_SERVING
        waiting = stub.Score.future(request(), timeout=TIMEOUT)  # queued until the restart
        server.wait_for("serving", count=2)
        assert health(server) == SERVING
        after = waiting.result()
        assert after.groups == before.groups
        info = stub.GetServerInfo(scoring_pb2.GetServerInfoRequest(), timeout=TIMEOUT)
        assert info.workers[0].restarts == 1


def test_with_two_workers_the_death_of_one_leaves_the_server_serving(start_server: StartServer, model: Path, probe_file: Path) -> None:
    server = start_server(model, [probe_file], devices="cpu,cpu", wait=False)
    server.wait_for("worker ready", count=2)
    os.kill(server.worker_pid(), signal.SIGKILL)
    server.wait_for("worker died")
    assert health(server) == SERVING
    with connected(server) as stub:
        assert stub.Score(request(), timeout=TIMEOUT).groups
        server.wait_for("worker ready", count=3)
        info = stub.GetServerInfo(scoring_pb2.GetServerInfoRequest(), timeout=TIMEOUT)
    assert sorted((worker.ready, worker.restarts) for worker in info.workers) == [(True, 0), (True, 1)]


def test_the_clients_retry_gets_the_right_scores_after_a_kill(start_server: StartServer, model: Path, probe_file: Path) -> None:
    server = start_server(model, [probe_file])
    groups = [RolloutGroup([1, 5, 6], [[7, 8, 9], [10]])]
    with ProbeClient(server.address, timeout=TIMEOUT) as client:
        expected = client.score(groups).values("direction")
        os.kill(server.worker_pid(), signal.SIGSTOP)
        scored: list[np.ndarray] = []
        calling = threading.Thread(target=lambda: scored.append(client.score(groups).values("direction")))
        calling.start()
        eventually(lambda: total(server, "probescore_rpcs_in_flight") == 1)
        os.kill(server.worker_pid(), signal.SIGKILL)
        calling.join(TIMEOUT)
    np.testing.assert_array_equal(scored[0], expected)


def test_a_call_whose_worker_dies_ends_with_its_budget(start_server: StartServer, model: Path, probe_file: Path) -> None:
    # given a call that computes, with a budget shorter than what the worker takes to start again
    server = start_server(model, [probe_file], worker_restart_seconds=2.0)
    ended: list[tuple[float, Exception]] = []

    def call() -> None:
        try:
            client.score([RolloutGroup([1, 5, 6], [[7, 8, 9], [10]])])
        except UnavailableError as error:
            ended.append((time.monotonic(), error))

    with ProbeClient(server.address, timeout=TIMEOUT, restart_budget=1.0) as client:
        os.kill(server.worker_pid(), signal.SIGSTOP)
        calling = threading.Thread(target=call)
        calling.start()
        eventually(lambda: total(server, "probescore_rpcs_in_flight") == 1)
        killed = time.monotonic()
        os.kill(server.worker_pid(), signal.SIGKILL)
        calling.join(TIMEOUT)

    [(when, error)] = ended
    assert "the client's restart_budget of 1 s" in str(error)
    assert when - killed < 3


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", [ProbeClient, AsyncProbeClient])
def test_a_stream_that_begins_as_the_server_is_killed_ends_by_its_deadline(
    kind: type, start_server: StartServer, model: Path, probe_file: Path
) -> None:
    server = start_server(model, [probe_file])
    groups = [RolloutGroup([1, 5, 6], [[7, 8]])]

    async def stream_twice() -> None:
        async with AsyncProbeClient(server.address, timeout=2.0) as client:
            assert len([scored async for scored in client.score_stream(groups)]) == 1
            server.process.kill()
            _ = [scored async for scored in client.score_stream(groups)]

    def stream_twice_synchronously() -> None:
        with ProbeClient(server.address, timeout=2.0) as client:
            assert len(list(client.score_stream(groups))) == 1
            server.process.kill()
            list(client.score_stream(groups))

    with pytest.raises((UnavailableError, DeadlineExceededError)):
        stream_twice_synchronously() if kind is ProbeClient else asyncio.run(stream_twice())


def test_files_that_changed_are_not_served_by_a_restarted_worker(
    start_server: StartServer, model: Path, probe_file: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(model, tmp_path / "model")
    server = start_server(own, [], worker_restart_seconds=0.1)
    weights = next(own.glob("*.safetensors"))
    shutil.copy(next(tiny_model(seed=1).glob("*.safetensors")), weights)
    os.kill(server.worker_pid(), signal.SIGKILL)
    assert "changed" in server.wait_for("worker did not start again")["problem"]
    assert health(server) == NOT_SERVING
    shutil.copy(model / weights.name, weights)
    server.wait_for("serving", count=2)


# ------------------------------------------------------------------------------------------------------- starts that must fail


def failed_start(*arguments: str, **environment: str) -> tuple[int, str]:
    with launch(["--port", "0", "--metrics-port", "0", "--devices", "cpu", *arguments], **environment) as server:
        code = server.process.wait(TIMEOUT * 2)
        return code, server.log.read_text()


def test_a_second_server_on_the_port_fails_with_a_clear_message(served: RunningServer, model: Path) -> None:
    port = served.address.rpartition(":")[2]
    code, log = failed_start("--model", str(model), "--port", port)
    assert code == 1
    assert f"cannot listen on 127.0.0.1:{port}" in log
    assert health(served) == SERVING


def test_a_metrics_port_that_is_taken_is_named(served: RunningServer, model: Path) -> None:
    port = served.metrics_address.rpartition(":")[2]
    code, log = failed_start("--model", str(model), "--metrics-port", port)
    assert code == 1
    assert f"metrics_port {port}" in log


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "model: required"),
        (("--model", "m", "--port", "70000"), "port: "),
        (("--model", "m", "--max-request-tokens", "8"), "max_request_tokens (8) must be at least max_rollout_tokens"),
        (("--model", "m", "--config", "no-such.yaml"), "config no-such.yaml"),
    ],
)
def test_wrong_settings_are_named_and_exit_2(arguments: tuple[str, ...], named: str) -> None:
    code, log = failed_start(*arguments)
    assert code == 2
    assert named in log
    assert "Traceback" not in log


def test_a_model_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    code, log = failed_start("--model", str(tmp_path / "nothing"), HF_HUB_OFFLINE="1")
    assert code == 1
    assert "cannot start" in log
    assert "nothing" in log


def test_probe_files_that_are_refused_are_named_with_what_is_wrong(model: Path, probe_file: Path, tmp_path: Path) -> None:
    corrupt = tmp_path / "corrupt.onnx"
    corrupt.write_bytes(probe_file.read_bytes()[:200])
    other = tiny_model(seed=1)
    for arguments, named in (
        (("--model", str(model), "--probes", str(corrupt)), "corrupt.onnx"),
        (("--model", str(model), "--probes", str(tmp_path / "missing.onnx")), "missing.onnx"),
        (("--model", str(other), "--probes", str(probe_file)), "model.fingerprint"),
    ):
        code, log = failed_start(*arguments)
        assert code == 1
        assert named in log
        assert "Traceback" not in log


def test_an_interceptor_that_cannot_be_imported_is_named(model: Path) -> None:
    code, log = failed_start("--model", str(model), "--interceptors", "json:no_such_thing")
    assert code == 1
    assert "json:no_such_thing" in log


# ---------------------------------------------------------------------------------------------------------------- authentication

INTERCEPTOR = """
import grpc

class Token(grpc.aio.ServerInterceptor):
    async def intercept_service(self, continuation, details):
        if ("authorization", "Bearer right") in details.invocation_metadata or "Health" in details.method:
            return await continuation(details)
        async def refuse(request, context):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are you?")
        return grpc.unary_unary_rpc_method_handler(refuse)

token = Token()
"""


def test_an_interceptor_of_the_settings_guards_every_call(
    start_server: StartServer, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "company_auth.py").write_text(INTERCEPTOR)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    server = start_server(model, [], interceptors="company_auth:token")
    with connected(server) as stub:
        with pytest.raises(grpc.RpcError) as refused:
            stub.ListProbes(probes_pb2.ListProbesRequest(), timeout=TIMEOUT)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        right = [("authorization", "Bearer right")]
        assert stub.ListProbes(probes_pb2.ListProbesRequest(), timeout=TIMEOUT, metadata=right) == probes_pb2.ListProbesResponse()
    assert total(server, "grpc_server_handled_total", 'grpc_code="UNAUTHENTICATED"') == 1
