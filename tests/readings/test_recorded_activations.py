"""Activations that a trainer records by itself: of which rollouts and anchors, on which readings, and what if they cannot be had."""

from __future__ import annotations

import asyncio
import logging
import pickle
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parity_models import LAYERS
from read_twice import ROLLOUTS, Served
from running_server import RunningServer, start_server
from test_anchors import anchors, run  # noqa: F401 - a fixture

from probescore import Completion, RolloutGroup
from probescore_adapters import PooledActivations, ProbeScorer, ProbeSignal, RecordOptions, Rollout
from probescore_audit import label_rows, plan_recorded
from probescore_audit.record import ActivationRow, Record, RecordWriter, read_record
from probescore_server import Engine

TAP = f"resid_post.{LAYERS - 1}"
MASK = [1] * 3 + [0] * 2
BATCH = [
    *(Rollout(prompt, completion, [1] * len(completion)) for prompt, completions in ROLLOUTS for completion in completions),
    Rollout([1, 5, 6], [7, 8, 9, 10, 11], MASK),
]
SIGNALS = [ProbeSignal("last", threshold=0.0), ProbeSignal("last", mode="monitor", reading="policy", threshold=0.0)]
BOTH = {"frozen", "policy"}


@pytest.fixture(scope="module")
def server(llama: Served, root: Path) -> Iterator[RunningServer]:
    with start_server(llama.model, [llama.probe("last")], admin=True, readings_root=root, allow_activations=TAP) as running:
        yield running


def scorer(server: RunningServer, folder: Path, **options: Any) -> ProbeScorer:
    record = RecordOptions(folder, **{"activations": TAP, "labels_per_step": 4, **options})
    one = ProbeScorer(SIGNALS, server.address, record=record)
    one.load_reading("policy", "step-0", 0)
    return one


def of_rollouts(record: Record) -> dict[str, set[tuple[int, str]]]:
    """Step and name of the rollouts whose activations are recorded, by reading."""
    found: dict[str, set[tuple[int, str]]] = {}
    for row in record.activations:
        if row.rollout is not None:
            found.setdefault(row.reading, set()).add((row.step, row.rollout))
    return found


def expected(engine: Engine, row: ActivationRow, record: Record, pool: str = "mean") -> np.ndarray:
    """What the engine says of the text of a row."""
    place = [each.rollout for each in record.rollouts if each.step == row.step].index(row.rollout)
    rollout = BATCH[place]
    asked = [RolloutGroup(rollout.prompt, [Completion(rollout.completion, mask=rollout.mask)])]
    (found,) = engine.activations(asked, TAP, pool=pool, reading=row.reading)
    return found.pooled[TAP][0, 0]


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_labelled_rollouts_have_them_on_every_reading(server: RunningServer, engine: Engine, root: Path, tmp_path: Path, pool: str) -> None:
    one = scorer(server, tmp_path, checker=lambda rollout: len(rollout.completion) > 9, activations=PooledActivations(TAP, pool))
    for step in range(3):
        one.score(BATCH, step=step)
    one.close()
    record = read_record(tmp_path)
    labelled = {(label.step, label.rollout) for label in record.labels}
    assert 6 <= len(labelled) < len(record.rollouts)
    assert of_rollouts(record) == dict.fromkeys(BOTH, labelled)
    assert not record.planned
    engine.load_reading("policy", root / "step-0")
    ids = {reading.name: reading.id for reading in engine.readings()}
    for row in record.activations:
        assert (row.tap, row.pool, row.reading_id) == (TAP, pool, ids["policy"] if row.reading == "policy" else None)
        own = expected(engine, row, record, pool)
        np.testing.assert_allclose(row.vector(), own, rtol=2**-8, atol=1e-3)  # bfloat16 has 8 bits
    frozen, policy = (np.stack([row.vector() for row in record.activations if row.reading == name]) for name in ("frozen", "policy"))
    assert np.abs(frozen - policy).max() > 0.01


