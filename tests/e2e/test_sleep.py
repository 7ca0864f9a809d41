"""A server that shares its device with training: asleep it holds nothing, loses nothing, and scores afterwards as before."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from calls import SERVING, TIMEOUT, connected, details, eventually, group, health, numbers, request, scrape, total
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from running_server import RunningServer, start_server

from probescore import AuthenticationError, ProbeClient, RolloutGroup
from probescore.v1 import admin_pb2, admin_pb2_grpc, scoring_pb2

StartServer = Callable[..., RunningServer]

CALL = request(group([1, 5, 6, 7], [8, 9, 10], [8, 11]))
CALL_TOKENS = 4 + 3 + 2
OTHER_CALL = request(group([1, 5, 6, 7], [12, 13, 14]))
OTHER_TOKENS = 4 + 3


@pytest.fixture(scope="module")
def server(model: Path, probe_file: Path) -> Iterator[RunningServer]:
    with start_server(model, [probe_file], admin=True) as running:
        yield running


@contextmanager
def administered(server: RunningServer) -> Iterator[admin_pb2_grpc.ProbeAdminServiceStub]:
    with grpc.insecure_channel(server.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield admin_pb2_grpc.ProbeAdminServiceStub(channel)


def sleep(server: RunningServer) -> admin_pb2.SleepResponse:
    with administered(server) as stub:
        return stub.Sleep(admin_pb2.SleepRequest(), timeout=TIMEOUT)


def wake(server: RunningServer) -> admin_pb2.WakeResponse:
    with administered(server) as stub:
        return stub.Wake(admin_pb2.WakeRequest(), timeout=TIMEOUT)


def queued(server: RunningServer) -> float:
    return total(server, "probescore_queue_tokens")


def worker_info(server: RunningServer) -> scoring_pb2.WorkerInfo:
    with connected(server) as stub:
        (worker,) = stub.GetServerInfo(scoring_pb2.GetServerInfoRequest(), timeout=TIMEOUT).workers
    return worker


# ------------------------------------------------------------------------------------------------------------------------- calls


def test_a_call_waits_until_it_is_woken_and_has_the_scores_that_it_had_before(server: RunningServer) -> None:
    sleep(server)  # so that both calls find an empty cache
    wake(server)
    with connected(server) as stub:
        before = stub.Score(CALL, timeout=TIMEOUT)
        sleep(server)
        waiting = stub.Score.future(CALL, timeout=TIMEOUT)
        eventually(lambda: queued(server) == CALL_TOKENS)
        assert not waiting.done()
        wake(server)
        assert waiting.result().groups == before.groups
    assert queued(server) == 0


def test_what_it_gives_back_is_said_and_asking_again_changes_nothing(server: RunningServer) -> None:
    with connected(server) as stub:
        stub.Score(CALL, timeout=TIMEOUT)
    (slept,) = sleep(server).transfers
    assert (slept.device, slept.weight_bytes) == ("cpu", 0)
    assert slept.device_bytes > 0
    assert slept.seconds > 0
    assert list(sleep(server).transfers) == [admin_pb2.Transfer(device="cpu")]
    wake(server)
    assert list(wake(server).transfers) == [admin_pb2.Transfer(device="cpu")]
    with connected(server) as stub:
        assert stub.Score(CALL, timeout=TIMEOUT).groups


def test_a_call_whose_deadline_passes_meanwhile_leaves_nothing_behind(server: RunningServer) -> None:
    sleep(server)
    batches = total(server, "probescore_batch_tokens_count")
    with connected(server) as stub:
        waiting = stub.Score.future(CALL, timeout=0.5)
        assert waiting.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    eventually(lambda: queued(server) == 0 and total(server, "probescore_rpcs_in_flight") == 0)
    wake(server)
    with connected(server) as stub:
        assert stub.Score(CALL, timeout=TIMEOUT).groups
    assert total(server, "probescore_batch_tokens_count") == batches + 1


def test_a_batch_that_computes_is_answered_and_only_then_it_sleeps(server: RunningServer) -> None:
    with connected(server) as stub, administered(server) as admin:
        os.kill(server.worker_pid(), signal.SIGSTOP)
        computing = stub.Score.future(CALL, timeout=TIMEOUT)
        eventually(lambda: total(server, "probescore_rpcs_in_flight") == 1 and queued(server) == 0)
        falling_asleep = admin.Sleep.future(admin_pb2.SleepRequest(), timeout=TIMEOUT)
        eventually(lambda: total(server, "probescore_worker_asleep") == 1)
        later = stub.Score.future(OTHER_CALL, timeout=TIMEOUT)
        eventually(lambda: queued(server) == OTHER_TOKENS)
        os.kill(server.worker_pid(), signal.SIGCONT)
        falling_asleep.result()
        assert computing.result().groups
        assert not later.done()
        wake(server)
        assert later.result().groups


def test_text_is_checked_while_it_sleeps(server: RunningServer) -> None:
    prompt = scoring_pb2.Prompt(text=scoring_pb2.Text(text="w7 w8"))
    text = scoring_pb2.RolloutGroup(prompt=prompt, completions=[scoring_pb2.Completion(text="w9")])
    sleep(server)
    with connected(server) as stub:
        waiting = stub.Score.future(request(text), timeout=TIMEOUT)
        eventually(lambda: queued(server) == 3)
        wake(server)
        assert waiting.result().groups[0].completions[0].inexact_ids


def test_in_a_training_loop_it_is_awake_for_the_scores_and_asleep_for_the_rest_of_the_step(server: RunningServer) -> None:
    groups = [RolloutGroup([1, 5, 6, 7], [[8, 9, 10], [8, 11]])]
    with ProbeClient(server.address, timeout=TIMEOUT) as client:
        client.sleep()
        steps = []
        for _ in range(3):
            with client.awake():
                steps.append(client.score(groups).values("direction").tolist())
            assert client.get_server_info().workers[0].asleep
        client.wake()
    assert steps[0] == steps[1] == steps[2]


# ------------------------------------------------------------------------------------------------------------- what others are told


def test_asleep_it_is_serving_and_says_that_it_sleeps(server: RunningServer) -> None:
    sleep(server)
    assert health(server) == health(server, "probescore.v1.ScoringService") == SERVING
    assert (worker_info(server).ready, worker_info(server).asleep) == (False, True)
    asleep = scrape(server)
    assert asleep["probescore_ready{}"] == asleep['probescore_worker_ready{device="cpu",worker="0"}'] == 0
    assert asleep['probescore_worker_asleep{device="cpu",worker="0"}'] == 1
    wake(server)
    assert (worker_info(server).ready, worker_info(server).asleep) == (True, False)
    awake = scrape(server)
    assert awake["probescore_ready{}"] == 1
    assert awake['probescore_worker_asleep{device="cpu",worker="0"}'] == 0
    for kind in ("sleep", "wake"):
        assert awake[f'probescore_transfer_seconds_count{{kind="{kind}"}}'] > 0


def services(server: RunningServer) -> set[str]:
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    with grpc.insecure_channel(server.address) as channel:
        (answer,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([asked]), timeout=TIMEOUT)
    return {service.name for service in answer.list_services_response.service}


def test_only_a_server_whose_settings_say_so_has_the_service(server: RunningServer, served: RunningServer) -> None:
    assert "probescore.v1.ProbeAdminService" in services(server)
    assert "probescore.v1.ProbeAdminService" not in services(served)
    for move in (sleep, wake):
        with pytest.raises(grpc.RpcError) as refused:
            move(served)
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


INTERCEPTOR = """
import grpc

