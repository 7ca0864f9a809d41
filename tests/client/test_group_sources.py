"""The sources of ``score_stream``: they may wait for scores, fail, never answer and be left, without holding up or being held up."""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from scripted_server import Service, answer_in_pieces, group

from probescore import AsyncProbeClient, InvalidRequestError, ProbeClient, RolloutGroup, StreamWindow

SMALL = StreamWindow(groups_per_call=2, calls_in_flight=3)
WINDOWS = [StreamWindow(), SMALL, StreamWindow(groups_per_call=1, calls_in_flight=1)]


def value(answer: Any) -> float:
    return float(answer.scores["sum"].value)


def collect(stream: Iterator[Any], found: list[float]) -> None:
    found.extend(map(value, stream))


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("probescore-")]


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    give_up = time.monotonic() + 10
    while reading_threads() and time.monotonic() < give_up:
        time.sleep(0.01)
    assert reading_threads() == []


# ---------------------------------------------------------------------------------------------------- a source that needs its scores


def needing_each(scores: queue.SimpleQueue[float], rounds: int) -> Iterator[RolloutGroup]:
    """Makes its next group of the score of the one before."""
    score = 1.0
    for _ in range(rounds):
        yield group([int(score) + 1])
        score = scores.get(timeout=20)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("window", WINDOWS)
def test_a_source_that_waits_for_each_score_is_read_to_its_end(client: Any, window: StreamWindow) -> None:
    scores: queue.SimpleQueue[float] = queue.SimpleQueue()
    found = []
    for answer in client.score_stream(needing_each(scores, 8), window=window):
        found.append(value(answer))
        scores.put(found[-1])
    assert found == [2, 3, 4, 5, 6, 7, 8, 9]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("window", WINDOWS)
async def test_an_async_source_that_waits_for_each_score_is_read_to_its_end(address: str, window: StreamWindow) -> None:
    scores: asyncio.Queue[float] = asyncio.Queue()

    async def needing() -> AsyncIterator[RolloutGroup]:
        score = 1.0
        for _ in range(8):
            yield group([int(score) + 1])
            score = await asyncio.wait_for(scores.get(), 20)

    found = []
    async with AsyncProbeClient(address) as client:
        async for answer in client.score_stream(needing(), window=window):
            found.append(value(answer))
            scores.put_nowait(found[-1])
    assert found == [2, 3, 4, 5, 6, 7, 8, 9]


@pytest.mark.timeout(60)
def test_a_source_that_waits_for_some_scores_only_is_read_to_its_end(client: Any) -> None:
    # given a source that gives five groups at a time, and then waits for two of their scores
    scores: queue.SimpleQueue[float] = queue.SimpleQueue()

    def bursts() -> Iterator[RolloutGroup]:
        for burst in range(4):
            yield from (group([10 * burst + number]) for number in range(5))
            assert [scores.get(timeout=20) for _ in range(2)]

    found = []
    for answer in client.score_stream(bursts(), window=SMALL):
        found.append(value(answer))
        scores.put(found[-1])
    assert sorted(found) == [10 * burst + number for burst in range(4) for number in range(5)]


def test_a_source_that_does_not_wait_still_fills_its_calls(client: Any, service: Service) -> None:
    answers = list(client.score_stream((group([number]) for number in range(64)), window=StreamWindow(groups_per_call=16)))
    assert len(answers) == 64
    assert len(service.requests) <= 8  # 4, unless the machine was very busy


@pytest.mark.timeout(60)
async def test_a_source_that_blocks_does_not_block_the_loop(address: str) -> None:
    release = threading.Event()
    ticks = 0

    def blocking() -> Iterator[RolloutGroup]:
        yield group([1])
        assert release.wait(20)
        yield group([2])

    async def tick() -> None:
        nonlocal ticks
        for _ in range(20):
            await asyncio.sleep(0.01)
            ticks += 1
        release.set()

    async with AsyncProbeClient(address) as client:
        ticking = asyncio.create_task(tick())
        assert [value(answer) async for answer in client.score_stream(blocking())] == [1, 2]
        assert ticks == 20
        await ticking