def test_labels_that_come_later_are_of_the_rollouts_that_have_them(server: RunningServer, tmp_path: Path) -> None:
    one = scorer(server, tmp_path)
    for step in range(3):
        one.score(BATCH, step=step)
    one.close()
    record = read_record(tmp_path)
    chosen = {(row.step, row.rollout) for row in record.planned}
    assert of_rollouts(record) == dict.fromkeys(BOTH, chosen)
    assert {row.step for row in record.planned} == {0, 1, 2}
    planned = plan_recorded(record, 32)  # the trainer has chosen fewer, and these are the plan
    assert {(each.step, each.rollout): (each.inclusion, each.stratum, each.floor) for each in planned} == {
        (row.step, row.rollout): (row.inclusion, row.stratum, row.floor) for row in record.planned
    }
    done = run("labels", "plan", tmp_path, "-o", tmp_path / "plan.txt")
    assert (done.exit_code, len((tmp_path / "plan.txt").read_text().splitlines())) == (0, len(chosen))
    with pytest.raises(ValueError, match="the trainer has chosen rollouts by the scores of last@1, frozen"):
        plan_recorded(record, 32, reading="policy")
    answers = [{**vars(each), "label": "yes"} for each in planned[:2]]
    with RecordWriter(tmp_path, record.header.anew()) as writer:
        writer.append(label_rows(record, answers, source="person"))
    left = plan_recorded(read_record(tmp_path), 32, complete=True)
    assert [*planned[:2], *left] == [*planned]


def test_anchors_have_them_whenever_they_are_scored(server: RunningServer, tmp_path: Path, anchors: Path) -> None:  # noqa: F811
    one = scorer(server, tmp_path / "run", anchors=anchors, anchors_every=2)
    for step in range(4):
        if step == 2:
            one.load_reading("policy", "step-1", 2)
        one.score(BATCH, step=step)
    one.close()
    record = read_record(tmp_path / "run")
    rows = [row for row in record.activations if row.anchor is not None]
    assert Counter((row.step, row.reading) for row in rows) == dict.fromkeys([(step, name) for step in (0, 2) for name in BOTH], 16)
    versions = {row.step: row.reading_ids["policy"] for row in record.anchors}
    assert {(row.step, row.reading_id) for row in rows if row.reading == "policy"} == set(versions.items())
    first, second = ({row.anchor: row.vector() for row in rows if (row.step, row.reading) == (step, "policy")} for step in (0, 2))
    assert max(np.abs(first[name] - second[name]).max() for name in first) > 0.01


def test_by_hand_anchors_have_the_same(server: RunningServer, tmp_path: Path, anchors: Path) -> None:  # noqa: F811
    one = scorer(server, tmp_path / "run", anchors=anchors)
    one.score(BATCH, step=0)
    one.close()
    arguments = ["anchors", "score", tmp_path / "run", anchors, "--step", 1, "-a", server.address, "--activations"]
    done = run(*arguments, TAP)
    assert done.exit_code == 0, done.stderr
    assert "added the scores of 16 anchors and 32 activations at step 1, on frozen, policy" in done.stdout
    rows = {(row.step, row.reading, row.anchor): row for row in read_record(tmp_path / "run").activations if row.anchor is not None}
    for (step, reading, name), row in rows.items():
        if step == 1:
            before = rows[0, reading, name]
            assert (row.tap, row.pool, row.reading_id) == (before.tap, before.pool, before.reading_id)
            np.testing.assert_allclose(row.vector(), before.vector(), rtol=2**-7, atol=1e-3)
    for tap, more, complaint in (
        ("resid_post.0", [], f"--activations: the server gives no activations at 'resid_post.0', it gives those at {TAP}"),
        ("resid_post.*", [], "--activations: expected the name of one tap"),
        (TAP, ["--pool", "tokens"], "--pool: expected 'mean', 'last' or 'max'"),
    ):
        refused = run(*arguments, tap, *more)
        assert (refused.exit_code, complaint in refused.stderr) == (2, True), refused.stderr
    assert {row.step for row in read_record(tmp_path / "run").anchors} == {0, 1}


# --------------------------------------------------------------------------------------------------------------------- who and when


