"""Readings through gRPC: a real server with two workers beside an engine of this process, which says what each answer must be."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from calls import eventually
from parity_models import write_model
from read_twice import GROUPS, TAPS, Served, direction, write_probes
from running_server import RunningServer, start_server
from safetensors.torch import load_file, save_file
from served_readings import ReadingsClient, failure, numbers, of
from written_adapters import WrittenAdapter

from probescore import Completion, RolloutGroup
from probescore.types import ReadingKind
from probescore_server import Engine

ATOL = 1e-4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readings")


@pytest.fixture(scope="module")
def server(llama: Served, root: Path) -> Iterator[RunningServer]:
    probes = [llama.probe(name) for name in TAPS]
    with start_server(
        llama.model, probes, admin=True, devices="cpu,cpu", readings_root=root, max_readings=2, worker_restart_seconds=0.05
    ) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[ReadingsClient]:
    with ReadingsClient.of(server) as connected:
        eventually(lambda: all(worker.ready for worker in connected.info().workers))
        yield connected
        for name in connected.readings():
            if name != "frozen":
                connected.unload(name)


@pytest.fixture(scope="module")
def adapters(llama: Served, root: Path) -> list[WrittenAdapter]:
    made = [WrittenAdapter.random(llama.model, seed=seed) for seed in range(3)]
    for seed, adapter in enumerate(made):
        adapter.write(root / f"step-{seed}")
    return made


def expected(engine: Engine, directory: Path) -> np.ndarray:
    engine.load_reading("expected", directory)
    found = of(engine.score(GROUPS, token_scores="all", readings=["expected"]), "expected")
    engine.unload_reading("expected")
    return found


# ---------------------------------------------------------------------------------------------------------------------- scoring


def test_one_request_reads_both_and_each_is_what_an_engine_says(
    client: ReadingsClient, engine: Engine, adapters: list[WrittenAdapter], root: Path
) -> None:
    before = of(client.score(), "frozen")
    loaded = client.load("policy", "step-0", step=7)
    assert (loaded.reading.name, loaded.reading.kind, loaded.reading.step, loaded.replaced) == ("policy", ReadingKind.ADAPTER, 7, None)
    assert set(loaded.golden_drift) == {f"{name}@1" for name in TAPS}
    assert min(loaded.golden_drift.values()) > 0.01
    assert loaded.device_bytes > 0
    result = client.score("frozen", "policy")
    assert result.info.readings == (client.readings()["frozen"], loaded.reading)
    np.testing.assert_allclose(of(result, "frozen"), before, rtol=0, atol=ATOL)
    np.testing.assert_allclose(of(result, "policy"), expected(engine, root / "step-0"), rtol=0, atol=ATOL)
    assert np.abs(of(result, "policy") - before).max() > 0.1
    assert client.score().info.readings == ()
    other_order = client.score("policy", "frozen")
    assert [reading.name for reading in other_order.info.readings] == ["policy", "frozen"]
    np.testing.assert_allclose(of(other_order, "policy"), of(result, "policy"), rtol=0, atol=ATOL)


def test_a_reading_alone_has_no_frozen_scores(client: ReadingsClient, adapters: list[WrittenAdapter]) -> None:
    client.load("policy", "step-0")
    both, alone = client.score("frozen", "policy"), client.score("policy")
    assert all(not scored.scores for group in alone.groups for scored in group)
    np.testing.assert_allclose(of(alone, "policy"), of(both, "policy"), rtol=0, atol=ATOL)
    assert all(not probe.outside_calibration for probe in alone.info.probes)


def test_a_stream_reads_both(client: ReadingsClient, adapters: list[WrittenAdapter]) -> None:
    loaded = client.load("policy", "step-1")
    pieces = sorted(client.stream("frozen", "policy"), key=lambda piece: (piece.group_index, piece.completion_index))
    assert {piece.info.readings[1] for piece in pieces} == {loaded.reading}
    whole = client.score("frozen", "policy")
    for reading in ("frozen", "policy"):
        np.testing.assert_allclose(numbers([piece.scores for piece in pieces], reading), of(whole, reading), rtol=0, atol=ATOL)


def test_wrong_names_are_named(client: ReadingsClient, adapters: list[WrittenAdapter]) -> None:
    client.load("policy", "step-0")
    for names, field, reason, text in [
        (["policy", "other"], "readings[1]", "UNKNOWN_READING", "unknown reading 'other'; loaded: frozen, policy"),
        (["policy", "policy"], "readings[1]", "INVALID_REQUEST", "'policy' appears twice"),
        (["frozen", "frozen"], "readings[1]", "INVALID_REQUEST", "'frozen' appears twice"),
        (["frozen", "policy", "policy", "a"], "readings[3]", "INVALID_REQUEST", "4 names, of at most 3 readings"),
        ([""], "readings[0]", "UNKNOWN_READING", "unknown reading ''"),
    ]:
        for call in (client.score, lambda *asked: list(client.stream(*asked))):
            failed = failure(lambda: call(*names))  # noqa: B023 - called at once
            assert (failed.code, failed.field, failed.reason) == ("INVALID_ARGUMENT", field, reason), names
            assert text in failed.text


# ---------------------------------------------------------------------------------------------------------------- versions


def test_a_name_means_what_was_loaded_last_and_then_nothing(
    client: ReadingsClient, engine: Engine, adapters: list[WrittenAdapter], root: Path
) -> None:
    first = client.load("policy", root / "step-0", step=1)
    second = client.load("policy", "step-1", step=2)
    assert second.replaced == first.reading
    assert second.reading.id != first.reading.id
    np.testing.assert_allclose(of(client.score("policy"), "policy"), expected(engine, root / "step-1"), rtol=0, atol=ATOL)
    assert [*client.readings()] == ["frozen", "policy"]
    assert client.readings()["policy"] == second.reading
    same = client.load("other", "step-1")
    assert same.reading.id == second.reading.id
    assert client.unload("policy") == second.reading
    np.testing.assert_allclose(of(client.score("other"), "other"), expected(engine, root / "step-1"), rtol=0, atol=ATOL)
    assert failure(lambda: client.score("policy")).reason == "UNKNOWN_READING"
    failed = failure(lambda: client.unload("policy"))
    assert (failed.code, failed.field, failed.reason) == ("INVALID_ARGUMENT", "name", "UNKNOWN_READING")
    assert failure(lambda: client.unload("frozen")).field == "name"


def test_the_same_rollout_on_two_versions_is_never_one_computation(
    client: ReadingsClient, adapters: list[WrittenAdapter], server: RunningServer
) -> None:
    """Calls before and after a flip run at the same time, with equal rollouts and equal options but for the version."""
    own = {}
    for step in range(2):
        reading = client.load("policy", f"step-{step}").reading
        own[reading.id] = of(client.score("policy"), "policy")
    results = []

    def score() -> None:
        with ReadingsClient.of(server) as other:
            results.extend(other.score("policy") for _ in range(8))

    threads = [threading.Thread(target=score) for _ in range(3)]
    for thread in threads:
        thread.start()
    for step in range(4):
        client.load("policy", f"step-{step % 2}")
    for thread in threads:
        thread.join()
    assert len(results) == 24
    for result in results:
        np.testing.assert_allclose(of(result, "policy"), own[result.info.readings[0].id], rtol=0, atol=ATOL)


def test_too_many_names_are_refused(client: ReadingsClient, adapters: list[WrittenAdapter]) -> None:
    for name in ("a", "b"):
        client.load(name, "step-0")
    failed = failure(lambda: client.load("c", "step-0"))
    assert (failed.code, failed.reason, failed.field) == ("INVALID_ARGUMENT", "LIMIT_EXCEEDED", "name")
    assert "max_readings is 2: unload one" in failed.text
    client.load("a", "step-1")  # a replacement is not one more


# ---------------------------------------------------------------------------------------------------------------- refusals


def test_arguments_are_checked(client: ReadingsClient, adapters: list[WrittenAdapter], root: Path, tmp_path: Path) -> None:
    outside = adapters[0].write(tmp_path / "outside")
    (root / "way-out").symlink_to(outside)
    inside = adapters[0].write(root / "with-link")
    (inside / "adapter_model.safetensors").unlink()
    (inside / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    (root / "latest").symlink_to(root / "step-0")
    refused = [
        ({"name": ""}, "name", "INVALID_REQUEST", "1 to 64"),
        ({"name": "frozen"}, "name", "INVALID_REQUEST", "is not 'frozen'"),
        ({"name": "a/b"}, "name", "INVALID_REQUEST", "1 to 64"),
        ({"step": -1}, "step", "INVALID_REQUEST", "a whole number from 0"),
        ({"path": ""}, "path", "INVALID_REQUEST", "does not lie below"),
        ({"path": "."}, "path", "INVALID_REQUEST", "does not lie below"),
        ({"path": ".."}, "path", "INVALID_REQUEST", "does not lie below"),
        ({"path": str(outside)}, "path", "INVALID_REQUEST", "does not lie below"),
        ({"path": "/nowhere/at/all"}, "path", "INVALID_REQUEST", "does not lie below"),
        ({"path": "way-out"}, "path", "INVALID_REQUEST", "does not lie below"),
        ({"path": "with-link"}, "path", "READING_REFUSED", "'adapter_model.safetensors' in it is a link that leads out"),
        ({"path": "no-such"}, "path", "READING_REFUSED", "'no-such' is no directory"),
        ({"path": "step-0/adapter_config.json"}, "path", "READING_REFUSED", "is no directory"),
        ({"path": "a\0b"}, "path", "INVALID_REQUEST", "is no path"),
        ({"path": "a" * 5000}, "path", "INVALID_REQUEST", "is no path"),
    ]
    for fields, field, reason, text in refused:
        failed = failure(lambda: client.load(**{"name": "policy", "path": "step-0", **fields}))  # noqa: B023 - called at once
        assert (failed.code, failed.reason, failed.field) == ("INVALID_ARGUMENT", reason, field), fields
        assert text in failed.text
        assert str(root) not in failed.text or str(root) in str(fields)
    assert [*client.readings()] == ["frozen"]
    assert client.load("policy", "latest").reading.id == client.load("policy", "step-0").reading.id


def test_files_that_would_not_be_computed_change_nothing(client: ReadingsClient, adapters: list[WrittenAdapter], root: Path) -> None:
    before = client.load("policy", "step-0").reading
    adapters[1].changed(bias="all").write(root / "biased")
    failed = failure(lambda: client.load("policy", "biased"))
    assert (failed.code, failed.reason, failed.field) == ("INVALID_ARGUMENT", "READING_REFUSED", "adapter_config.json: bias")
    torn = adapters[1].write(root / "torn") / "adapter_model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-100])
    failed = failure(lambda: client.load("policy", "torn"))
    assert (failed.code, failed.reason) == ("UNAVAILABLE", "READING_INCOMPLETE")
    assert failed.retry_seconds == 1.0
    assert str(root) not in failed.text
    failed = failure(lambda: client.load("policy", "step-1", expected_id="sha256:other"))
    assert (failed.code, failed.reason) == ("FAILED_PRECONDITION", "READING_MISMATCH")
    assert "sha256:other is expected" in failed.text
    assert client.readings()["policy"] == before
    client.load("policy", "step-0", expected_id=before.id)


def test_a_refusal_names_what_the_client_named(client: ReadingsClient, root: Path) -> None:
    (root / "hidden-name").mkdir()
    (root / "hidden-name" / "notes.txt").write_text("nothing")
    (root / "shown").symlink_to(root / "hidden-name")
    failed = failure(lambda: client.load("policy", "shown"))
    assert "'shown' has neither" in failed.text
    assert "hidden-name" not in failed.text


# ---------------------------------------------------------------------------------------------------------------- off, asleep


def test_a_server_without_a_root_loads_nothing(llama: Served, adapters: list[WrittenAdapter], root: Path) -> None:
    with start_server(llama.model, [llama.probe("last")], admin=True) as plain, ReadingsClient.of(plain) as client:
        for call in (lambda: client.load("policy", root / "step-0"), lambda: client.unload("policy")):
            failed = failure(call)
            assert (failed.code, failed.reason) == ("FAILED_PRECONDITION", "READINGS_OFF")
        assert client.info().readings == ()
        assert failure(lambda: client.score("policy")).reason == "UNKNOWN_READING"
        result = client.score("frozen")
        assert [reading.name for reading in result.info.readings] == ["frozen"]
        np.testing.assert_allclose(of(result, "frozen"), of(client.score(), "frozen"), rtol=0, atol=ATOL)


# ------------------------------------------------------------------------------------------------------------- not finite


def test_what_is_not_finite_on_one_reading_spoils_no_other(tmp_path: Path) -> None:
    """One token overflows on the frozen model alone, another on the policy alone, whose embedding is its own."""
    frozen_alone, policy_alone = 90, 91
    overflowing = 3e38 * torch.sign(torch.from_numpy(direction("last")))
    model = write_model(tmp_path / "model", "llama")
    weights = load_file(model / "model.safetensors")
    own = weights["model.embed_tokens.weight"].clone()
    own[policy_alone] = overflowing
    adapter = WrittenAdapter.random(model, ["q_proj"], modules_to_save=["embed_tokens"])
    adapter.tensors["base_model.model.model.embed_tokens.weight"] = own
    weights["model.embed_tokens.weight"][frozen_alone] = overflowing
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    adapter.write(tmp_path / "policy")
    groups = [
        RolloutGroup([1, 20, 21], [Completion([30, token], follow_ups=(Completion([31]),)) for token in (40, frozen_alone, policy_alone)])
    ]
    with (
        start_server(model, write_probes(tmp_path, model, ["last"]), admin=True, readings_root=tmp_path) as server,
        ReadingsClient.of(server) as client,
    ):
        client.load("policy", "policy")
        for result in (client.score("frozen", "policy", groups=groups), client.score("policy", "frozen", groups=groups)):
            status = [(each.status.value, each.readings["policy"].status.value) for each in result.groups[0]]
            assert status == [("ok", "ok"), ("non_finite", "ok"), ("ok", "non_finite")]
            fine, frozen_spoilt, policy_spoilt = result.groups[0]
            assert not frozen_spoilt.scores
            assert not policy_spoilt.readings["policy"].scores
            assert "last@1" in frozen_spoilt.status_message
            assert "last@1" in policy_spoilt.readings["policy"].status_message
            assert np.isfinite(numbers([fine, policy_spoilt], "frozen")).all()
            assert np.isfinite(numbers([fine, frozen_spoilt], "policy")).all()
        alone = [(each.status.value, each.readings["policy"].status.value) for each in client.score("policy", groups=groups).groups[0]]
        assert alone == [("ok", "ok"), ("ok", "ok"), ("ok", "non_finite")]
