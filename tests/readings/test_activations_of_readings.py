"""Activations of a reading: as plain Hugging Face gives them with the adapter in its weights, of one version a call, in an engine and
through gRPC.
"""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from calls import eventually
from read_twice import BOUND, GROUPS, TAPS, Array, Served, direction, plain_scores, write_probes
from running_server import RunningServer, start_server
from written_adapters import WrittenAdapter

from probescore import AsyncProbeClient, Completion, CompletionActivations, InvalidRequestError, MismatchError, ProbeClient, RolloutGroup
from probescore.types import FROZEN, ReadingKind
from probescore_server import Engine
from probescore_server.errors import InvalidRequest

FORMS = {"lora": {}, "dora": {"use_dora": True}, "some layers": {"layers_to_transform": [1, 2]}}
ALL = [*TAPS.values()]


def scores_of(found: Sequence[CompletionActivations], name: str) -> Array:
    """What a probe says of every token, by its direction and the activations."""
    return np.concatenate([each.tokens[TAPS[name]].astype(np.float64) @ direction(name).astype(np.float64) for each in found])


def rows_of(found: Sequence[CompletionActivations]) -> Array:
    return np.concatenate([np.concatenate([each.tokens[tap] for tap in ALL], axis=1) for each in found]).astype(np.float64)


# ------------------------------------------------------------------------------------------------------------------- in an engine


@pytest.mark.parametrize("form", FORMS)
def test_activations_are_those_of_the_merged_model(engine: Engine, llama: Served, tmp_path: Path, form: str) -> None:
    adapter = WrittenAdapter.random(llama.model, **FORMS[form])
    before = list(engine.activations(GROUPS, ALL, pool=("tokens", "mean")))
    loaded = engine.load_reading("policy", adapter.write(tmp_path), step=7)
    found = list(engine.activations(GROUPS, ALL, pool=("tokens", "mean"), reading="policy"))
    expected = plain_scores(adapter.merged())
    far = {name: np.abs(scores_of(found, name) - own).max() / own.std() for name, own in expected.items()}
    assert {name: by for name, by in far.items() if not by <= BOUND} == {}
    assert all(each.reading == loaded.reading for each in found)
    assert np.abs(rows_of(found) - rows_of(before)).max() > 0.01
    for each in found:
        for tap in ALL:
            np.testing.assert_allclose(each.pooled[tap][0, 0], each.tokens[tap].astype(np.float64).mean(axis=0), rtol=0, atol=1e-5)
    for name in ("", FROZEN):  # bit by bit what they were, and named if it was asked for by name
        again = list(engine.activations(GROUPS, ALL, pool=("tokens", "mean"), reading=name))
        np.testing.assert_array_equal(rows_of(again), rows_of(before))
        assert {each.reading for each in again} == ({engine.readings()[0]} if name else {None})


def test_where_a_version_changes_nothing_it_is_read_as_the_frozen_model(engine: Engine, llama: Served, tmp_path: Path) -> None:
    engine.load_reading("policy", WrittenAdapter.random(llama.model, layers_to_transform=[2]).write(tmp_path))
    before, early = (list(engine.activations(GROUPS, TAPS["early"], reading=name)) for name in ("", "policy"))
    for plain, own in zip(before, early, strict=True):
        np.testing.assert_array_equal(plain.tokens[TAPS["early"]], own.tokens[TAPS["early"]])
    late = list(engine.activations(GROUPS, ALL, reading="policy"))
    assert np.abs(rows_of(late) - rows_of(list(engine.activations(GROUPS, ALL)))).max() > 0.01


def test_follow_ups_say_whose_they_are(engine: Engine, llama: Served, tmp_path: Path) -> None:
    loaded = engine.load_reading("policy", WrittenAdapter.random(llama.model).write(tmp_path))
    asked = [RolloutGroup([1, 5], [Completion([6, 7], follow_ups=(Completion([8]),))])]
    (found,) = engine.activations(asked, ALL, reading="policy")
    assert (found.reading, found.follow_ups[0].reading) == (loaded.reading, loaded.reading)


def test_an_unknown_reading_is_refused_at_the_call(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match=r"^reading: unknown reading 'policy'; loaded: frozen$"):
        engine.activations(GROUPS, ALL, reading="policy")


def test_a_call_is_of_the_version_that_it_began_with(engine: Engine, llama: Served, tmp_path: Path) -> None:
    adapters = [WrittenAdapter.random(llama.model, seed=seed).write(tmp_path / str(seed)) for seed in range(2)]
    first = engine.load_reading("policy", adapters[0]).reading
    expected = rows_of(list(engine.activations(GROUPS, ALL, reading="policy")))
    late, row_bytes = engine.activations(GROUPS, ALL, reading="policy"), len(ALL) * engine.info.model.hidden_size * 4
    begun = engine.activations(GROUPS, ALL, reading="policy", max_batch_bytes=30 * row_bytes)  # a batch for each completion or two
    found = [next(begun)]
    engine.load_reading("policy", adapters[1])
    engine.unload_reading("policy")
    for results in ([*found, *begun], [*late]):
        assert {each.reading for each in results} == {first}
        np.testing.assert_allclose(rows_of(results), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("asked", [0, 1, 100])
def test_what_nobody_reads_any_more_is_freed(engine: Engine, llama: Served, tmp_path: Path, asked: int) -> None:
    engine.load_reading("policy", WrittenAdapter.random(llama.model).write(tmp_path))
    own = [weakref.ref(tensor) for tensor in engine._readings.tensors()]
    results = engine.activations(GROUPS, ALL, reading="policy", max_batch_bytes=1 << 16)
    for _, _ in zip(range(asked), results, strict=False):
        pass
    engine.unload_reading("policy")
    assert all(tensor() is not None for tensor in own) or asked == 100
    del results
    gc.collect()
    assert own
    assert all(tensor() is None for tensor in own)
    assert list(engine._readings.tensors()) == []


# ------------------------------------------------------------------------------------------------------------------- through gRPC


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, llama: Served) -> Path:
    root = tmp_path_factory.mktemp("readings")
    for seed in range(2):
        WrittenAdapter.random(llama.model, seed=seed).write(root / f"step-{seed}")
    return root


