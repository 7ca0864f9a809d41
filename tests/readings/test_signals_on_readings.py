"""A trainer's signals on two readings, against a real server on which the policy is loaded, replaced and dropped meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from read_twice import ROLLOUTS, Served
from running_server import RunningServer, start_server

from probescore import ProbeClient, RolloutGroup
from probescore_adapters import ProbeScorer, ProbeSignal, ReadingGone, Rollout
from probescore_audit.record import read_record

ATOL = 1e-4
BATCH = [Rollout(prompt, completion) for prompt, completions in ROLLOUTS for completion in completions]
PAID = ProbeSignal("last", mode="reward")
WATCHED = ProbeSignal("last", mode="monitor", reading="policy")


@pytest.fixture(scope="module")
def server(llama: Served, root: Path) -> Iterator[RunningServer]:
    with start_server(llama.model, [llama.probe("last")], admin=True, readings_root=root) as running:
        yield running


@pytest.fixture(scope="module")
def expected(llama: Served, root: Path) -> dict[int, np.ndarray]:
    """Of each step's adapter, by an engine of this process: the mean of each rollout."""
    engine = llama.engine("last")
    found = {}
    for step in range(2):
        engine.load_reading("policy", root / f"step-{step}", step=step)
        groups = [RolloutGroup(rollout.prompt, [rollout.completion]) for rollout in BATCH]
        found[step] = engine.score(groups, readings=("policy",)).values("last", reading="policy")
        found[-1] = engine.score(groups).values("last")
    return found


def test_signals_read_what_is_loaded_and_nothing_in_its_place(server: RunningServer, expected: dict[int, np.ndarray]) -> None:
    scorer = ProbeScorer([PAID, WATCHED], server.address)
    paying = ProbeScorer(ProbeSignal("last", mode="reward", reading="policy"), server.address)
    for step in (0, 1):
        assert scorer.load_reading("policy", f"step-{step}", step).reading.step == step
        outcome = scorer.score(BATCH, step=step)
        np.testing.assert_allclose(outcome.values["last"], expected[-1], atol=ATOL)
        np.testing.assert_allclose(outcome.values["last/policy"], expected[step], atol=ATOL)
        np.testing.assert_allclose(outcome.drift["last/policy"], expected[step] - expected[-1], atol=2 * ATOL)
        assert np.abs(outcome.drift["last/policy"]).max() > 100 * ATOL
        assert outcome.readings["policy"].step == outcome.metrics["probescore/last/policy/reading_step"] == step
        np.testing.assert_allclose(paying.score(BATCH).values["last/policy"], expected[step], atol=ATOL)
    with ProbeClient(server.address) as client:
        client.unload_reading("policy")
    outcome = scorer.score(BATCH)
    np.testing.assert_allclose(outcome.values["last"], expected[-1], atol=ATOL)
    assert np.isnan(outcome.values["last/policy"]).all()
    assert "unknown reading 'policy'" in outcome.missing_readings["policy"]
    with pytest.raises(ReadingGone, match=r"signal 'last/policy': reading: 'policy' gave no scores: .*unknown reading 'policy'"):
        paying.score(BATCH)


def test_a_record_has_the_scores_of_each_reading_and_none_of_one_that_is_gone(
    server: RunningServer, expected: dict[int, np.ndarray], tmp_path: Path
) -> None:
    """With the step of the weights that gave them, and a threshold for each reading where signals have their own."""
    signals = [replace(PAID, threshold=0.5), replace(WATCHED, threshold=1.5)]
    scorer = ProbeScorer(signals, server.address, record=tmp_path)
    for step in (0, 1, 2):
        if step < 2:
            scorer.load_reading("policy", f"step-{step}", step)
        else:
            with ProbeClient(server.address) as client:
                client.unload_reading("policy")
        scorer.score(BATCH, step=step)
    record = read_record(tmp_path)
    table, count = record.table(), len(BATCH)
    (probe,) = record.header.probes
    assert [set(row.scores[probe.key]) for row in record.rollouts[::count]] == [{"frozen", "policy"}, {"frozen", "policy"}, {"frozen"}]
    assert [row.reading_steps for row in record.rollouts[::count]] == [{"policy": 0}, {"policy": 1}, None]
    np.testing.assert_allclose(table.scores[probe.key, "frozen", "mean"], np.tile(expected[-1], 3), atol=ATOL)
    found = table.scores[probe.key, "policy", "mean"].reshape(3, count)
    np.testing.assert_allclose(found[:2], [expected[0], expected[1]], atol=ATOL)
    assert np.isnan(found[2]).all()
    assert probe.role == "reward"
    assert (probe.thresholds_on("frozen")["mean"], probe.thresholds_on("policy")["mean"]) == (0.5, 1.5)


def test_no_batch_is_of_two_versions_while_they_are_replaced(server: RunningServer, expected: dict[int, np.ndarray]) -> None:
    scorer = ProbeScorer([PAID, WATCHED], server.address)
    scorer.load_reading("policy", "step-0", 0)
    over = threading.Event()

    def replace_it() -> None:
        with ProbeClient(server.address) as client:
            for count in range(1, 9):
                client.load_reading("policy", f"step-{count % 2}", step=count % 2)
        over.set()

    replacing = threading.Thread(target=replace_it)
    replacing.start()
    seen = set()
    try:
        while not over.is_set():
            outcome = scorer.score(BATCH)
            step = outcome.readings["policy"].step
            assert step is not None
            seen.add(step)
            np.testing.assert_allclose(outcome.values["last/policy"], expected[step], atol=ATOL)
            np.testing.assert_allclose(outcome.values["last"], expected[-1], atol=ATOL)
    finally:
        replacing.join()
    assert seen == {0, 1}


def test_a_server_that_takes_no_readings_scores_the_frozen_model_for_the_others(llama: Served) -> None:
    with start_server(llama.model, [llama.probe("last")]) as plain:
        outcome = ProbeScorer([PAID, WATCHED], plain.address).score(BATCH)
    assert np.isfinite(outcome.values["last"]).all()
    assert np.isnan(outcome.values["last/policy"]).all()
    assert outcome.missing_readings["policy"]
