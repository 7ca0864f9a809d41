"""An engine that sleeps: what it gives back, what it still does, and that its scores are afterwards what they were."""

from __future__ import annotations

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from engine_probes import linear, pooled_mean, running_mean
from models import BOS

from probescore import RolloutGroup, Text
from probescore_server.backbone.kv_cache import KeyValueCache
from probescore_server.engine.device_memory import DeviceMemory
from probescore_server.probes.loading.onnx_session import ProbeSession
from probescore_server.validation.options import resolve_options
from probescore_server.validation.rollouts import resolve_rollouts

PROBES = (linear(), running_mean(sees_prompt=True), pooled_mean())
GROUPS = [RolloutGroup([BOS, 5, 9, 12], [[7, 8, 30], [7, 8, 31, 40, 41]]), RolloutGroup([], [[BOS, 50, 60]])]


@pytest.fixture
def engine(load):
    return load(*PROBES)


def test_scores_are_bit_by_bit_what_they_were(load):
    engine = load(*PROBES, max_kv_cache_bytes=0)
    before = engine.score(GROUPS, token_scores="all")

    engine.sleep()
    engine.wake()

    after = engine.score(GROUPS, token_scores="all")
    for theirs, ours in zip(before.groups, after.groups, strict=True):
        for one, other in zip(theirs, ours, strict=True):
            for name, scores in one.scores.items():
                np.testing.assert_array_equal(other[name].reduced, scores.reduced)
                np.testing.assert_array_equal(other[name].tokens, scores.tokens)


def test_the_cache_is_given_back_and_the_weights_of_a_cpu_stay(load):
    engine = load(linear())
    engine.score(GROUPS)
    assert engine.score(GROUPS).info.usage.tokens_cached > 0

    slept = engine.sleep()
    woken = engine.wake()

    assert slept.device_bytes > 0
    assert (slept.device, slept.weight_bytes) == ("cpu", 0)
    assert (woken.weight_bytes, woken.device_bytes) == (0, 0)
    assert engine.score(GROUPS).info.usage.tokens_cached == 0


def test_nothing_of_the_cache_outlives_it(load):
    engine = load(linear())
    engine.score(GROUPS)
    cached = [weakref.ref(keys) for run in engine._cache._recency for keys, _ in run.key_values]
    assert cached

    engine.sleep()

    assert [tensor() for tensor in cached] == [None] * len(cached)


def test_asking_twice_changes_nothing(engine):
    before = engine.score(GROUPS)

    engine.sleep()
    again = engine.sleep()
    engine.wake()
    awake = engine.wake()

    for transfer in (again, awake):
        assert (transfer.seconds, transfer.weight_bytes, transfer.device_bytes) == (0, 0, 0)
    for probe in PROBES:
        np.testing.assert_allclose(engine.score(GROUPS).values(probe.name), before.values(probe.name), rtol=1e-4)


def test_nothing_is_scored_asleep_and_texts_are_tokenised(engine):
    engine.sleep()

    with pytest.raises(RuntimeError, match="call wake first"):
        engine.score(GROUPS)
    assert engine.encode_prompt(Text("w7 w8", add_special_tokens=True)).tolist() == [BOS, 7, 8]
    assert engine.encode_completion("w9").tolist() == [9]


def test_a_batch_that_computes_ends_first(engine):
    rollouts = [rollout for group in resolve_rollouts(GROUPS, engine.info, resolve_options(engine.info)) for rollout in group]
    computing, go_on = threading.Event(), threading.Event()

    def hold_up(_: int) -> bool:
        computing.set()
        return not go_on.wait(60)

    with ThreadPoolExecutor() as threads:
        batch = threads.submit(engine.score_rollouts, rollouts, is_cancelled=hold_up)
        computing.wait(60)
        sleeping = threads.submit(engine.sleep)
        scored_before = not sleeping.done()
        go_on.set()

        assert all(result is not None for result in batch.result())
        assert scored_before
        assert sleeping.result().device == "cpu"


def test_a_session_that_was_closed_scores_as_before_once_it_is_open(engine):
    expected = {probe.name: engine.score(GROUPS).values(probe.name) for probe in PROBES}
    sessions = [probe.runs for probe in engine._served.loaded.values() if isinstance(probe.runs, ProbeSession)]
    memory = DeviceMemory(torch.device("cpu"), list, KeyValueCache(0), sessions)

    memory.sleep()
    closed = [not hasattr(session, "_session") for session in sessions]
    memory.wake()

    assert closed == [True] * 2  # the linear one is computed without
    for probe in PROBES:
        np.testing.assert_allclose(engine.score(GROUPS).values(probe.name), expected[probe.name], rtol=1e-4)
