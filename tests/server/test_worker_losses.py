"""A worker whose device fails, which crashes, whose memory is short, or which is killed for it: what it says, and what is said of it."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import harmed_worker
import numpy as np
import pytest
import torch
from harmed_worker import CRASHES, LOSES_DEVICE, READ_TOKENS
from harmful_probe import HUNGRY, write_harmful_probe
from models import BOS, tiny_model
from watched_worker import Watched, rollouts_of, running

from probescore.types import Pool, RolloutGroup
from probescore_server.activations import resolve_reads
from probescore_server.backbone.kv_cache import KeyValueCache
from probescore_server.engine.device_memory import DeviceMemory
from probescore_server.engine.engine import Engine
from probescore_server.errors import OutOfMemory, WorkerLost, WorkerUnavailable
from probescore_server.rollouts import ResolvedOptions, RolloutResult
from probescore_server.scheduling.call import Call
from probescore_server.scheduling.scheduler import Scheduler
from probescore_server.settings import ServerSettings
from probescore_server.validation.options import resolve_options
from probescore_server.validation.rollouts import resolve_rollouts
from probescore_server.workers import process
from probescore_server.workers.main import _WorkerRuntime
from probescore_server.workers.messages import DeviceLost, Failed, Sleep, Wake, WorkerSpec


async def value_of(watched: Watched, *completion: int) -> float:
    batch = rollouts_of(watched.worker.info, RolloutGroup([BOS], [list(completion)]))
    scored = await watched.worker.score(watched.worker.new_batch(), batch)
    return float(next(iter(scored.results[0].scores.scores.values())).reduced[0, 0, 0])


async def test_a_device_that_is_lost_and_a_crash_cost_the_worker_and_what_it_computed_may_be_why(
    probes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "MAIN", "harmed_worker:run_on_a_device_that_fails")
    reasons: list[str] = []
    async with running(model=str(tiny_model()), probes=[str(probes)]) as watched:
        watched.worker._on_lost = reasons.append
        before = await value_of(watched, 7, 8)
        for token, reason, problem in ((LOSES_DEVICE, "device", "incident"), (CRASHES, "crash", "SIGABRT")):
            with pytest.raises(WorkerLost, match=problem) as lost:
                await value_of(watched, 7, token)
            assert lost.value.reason_lost == reason
            assert "illegal" not in str(lost.value)
            await watched.until(ready=False)
            await watched.until(ready=True)
            assert await value_of(watched, 7, 8) == before
    assert reasons == ["device", "crash"]


async def test_one_at_its_limit_says_that_memory_is_short_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "MAIN", "harmed_worker:run_at_its_limit")
    write_harmful_probe(tmp_path / "loop.onnx", tiny_model())
    async with running(model=str(tiny_model()), probes=[str(tmp_path)]) as watched:
        before = await value_of(watched, 7, 8)
        with pytest.raises(OutOfMemory, match="a rollout of 3 tokens"):
            await value_of(watched, 7, HUNGRY)
        assert await value_of(watched, 7, 8) == before
        assert watched.worker.restarts == 0


async def test_activations_for_which_memory_is_short_are_read_in_halves_and_cost_their_neighbours_nothing(
    probes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "MAIN", "harmed_worker:run_with_little_room_for_activations")
    random, taps = np.random.default_rng(0), ("resid_post.0", "mlp_out.1")
    groups = [RolloutGroup([BOS, 5, 6], [random.integers(7, 90, length) for length in lengths]) for lengths in ((4, 9, 6), (12,), (3, 11))]
    too_long = RolloutGroup([BOS], [random.integers(7, 90, READ_TOKENS)])
    engine = Engine.load(str(tiny_model()), taps=taps)
    async with running(model=str(tiny_model()), probes=[str(probes)], allow_activations=",".join(taps)) as watched:
        worker, sizes, short = watched.worker, list[int](), list[int]()
        scheduler = Scheduler(
            [worker],
            max_queue_tokens=10_000,
            max_batch_tokens=1000,
            on_batch=lambda _tokens, rollouts: sizes.append(rollouts),
            on_out_of_memory=lambda: short.append(1),
        )
        reads = resolve_reads(taps, ("tokens", "mean"), worker.info.taps, whose="the taps")
        options = replace(resolve_options(worker.info), probes=(), activations=reads)
        before = await value_of(watched, 7, 8)

        def submit(groups: list[RolloutGroup], options: ResolvedOptions) -> Call:
            return scheduler.submit(resolve_rollouts(groups, worker.info, options), job="job")

        async def rollouts(call: Call) -> dict[tuple[int, int], RolloutResult]:
            return {(one.group, one.completion): one.result async for delivery in call for one in delivery.finished}

        # while it runs the others wait, and become one batch
        first = submit([RolloutGroup([BOS, 40], [[41]])], resolve_options(worker.info))
        scored = submit([RolloutGroup([BOS], [[7, 8]])], resolve_options(worker.info))
        read, refused = submit(groups, options), submit([too_long], options)
        await rollouts(first)
        (alone,) = (await rollouts(scored)).values()
        found = await rollouts(read)
        with pytest.raises(OutOfMemory, match=f"a rollout of {READ_TOKENS + 1} tokens"):
            await rollouts(refused)

        assert max(sizes) == 1 + 6 + 1
        assert len(short) >= 3
        assert next(iter(alone.scores.scores.values())).reduced.item() == pytest.approx(before, abs=1e-5)
        for expected in engine.activations(groups, taps, pool=("tokens", "mean")):
            (arrays,) = found[expected.group_index, expected.completion_index].activations
            for tap in taps:
                np.testing.assert_allclose(arrays[tap, Pool.TOKENS], expected.tokens[tap], rtol=1e-4, atol=1e-5)
                np.testing.assert_allclose(arrays[tap, Pool.MEAN], expected.pooled[tap][:, 0], rtol=1e-4, atol=1e-5)
        assert worker.restarts == 0


async def test_one_that_the_kernel_kills_for_memory_is_told_from_one_that_somebody_kills(
    probes: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    vmstat = tmp_path / "vmstat"
    vmstat.write_text("nr_free_pages 17\noom_kill 3\n")
    monkeypatch.setattr(process, "VMSTAT", vmstat)
    async with running(model=str(tiny_model()), probes=[str(probes)]) as watched:
        worker = watched.worker
        batch = rollouts_of(worker.info, RolloutGroup([BOS], [[7]]))
        for counter, kind in ((4, WorkerLost), (4, WorkerUnavailable)):
            vmstat.write_text(f"nr_free_pages 17\noom_kill {counter}\n")
            os.kill(watched.pid, signal.SIGSTOP)
            number = worker.new_batch()
            scoring = asyncio.create_task(worker.score(number, batch))
            await asyncio.sleep(0)
            os.kill(watched.pid, signal.SIGKILL)
            with pytest.raises(WorkerUnavailable) as failed:
                await scoring
            assert type(failed.value) is kind
            await watched.until(ready=False)
            await watched.until(ready=True)


# -------------------------------------------------------------------------------------------------- what only a GPU does by itself


class Unmovable:
    """An engine whose memory cannot be moved."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def sleep(self) -> None:
        raise self._error

    wake = sleep