def test_the_sync_client_takes_an_async_source(address: str) -> None:
    closed = []

    async def generated() -> AsyncIterator[RolloutGroup]:
        try:
            for number in range(7):
                await asyncio.sleep(0.001)
                yield group([number])
        finally:
            closed.append(True)

    with ProbeClient(address) as client:
        assert sorted(map(value, client.score_stream(generated()))) == [0, 1, 2, 3, 4, 5, 6]
        stream = client.score_stream(generated(), window=SMALL)
        next(stream)
        stream.close()
    assert closed == [True, True]


def test_a_source_sees_the_context_of_who_asked(client: Any) -> None:
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)
    variable.set(5)
    assert [value(answer) for answer in client.score_stream(group([variable.get()]) for _ in range(1))] == [5]


# ------------------------------------------------------------------------------------------------------------------ read how far


@pytest.mark.parametrize("window", WINDOWS)
def test_a_source_is_read_no_further_than_the_window_while_nothing_is_answered(client: Any, service: Service, window: StreamWindow) -> None:
    release, read = threading.Event(), 0

    def hold(request: Any) -> Iterator[Any]:
        assert release.wait(20)
        yield from answer_in_pieces(request)

    def counted() -> Iterator[RolloutGroup]:
        nonlocal read
        for _ in range(500):
            read += 1
            yield group([1])

    service.script = [hold] * 500
    threading.Timer(0.5, release.set).start()
    stream = client.score_stream(counted(), window=window)
    next(stream)
    assert read <= window.groups_per_call * window.calls_in_flight + window.groups_per_call
    stream.close()


# ------------------------------------------------------------------------------------------------------------------ that fails


class GoneError(Exception):
    pass


@pytest.mark.parametrize("given", [0, 1, 2, 5])
@pytest.mark.parametrize("error", [GoneError("the disk is gone"), KeyboardInterrupt(), GeneratorExit()])
def test_what_a_source_raises_comes_after_the_answers_to_what_it_gave(address: str, given: int, error: BaseException) -> None:
    def breaking() -> Iterator[RolloutGroup]:
        yield from (group([number]) for number in range(given))
        raise error

    found: list[float] = []
    with ProbeClient(address) as client, pytest.raises(type(error)) as raised:
        collect(client.score_stream(breaking(), window=SMALL), found)
    assert raised.value is error
    assert sorted(found) == list(range(given))


@pytest.mark.parametrize("error", [GoneError("the disk is gone"), asyncio.CancelledError()])
async def test_what_an_async_source_raises_comes_after_the_answers_to_what_it_gave(address: str, error: BaseException) -> None:
    async def breaking() -> AsyncIterator[RolloutGroup]:
        for number in range(5):
            yield group([number])
        raise error

    found = []
    async with AsyncProbeClient(address) as client:
        stream = client.score_stream(breaking(), window=SMALL)
        for _ in range(5):
            found.append(value(await anext(stream)))
        with pytest.raises(type(error)):
            await anext(stream)
    assert sorted(found) == [0, 1, 2, 3, 4]


def test_a_group_that_cannot_be_sent_is_refused_after_the_answers_to_those_before(client: Any) -> None:
    groups = [group([0]), group([1]), group([2]), RolloutGroup([0.5], [[1]]), group([4])]
    found: list[float] = []
    with pytest.raises(InvalidRequestError, match=r"groups\[3\].prompt.ids"):
        collect(client.score_stream(iter(groups)), found)
    assert sorted(found) == [0, 1, 2]


@pytest.mark.parametrize("source", [None, 3, [None], [object()]])
def test_what_is_no_source_of_groups_is_an_error(client: Any, source: Any) -> None:
    with pytest.raises((TypeError, AttributeError)):
        list(client.score_stream(source))
    with pytest.raises((TypeError, AttributeError)):
        list(client.score_stream(iter(source) if isinstance(source, list) else source))


