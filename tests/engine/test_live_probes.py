"""Probes are added to an engine and taken from it while it scores: proven as at the start, and gone when they are gone."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
from engine_probes import Probe, linear, pooled_mean, running_mean
from models import BOS, HIDDEN_SIZE, tiny_model

from probescore import RolloutGroup
from probescore_probes.exporting import linear_probe
from probescore_probes.reference import ReferenceModel
from probescore_server import Engine
from probescore_server.engine.engine import LIVE_BATCH_TOKENS
from probescore_server.probes.format.probe_file import ProbeFile, read_probe_file
from probescore_server.probes.loading.loader import StackMember

GROUPS = [RolloutGroup([BOS, 5, 6], [[7, 8, 9], [10]]), RolloutGroup([BOS], [[11, 12]])]


def scores(engine: Engine, key: str) -> list[float]:
    result = engine.score(GROUPS, probes=[key])
    name = key.split("@")[0]
    return [one.scores[name].reduced.item() for group in result.groups for one in group.completions]


@pytest.fixture
def write(reference: ReferenceModel, tmp_path: Path):
    def write(probe: Probe, **fields: object) -> ProbeFile:
        return read_probe_file(probe.write(tmp_path, reference, **fields))

    return write


def direction(name: str, seed: int, tap: str = "resid_post.1") -> Probe:
    return Probe(name, linear_probe(np.random.default_rng(seed).standard_normal(HIDDEN_SIZE)), (tap,))


def test_after_a_change_it_is_as_if_it_had_been_started_so(write) -> None:
    """Of every kind: stacked beside others, alone, pooling, at another hook, at a tap that nobody has read before."""
    old = [write(direction("a", 1)), write(direction("b", 2)), write(running_mean())]
    new = [
        write(direction("a", 3), version="2"),
        write(direction("c", 4)),
        write(pooled_mean()),
        write(direction("attention", 5, "attn_out.0")),
        write(direction("mlp", 6, "mlp_out.1")),
        write(direction("input", 7, "resid_pre.1")),
    ]
    engine = Engine.load(str(tiny_model()), old)
    kept = old[1:] + new
    before = {key: scores(engine, key) for key in ("a@1", "b@1", "running-mean@1")}
    session = engine._served.loaded["running-mean@1"]
    served, refusals = engine.prepare_probes(kept)
    assert not refusals
    assert {probe.key for probe in engine.info.probes} == {"a@1", "b@1", "running-mean@1"}
    assert scores(engine, "a@1") == before["a@1"]
    engine.adopt_probes(served)
    fresh = Engine.load(str(tiny_model()), kept)
    assert [probe.key for probe in engine.info.probes] == [probe.key for probe in fresh.info.probes]
    assert engine.info.probes == fresh.info.probes
    for probe in fresh.info.probes:
        np.testing.assert_allclose(scores(engine, probe.key), scores(fresh, probe.key), rtol=1e-5, atol=1e-6)
    assert engine._served.loaded["running-mean@1"] is session
    runs = {key: probe.runs for key, probe in engine._served.loaded.items()}
    assert all(isinstance(runs[key], StackMember) for key in ("a@2", "b@1", "c@1"))
    assert runs["a@2"].stack is runs["b@1"].stack is runs["c@1"].stack
    np.testing.assert_allclose(scores(engine, "b@1"), before["b@1"], rtol=1e-5, atol=1e-6)


def test_what_is_taken_away_is_freed(write) -> None:
    files = [write(direction("a", 1)), write(direction("b", 2)), write(running_mean())]
    engine = Engine.load(str(tiny_model()), files)
    scores(engine, "running-mean@1")
    loaded = engine._served.loaded
    gone = [
        weakref.ref(each) for each in (loaded["a@1"], loaded["a@1"].runs.stack, loaded["running-mean@1"], loaded["running-mean@1"].runs)
    ]
    gone += [weakref.ref(tensor) for tensor in loaded["a@1"].runs.stack.tensors()]
    del loaded
    served, _ = engine.prepare_probes(files[1:2])
    assert all(reference() is not None for reference in gone)
    engine.adopt_probes(served)
    gc.collect()
    assert not [reference() for reference in gone if reference() is not None]
    engine.adopt_probes(engine.prepare_probes([])[0])
    assert engine.info.probes == ()


def test_files_that_fail_are_left_out_and_the_others_taken(write, tmp_path: Path) -> None:
    engine = Engine.load(str(tiny_model()), [write(direction("a", 1))])
    other = ReferenceModel.load(tiny_model(seed=1))
    (tmp_path / "other").mkdir()
    files = {
        "another version": write(direction("x", 2), name="a", version="1-x"),
        "deep": write(direction("deep", 3, "resid_post.3")),
        "final": write(direction("final", 3, "final_norm")),
        "foreign": read_probe_file(linear("foreign").write(tmp_path / "other", other)),
        "good": write(direction("good", 4)),
    }
    served, refusals = engine.prepare_probes([read_probe_file(tmp_path / "a-1.onnx"), *files.values()])
    assert [refusal.needs_layers for refusal in refusals] == [4, 4, 0]
    assert {Path(refusal.file).stem: refusal.field for refusal in refusals} == {
        "deep-1": "inputs",
        "final-1": "inputs",
        "foreign-1": "model.fingerprint",
    }
    assert {probe.key for probe in served.info.probes} == {"a@1", "a@1-x", "good@1"}
    accepted, _ = engine.prepare_probes([*files.values()], accept_mismatch=["foreign"])
    assert {probe.key: probe.accepted_mismatches for probe in accepted.info.probes}["foreign@1"][0] == "model.fingerprint"


def test_golden_rollouts_that_take_too_long_are_refused(write) -> None:
    engine = Engine.load(str(tiny_model()), [write(direction("a", 1))])
    served, (refusal,) = engine.prepare_probes([write(direction("b", 2))], max_batch_seconds=0.0)
    assert (refusal.field, served.info.probes) == ("golden", ())
    assert "take longer than 0 s" in refusal.found


def test_it_scores_meanwhile_and_waits_for_small_batches_only(write, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.load(str(tiny_model()), [write(direction("a", 1))])
    expected, failures, ended = scores(engine, "a@1"), [], threading.Event()
    sizes: list[int] = []
    forward = engine._backbone.forward

    def watched(forest, *args, **keywords):
        sizes.append(sum(len(segment.token_ids) for segment in forest.segments))
        return forward(forest, *args, **keywords)

    monkeypatch.setattr(engine._backbone, "forward", watched)

    def score() -> None:
        while not ended.is_set():
            try:
                np.testing.assert_allclose(scores(engine, "a@1"), expected, rtol=1e-5, atol=1e-6)
            except BaseException as error:
                failures.append(error)
                return

    scoring = threading.Thread(target=score)
    scoring.start()
    many = [([BOS, *range(5, 65)], list(range(10, 70))) for _ in range(40)]
    try:
        for number, probe in enumerate((direction("b", 2), running_mean(), direction("c", 3)), start=1):
            files = [write(direction("a", 1)), write(probe, version=str(number), golden=[*many, ([BOS], [7, 8])])]
            served, refusals = engine.prepare_probes(files)
            assert not refusals
            engine.adopt_probes(served)
    finally:
        ended.set()
        scoring.join()
    assert not failures
    assert max(sizes) <= LIVE_BATCH_TOKENS
