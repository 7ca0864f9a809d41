"""A worker that sleeps: what waits, what goes on, and what becomes of it when it dies."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import Coroutine
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import BOS, MAX_POSITIONS, VOCAB_SIZE, tiny_model
from watched_worker import Watched, rollouts_of, running

from probescore.types import RolloutGroup, Text
from probescore_server.errors import InternalFault, WorkerUnavailable
from probescore_server.settings import ServerSettings
from probescore_server.validation.texts import PendingText
from probescore_server.workers.main import _WorkerRuntime
from probescore_server.workers.messages import Failed, Sleep, Wake, WorkerSpec

GROUP = RolloutGroup([BOS, 5], [[7, 8, 9], [10]])
TEXT = [PendingText("groups[0].prompt", Text("w7 w8", add_special_tokens=True))]


async def is_waiting(work: asyncio.Task[Any]) -> bool:
    """Whether it is not done though everything else had its turn."""
    for _ in range(20):
        await asyncio.sleep(0)
    return not work.done()


def begun(work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    return asyncio.create_task(work)


async def test_a_batch_waits_while_it_sleeps_and_has_the_same_scores_once_it_is_awake(probes: Path) -> None:
    async with running(model=str(tiny_model()), probes=[str(probes)]) as watched:
        worker, batch = watched.worker, rollouts_of(watched.worker.info, GROUP)
        await worker.sleep()
        await worker.wake()
        before = await worker.score(worker.new_batch(), batch)

        await worker.sleep()
        assert (worker.ready, worker.up, worker.asleep) == (False, True, True)
        scoring = begun(worker.score(worker.new_batch(), batch))
        assert await is_waiting(scoring)
        assert (await worker.encode(TEXT))["groups[0].prompt"].tolist() == [BOS, 7, 8]

        await worker.wake()
        assert (worker.ready, worker.up, worker.asleep) == (True, True, False)
        after = await scoring
        for one, other in zip(before.results, after.results, strict=True):
            np.testing.assert_array_equal(other.scores["direction"].reduced, one.scores["direction"].reduced)


async def test_asking_twice_changes_nothing(probes: Path) -> None:
    async with running(model=str(tiny_model()), probes=[str(probes)]) as watched:
        worker = watched.worker
        assert [transfer.device for transfer in await asyncio.gather(worker.sleep(), worker.sleep())] == ["cpu", "cpu"]
        assert worker.asleep
        await asyncio.gather(worker.wake(), worker.wake())
        assert worker.ready


async def test_a_batch_that_computes_ends_before_it_sleeps(probes: Path) -> None:
    async with running(model=str(tiny_model()), probes=[str(probes)]) as watched:
        long = list(np.random.default_rng(0).integers(4, VOCAB_SIZE, (16, MAX_POSITIONS - 1)))
        scoring = begun(watched.worker.score(watched.worker.new_batch(), rollouts_of(watched.worker.info, RolloutGroup([BOS], long))))
        await is_waiting(scoring)

        await watched.worker.sleep()

        assert scoring.done()
        assert all(result is not None for result in scoring.result().results)


async def test_orders_that_cross_end_as_the_last_one_says(probes: Path) -> None:
    async with running(model=str(tiny_model()), probes=[str(probes)]) as watched:
        worker = watched.worker
        await asyncio.gather(worker.sleep(), worker.wake(), worker.sleep())
        assert worker.asleep
        scoring = begun(worker.score(worker.new_batch(), rollouts_of(worker.info, GROUP)))
        assert await is_waiting(scoring)
        await asyncio.gather(worker.wake(), worker.sleep(), worker.wake())
        assert (await scoring).results[0] is not None


async def test_a_caller_who_leaves_puts_it_to_sleep_all_the_same_and_can_wake_it_again(probes: Path) -> None:
    async with running(model=str(tiny_model()), probes=[str(probes)]) as watched:
        worker = watched.worker
        for move in (worker.sleep, worker.wake):
            leaving = begun(move())
            await asyncio.sleep(0)  # it has asked, and cannot have its answer yet
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
            assert worker.asleep
        await worker.wake()
        assert (await worker.score(worker.new_batch(), rollouts_of(worker.info, GROUP))).results[0] is not None


async def test_one_that_dies_asleep_leaves_its_device_alone_until_it_is_woken(probes: Path) -> None:
    async with running(model=str(tiny_model()), probes=[str(probes)]) as watched:
        worker, batch = watched.worker, rollouts_of(watched.worker.info, GROUP)
        before = await worker.score(worker.new_batch(), batch)
        await worker.sleep()
        os.kill(watched.pid, signal.SIGKILL)
        await watched.until(up=False)

        encoding, scoring = begun(worker.encode(TEXT)), begun(worker.score(worker.new_batch(), batch))
        assert await is_waiting(encoding)
        assert await is_waiting(scoring)
        assert (worker.restarts, worker.asleep) == (0, True)
        assert (await worker.sleep()).device_bytes == 0

        with pytest.raises(WorkerUnavailable) as starting:
            await worker.wake()
        assert starting.value.retry_seconds > 0
        for waited in (encoding, scoring):
            with pytest.raises(WorkerUnavailable):
                await waited
        await watched.until(ready=True)
        assert worker.restarts == 1
        assert (await worker.wake()).device_bytes == 0
        after = await worker.score(worker.new_batch(), batch)
        np.testing.assert_allclose(after.results[0].scores["direction"].reduced, before.results[0].scores["direction"].reduced, rtol=1e-4)


async def test_one_that_is_down_cannot_be_put_to_sleep_and_comes_back_awake(probes: Path) -> None:
    async with running(model=str(tiny_model()), probes=[str(probes)]) as watched:
        os.kill(watched.pid, signal.SIGKILL)
        await watched.until(up=False)
        with pytest.raises(WorkerUnavailable):
            await watched.worker.sleep()
        await watched.until(ready=True)


async def test_one_that_sleeps_ends_when_it_is_told_to(probes: Path) -> None:
    watched = Watched(model=str(tiny_model()), probes=[str(probes)])
    await watched.until(ready=True)
    await watched.worker.sleep()
    process = watched.worker._running.process
    watched.task.cancel()
    await asyncio.gather(watched.task, return_exceptions=True)
    assert process.exitcode == 0


# -------------------------------------------------------------------------------------------------- what only a GPU does by itself


class Unmovable:
    """An engine whose memory cannot be moved."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def sleep(self) -> None:
        raise self._error

    wake = sleep


