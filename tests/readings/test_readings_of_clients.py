"""The Python client and the command line with readings, against two real servers that are known by a list of addresses."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from read_twice import GROUPS, TAPS, Served
from running_server import RunningServer, start_server
from served_readings import numbers, of
from written_adapters import WrittenAdapter

from probescore import AsyncProbeClient, InvalidRequestError, MismatchError, ProbeClient, ServerError, StreamWindow, UnavailableError
from probescore_server import Engine

ATOL = 1e-4
BOTH = ("frozen", "policy")


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory, llama: Served) -> list[Path]:
    """What each server sees: the same adapters, but for one that only the first has."""
    folder = tmp_path_factory.mktemp("roots")
    for step in range(2):
        WrittenAdapter.random(llama.model, seed=step).write(folder / "first" / f"step-{step}")
    shutil.copytree(folder / "first", folder / "second")
    WrittenAdapter.random(llama.model, seed=9).write(folder / "first" / "step-9")
    return [folder / "first", folder / "second"]


@pytest.fixture(scope="module")
def servers(llama: Served, roots: list[Path]) -> Iterator[list[RunningServer]]:
    probes = [llama.probe(name) for name in TAPS]
    with (
        start_server(llama.model, probes, admin=True, readings_root=roots[0]) as first,
        start_server(llama.model, probes, admin=True, readings_root=roots[1]) as second,
    ):
        yield [first, second]


@pytest.fixture
def client(servers: list[RunningServer]) -> Iterator[ProbeClient]:
    with ProbeClient([server.address for server in servers], timeout=60) as connected:
        yield connected
        for server in servers:
            with ProbeClient(server.address) as alone:
                for reading in alone.readings()[1:]:
                    alone.unload_reading(reading.name)


def ids(servers: list[RunningServer]) -> list[dict[str, str]]:
    found = []
    for server in servers:
        with ProbeClient(server.address) as alone:
            found.append({reading.name: reading.id for reading in alone.readings()[1:]})
    return found


def expected(engine: Engine, directory: Path) -> np.ndarray:
    engine.load_reading("expected", directory)
    found = of(engine.score(GROUPS, token_scores="all", readings=["expected"]), "expected")
    engine.unload_reading("expected")
    return found


def test_both_readings_come_from_every_server(client: ProbeClient, servers: list[RunningServer], engine: Engine, roots: list[Path]) -> None:
    loaded = client.load_reading("policy", "step-0", step=50)
    assert loaded.reading.step == 50
    assert ids(servers) == [{"policy": loaded.reading.id}] * 2
    assert client.readings()[1] == loaded.reading
    frozen, policy = of(engine.score(GROUPS, token_scores="all"), "frozen"), expected(engine, roots[0] / "step-0")
    for _ in range(4):
        result = client.score(GROUPS, readings=BOTH, token_scores=True)
        np.testing.assert_allclose(of(result, "frozen"), frozen, rtol=0, atol=ATOL)
        np.testing.assert_allclose(of(result, "policy"), policy, rtol=0, atol=ATOL)
        assert result.info.readings[1] == loaded.reading
    pieces = sorted(
        client.score_stream(GROUPS, readings=BOTH, token_scores=True, window=StreamWindow(groups_per_call=1)),
        key=lambda piece: (piece.group_index, piece.completion_index),
    )
    np.testing.assert_allclose(numbers([piece.scores for piece in pieces], "policy"), policy, rtol=0, atol=ATOL)
    assert client.unload_reading("policy") == loaded.reading
    assert ids(servers) == [{}, {}]
    with pytest.raises(InvalidRequestError, match="unknown reading 'policy'"):
        client.score(GROUPS, readings=BOTH)


def test_the_asynchronous_client_does_the_same(
    servers: list[RunningServer], client: ProbeClient, engine: Engine, roots: list[Path]
) -> None:
    async def run() -> np.ndarray:
        async with AsyncProbeClient([server.address for server in servers], timeout=60) as connected:
            loaded = await connected.load_reading("policy", "step-1")
            result = await connected.score(GROUPS, readings="policy", token_scores=True)
            assert result.info.readings == (loaded.reading,) == (await connected.readings())[1:]
            with pytest.raises(InvalidRequestError, match="on all 2 servers or on none"):
                await connected.load_reading("policy", "step-9")
            assert ids(servers) == [{"policy": loaded.reading.id}] * 2
            assert await connected.unload_reading("policy") == loaded.reading
            return of(result, "policy")

    np.testing.assert_allclose(asyncio.run(run()), expected(engine, roots[0] / "step-1"), rtol=0, atol=ATOL)


def test_what_one_server_does_not_see_is_loaded_on_none(client: ProbeClient, servers: list[RunningServer]) -> None:
    with pytest.raises(InvalidRequestError) as failed:
        client.load_reading("policy", "step-9")
    assert (failed.value.reason, failed.value.field) == ("READING_REFUSED", "path")
    assert ids(servers) == [{}, {}]

    first = client.load_reading("policy", "step-0", step=1).reading
    for in_place in (False, True):
        with pytest.raises(InvalidRequestError, match=f"on {servers[0].address} what it meant before, {first.id[:19]}… of step 1"):
            client.load_reading("policy", "step-9", step=2, in_place=in_place)
        assert client.readings()[1] == first
    assert client.score(GROUPS, readings="policy").info.readings == (first,)


def test_files_that_differ_are_loaded_on_none(client: ProbeClient, servers: list[RunningServer], roots: list[Path], llama: Served) -> None:
    for seed, root in enumerate(roots):
        WrittenAdapter.random(llama.model, seed=20 + seed).write(root / "differs")
    with pytest.raises(MismatchError, match="have read different files") as failed:
        client.load_reading("policy", "differs")
    assert failed.value.reason == "READING_DIFFERS"
    assert ids(servers) == [{}, {}]
    with pytest.raises(MismatchError) as expected_other:
        client.load_reading("policy", "step-0", expected_id="sha256:" + "0" * 64)
    assert expected_other.value.reason == "READING_MISMATCH"


def test_servers_that_differ_are_not_asked_in_turn(client: ProbeClient, servers: list[RunningServer]) -> None:
    for step, server in enumerate(servers):
        with ProbeClient(server.address) as alone:
            alone.load_reading("policy", f"step-{step}")
    with ProbeClient([server.address for server in servers], restart_budget=0.2) as impatient:
        for _ in range(3):
            with pytest.raises(UnavailableError, match="do not have the same version of reading 'policy'"):
                impatient.score(GROUPS, readings=BOTH)
        with pytest.raises(MismatchError):
            impatient.readings()
        assert impatient.score(GROUPS).info.readings == ()
        # and the remedy that the message names
        impatient.load_reading("policy", "step-1")
        assert impatient.score(GROUPS, readings=BOTH).info.readings[1].id == impatient.readings()[1].id


def test_a_stream_ends_where_the_policy_was_replaced(client: ProbeClient) -> None:
    first = client.load_reading("policy", "step-0").reading

    def groups() -> Iterator[object]:
        yield GROUPS[0]
        client.load_reading("policy", "step-1")
        yield GROUPS[1]

    stream = client.score_stream(groups(), readings=BOTH, window=StreamWindow(groups_per_call=1, calls_in_flight=1))
    seen = []
    with pytest.raises(MismatchError, match="came to mean") as failed:
        seen.extend(piece.info.readings[1].id for piece in stream)
    assert failed.value.reason == "READING_CHANGED"
    assert set(seen) <= {first.id}


def test_an_adapter_that_is_being_written_is_waited_for(client: ProbeClient, roots: list[Path], llama: Served) -> None:
    adapter = WrittenAdapter.random(llama.model, seed=5)
    for root in roots:
        whole = (adapter.write(root / "torn") / "adapter_model.safetensors").read_bytes()
        (root / "torn" / "adapter_model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(UnavailableError, match=r"it is being written; .*the call's timeout") as failed:
        client.load_reading("policy", "torn", timeout=0.5)
    assert failed.value.reason == "READING_INCOMPLETE"

    def finish() -> None:
        time.sleep(0.7)
        for root in roots:
            (root / "torn" / "adapter_model.safetensors").write_bytes(whole)

    writer = threading.Thread(target=finish)
    writer.start()
    with ProbeClient(client._settings.addresses.written, restart_budget=0) as patient:
        assert patient.load_reading("policy", "torn", timeout=60).reading.changed_layers
    writer.join()


# ---------------------------------------------------------------------------------------------------------------- command line


def run(servers: list[RunningServer], *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    address = ",".join(server.address for server in servers)
    return subprocess.run(
        [sys.executable, "-m", "probescore_server.cli", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PROBESCORE_ADDRESS": address, "COLUMNS": "250"},
    )


def test_the_command_line_loads_scores_and_unloads(client: ProbeClient, servers: list[RunningServer], tmp_path: Path) -> None:
    loaded = run(servers, "readings", "load", "policy", "step-0", "--step", "50")
    assert (loaded.returncode, loaded.stderr) == (0, "")
    reading = client.readings()[1]
    assert loaded.stdout.startswith("policy is loaded")
    assert reading.id in loaded.stdout
    assert f"golden drift of {sorted(TAPS)[0]}@1" in loaded.stdout

    listed = run(servers, "readings", "list")
    assert [line.split()[:3] for line in listed.stdout.splitlines()[2:]] == [["frozen", "frozen", "nothing"], ["policy", "adapter", "50"]]
    as_json = [json.loads(line) for line in run(servers, "readings", "list", "--json").stdout.splitlines()]
    assert [each["name"] for each in as_json] == ["frozen", "policy"]
    assert (as_json[1]["id"], as_json[1]["step"]) == (reading.id, 50)
    assert "policy" in run(servers[:1], "info").stdout

    lines = json.dumps({"prompt": list(map(int, GROUPS[0].prompt)), "completion": [5, 6, 7]})
    page = tmp_path / "page.html"
    scored = run(servers, "score", "-", "--json", "--html", str(page), "--reading", "frozen", "--reading", "policy", stdin=lines)
    assert (scored.returncode, scored.stderr) == (0, "")
    (answer,) = map(json.loads, scored.stdout.splitlines())
    result = client.score([type(GROUPS[0])(GROUPS[0].prompt, [[5, 6, 7]])], readings=BOTH)
    for probe in TAPS:
        for read, found in (("frozen", answer["scores"]), ("policy", answer["readings"]["policy"]["scores"])):
            assert found[probe]["reduced"][0][0][0] == pytest.approx(result.values(probe, reading=read)[0], abs=1e-4)
    assert "policy − frozen" not in page.read_text("utf-8")  # the page subtracts names itself
    assert '"base":"frozen"' in page.read_text("utf-8")

    removed = run(servers, "readings", "unload", "policy", "--json")
    assert json.loads(removed.stdout)["id"] == reading.id
    assert ids(servers) == [{}, {}]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["readings", "load", "policy", "nowhere"], 2, "'nowhere' is no directory that this server sees"),
        (["score", "w5", "--reading", "policy"], 2, "readings[0]: unknown reading 'policy'"),
        (["readings", "load", "policy", "step-0", "--expected-id", "sha256:00"], 1, "sha256:00"),
    ],
)
def test_what_fails_is_one_line(client: ProbeClient, servers: list[RunningServer], arguments: list[str], code: int, said: str) -> None:
    ran = run(servers, *arguments)
    assert (ran.returncode, ran.stdout) == (code, "")
    assert said in ran.stderr
    assert ran.stderr.startswith("probescore: ")
    assert ran.stderr.count("\n") == 1


def test_a_server_without_readings_says_so(llama: Served) -> None:
    with (
        start_server(llama.model, [llama.probe("early")], admin=True) as server,
        ProbeClient(server.address) as client,
    ):
        assert client.readings() == ()
        with pytest.raises(ServerError, match="readings-root") as off:
            client.load_reading("policy", "step-0")
        assert off.value.reason == "READINGS_OFF"
        with pytest.raises(InvalidRequestError, match="unknown reading"):
            client.score(GROUPS, readings="policy")
        assert [each.name for each in client.score(GROUPS, readings="frozen").info.readings] == ["frozen"]