# ------------------------------------------------------------------------------------------------------------------ that is left


def test_a_generator_is_closed_with_the_stream_by_the_thread_that_ran_it(client: Any) -> None:
    closed: list[threading.Thread] = []
    ran: list[threading.Thread] = []

    def endless() -> Iterator[RolloutGroup]:
        ran.append(threading.current_thread())
        try:
            while True:
                yield group([1])
        finally:
            closed.append(threading.current_thread())

    stream = client.score_stream(endless(), window=SMALL)
    next(stream)
    stream.close()
    assert closed == ran != []


@pytest.mark.timeout(60)
def test_a_source_that_never_answers_does_not_keep_the_stream_from_closing(client: Any) -> None:
    release, closed = threading.Event(), threading.Event()

    def stuck() -> Iterator[RolloutGroup]:
        try:
            yield group([1])
            release.wait(50)
            yield group([2])
        finally:
            closed.set()

    stream = client.score_stream(stuck())
    assert value(next(stream)) == 1
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 5
    # and is closed when it goes on
    release.set()
    assert closed.wait(10)


async def test_an_async_generator_is_closed_with_the_stream(address: str) -> None:
    closed = []

    async def endless() -> AsyncIterator[RolloutGroup]:
        try:
            while True:
                yield group([1])
                await asyncio.sleep(0)
        finally:
            closed.append(True)

    async def stuck() -> AsyncIterator[RolloutGroup]:
        try:
            yield group([1])
            await asyncio.Event().wait()
        finally:
            closed.append(True)

    async with AsyncProbeClient(address) as client:
        for source in (endless, stuck):
            stream: Any = client.score_stream(source(), window=SMALL)
            await anext(stream)
            await stream.aclose()
    assert closed == [True, True]
    assert not [task for task in asyncio.all_tasks() if "TaskSource" in repr(task)]


async def test_an_async_source_runs_in_one_task_from_its_beginning_to_its_end(address: str) -> None:
    tasks = set()

    async def watched() -> AsyncIterator[RolloutGroup]:
        for number in range(5):
            tasks.add(asyncio.current_task())
            yield group([number])
        tasks.add(asyncio.current_task())

    async with AsyncProbeClient(address) as client:
        assert len([answer async for answer in client.score_stream(watched())]) == 5
    assert len(tasks) == 1


def test_a_source_that_fails_as_it_is_closed_is_logged(client: Any, caplog: pytest.LogCaptureFixture) -> None:
    def failing() -> Iterator[RolloutGroup]:
        try:
            while True:
                yield group([1])
        finally:
            raise GoneError("already gone")

    stream = client.score_stream(failing(), window=SMALL)
    next(stream)
    stream.close()
    assert "failed as it was closed" in caplog.text


def test_a_stream_that_nobody_reads_reads_nothing(client_class: Any, address: str) -> None:
    def untouched() -> Iterator[RolloutGroup]:
        raise AssertionError("read")
        yield

    client = client_class(address)
    with client:
        getattr(client, "client", client).score_stream(untouched())
    assert reading_threads() == []


STREAMS: dict[str, Callable[[Any], Any]] = {"list": list, "tuple": tuple, "iterator": iter, "generator": lambda groups: (g for g in groups)}


@pytest.mark.parametrize("kind", STREAMS)
def test_every_kind_of_source_gives_the_same(client: Any, kind: str) -> None:
    groups = [group([number], [100 + number]) for number in range(37)]
    answers = list(client.score_stream(STREAMS[kind](groups), window=SMALL))
    places = {(answer.group_index, answer.completion_index): value(answer) for answer in answers}
    assert places == {(number, position): number + 100 * position for number in range(37) for position in range(2)}
    assert len(answers) == 74
