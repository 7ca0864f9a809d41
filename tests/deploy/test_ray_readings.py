"""Readings in Ray Serve with two replicas: whichever has a call, a name means the same version, whatever happens to a replica."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
import psutil
import pytest
import ray
from models import tiny_model
from numpy.typing import NDArray
from running_ray import RunningServe, free_ports, running_ray, serve_run, until
from written_adapters import WrittenAdapter

from probescore import (
    DeadlineExceededError,
    InvalidRequestError,
    ProbeClient,
    ProbescoreError,
    RolloutGroup,
    ServerError,
    UnavailableError,
)
from probescore.types import LoadedReading, ScoreResult
from probescore_server import Engine

PROBE = "direction"
GROUPS = [RolloutGroup([1, 5, 6, 7], [[8, 9, 10], [11, 12]]), RolloutGroup([1, 20, 21], [[22, 23, 24, 25]])]
STEPS = 4
ATOL = 1e-4
DRAIN_SECONDS = 3.0
START_SECONDS = 180.0

Array = NDArray[np.float64]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readings")


@pytest.fixture(scope="module")
def serve(model: Path, probe_file: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServe]:
    """Two replicas."""
    (port,), metrics_ports = free_ports(1), free_ports(3)
    settings = {
        "model": model,
        "probes": probe_file,
        "devices": "cpu",
        "threads_per_worker": 1,
        "min_replicas": 2,
        "port": port,
        "metrics_port": metrics_ports[0],
        "admin": True,
        "readings_root": root,
        "max_readings": 2,
        "max_batch_tokens": 512,
        "max_rollout_tokens": 256,
        "drain_seconds": DRAIN_SECONDS,
        "worker_restart_seconds": 0.05,
    }
    arguments = [f"{name}={value}" for name, value in settings.items()]
    log = tmp_path_factory.mktemp("log") / "serve.log"
    with running_ray(), serve_run(log, "probescore_server.ray:app", *arguments, port=port, metrics_port=metrics_ports[0]) as running:
        yield running


@pytest.fixture
def client(serve: RunningServe) -> Iterator[ProbeClient]:
    """A client that tries nothing twice, of two replicas without any readings."""
    with ProbeClient(serve.address) as patient:
        patient.wait_until_ready(START_SECONDS)
        until_both_score(serve)
    with ProbeClient(serve.address, restart_budget=0.0) as connected:
        yield connected
    with ProbeClient(serve.address) as patient:
        for reading in patient.readings()[1:]:
            patient.unload_reading(reading.name)


@pytest.fixture
def expected(model: Path, probe_file: Path, root: Path) -> Iterator[dict[str, Array]]:
    """Writes adapters to ``step-0`` and so on, and says what a plain engine scores with each, by directory; and with none."""
    engine = Engine.load(str(model), [probe_file])
    values = {"frozen": engine.score(GROUPS).values(PROBE)}
    for step in range(STEPS):
        folder = WrittenAdapter.random(model, ["q_proj", "v_proj"], size=1.0, seed=step).write(root / f"step-{step}")
        engine.load_reading("policy", folder)
        values[folder.name] = engine.score(GROUPS, readings=["policy"]).values(PROBE, reading="policy")
    closest = min(np.abs(one - other).max() for one in values.values() for other in values.values() if one is not other)
    assert closest > 100 * ATOL  # else scores of another version would pass
    yield values
    for entry in root.iterdir():
        if entry.is_symlink():
            entry.unlink()
        else:
            shutil.rmtree(entry)


class Scoring:
    """Callers that score both readings from the start of a ``with`` block to its end, and note what is wrong.

    Args:
        address: the servers'.
        expected: by the id of a version, its scores; and those of ``frozen``.
    """

    def __init__(self, address: str, expected: dict[str, Array]) -> None:
        self._address = address
        self._expected = expected
        self._stopping = threading.Event()
        self._callers = [threading.Thread(target=self._call_until_stopped, daemon=True) for _ in range(3)]
        self.seen: list[str] = []
        self.failures: list[str] = []

    def __enter__(self) -> Scoring:
        for caller in self._callers:
            caller.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopping.set()
        for caller in self._callers:
            caller.join(START_SECONDS)

    def wait(self, answers: int = 20) -> None:
        """Waits until so many more calls were answered."""
        wanted = len(self.seen) + answers
        until(lambda: self.failures or len(self.seen) >= wanted, "calls are answered")

    def _call_until_stopped(self) -> None:
        with ProbeClient(self._address) as client:
            while not self._stopping.is_set():
                try:
                    answer = client.score(GROUPS, readings=("frozen", "policy"))
                    version = answer.info.readings[1].id
                    check(answer, self._expected["frozen"], self._expected[version])
                except (ProbescoreError, AssertionError, KeyError) as problem:
                    self.failures.append(repr(problem)[:500])
                else:
                    self.seen.append(version)


def check(answer: ScoreResult, frozen: Array, policy: Array) -> None:
    np.testing.assert_allclose(answer.values(PROBE), frozen, rtol=0, atol=ATOL)
    np.testing.assert_allclose(answer.values(PROBE, reading="policy"), policy, rtol=0, atol=ATOL)


def until_both_score(serve: RunningServe) -> None:
    until(lambda: len(serve.replicas()) == 2, "there are two replicas")
    until(lambda: all(serve.counted("probescore_ready", replica=replica) for replica in (0, 1)), "both can score")


def answered(serve: RunningServe) -> list[float]:
    """How many calls to score each replica has answered."""
    labels = {"grpc_method": "Score", "grpc_code": "OK"}
    return [serve.counted("grpc_server_handled_total", replica=replica, **labels) for replica in (0, 1)]


def check_every_replica(serve: RunningServe, client: ProbeClient, frozen: Array, policy: Array, reading_id: str) -> None:
    """Scores until both replicas have answered several calls, all of one version."""
    before = answered(serve)
    while any(now - then < 5 for now, then in zip(answered(serve), before, strict=True)):
        for _ in range(10):
            answer = client.score(GROUPS, readings=("frozen", "policy"))
            assert [each.name for each in answer.info.readings] == ["frozen", "policy"]
            assert answer.info.readings[1].id == reading_id
            check(answer, frozen, policy)


def check_refused_everywhere(client: ProbeClient, error: type[ProbescoreError], reason: str) -> str:
    for _ in range(20):
        with pytest.raises(error) as refused:
            client.score(GROUPS, readings=("frozen", "policy"))
        assert refused.value.reason == reason
    return str(refused.value)


def worker_of(replica: psutil.Process) -> psutil.Process:
    return next(child for child in replica.children(recursive=True) if "spawn_main" in " ".join(child.cmdline()))


def outcome_of(call: Callable[[], object]) -> object:
    """What a call returns, or the error that it raises."""
    try:
        return call()
    except ProbescoreError as error:
        return error


def in_background(call: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """Starts a call, whose outcome is put into the list."""
    outcome: list[object] = []
    thread = threading.Thread(target=lambda: outcome.append(outcome_of(call)))
    thread.start()
    return thread, outcome


# ----------------------------------------------------------------------------------------------------------------------- loading


def test_every_replica_reads_what_was_loaded_through_any(serve: RunningServe, client: ProbeClient, expected: dict[str, Array]) -> None:
    assert [reading.name for reading in client.readings()] == ["frozen"]
    loaded = client.load_reading("policy", "step-0", step=7)

    assert (loaded.reading.name, loaded.reading.step, loaded.replaced) == ("policy", 7, None)
    assert loaded.golden_drift[f"{PROBE}@1"] > 0.01
    assert loaded.device_bytes > 0
    check_every_replica(serve, client, expected["frozen"], expected["step-0"], loaded.reading.id)
    for _ in range(10):
        assert client.readings()[1:] == (loaded.reading,)
        np.testing.assert_allclose(client.score(GROUPS).values(PROBE), expected["frozen"], rtol=0, atol=ATOL)
    streamed = sorted(client.score_stream(GROUPS, readings=["policy"]), key=lambda one: (one.group_index, one.completion_index))
    found = [one.scores.on("policy")[PROBE].reduced.item() for one in streamed]
    np.testing.assert_allclose(found, expected["step-0"], rtol=0, atol=ATOL)

    assert client.unload_reading("policy") == loaded.reading
    text = check_refused_everywhere(client, InvalidRequestError, "UNKNOWN_READING")
    assert "readings[1]: unknown reading 'policy'; loaded: frozen" in text
    for _ in range(10):
        assert [reading.name for reading in client.readings()] == ["frozen"]


def test_a_reading_is_replaced_while_clients_score(serve: RunningServe, client: ProbeClient, expected: dict[str, Array]) -> None:
    by_id = {"frozen": expected["frozen"]}
    engine_ids: list[str] = []
    for step in range(STEPS):
        loaded = client.load_reading("policy", f"step-{step}", step=step)
        by_id[loaded.reading.id] = expected[f"step-{step}"]
        engine_ids.append(loaded.reading.id)
    with Scoring(serve.address, by_id) as scoring:
        for step in (0, 1, 2, 3, 0, 1):
            scoring.wait()
            loaded = client.load_reading("policy", f"step-{step}", step=step, in_place=step == 2)
            assert loaded.reading.id == engine_ids[step]
            assert loaded.replaced is not None
            assert loaded.replaced.id == engine_ids[step - 1]
            for _ in range(5):  # what follows a load is of that load, whichever replica has the call
                assert client.score(GROUPS, readings=["policy"]).info.readings[0].id == engine_ids[step]
        scoring.wait()

    assert scoring.failures == []
    assert set(scoring.seen) == set(engine_ids)


def test_two_names_and_no_more_and_loads_of_one_name_take_turns(client: ProbeClient, expected: dict[str, Array]) -> None:
    started = [in_background(lambda step=step: client.load_reading("policy", f"step-{step}", step=step)) for step in range(3)]
    client.load_reading("other", "step-3")
    for thread, _ in started:
        thread.join()
    outcomes = [outcome for _, (outcome,) in started]
    assert all(isinstance(outcome, LoadedReading) for outcome in outcomes), outcomes
    replaced = [outcome.replaced for outcome in outcomes]
    assert replaced.count(None) == 1
    (last,) = {outcome.reading for outcome in outcomes} - set(replaced)
    for _ in range(10):
        answer = client.score(GROUPS, readings=("policy", "other"))
        assert answer.info.readings[0] == last
        np.testing.assert_allclose(answer.values(PROBE, reading="policy"), expected[f"step-{last.step}"], rtol=0, atol=ATOL)
        np.testing.assert_allclose(answer.values(PROBE, reading="other"), expected["step-3"], rtol=0, atol=ATOL)
    with pytest.raises(InvalidRequestError) as refused:
        client.load_reading("third", "step-0")
    assert (refused.value.reason, refused.value.violations[0].field) == ("LIMIT_EXCEEDED", "name")


def test_what_cannot_be_loaded_is_refused_with_the_reason(client: ProbeClient, expected: dict[str, Array], root: Path) -> None:
    (root / "written").mkdir()
    (root / "written" / "model.bin").write_bytes(b"none of ours")
    (root / "latest").symlink_to("written")
    before = client.load_reading("policy", "step-0").reading
    for path, text in [
        ("../outside", "does not lie below the server's readings_root"),
        ("nowhere", "'nowhere' is no directory that this server sees"),
        ("latest", "'latest'"),  # the name that the client gave, not what a link leads to
    ]:
        with pytest.raises(ProbescoreError) as refused:
            client.load_reading("policy", path, timeout=1.0)
        assert text in str(refused.value)
        assert "written" not in str(refused.value)
        assert str(root) not in str(refused.value)
    with pytest.raises(ProbescoreError) as mismatch:
        client.load_reading("policy", "step-1", expected_id=before.id)
    assert mismatch.value.reason == "READING_MISMATCH"
    with pytest.raises(InvalidRequestError, match="frozen"):
        client.unload_reading("frozen")
    with pytest.raises(InvalidRequestError, match="unknown reading 'other'"):
        client.unload_reading("other")
    for _ in range(10):
        check(client.score(GROUPS, readings=("frozen", "policy")), expected["frozen"], expected["step-0"])


# ----------------------------------------------------------------------------------------------------------- one replica fails


def test_a_load_that_one_replica_cannot_do_leaves_all_as_they_were(
    serve: RunningServe, client: ProbeClient, expected: dict[str, Array], root: Path
) -> None:
    before = client.load_reading("policy", "step-0").reading

    def loads() -> list[float]:
        return [serve.counted("probescore_reading_loads_total", replica=replica, outcome="loaded") for replica in (0, 1)]

    began = loads()
    late = worker_of(serve.replicas()[0])
    late.send_signal(signal.SIGSTOP)
    loading, outcome = in_background(lambda: client.load_reading("policy", "step-1", timeout=10.0))
    until(lambda: sum(loads()) == sum(began) + 1, "the other replica has loaded it")
    torn = root / "step-1" / "adapter_model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-100])  # as if it were being written
    late.send_signal(signal.SIGCONT)
    loading.join()
    (error,) = outcome
    assert isinstance(error, UnavailableError), error
    assert error.reason == "READING_INCOMPLETE"
    check_every_replica(serve, client, expected["frozen"], expected["step-0"], before.id)


def test_a_replica_that_dies_while_it_loads_leaves_the_others_as_they_were(
    serve: RunningServe, client: ProbeClient, expected: dict[str, Array]
) -> None:
    before = client.load_reading("policy", "step-0").reading
    by_id = {"frozen": expected["frozen"], before.id: expected["step-0"]}
    victim = serve.replicas()[0]
    worker = worker_of(victim)
    worker.send_signal(signal.SIGSTOP)
    with ProbeClient(serve.address) as patient:
        loading, outcome = in_background(lambda: client.load_reading("policy", "step-1", timeout=60.0))
        time.sleep(2.0)
        worker.kill()
        victim.kill()
        loading.join()
        (error,) = outcome
        assert isinstance(error, UnavailableError), error
        for _ in range(10):
            answer = patient.score(GROUPS, readings=("frozen", "policy"))
            check(answer, by_id["frozen"], by_id[answer.info.readings[1].id])
        until_both_score(serve)
        check_every_replica(serve, patient, expected["frozen"], expected["step-0"], before.id)
        loaded = patient.load_reading("policy", "step-1").reading
        check_every_replica(serve, patient, expected["frozen"], expected["step-1"], loaded.id)


def test_a_replica_that_is_killed_comes_back_with_what_was_loaded(
    serve: RunningServe, client: ProbeClient, expected: dict[str, Array]
) -> None:
    first, second = (client.load_reading("policy", f"step-{step}").reading for step in range(2))
    by_id = {"frozen": expected["frozen"], first.id: expected["step-0"], second.id: expected["step-1"]}
    with Scoring(serve.address, by_id) as scoring:
        scoring.wait()
        serve.replicas()[0].kill()
        scoring.wait()
        until_both_score(serve)
        scoring.wait()
    assert scoring.failures == []
    assert set(scoring.seen) == {second.id}
    with ProbeClient(serve.address) as patient:
        check_every_replica(serve, patient, expected["frozen"], expected["step-1"], second.id)


def test_a_replica_that_cannot_read_it_again_loses_it_for_all(
    serve: RunningServe, client: ProbeClient, expected: dict[str, Array], root: Path
) -> None:
    client.load_reading("policy", "step-0")
    other = client.load_reading("other", "step-1").reading
    shutil.rmtree(root / "step-0")
    serve.replicas()[0].kill()
    until_both_score(serve)
    with ProbeClient(serve.address) as patient:
        until(lambda: len(patient.readings()) == 2, "it is lost")
        text = check_refused_everywhere(patient, ServerError, "READING_LOST")
        assert "the reading 'policy' was lost" in text
        for _ in range(10):
            answer = patient.score(GROUPS, readings=("frozen", "other"))
            assert answer.info.readings[1] == other
            np.testing.assert_allclose(answer.values(PROBE), expected["frozen"], rtol=0, atol=ATOL)
            np.testing.assert_allclose(answer.values(PROBE, reading="other"), expected["step-1"], rtol=0, atol=ATOL)
        loaded = patient.load_reading("policy", "step-2").reading  # and it may come again
        check_every_replica(serve, patient, expected["frozen"], expected["step-2"], loaded.id)


def test_a_worker_that_cannot_read_it_again_loses_it_for_all(
    serve: RunningServe, client: ProbeClient, expected: dict[str, Array], root: Path
) -> None:
    client.load_reading("policy", "step-0")
    shutil.rmtree(root / "step-0")
    worker_of(serve.replicas()[1]).kill()
    with ProbeClient(serve.address) as patient:
        until(lambda: len(patient.readings()) == 1, "it is lost")
        check_refused_everywhere(patient, ServerError, "READING_LOST")


def test_names_keep_their_meaning_if_the_actor_that_knows_it_is_lost(
    serve: RunningServe, client: ProbeClient, expected: dict[str, Array]
) -> None:
    loaded = client.load_reading("policy", "step-0").reading
    (found,) = [each for each in ray.util.list_named_actors(all_namespaces=True) if "DEPLOYMENT_ACTOR" in each["name"].upper()]
    ray.kill(ray.get_actor(found["name"], namespace=found["namespace"]))
    # Until it is there again, calls are refused, rather than what the name may not mean any more is scored.
    outcomes = [outcome_of(lambda: client.score(GROUPS, readings=["policy"])) for _ in range(10)]
    assert any(isinstance(outcome, UnavailableError) for outcome in outcomes)
    np.testing.assert_allclose(client.score(GROUPS).values(PROBE), expected["frozen"], rtol=0, atol=ATOL)
    with ProbeClient(serve.address, timeout=START_SECONDS, restart_budget=START_SECONDS) as patient:
        check_every_replica(serve, patient, expected["frozen"], expected["step-0"], loaded.id)
        second = patient.load_reading("policy", "step-1")
        assert second.replaced == loaded
        check_every_replica(serve, patient, expected["frozen"], expected["step-1"], second.reading.id)


def test_a_load_whose_caller_gives_up_runs_on(serve: RunningServe, client: ProbeClient, expected: dict[str, Array]) -> None:
    late = worker_of(serve.replicas()[0])
    late.send_signal(signal.SIGSTOP)
    with pytest.raises(DeadlineExceededError):
        client.load_reading("policy", "step-1", timeout=1.0)
    time.sleep(0.5)
    assert client.readings()[1:] == ()
    late.send_signal(signal.SIGCONT)
    with ProbeClient(serve.address) as patient:
        (loaded,) = until(lambda: patient.readings()[1:], "it is loaded")
        check_every_replica(serve, patient, expected["frozen"], expected["step-1"], loaded.id)


# --------------------------------------------------------------------------------------------------------------------- in place


def test_a_load_in_place_waits_for_calls_of_every_replica_and_gives_up_in_time(
    serve: RunningServe, client: ProbeClient, expected: dict[str, Array]
) -> None:
    first = client.load_reading("policy", "step-0").reading
    slow = worker_of(serve.replicas()[0])
    slow.send_signal(signal.SIGSTOP)
    scoring = [in_background(lambda: client.score(GROUPS, readings=["policy"], timeout=60.0)) for _ in range(20)]
    time.sleep(1.0)  # those of the other replica have ended
    began = time.monotonic()
    with pytest.raises(ServerError) as in_use:
        client.load_reading("policy", "step-1", in_place=True)
    assert in_use.value.reason == "READING_IN_USE"
    assert "still read 'policy'" in str(in_use.value)
    assert DRAIN_SECONDS <= time.monotonic() - began < DRAIN_SECONDS + 15
    began = time.monotonic()
    with pytest.raises(ProbescoreError):
        client.load_reading("policy", "step-1", in_place=True, timeout=1.0)
    assert time.monotonic() - began < DRAIN_SECONDS
    slow.send_signal(signal.SIGCONT)
    for thread, _ in scoring:
        thread.join()
    for _, (answer,) in scoring:
        assert isinstance(answer, ScoreResult), answer
        assert answer.info.readings == (first,)
        np.testing.assert_allclose(answer.values(PROBE, reading="policy"), expected["step-0"], rtol=0, atol=ATOL)
    check_every_replica(serve, client, expected["frozen"], expected["step-0"], first.id)
    loaded = client.load_reading("policy", "step-1", in_place=True)
    assert loaded.replaced == first
    check_every_replica(serve, client, expected["frozen"], expected["step-1"], loaded.reading.id)


def test_a_load_in_place_that_fails_leaves_nothing_in_any_replica(
    serve: RunningServe, client: ProbeClient, expected: dict[str, Array], root: Path
) -> None:
    client.load_reading("policy", "step-0")
    torn = root / "step-1" / "adapter_model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-100])
    with pytest.raises(UnavailableError) as incomplete:
        client.load_reading("policy", "step-1", in_place=True, timeout=1.0)
    assert incomplete.value.reason == "READING_INCOMPLETE"
    check_refused_everywhere(client, InvalidRequestError, "UNKNOWN_READING")
    np.testing.assert_allclose(client.score(GROUPS).values(PROBE), expected["frozen"], rtol=0, atol=ATOL)
    loaded = client.load_reading("policy", "step-2", in_place=True).reading
    check_every_replica(serve, client, expected["frozen"], expected["step-2"], loaded.id)


def test_what_is_meant_for_one_server_is_not_there(client: ProbeClient) -> None:
    for call in (client.sleep, client.wake, client.reload_probes):
        with pytest.raises(ServerError) as refused:
            call()
        assert refused.value.code == "UNIMPLEMENTED"


def test_a_model_of_others_is_refused_by_all(client: ProbeClient, expected: dict[str, Array], root: Path) -> None:
    before = client.load_reading("policy", "step-0").reading
    shutil.copytree(tiny_model(layers=2), root / "other-model")
    with pytest.raises(InvalidRequestError) as refused:
        client.load_reading("policy", "other-model")
    assert refused.value.reason == "READING_REFUSED"
    for _ in range(10):
        assert client.score(GROUPS, readings=["policy"]).info.readings == (before,)
