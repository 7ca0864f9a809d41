"""The pipe between the front process and a worker, over a real socket pair."""

from __future__ import annotations

import asyncio
import pickle
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest

from probescore.types import CompletionScores, CompletionStatus, ProbeScores, Usage
from probescore_server.pipe import MAX_BYTES_UNPACKED_ON_LOOP, BlockingEnd, LoopEnd
from probescore_server.rollouts import MANY_PROBES, RolloutResult

LARGE = 3 * MAX_BYTES_UNPACKED_ON_LOOP


class Ends:
    """Both ends, and what has arrived at the front's."""

    def __init__(self) -> None:
        ours, self._theirs = socket.socketpair()
        self.ours, self.worker = ours, BlockingEnd(self._theirs)
        self.received: list[object] = []
        self.ended = asyncio.Event()
        self.front = LoopEnd(self.received.append, self.ended.set)

    def close_worker(self) -> None:
        self.worker._reader.close()
        self._theirs.close()


@asynccontextmanager
async def both_ends() -> AsyncIterator[Ends]:
    ends = Ends()
    await asyncio.get_running_loop().create_unix_connection(lambda: ends.front, sock=ends.ours)
    try:
        yield ends
    finally:
        ends.front.close()
        ends.close_worker()
        await ends.ended.wait()


async def test_messages_arrive_in_order_though_some_take_long_to_pack() -> None:
    async with both_ends() as ends:
        for number in range(20):
            ends.front.send((number, b"x" * (LARGE if number % 5 == 0 else 1)), takes_long=number % 5 == 0)
        arrived = [(await asyncio.to_thread(ends.worker.receive))[0] for _ in range(20)]
    assert arrived == list(range(20))


async def test_answers_arrive_whole_however_large_and_before_the_end_is_told() -> None:
    async with both_ends() as ends:
        answers = [bytes([number]) * size for number, size in enumerate((0, 1, LARGE, 70, LARGE * 10))]
        for answer in answers:
            await asyncio.to_thread(ends.worker.send, answer)
        ends.close_worker()
        await ends.ended.wait()
        assert sorted(ends.received) == sorted(answers)


async def test_a_worker_that_does_not_read_holds_up_nobody_and_what_it_would_not_get_is_dropped() -> None:
    async with both_ends() as ends:
        for _ in range(10):
            ends.front.send(b"x" * LARGE, takes_long=False)
        ends.close_worker()
        await ends.ended.wait()
        ends.front.send("late", takes_long=False)
        ends.front.send("late", takes_long=True)


async def test_a_worker_learns_that_the_front_is_gone() -> None:
    async with both_ends() as ends:
        ends.front.close()
        with pytest.raises(EOFError):
            await asyncio.to_thread(ends.worker.receive)


@pytest.mark.parametrize("probes", [0, 1, MANY_PROBES, 100])
def test_a_result_is_the_same_on_the_other_side_however_many_probes_it_has(probes: int) -> None:
    random = np.random.default_rng(0)
    scores = CompletionScores(
        "id",
        CompletionStatus.OK,
        {
            f"p{number}": ProbeScores(
                random.random((1 + number % 2, 2, 1 + number % 3)).astype(np.float32),
                random.random((5, 1)).astype(np.float32) if number % 4 == 0 else None,
            )
            for number in range(probes)
        },
        completion_ids=np.arange(5, dtype=np.int32),
    )
    result = RolloutResult(replace(scores, follow_ups=(scores, replace(scores, scores={}))), Usage(1, 2, 3))
    arrived = pickle.loads(pickle.dumps(result))
    assert arrived.usage == result.usage
    for ours, theirs in zip([arrived.scores, *arrived.scores.follow_ups], [result.scores, *result.scores.follow_ups], strict=True):
        assert (ours.id, ours.status, list(ours.scores)) == (theirs.id, theirs.status, list(theirs.scores))
        np.testing.assert_array_equal(ours.completion_ids, theirs.completion_ids)
        for key, probe in theirs.scores.items():
            np.testing.assert_array_equal(ours.scores[key].reduced, probe.reduced)
            assert (ours.scores[key].tokens is None) == (probe.tokens is None)
            if probe.tokens is not None:
                np.testing.assert_array_equal(ours.scores[key].tokens, probe.tokens)
