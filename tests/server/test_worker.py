"""A worker process with a real engine: what it answers, what it gives up, and how it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil
import pytest
from models import BOS, MAX_POSITIONS, VOCAB_SIZE, tiny_model
from watched_worker import Watched, rollouts_of, running

from probescore.types import Chat, ChatMessage, RolloutGroup, Text
from probescore_server import Engine
from probescore_server.errors import InternalFault, InvalidRequest, StartupError, WorkerUnavailable
from probescore_server.rollouts import CheckedRollout
from probescore_server.validation.texts import PendingText


def children() -> set[int]:
    return {
        child.pid
        for child in psutil.Process().children()
        if child.status() != psutil.STATUS_ZOMBIE and "spawn_main" in " ".join(child.cmdline())
    }


def first_children() -> set[int]:
    while not (found := children()):
        time.sleep(0.01)
    return found


async def test_it_answers_as_the_engine_does_and_ends_when_it_is_told_to(probes: Path) -> None:
    engine = Engine.load(str(tiny_model()), [probes / "direction.onnx"])
    groups = [RolloutGroup([BOS, 5], [[7, 8, 9], [10]]), RolloutGroup([BOS], [[]])]
    before = children()
    async with running(model=str(tiny_model()), probes=[str(probes)]) as watched:
        assert asdict(watched.worker.info) == asdict(engine.info)
        batch = rollouts_of(engine.info, *groups)
        scored = await watched.worker.score(watched.worker.new_batch(), batch)
        expected = engine.score_rollouts(batch)
        for ours, theirs in zip(scored.results, expected, strict=True):
            np.testing.assert_array_equal(ours.scores["direction"].reduced, theirs.scores["direction"].reduced)
        assert scored.compute_seconds > 0
        # texts are tokenised beside the batches
        ids = await watched.worker.encode(
            [
                PendingText("groups[0].prompt", Text("w7 w8", add_special_tokens=True)),
                PendingText("groups[0].completions[0]", "w9"),
                PendingText("groups[1].prompt", Chat((ChatMessage("user", "w5"),))),
            ]
        )
        assert [ids[field].tolist() for field in ("groups[0].prompt", "groups[0].completions[0]")] == [[BOS, 7, 8], [9]]
        assert ids["groups[1].prompt"][0] == BOS
        with pytest.raises(InvalidRequest) as refused:
            await watched.worker.encode([PendingText("groups[3].prompt", Text("<s> w7", add_special_tokens=True))])
        assert refused.value.field == "groups[3].prompt"
    assert not watched.worker.ready
    assert children() == before


async def test_what_is_cancelled_in_mid_batch_is_not_computed_and_its_neighbours_are(probes: Path) -> None:
    async with running(model=str(tiny_model()), probes=[str(probes)]) as watched:
        long = list(np.random.default_rng(0).integers(4, VOCAB_SIZE, (64, MAX_POSITIONS - 1)))
        batch = rollouts_of(watched.worker.info, RolloutGroup([BOS], long))
        whole = await watched.worker.score(watched.worker.new_batch(), batch)
        number = watched.worker.new_batch()
        scoring = asyncio.create_task(watched.worker.score(number, batch))
        await asyncio.sleep(0)
        for index in range(1, len(batch)):
            watched.worker.cancel(number, index)
        part = await scoring
        assert part.results[-1] is None
        np.testing.assert_allclose(part.results[0].scores["direction"].reduced, whole.results[0].scores["direction"].reduced, rtol=1e-4)
        # a cancel that comes too late does not reach the next batch
        watched.worker.cancel(number, 0)
        again = await watched.worker.score(watched.worker.new_batch(), batch[:1])
        assert again.results[0] is not None


async def test_a_fault_fails_the_batch_with_an_incident_and_nothing_else_of_it(probes: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async with running(model=str(tiny_model()), probes=[str(probes)]) as watched:
        (good,) = rollouts_of(watched.worker.info, RolloutGroup([BOS], [[7]]))
        broken = CheckedRollout(np.array([10**6], np.int32), good.completion, good.options)  # that no check let through
        with pytest.raises(InternalFault) as fault:
            await watched.worker.score(watched.worker.new_batch(), [broken])
        assert "index" not in str(fault.value)
        with pytest.raises(InternalFault):
            await watched.worker.encode([PendingText("groups[0].prompt", Text(5))])
        assert (await watched.worker.score(watched.worker.new_batch(), [good])).results[0] is not None
    assert fault.value.incident in capfd.readouterr().err


async def test_death_fails_what_it_had_and_it_comes_back(probes: Path) -> None:
    async with running(model=str(tiny_model()), probes=[str(probes)]) as watched:
        batch = rollouts_of(watched.worker.info, RolloutGroup([BOS], [[7]]))
        before = await watched.worker.score(watched.worker.new_batch(), batch)
        (pid,) = children()
        os.kill(pid, signal.SIGSTOP)
        scoring = asyncio.create_task(watched.worker.score(watched.worker.new_batch(), batch))
        await asyncio.sleep(0)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerUnavailable) as failed:
            await scoring
        assert failed.value.retry_seconds > 0
        await watched.until(ready=False)
        with pytest.raises(WorkerUnavailable):
            await watched.worker.score(watched.worker.new_batch(), batch)
        watched.worker.cancel(1, 0)  # of a worker that is not there: nothing to give up
        await watched.until(ready=True)
        after = await watched.worker.score(watched.worker.new_batch(), batch)
        np.testing.assert_array_equal(after.results[0].scores["direction"].reduced, before.results[0].scores["direction"].reduced)
        assert watched.worker.restarts == 1


async def test_a_first_start_that_is_refused_says_why_and_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    watched = Watched(model=str(tmp_path / "nothing"))
    with pytest.raises(StartupError, match="nothing"):
        await watched.task
    assert watched.worker.restarts == 0


async def test_dying_while_it_starts_is_a_refusal_too() -> None:
    watched = Watched(model=str(tiny_model()))
    (pid,) = await asyncio.to_thread(first_children)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(StartupError, match="died while it was starting"):
        await watched.task
