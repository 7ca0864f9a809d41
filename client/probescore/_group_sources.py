"""Reads the rollout groups that a user passes to ``score_stream``. Each source is read in a thread or task of its own, one group at a time,
on demand.

For this reason a source may wait, for example for an earlier score, while scores of earlier groups are handed out. A source is never read
ahead.
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
"""Seconds that a source may take for its next rollout group before the groups read so far are sent without the next one."""

_STOP_IDLE_SECONDS = 1.0
_STOP_READING_SECONDS = 0.1


@dataclass(frozen=True, eq=False)
class GroupRead:
    """Event with one rollout group (a prompt with its completions) that a source, a reader of a user's iterable, has read."""

    group: RolloutGroup


@dataclass(frozen=True, eq=False)
class SourceEnded:
    """Event that a source of rollout groups has ended: ``error`` is the exception that the source raised, or ``None`` if the source was
    exhausted.
    """

    error: BaseException | None = None


Deliver = Callable[[Union[GroupRead, SourceEnded]], None]


class Source(Protocol):
    """Interface (Protocol) of a reader of rollout groups that reads one group (a prompt with its completions) from a user's iterable each
    time ``ask`` is called.
    """

    def ask(self) -> None:
        """Requests the next event of a source (reader of rollout groups), a ``GroupRead`` (one rollout group) or a ``SourceEnded``, which
        is delivered now or later. This method must not be called again before that event is delivered, nor after a ``SourceEnded``.
        """

    def stop(self) -> None:
        """Ends the reading of rollout groups, and closes the iterable that they come from if it is a generator. This method does not wait
        for a generator that is running; such a generator is closed when it yields its next group.
        """


def source_of(groups: Iterable[RolloutGroup] | AsyncIterable[RolloutGroup], deliver: Deliver) -> Source:
    """Returns a ``Source`` (reader of rollout groups) that reads the iterable ``groups`` without an event loop: a list is read in place,
    since a list never blocks, and any other iterable in a thread.
    """
    if isinstance(groups, (list, tuple)):
        return ListSource(groups, deliver)
    return ThreadSource(groups if isinstance(groups, Iterable) else _iterate_in_own_loop(groups), deliver)


class ListSource:
    """Source (reader of rollout groups) that reads a list of rollout groups without a thread, since a list never blocks."""

    def __init__(self, groups: Iterable[RolloutGroup], deliver: Deliver) -> None:
        self._groups = iter(groups)
        self._deliver = deliver

    def ask(self) -> None:
        """Delivers the next rollout group of a list, or, after the last group, the event that tells the end of the list."""
        self._deliver(next(map(GroupRead, self._groups), SourceEnded()))

    def stop(self) -> None:
        """Does nothing, since this source of rollout groups reads a list, which needs no clean-up."""


class ThreadSource:
    """Source (reader of rollout groups) that reads a user's iterable in a thread of its own."""

    def __init__(self, groups: Iterable[RolloutGroup], deliver: Deliver) -> None:
        self._groups = groups
        self._deliver = deliver
        self._wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._reading = False
        # a source that waits for ever must not keep the program from ending
        self._thread = threading.Thread(target=contextvars.copy_context().run, args=(self._read,), name="probescore-source", daemon=True)

    def ask(self) -> None:
        """Makes the thread that reads a user's iterable read one more rollout group and deliver the group."""
        if self._thread.ident is None:
            self._thread.start()
        self._reading = True
        self._wanted.put(True)

    def stop(self) -> None:
        """Ends the thread that reads a user's iterable once the thread is between two rollout groups, and waits briefly for its end."""
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
    """Yields the rollout groups of an asynchronous iterable, which runs in an event loop of the current thread."""
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
    """Interface (Protocol) of a reader of rollout groups that reads one group (a prompt with its completions) from a user's iterable each
    time ``ask`` is called, and never blocks the event loop.
    """

    def ask(self) -> None:
        """Requests the next event of a source (reader of rollout groups), a ``GroupRead`` (one rollout group) or a ``SourceEnded``, which
        is delivered now or later; the rules are those of ``Source.ask``.
        """

    async def stop(self) -> None:
        """Ends the reading of rollout groups, and closes the iterable that they come from if it is a generator, as ``Source.stop`` does."""


def async_source_of(groups: Iterable[RolloutGroup] | AsyncIterable[RolloutGroup], deliver: Deliver) -> AsyncSource:
    """Returns an ``AsyncSource`` (asynchronous reader of rollout groups) that reads the iterable ``groups`` from within an event loop
    without blocking the loop.
    """
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
    """Adapter that turns a reader of rollout groups which never blocks the event loop (a ``Source``) into an asynchronous reader (an
    ``AsyncSource``).
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self.ask = source.ask

    async def stop(self) -> None:
        if isinstance(self._source, ThreadSource):
            await asyncio.to_thread(self._source.stop)


class TaskSource:
    """Source (reader of rollout groups) that reads a user's asynchronous iterable in a single task, since a generator must leave each
    context manager in the task in which the generator entered it.
    """

    def __init__(self, groups: AsyncIterable[RolloutGroup], deliver: Deliver) -> None:
        self._deliver = deliver
        self._wanted = asyncio.Semaphore(0)
        self._stopped = False
        self._task = asyncio.create_task(self._read(groups))

    def ask(self) -> None:
        """Makes the task that reads a user's asynchronous iterable read one more rollout group and deliver the group."""
        self._wanted.release()

    async def stop(self) -> None:
        """Cancels the task that reads a user's asynchronous iterable, and waits briefly for its end."""
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
