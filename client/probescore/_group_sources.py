"""Reads the groups of a ``score_stream``: each source in a thread or task of its own, one group whenever it is asked.

So a source may wait, for an earlier score for example, while answers are handed out; and it is never read ahead.
"""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, Union

from probescore._retries import logger
from probescore.types import RolloutGroup

LINGER_SECONDS = 0.01
"""Is how long a source may take for its next group before what was read is sent without it."""

_STOP_IDLE_SECONDS = 1.0
_STOP_READING_SECONDS = 0.1


@dataclass(frozen=True, eq=False)
class GroupRead:
    """Says that a source gave a group."""

    group: RolloutGroup


@dataclass(frozen=True, eq=False)
class SourceEnded:
    """Says that a source gives no more groups: ``error`` is ``None`` if it ended by itself, or what it raised."""

    error: BaseException | None = None


Deliver = Callable[[Union[GroupRead, SourceEnded]], None]


class Source(Protocol):
    """Reads groups one at a time, each when it is asked to."""

    def ask(self) -> None:
        """Has one ``GroupRead`` or ``SourceEnded`` delivered, now or later. It must not be called again before that, nor after a
        ``SourceEnded``.
        """

    def stop(self) -> None:
        """Ends the reading and closes a generator. It does not wait for one at work, which is closed when it gives its next group."""


def source_of(groups: Iterable[RolloutGroup] | AsyncIterable[RolloutGroup], deliver: Deliver) -> Source:
    """Returns the way to read ``groups`` without an event loop: a list in place, since it never makes anybody wait, and anything else in a
    thread.
    """
    if isinstance(groups, (list, tuple)):
        return ListSource(groups, deliver)
    return ThreadSource(groups if isinstance(groups, Iterable) else _iterate_in_own_loop(groups), deliver)


class ListSource:
    """Reads a list of groups where it is asked."""

    def __init__(self, groups: Iterable[RolloutGroup], deliver: Deliver) -> None:
        self._groups = iter(groups)
        self._deliver = deliver

    def ask(self) -> None:
        """Delivers the next group, or that there is none."""
        self._deliver(next(map(GroupRead, self._groups), SourceEnded()))

    def stop(self) -> None:
        """Does nothing, since a list needs no end."""


class ThreadSource:
    """Reads an iterable of groups in a thread of its own."""

    def __init__(self, groups: Iterable[RolloutGroup], deliver: Deliver) -> None:
        self._groups = groups
        self._deliver = deliver
        self._wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._reading = False
        # a source that waits for ever must not keep the program from ending
        self._thread = threading.Thread(target=contextvars.copy_context().run, args=(self._read,), name="probescore-source", daemon=True)

    def ask(self) -> None:
        """Has the thread read one more group, and deliver it."""
        if self._thread.ident is None:
            self._thread.start()
        self._reading = True
        self._wanted.put(True)

    def stop(self) -> None:
        """Ends the thread when it is between two groups, and waits for that for a moment."""
        self._wanted.put(False)
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(_STOP_READING_SECONDS if self._reading else _STOP_IDLE_SECONDS)

    def _read(self) -> None:
        iterator: Iterator[RolloutGroup] | None = None
        try:
            iterator = iter(self._groups)
            while self._wanted.get():
                arrival = next(map(GroupRead, iterator), SourceEnded())
                self._give(arrival)
                if isinstance(arrival, SourceEnded):
                    return
                del arrival
        except BaseException as error:  # the reader of the answers must hear of it, whatever it is, instead of waiting
            self._give(SourceEnded(error))
        finally:
            # only a thread that does not run a generator can close it: this one
            if isinstance(iterator, Generator):
                try:
                    iterator.close()
                except Exception:
                    logger.warning("the source of a score_stream failed as it was closed", exc_info=True)

    def _give(self, arrival: GroupRead | SourceEnded) -> None:
        self._reading = False
        self._deliver(arrival)


def _iterate_in_own_loop(groups: AsyncIterable[RolloutGroup]) -> Iterator[RolloutGroup]:
    """Yields the groups of an asynchronous source, which runs in an event loop of this thread's own."""
    loop = asyncio.new_event_loop()
    iterator = aiter(groups)
    try:
        while True:
            try:
                group = loop.run_until_complete(_next(iterator))
            except StopAsyncIteration:
                return
            yield group
    finally:
        if isinstance(iterator, AsyncGenerator):
            loop.run_until_complete(iterator.aclose())
        loop.close()


async def _next(iterator: AsyncIterator[RolloutGroup]) -> RolloutGroup:
    return await anext(iterator)


class AsyncSource(Protocol):
    """Reads groups one at a time, each when it is asked to, within an event loop that it never blocks."""

    def ask(self) -> None:
        """Has one ``GroupRead`` or ``SourceEnded`` delivered, as ``Source.ask`` does."""

    async def stop(self) -> None:
        """Ends the reading and closes a generator, as ``Source.stop`` does."""


def async_source_of(groups: Iterable[RolloutGroup] | AsyncIterable[RolloutGroup], deliver: Deliver) -> AsyncSource:
    """Returns the way to read ``groups`` from within an event loop without ever blocking it."""
    if isinstance(groups, AsyncIterable):
        return TaskSource(groups, deliver)
    loop = asyncio.get_running_loop()

    def deliver_from_thread(arrival: GroupRead | SourceEnded) -> None:
        with suppress(RuntimeError):  # the loop is over, and so is whoever waited
            loop.call_soon_threadsafe(deliver, arrival)

    return _NonBlockingSource(
        ListSource(groups, deliver) if isinstance(groups, (list, tuple)) else ThreadSource(groups, deliver_from_thread)
    )


class _NonBlockingSource:
    """Reads a ``Source`` from within an event loop, which it never blocks."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.ask = source.ask

    async def stop(self) -> None:
        if isinstance(self._source, ThreadSource):
            await asyncio.to_thread(self._source.stop)


class TaskSource:
    """Reads an asynchronous iterable of groups in a task: a single one, since what a generator has entered it must leave in the same."""

    def __init__(self, groups: AsyncIterable[RolloutGroup], deliver: Deliver) -> None:
        self._deliver = deliver
        self._wanted = asyncio.Semaphore(0)
        self._stopped = False
        self._task = asyncio.create_task(self._read(groups))

    def ask(self) -> None:
        """Has the task read one more group, and deliver it."""
        self._wanted.release()

    async def stop(self) -> None:
        """Cancels the task, and waits for its end for a moment."""
        self._stopped = True
        self._task.cancel()
        await asyncio.wait({self._task}, timeout=_STOP_IDLE_SECONDS)  # a source may refuse to be cancelled

    async def _read(self, groups: AsyncIterable[RolloutGroup]) -> None:
        iterator: AsyncIterator[RolloutGroup] | None = None
        try:
            iterator = aiter(groups)
            while True:
                await self._wanted.acquire()
                try:
                    group = await anext(iterator)
                except StopAsyncIteration:
                    return self._deliver(SourceEnded())
                self._deliver(GroupRead(group))
                del group
        except asyncio.CancelledError as error:
            if self._stopped:
                raise
            self._deliver(SourceEnded(error))
        except Exception as error:  # the reader of the answers must hear of it, whatever it is, instead of waiting
            self._deliver(SourceEnded(error))
        finally:
            if isinstance(iterator, AsyncGenerator):
                try:
                    await iterator.aclose()
                except Exception:
                    logger.warning("the source of a score_stream failed as it was closed", exc_info=True)