class Administrators(grpc.aio.ServerInterceptor):
    async def intercept_service(self, continuation, details):
        if "ProbeAdminService" not in details.method or ("authorization", "Bearer right") in details.invocation_metadata:
            return await continuation(details)
        async def refuse(request, context):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "for administrators")
        return grpc.unary_unary_rpc_method_handler(refuse)

administrators = Administrators()
"""


def test_an_interceptor_of_the_settings_guards_it(
    start_server: StartServer, model: Path, probe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "company_admins.py").write_text(INTERCEPTOR)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    server = start_server(model, [probe_file], admin=True, interceptors="company_admins:administrators")
    with ProbeClient(server.address, timeout=TIMEOUT) as anyone, pytest.raises(AuthenticationError):
        anyone.sleep()
    assert worker_info(server).ready
    with ProbeClient(server.address, timeout=TIMEOUT, metadata={"authorization": "Bearer right"}) as administrator:
        administrator.sleep()
    assert worker_info(server).asleep


# -------------------------------------------------------------------------------------------------------------------- ends and deaths


def test_one_that_starts_cannot_be_put_to_sleep_yet(start_server: StartServer, model: Path, probe_file: Path) -> None:
    server = start_server(model, [probe_file], admin=True, wait=False)
    with pytest.raises(grpc.RpcError) as refused:
        sleep(server)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert details(refused.value, RetryInfo)


def test_kill_while_it_sleeps_leaves_the_device_alone_until_it_is_woken(start_server: StartServer, model: Path, probe_file: Path) -> None:
    server = start_server(model, [probe_file], admin=True)
    with connected(server) as stub:
        before = stub.Score(CALL, timeout=TIMEOUT)
        sleep(server)
        waiting = stub.Score.future(CALL, timeout=TIMEOUT)
        eventually(lambda: queued(server) == CALL_TOKENS)
        os.kill(server.worker_pid(), signal.SIGKILL)
        server.wait_for("worker died")
        assert health(server) == SERVING
        assert (worker_info(server).ready, worker_info(server).asleep) == (False, True)
        assert len(server.events("starting worker")) == 1

        with pytest.raises(grpc.RpcError) as starting:
            wake(server)
        assert starting.value.code() is grpc.StatusCode.UNAVAILABLE
        assert details(starting.value, RetryInfo)[0].retry_delay.ToMilliseconds() > 0
        server.wait_for("worker ready", count=2)
        assert numbers(waiting.result().groups[0].completions[0].scores[0].reduced) == pytest.approx(
            numbers(before.groups[0].completions[0].scores[0].reduced)
        )
    wake(server)
    assert (worker_info(server).ready, worker_info(server).restarts) == (True, 1)


def test_of_two_workers_one_that_is_down_is_put_to_sleep_when_it_is_back(start_server: StartServer, model: Path, probe_file: Path) -> None:
    server = start_server(model, [probe_file], admin=True, devices="cpu,cpu", wait=False)
    server.wait_for("worker ready", count=2)
    os.kill(server.worker_pid(), signal.SIGKILL)
    server.wait_for("worker died")
    with pytest.raises(grpc.RpcError) as half:
        sleep(server)
    assert half.value.code() is grpc.StatusCode.UNAVAILABLE
    with ProbeClient(server.address, timeout=TIMEOUT) as client:
        assert len(client.sleep()) == 2
        assert [worker.asleep for worker in client.get_server_info().workers] == [True, True]
        assert len(client.wake()) == 2
        assert [worker.ready for worker in client.get_server_info().workers] == [True, True]


def test_sigterm_while_it_sleeps_ends_at_once_and_tells_those_who_wait(start_server: StartServer, model: Path, probe_file: Path) -> None:
    server = start_server(model, [probe_file], admin=True, drain_seconds=3600)
    sleep(server)
    with connected(server) as stub:
        waiting = stub.Score.future(CALL, timeout=TIMEOUT)
        eventually(lambda: queued(server) == CALL_TOKENS)
        server.process.send_signal(signal.SIGTERM)
        error = waiting.exception()
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert details(error, ErrorInfo)[0].reason == "WORKER_UNAVAILABLE"
        assert details(error, RetryInfo)
    assert server.process.wait(TIMEOUT) == 0