def move_on_a_lost_device(connection: Connection, order: Sleep | Wake) -> None:
    worker = _WorkerRuntime(connection, WorkerSpec(ServerSettings(model="m"), "cpu", threads=1))
    engine = Unmovable(torch.AcceleratorError(harmed_worker.MESSAGE))
    worker._sleep(engine, order) if isinstance(order, Sleep) else worker._wake(engine, order)


@pytest.mark.parametrize("order", [Sleep(3), Wake(4)])
def test_a_device_that_is_lost_in_a_move_ends_the_process(order: Sleep | Wake) -> None:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=move_on_a_lost_device, args=(theirs, order))
    process.start()
    process.join(120)
    assert process.exitcode == 1
    assert isinstance(ours.recv(), DeviceLost)


def test_short_memory_in_a_move_leaves_it_as_it_was() -> None:
    ours, theirs = multiprocessing.Pipe()
    worker = _WorkerRuntime(theirs, WorkerSpec(ServerSettings(model="m"), "cpu", threads=1))
    worker._sleep(Unmovable(torch.AcceleratorError("CUDA error: out of memory")), Sleep(5))
    assert isinstance(ours.recv(), Failed)


class Session:
    """A probe's session on a device with room for some."""

    def __init__(self, room: list[int], error: Exception) -> None:
        self._room = room
        self._error = error
        self.is_open = False
        self.open()

    def open(self) -> None:
        if not self._room[0]:
            raise self._error
        self._room[0] -= 1
        self.is_open = True

    def close(self) -> None:
        assert self.is_open
        self._room[0] += 1
        self.is_open = False


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (RuntimeError("BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 8"), WorkerUnavailable),
        (RuntimeError("CUDA failure 2: out of memory ; GPU=0 ; expr=cudaMalloc(&p, size)"), WorkerUnavailable),
        (RuntimeError("a graph that is broken"), RuntimeError),
    ],
)
def test_a_device_without_room_for_graphs_leaves_the_engine_asleep_and_it_can_be_woken_later(error: Exception, raised: type) -> None:
    room = [3]
    sessions = [Session(room, error) for _ in range(3)]
    weight = torch.arange(5.0)
    memory = DeviceMemory(torch.device("cpu"), lambda: [weight], KeyValueCache(0), sessions)  # type: ignore[arg-type]
    memory.sleep()
    room[0] = 2
    with pytest.raises(raised):
        memory.wake()
    assert memory.asleep
    if raised is WorkerUnavailable:
        assert [session.is_open for session in sessions] == [False, False, False]
        room[0] = 3
        memory.wake()
        assert [session.is_open for session in sessions] == [True, True, True]
        np.testing.assert_array_equal(weight.numpy(), np.arange(5.0))
