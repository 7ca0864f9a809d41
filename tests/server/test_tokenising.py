"""Workers that are slow with texts, get stuck on one or crash with one: what is given up, what is tried again, and who is blamed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from harmed_worker import CRASHES_TEXT, HANGS, SLOW_SECONDS
from models import tiny_model
from watched_worker import Watched, running

from probescore.types import Chat, ChatMessage, Text
from probescore_server.errors import WorkerLost, WorkerLostTwice, WorkerUnavailable
from probescore_server.validation.texts import PendingText
from probescore_server.workers import process
from probescore_server.workers.text_queue import SHORT_BYTES
from probescore_server.workers.tokenising import MAX_LOSSES, encode

STEP = 1.0
# For what is stuck to be noticed, on a busy machine.
PATIENCE = 20 * STEP


@pytest.fixture(autouse=True)
def poor_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "MAIN", "harmed_worker:run_with_a_poor_tokenizer")


class Losses:
    """Why a worker was lost, from the first time on."""

    def __init__(self) -> None:
        self.reasons: asyncio.Queue[str] = asyncio.Queue()

    async def next(self) -> str:
        return await asyncio.wait_for(self.reasons.get(), PATIENCE)


@asynccontextmanager
async def working(probes: Path, **settings: object) -> AsyncIterator[tuple[Watched, Losses]]:
    """A worker, and why it is lost whenever it is."""
    chosen = {"model": str(tiny_model()), "probes": [str(probes)], "step_seconds": STEP, "max_chat_seconds": STEP, **settings}
    async with running(**chosen) as watched:
        losses = Losses()
        watched.worker._on_lost = losses.reasons.put_nowait
        yield watched, losses


def prompts(*texts: str) -> list[PendingText]:
    return [PendingText(f"groups[{index}].prompt", Text(text)) for index, text in enumerate(texts)]


async def test_many_chats_that_are_slow_within_their_limit_cost_no_worker(probes: Path) -> None:
    chats = [PendingText(f"groups[{index}].prompt", Chat((ChatMessage("user", "w5"),))) for index in range(16)]
    assert len(chats) * SLOW_SECONDS > 3 * STEP
    async with working(probes) as (watched, losses):
        assert len(await watched.worker.encode(chats)) == len(chats)
        assert losses.reasons.empty()


@pytest.mark.parametrize("leaves", [False, True])
async def test_a_lane_that_is_stuck_is_noticed_while_the_other_gets_on_and_callers_leave(probes: Path, leaves: bool) -> None:
    hangs = HANGS + " w5" * SHORT_BYTES
    async with working(probes) as (watched, losses):
        stuck = asyncio.create_task(watched.worker.encode(prompts(hangs)))
        until = time.monotonic() + PATIENCE
        with contextlib.suppress(WorkerUnavailable):
            while losses.reasons.empty() and time.monotonic() < until:
                await watched.worker.encode(prompts("w6"))
                if leaves:
                    stuck.cancel()
                    stuck = asyncio.create_task(watched.worker.encode(prompts(hangs)))
                await asyncio.sleep(STEP / 10)
        stuck.cancel()
        await asyncio.gather(stuck, return_exceptions=True)
        assert await losses.next() == "overdue"


@pytest.mark.parametrize(("bad", "reason"), [(HANGS, "overdue"), (CRASHES_TEXT, "crash")])
async def test_the_text_that_does_it_is_refused_by_its_name_and_no_other(probes: Path, bad: str, reason: str) -> None:
    async with working(probes) as (watched, losses):
        with pytest.raises(WorkerLostTwice) as refused:
            await encode([watched.worker], prompts("w5", "w6", bad, "w7"))
        assert refused.value.field == "groups[2].prompt"
        assert [await losses.next() for _ in range(2)] == [reason, reason]


async def test_a_neighbour_that_loses_workers_is_not_held_against_a_request(probes: Path) -> None:
    """Given a request that waits behind another's text, each time a worker is lost with that, then it is answered in the end."""
    async with working(probes) as (watched, losses):
        bad = asyncio.create_task(encode([watched.worker], prompts(HANGS)))
        await asyncio.sleep(0)
        good = asyncio.create_task(encode([watched.worker], prompts("w5", "w6")))
        with pytest.raises(WorkerLostTwice):
            await bad
        assert set(await good) == {"groups[0].prompt", "groups[1].prompt"}
        assert losses.reasons.qsize() == 2


async def test_with_neighbours_nobody_is_blamed_for_a_crash_and_it_does_not_go_on_for_ever(probes: Path) -> None:
    async with working(probes, step_seconds=1000) as (watched, losses):
        hanging = [asyncio.create_task(encode([watched.worker], prompts(f"{HANGS} {number}", "w5"))) for number in range(2)]
        for _ in range(MAX_LOSSES):
            await watched.until(ready=True)
            await asyncio.sleep(0.1)
            os.kill(watched.pid, signal.SIGSEGV)
            assert await losses.next() == "crash"
        for ended in await asyncio.gather(*hanging, return_exceptions=True):
            assert isinstance(ended, WorkerLost)


async def test_another_worker_takes_over_at_once(probes: Path) -> None:
    async with working(probes, worker_restart_seconds=600) as (first, losses), working(probes) as (second, _):
        os.kill(first.pid, signal.SIGSTOP)
        asking = asyncio.create_task(encode([first.worker, second.worker], prompts("w5")))
        await asyncio.sleep(0.1)
        os.kill(first.pid, signal.SIGSEGV)
        os.kill(first.pid, signal.SIGCONT)
        assert set(await asyncio.wait_for(asking, PATIENCE)) == {"groups[0].prompt"}
        assert await losses.next() == "crash"
        assert not first.worker.up