@pytest.fixture(scope="module")
def server(llama: Served, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    probes = write_probes(tmp_path_factory.mktemp("probes"), llama.model, ["last"])
    settings = {"admin": True, "readings_root": root, "devices": "cpu,cpu", "worker_restart_seconds": 0.05}
    with start_server(llama.model, probes, allow_activations=",".join(ALL), **settings) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[ProbeClient]:
    with ProbeClient(server.address, timeout=60) as connected:
        eventually(lambda: all(worker.ready for worker in connected.get_server_info().workers))
        yield connected
        for reading in connected.readings()[1:]:
            connected.unload_reading(reading.name)


def test_a_server_gives_what_the_engine_gives(client: ProbeClient, server: RunningServer, engine: Engine, root: Path) -> None:
    loaded = client.load_reading("policy", "step-0", step=3).reading
    engine.load_reading("policy", root / "step-0")
    for name in ("policy", FROZEN, ""):
        found = list(client.activations(GROUPS, ALL, reading=name))
        np.testing.assert_allclose(rows_of(found), rows_of(list(engine.activations(GROUPS, ALL, reading=name))), rtol=0, atol=1e-4)
        own = {"policy": loaded, FROZEN: client.readings()[0], "": None}[name]
        assert {(each.reading, each.info.reading) for each in found if each.info} == {(own, own)}

    async def read() -> list[CompletionActivations]:
        async with AsyncProbeClient(server.address) as other:
            return [each async for each in other.activations(GROUPS, ALL, reading="policy")]

    found = asyncio.run(read())
    assert {each.reading and each.reading.kind for each in found} == {ReadingKind.ADAPTER}
    np.testing.assert_allclose(rows_of(found), rows_of(list(engine.activations(GROUPS, ALL, reading="policy"))), rtol=0, atol=1e-4)


def test_readings_do_not_mix_in_a_batch(client: ProbeClient, server: RunningServer, engine: Engine, root: Path) -> None:
    """Calls of two versions, of the frozen model and for scores, at the same time, of the same rollouts."""
    for step in range(2):
        client.load_reading(f"at-{step}", f"step-{step}")
        engine.load_reading(f"at-{step}", root / f"step-{step}")
    names = ["at-0", "at-1", FROZEN]
    expected = {name: rows_of(list(engine.activations(GROUPS, ALL, reading=name))) for name in names}

    async def read_all() -> list[tuple[str, list[CompletionActivations]]]:
        async with AsyncProbeClient(server.address, timeout=60) as other:

            async def read(name: str) -> tuple[str, list[CompletionActivations]]:
                return name, [each async for each in other.activations(GROUPS, ALL, reading=name)]

            scores = [other.score(GROUPS, readings=names) for _ in range(4)]
            found = await asyncio.gather(*(read(name) for name in names * 4), *scores)
            return found[: len(names) * 4]  # type: ignore[return-value]

    for name, found in asyncio.run(read_all()):
        np.testing.assert_allclose(rows_of(found), expected[name], rtol=0, atol=1e-4)


def test_a_reading_that_is_not_there_is_named(client: ProbeClient) -> None:
    with pytest.raises(InvalidRequestError, match="unknown reading 'policy'; loaded: frozen") as failed:
        list(client.activations(GROUPS, ALL, reading="policy"))
    assert (failed.value.field, failed.value.reason) == ("reading", "UNKNOWN_READING")
    with pytest.raises(InvalidRequestError, match="1 to 64") as failed:
        client.activations(GROUPS, ALL, reading="../policy")
    assert failed.value.field == "reading"


def test_a_call_of_several_rpcs_does_not_mix_versions(client: ProbeClient) -> None:
    client.load_reading("policy", "step-0")
    found = client.activations(GROUPS, ALL, reading="policy", bytes_per_call=1)
    next(found)
    client.load_reading("policy", "step-1")
    with pytest.raises(MismatchError, match=r"'policy' came to mean .* during the call, and activations of both would be mixed") as failed:
        list(found)
    assert failed.value.reason == "READING_CHANGED"


def test_only_the_taps_of_the_start_are_read_of_a_reading(client: ProbeClient) -> None:
    client.load_reading("policy", "step-0")
    with pytest.raises(InvalidRequestError, match="none of the taps that the server reads"):
        list(client.activations(GROUPS, "mlp_out.0", reading="policy"))
