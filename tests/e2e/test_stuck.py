"""A worker that gets stuck, in each state that it can be in: noticed within the limits, recovered by itself, and no call lost.

Limits are short here. Nothing is measured that a busy machine could make longer, but that it happens at all.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import psutil
import pytest
from calls import NOT_SERVING, SERVING, TIMEOUT, connected, details, eventually, group, health, numbers, request, scrape, total
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from harmful_probe import ENDLESS, SLOW, write_harmful_probe
from running_server import RunningServer, start_server

from probescore.v1 import admin_pb2, admin_pb2_grpc, scoring_pb2

StartServer = Callable[..., RunningServer]
SILENT, STEP = 4.0, 3.0
LIMITS = {"worker_silent_seconds": SILENT, "step_seconds": STEP, "step_seconds_per_1000_tokens": 100, "worker_restart_seconds": 0}
# What a busy machine may add until something is noticed, or done.
PATIENCE = 4 * TIMEOUT
# Of a loop whose body is an addition, for one rollout: more than `STEP` wherever this may run.
SLOW_STEPS = 15_000_000

CALL = request(group([1, 5, 6, 7], [8, 9, 10], [8, 11]))
TEXT = scoring_pb2.RolloutGroup(
    prompt=scoring_pb2.Prompt(text=scoring_pb2.Text(text="w5 w6 w7")), completions=[scoring_pb2.Completion(text="w8 w9")]
)


@pytest.fixture(scope="module")
def probes(model: Path, probe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    harmful = tmp_path_factory.mktemp("harmful") / "loop.onnx"
    write_harmful_probe(harmful, model, slow_steps=SLOW_STEPS)
    return [probe_file, harmful]


@pytest.fixture(scope="module")
def server(model: Path, probes: list[Path]) -> Iterator[RunningServer]:
    with start_server(model, probes, admin=True, **LIMITS) as running:
        yield running


@contextmanager
def administered(server: RunningServer) -> Iterator[admin_pb2_grpc.ProbeAdminServiceStub]:
    with grpc.insecure_channel(server.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield admin_pb2_grpc.ProbeAdminServiceStub(channel)


@contextmanager
def loses_its_worker(server: RunningServer, *reasons: str) -> Iterator[None]:
    """What runs inside costs the server its worker, for these reasons; afterwards it is there again."""
    deaths, starts = len(server.events("worker died")), len(server.events("worker ready"))
    counted = {reason: losses(server, reason) for reason in reasons}
    yield
    server.wait_for("worker ready", count=starts + len(reasons), seconds=PATIENCE)
    eventually(lambda: health(server) == SERVING)
    assert [event["reason"] for event in server.events("worker died")[deaths:]] == list(reasons)
    for reason in counted:
        assert losses(server, reason) == counted[reason] + reasons.count(reason)


def losses(server: RunningServer, reason: str) -> float:
    return total(server, "probescore_worker_losses_total", f'reason="{reason}"')


def stop_worker(server: RunningServer) -> None:
    os.kill(server.worker_pid(), signal.SIGSTOP)


def direction(response: scoring_pb2.ScoreResponse) -> list[float]:
    """What the linear probe says of every completion."""
    return [numbers(completion.scores[0].reduced).item() for one in response.groups for completion in one.completions]


def scored(server: RunningServer, asked: scoring_pb2.ScoreRequest = CALL) -> list[float]:
    with connected(server) as stub:
        return direction(stub.Score(asked, timeout=PATIENCE))


# ------------------------------------------------------------------------------------------------------------ stopped, in each state


def test_idle(server: RunningServer) -> None:
    before = scored(server)
    with loses_its_worker(server, "silent"):
        stop_worker(server)
        began = time.monotonic()
        server.wait_for("worker died", count=len(server.events("worker died")) + 1, seconds=PATIENCE)
        assert time.monotonic() - began > SILENT / 2
        assert health(server, "grpc.health.v1.Health") == SERVING  # it is alive: nobody need restart it
        server.wait_for("not serving")
        assert scored(server) == pytest.approx(before, rel=1e-4)  # a call that comes meanwhile waits
    assert total(server, "probescore_ready") == 1


def test_computing_and_tokenising(server: RunningServer) -> None:
    before, of_text = scored(server), scored(server, request(TEXT))
    with loses_its_worker(server, "silent"), connected(server) as stub:
        stop_worker(server)
        computing = [stub.Score.future(asked, timeout=PATIENCE) for asked in (CALL, request(group([1, 9], [12, 13])), request(TEXT))]
        eventually(lambda: total(server, "probescore_rpcs_in_flight") == 3)
        with pytest.raises(grpc.RpcError) as late:
            stub.Score(request(group([1, 9], [18])), timeout=SILENT / 4)
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert direction(computing[0].result()) == pytest.approx(before, rel=1e-4)
        assert computing[1].result().groups
        assert direction(computing[2].result()) == pytest.approx(of_text, rel=1e-4)


def test_falling_asleep_asleep_and_woken(server: RunningServer) -> None:
    before = scored(server)
    with loses_its_worker(server, "silent"), administered(server) as admin, connected(server) as stub:
        stop_worker(server)
        with pytest.raises(grpc.RpcError) as failed:
            admin.Sleep(admin_pb2.SleepRequest(), timeout=PATIENCE)
        assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
        assert details(failed.value, RetryInfo)
        assert admin.Sleep(admin_pb2.SleepRequest(), timeout=PATIENCE).transfers  # it is dead, and stays so until it is woken
        waiting = stub.Score.future(CALL, timeout=PATIENCE)
        with pytest.raises(grpc.RpcError):
            admin.Wake(admin_pb2.WakeRequest(), timeout=PATIENCE)
        assert direction(waiting.result()) == pytest.approx(before, rel=1e-4)


def test_asleep(server: RunningServer) -> None:
    with loses_its_worker(server, "silent"), administered(server) as admin:
        admin.Sleep(admin_pb2.SleepRequest(), timeout=PATIENCE)
        deaths, starts = len(server.events("worker died")), len(server.events("starting worker"))
        stop_worker(server)
        server.wait_for("worker died", count=deaths + 1, seconds=PATIENCE)
        assert health(server) == SERVING
        assert len(server.events("starting worker")) == starts
        with pytest.raises(grpc.RpcError):
            admin.Wake(admin_pb2.WakeRequest(), timeout=PATIENCE)


def test_waking(server: RunningServer) -> None:
    before = scored(server)
    with loses_its_worker(server, "silent"), administered(server) as admin:
        admin.Sleep(admin_pb2.SleepRequest(), timeout=PATIENCE)
        stop_worker(server)
        with pytest.raises(grpc.RpcError) as failed:
            admin.Wake(admin_pb2.WakeRequest(), timeout=PATIENCE)
        assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
        assert details(failed.value, RetryInfo)
        # and nobody asks again: it was told to be awake
    assert scored(server) == pytest.approx(before, rel=1e-4)


# ----------------------------------------------------------------------------------------------------- a graph that does not end


def test_a_rollout_on_which_a_graph_never_ends_is_refused_by_name_and_the_rest_is_scored(server: RunningServer) -> None:
    before = scored(server)
    with loses_its_worker(server, "overdue", "overdue"), connected(server) as stub:
        bad = stub.Score.future(request(group([1, 5], [8]), group([1, 5, 6], [9], [10, ENDLESS])), timeout=PATIENCE)
        eventually(lambda: total(server, "probescore_rpcs_in_flight") == 1)
        neighbours = [stub.Score.future(asked, timeout=PATIENCE) for asked in (CALL, request(group([1], [14, 15])))]
        error = bad.exception()
        assert error.code() is grpc.StatusCode.INTERNAL
        assert "groups[1].completions[1] with probe loop@1" in error.details()
        (info,) = details(error, ErrorInfo)
        assert (info.reason, dict(info.metadata)) == (
            "WORKER_LOST_TWICE",
            {"field": "groups[1].completions[1]", "doing": "probe loop@1"},
        )
        assert direction(neighbours[0].result()) == pytest.approx(before, rel=1e-4)
        assert neighbours[1].result().groups
    assert {event["doing"] for event in server.events("worker died")[-2:]} == {"probe loop@1"}
    # it costs nobody a worker any more
    with connected(server) as stub, pytest.raises(grpc.RpcError) as refused:
        stub.Score(request(group([1, 5, 6], [10, ENDLESS])), timeout=PATIENCE)
    assert details(refused.value, ErrorInfo)[0].reason == "WORKER_LOST_TWICE"
    # without the probe that does not end, it is scored
    assert scored(server, request(group([1, 5, 6], [10, ENDLESS]), probes=["direction"]))


# ------------------------------------------------------------------------------------------------------------------ nothing is stuck


def test_a_batch_that_is_merely_long_is_not_killed(server: RunningServer) -> None:
    deaths = len(server.events("worker died"))
    long = [SLOW] + [20 + place % 50 for place in range(480)]
    with connected(server) as stub:
        answer = stub.Score(request(group([1, 5], long)), timeout=PATIENCE)
    assert answer.info.usage.compute_seconds > STEP
    assert len(server.events("worker died")) == deaths


@pytest.mark.parametrize("whole", [True, False])
def test_one_is_not_killed_for_a_time_in_which_the_front_stood_still_itself(server: RunningServer, whole: bool) -> None:
    deaths = len(server.events("worker died"))
    stopped = [server.pid] + [server.worker_pid()] * whole
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(1.5 * SILENT)
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    assert scored(server)
    time.sleep(SILENT / 2)
    assert len(server.events("worker died")) == deaths


# ------------------------------------------------------------------------------------------------------------- starting, stopping


def workers_of(server: RunningServer) -> list[psutil.Process]:
    return [child for child in psutil.Process(server.pid).children() if "spawn_main" in " ".join(child.cmdline())]


def test_starting(start_server: StartServer, model: Path, probe_file: Path) -> None:
    server = start_server(model, [probe_file], wait=False, **LIMITS)
    server.wait_for("reading 1 probe files")
    (stopped,) = workers_of(server)
    stopped.send_signal(signal.SIGSTOP)
    assert health(server) == NOT_SERVING
    server.wait_for("worker stalled while it was starting", seconds=PATIENCE)
    server.wait_for("serving", seconds=PATIENCE)
    assert [event["reason"] for event in server.events("worker died")] == ["silent"]
    assert not stopped.is_running()
    assert scored(server)


def test_of_two_workers_the_other_goes_on(start_server: StartServer, model: Path, probe_file: Path) -> None:
    server = start_server(model, [probe_file], devices="cpu,cpu", wait=False, **LIMITS)
    server.wait_for("worker ready", count=2, seconds=PATIENCE)
    stop_worker(server)
    with connected(server) as stub:
        answers = [stub.Score.future(request(group([1, 5], [8, number])), timeout=PATIENCE) for number in range(20, 28)]
        assert all(answer.result().groups for answer in answers)
    assert server.wait_for("worker died")["reason"] == "silent"
    assert not server.events("not serving")


def test_loading_that_never_ends_is_given_up(start_server: StartServer, model: Path, probe_file: Path) -> None:
    server = start_server(model, [probe_file], wait=False, worker_start_seconds=1)
    assert server.process.wait(PATIENCE) == 1
    assert "not ready within 1 s (worker_start_seconds)" in server.log.read_text()


def test_a_server_that_is_told_to_stop_still_finishes_what_a_stuck_worker_has(server: RunningServer) -> None:
    """The last of this server."""
    before = scored(server)
    with connected(server) as stub:
        stop_worker(server)
        accepted = stub.Score.future(CALL, timeout=PATIENCE)
        eventually(lambda: scrape(server)["probescore_rpcs_in_flight{}"] == 1)
        server.process.send_signal(signal.SIGTERM)
        if accepted.exception() is None:
            assert direction(accepted.result()) == pytest.approx(before, rel=1e-4)
        else:  # the drain was shorter than a start on this machine
            assert accepted.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    assert server.process.wait(PATIENCE) == 0
