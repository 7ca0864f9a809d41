"""The pipe between the front process and a worker, over a real socket pair."""

from __future__ import annotations

import asyncio
import pickle
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from probescore_server.event_loop import MAX_BYTES_UNPICKLED_ON_LOOP
from probescore_server.workers.transport import BlockingEnd, EventLoopEnd, _encode

LARGE = 3 * MAX_BYTES_UNPICKLED_ON_LOOP


class Ends:
    """Both ends, and what has arrived at the front's."""

    def __init__(self) -> None:
        ours, self._theirs = socket.socketpair()
        self.ours, self.worker = ours, BlockingEnd(self._theirs)
        self.received: list[object] = []
        self.ended = asyncio.Event()
        self.front = EventLoopEnd(self.received.append, self.ended.set)

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


async def test_messages_arrive_in_order_though_some_take_long_to_encode() -> None:
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


@pytest.mark.parametrize("sizes", [[0], [1, 0, 3], [LARGE, 70, LARGE * 10], [1] * 300])
async def test_buffers_cross_beside_their_message_without_being_copied_into_it(sizes: list[int]) -> None:
    async with both_ends() as ends:
        contents = [bytes([number % 251]) * size for number, size in enumerate(sizes)]
        for _ in range(3):
            await asyncio.to_thread(ends.worker.send, ("before", "x" * LARGE))
            await asyncio.to_thread(ends.worker.send, [pickle.PickleBuffer(content) for content in contents])
        ends.front.send([pickle.PickleBuffer(content) for content in contents], takes_long=True)
        assert [bytes(part) for part in await asyncio.to_thread(ends.worker.receive)] == contents
        ends.close_worker()
        await ends.ended.wait()
    arrived = [message for message in ends.received if isinstance(message, list)]
    assert [[bytes(part) for part in message] for message in arrived] == [contents] * 3
    header, *rest = _encode([pickle.PickleBuffer(content) for content in contents])
    assert len(header) < 100 + 20 * len(sizes)
    assert [part.obj for part in rest] == contents


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
