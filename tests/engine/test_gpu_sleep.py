"""On a CUDA device: the memory that a sleeping engine gives back, and takes again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_probes import linear, pooled_mean, running_mean

from probescore import RolloutGroup
from probescore_server.backbone.kv_cache import KeyValueCache
from probescore_server.engine.device_memory import DeviceMemory
from probescore_server.errors import WorkerUnavailable

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

PROBES = (linear(), running_mean(sees_prompt=True), pooled_mean())
GROUPS = [RolloutGroup([1, 5, 9, 12], [[7, 8, 30], [7, 8, 31, 40, 41]]), RolloutGroup([], [[1, 50, 60]])]


@pytest.fixture
def engine(load):
    return load(*PROBES, device="cuda", max_kv_cache_bytes=0)


def test_it_holds_less_asleep_and_the_same_awake(engine):
    engine.score(GROUPS)
    torch.cuda.empty_cache()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    slept = engine.sleep()
    asleep = torch.cuda.memory_allocated()
    given_back = reserved - torch.cuda.memory_reserved()
    woken = engine.wake()

    assert slept.weight_bytes == woken.weight_bytes > 0
    assert asleep <= allocated - slept.weight_bytes
    assert slept.device_bytes == given_back
    assert torch.cuda.memory_allocated() == allocated


def test_large_weights_leave_the_device_for_others():
    weights = torch.arange(64 << 20, dtype=torch.float32, device="cuda")
    memory = DeviceMemory(weights.device, lambda: [weights], KeyValueCache(0), [])
    free_before, _ = torch.cuda.mem_get_info()

    slept = memory.sleep()
    free_asleep, _ = torch.cuda.mem_get_info()
    memory.wake()

    assert slept.weight_bytes == 256 << 20
    assert slept.device_bytes >= 256 << 20
    assert free_asleep - free_before >= 128 << 20  # of which others may have taken some
    assert torch.equal(weights, torch.arange(64 << 20, dtype=torch.float32, device="cuda"))


def test_scores_are_bit_by_bit_what_they_were(engine):
    before = engine.score(GROUPS)
    for _ in range(2):
        engine.sleep()
        engine.wake()

    for probe in PROBES:
        np.testing.assert_array_equal(engine.score(GROUPS).values(probe.name), before.values(probe.name))


def test_the_host_memory_is_pinned_and_used_again(engine):
    engine.sleep()
    pieces = engine._memory._offload._pieces
    addresses = [piece.data_ptr() for piece in pieces]
    engine.wake()
    engine.sleep()

    assert all(piece.is_pinned() for piece in pieces)
    assert [piece.data_ptr() for piece in pieces] == addresses
    engine.wake()


def test_without_room_it_stays_asleep_and_wakes_once_there_is(engine):
    before = engine.score(GROUPS)
    engine.sleep()
    torch.cuda.set_per_process_memory_fraction(0.0)
    try:
        with pytest.raises(WorkerUnavailable, match="no room"):
            engine.wake()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    with pytest.raises(RuntimeError, match="call wake first"):
        engine.score(GROUPS)

    engine.wake()

    for probe in PROBES:
        np.testing.assert_array_equal(engine.score(GROUPS).values(probe.name), before.values(probe.name))