def worker_on(connection: Connection) -> _WorkerRuntime:
    return _WorkerRuntime(connection, WorkerSpec(ServerSettings(model="m"), "cpu", threads=1))


def test_a_device_without_room_is_said_to_be_without_room() -> None:
    ours, theirs = multiprocessing.Pipe()
    worker_on(theirs)._wake(Unmovable(WorkerUnavailable("the device has no room", 1.0)), Wake(3))
    answer = ours.recv()
    assert (answer.number, str(answer.error), answer.error.retry_seconds) == (3, "the device has no room", 1.0)


def test_one_that_could_not_fall_asleep_says_so_with_an_incident() -> None:
    ours, theirs = multiprocessing.Pipe()
    worker_on(theirs)._sleep(Unmovable(RuntimeError("cannot pin")), Sleep(4))
    answer = ours.recv()
    assert isinstance(answer, Failed)
    assert isinstance(answer.error, InternalFault)
    assert "pin" not in str(answer.error)


def wake_with_changed_weights(connection: Connection) -> None:
    worker_on(connection)._wake(Unmovable(RuntimeError("not those that left")), Wake(5))


def test_weights_that_came_back_changed_end_the_process() -> None:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=wake_with_changed_weights, args=(theirs,))
    process.start()
    process.join(60)
    assert process.exitcode == 1
    assert not ours.poll()