def test_training_that_goes_back_has_them_once(server: RunningServer, tmp_path: Path) -> None:
    one = scorer(server, tmp_path)
    for step in (0, 1, 2, 1, 2):
        one.score(BATCH, step=step)
    one = pickle.loads(pickle.dumps(one))
    one.score(BATCH, step=2)
    record = read_record(tmp_path)
    chosen = {(row.step, row.rollout) for row in record.planned}
    assert of_rollouts(record) == dict.fromkeys(BOTH, chosen)
    assert Counter(step for step, _ in chosen).keys() == {0, 1, 2}
    assert chosen <= {(row.step, row.rollout) for row in record.rollouts}
    assert max(Counter(step for step, _ in chosen).values()) <= 4


def test_each_rank_has_those_of_its_own_rollouts(server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    ranks = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        ranks.append(scorer(server, tmp_path, labels_per_step=8))
    for step in range(2):
        for one in ranks:
            one.score(BATCH, step=step)
    record = read_record(tmp_path)
    chosen = {(row.step, row.rollout) for row in record.planned}
    assert of_rollouts(record) == dict.fromkeys(BOTH, chosen)
    assert len({name.partition(".")[0] for _, name in chosen}) == 2  # of the files of both
    assert {(each.step, each.rollout) for each in plan_recorded(record, 8)} == chosen


def test_a_trainer_with_an_event_loop_records_the_same(server: RunningServer, tmp_path: Path) -> None:
    async def train() -> None:
        one = scorer(server, tmp_path)
        await asyncio.gather(*(one.score_async(BATCH, step=0) for _ in range(3)))
        await one.close_async()

    asyncio.run(train())
    record = read_record(tmp_path)
    assert len(record.rollouts) == 3 * len(BATCH)
    chosen = {(row.step, row.rollout) for row in record.planned}
    assert of_rollouts(record) == dict.fromkeys(BOTH, chosen)


def test_a_reading_that_is_gone_leaves_the_others(server: RunningServer, tmp_path: Path, caplog: Any) -> None:
    one = scorer(server, tmp_path)
    one.score(BATCH, step=0)
    one._client.unload_reading("policy")
    one.score(BATCH, step=1)
    by_reading = {name: {step for step, _ in found} for name, found in of_rollouts(read_record(tmp_path)).items()}
    assert by_reading == {"frozen": {0, 1}, "policy": {0}}


def test_a_reading_that_fails_costs_no_other(server: RunningServer, tmp_path: Path, caplog: Any) -> None:
    """The plan of a step is made when the next one begins, and by then the reading is gone."""
    one = scorer(server, tmp_path, batches_per_step=0)
    one.score(BATCH, step=0)
    one._client.unload_reading("policy")
    with caplog.at_level(logging.ERROR, "probescore_adapters"):
        one.score(BATCH, step=1)
    assert {name: {step for step, _ in found} for name, found in of_rollouts(read_record(tmp_path)).items()} == {"frozen": {0}}
    assert "the activations of some steps, from step 1 on, are not in the record: reading: unknown reading 'policy'" in caplog.text


def test_what_was_replaced_since_it_was_scored_is_left_out(server: RunningServer, tmp_path: Path, caplog: Any) -> None:
    """The plan of a step is made when the next one begins, and by then the policy has moved on."""
    one = scorer(server, tmp_path, batches_per_step=0)
    with caplog.at_level(logging.WARNING, "probescore_adapters"):
        for step in range(3):
            one.load_reading("policy", f"step-{step % 2}", step)
            one.score(BATCH, step=step)
    by_reading = {name: {step for step, _ in found} for name, found in of_rollouts(read_record(tmp_path)).items()}
    assert by_reading == {"frozen": {0, 1}}
    assert caplog.text.count("their reading was replaced before the plan of the step was made (batches_per_step)") == 1


# ---------------------------------------------------------------------------------------------------------- never in training's way


@pytest.fixture(scope="module")
def closed(llama: Served, root: Path) -> Iterator[RunningServer]:
    """A server that gives no activations."""
    with start_server(llama.model, [llama.probe("last")], admin=True, readings_root=root) as running:
        yield running


@pytest.mark.parametrize("policy", ["log", "raise"])
def test_a_server_that_gives_none_is_told_at_the_first_batch(
    closed: RunningServer, server: RunningServer, tmp_path: Path, caplog: Any, policy: Any
) -> None:
    for number, (address, tap, problem) in enumerate([
        (closed, TAP, f"the server gives no activations at '{TAP}', it gives none; start it with --allow-activations {TAP}"),
        (server, "resid_post.0", f"the server gives no activations at 'resid_post.0', it gives those at {TAP}"),
    ]):  # fmt: skip
        one = scorer(address, tmp_path / str(number), activations=tap, batches_per_step=0, on_error=policy)
        caplog.clear()
        with caplog.at_level(logging.ERROR, "probescore_adapters"):
            if policy == "raise":
                with pytest.raises(ValueError, match=r"record\.activations: the server gives no activations") as raised:
                    one.score(BATCH, step=0)
                assert problem in str(raised.value)
                continue
            one.score(BATCH, step=0)
            assert problem in caplog.text
            for step in range(1, 12):
                one.score(BATCH, step=step)
        assert len(caplog.records) <= 2  # once as it begins, and once as the client says it
        one.close()
        record = read_record(tmp_path / str(number))
        assert (len(record.rollouts), len(record.activations)) == (12 * len(BATCH), 0)
        assert {row.step for row in record.planned} == set(range(12))


def test_what_takes_too_long_is_left_out_and_tried_again_later(server: RunningServer, tmp_path: Path, caplog: Any) -> None:
    one = scorer(server, tmp_path, activations=PooledActivations(TAP, seconds=1e-4))
    one.score(BATCH, step=0)
    started = time.monotonic()
    with caplog.at_level(logging.ERROR, "probescore_adapters"):
        for step in range(1, 20):
            one.score(BATCH, step=step)
    assert time.monotonic() - started < 10
    assert len(caplog.records) <= 1
    record = read_record(tmp_path)
    assert (len(record.rollouts), len(record.activations)) == (20 * len(BATCH), 0)


def test_a_server_that_gives_them_after_all_is_read_again(
    closed: RunningServer, server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = scorer(closed, tmp_path)
    one.score(BATCH, step=0)
    other = ProbeScorer(SIGNALS, server.address)
    other.load_reading("policy", "step-0", 0)
    monkeypatch.setattr(one, "_client", other._client)
    for step in range(1, 5):
        one.score(BATCH, step=step)
    assert {step for step, _ in of_rollouts(read_record(tmp_path))["policy"]} >= {4}


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("", r"activations\.tap: expected the name of one tap"),
        ("resid_post.*", r"activations\.tap: .*'resid_post\.\*'"),
        (3, "activations: expected the name of a tap, or a dictionary of tap, pool, seconds; got 3"),
        ({"pool": "mean"}, "activations: expected the name of a tap"),
        ({"tap": TAP, "layers": 3}, "activations: .* unknown 'layers'"),
        ({"tap": TAP, "pool": "tokens"}, r"activations\.pool: expected 'mean', 'last' or 'max', got 'tokens'"),
        ({"tap": TAP, "seconds": 0}, r"activations\.seconds: expected seconds above 0, got 0"),
        ({"tap": TAP, "seconds": float("nan")}, r"activations\.seconds"),
        ({"tap": TAP, "seconds": True}, r"activations\.seconds"),
    ],
)
def test_wrong_options_are_named(tmp_path: Path, given: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=rf"^record\.{problem}"):
        RecordOptions(tmp_path, activations=given)


def test_options_of_text_are_options(tmp_path: Path) -> None:
    for given in (TAP, {"tap": TAP}, PooledActivations(TAP)):
        assert RecordOptions(tmp_path, activations=given) == RecordOptions(tmp_path, activations=TAP)
    assert RecordOptions(tmp_path, activations=TAP).activations == PooledActivations(TAP, "mean", 60.0)
