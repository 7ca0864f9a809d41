"""Implements the table of what the names of readings mean in all replicas of a server, which is kept in one place.

A replica is a whole scoring server behind an address that others share with it, so that nobody can say which of them gets a call. None of
them decides what a name means. Each asks the table whenever a call (the work of one request) names a reading, and refuses the call if it
does not hold the version that the table says. So two replicas never answer one name with different versions, whether they have just been
started, were unreachable for a while, or could not load a version.

A load has every replica read the files beside what it holds. Then the name changes in the table, in one step. If one replica fails, the
table stays as it is, and the others free what they have read.

All code of this module runs on one event loop.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol
from weakref import WeakValueDictionary

from probescore.types import LoadedReading, Reading
from probescore_server.errors import CoreError, InvalidRequest, LimitExceeded, ReadingIncomplete, WorkerUnavailable
from probescore_server.registry.readings import MAX_LOST_NAMES, lost_problem, reading_loss, unknown_reading

RETRY_SECONDS = 0.5
LONGEST_POLL_SECONDS = 30.0
SHOWN_IN_KEY = 40


@dataclass(frozen=True)
class SharedVersion:
    """Value object with what a name means in every replica.

    Attributes:
        key: the name under which the registry of each replica holds the version: another one for each load.
        path: the directory of the files, relative to the setting ``readings_root``, with every link resolved.
        reading: the description by the replica that was first to load it, with the name and the label of the request.
    """

    key: str
    path: str
    reading: Reading


@dataclass(frozen=True)
class SharedNames:
    """Value object with what all names mean at one moment.

    Attributes:
        revision: number that is larger after each change.
        named: a dictionary from the names to what they mean.
        lost: names whose reading was lost, the last one last.
        closed: the name that is being replaced in place, for which calls wait; empty = none.
        loading: the key under which replicas may hold a version that no name means yet; empty = none.
    """

    revision: int = 0
    named: Mapping[str, SharedVersion] = field(default_factory=dict)
    lost: tuple[str, ...] = ()
    closed: str = ""
    loading: str = ""

    @property
    def keys(self) -> set[str]:
        """Returns the keys of the versions that a replica holds."""
        return {version.key for version in self.named.values()} | ({self.loading} if self.loading else set())

    def missing(self, at: str, name: str) -> CoreError:
        """Returns the error for a name that means nothing: it was lost, or there is no such reading."""
        return reading_loss(lost_problem(name)) if name in self.lost else unknown_reading(at, name, self.named)


@dataclass(frozen=True)
class LoadOrder:
    """Value object with what one call asks to be loaded.

    Attributes:
        name: the name by which requests ask for the reading.
        path: the directory of the files, relative to the setting ``readings_root``, with every link resolved.
        step: label to tell versions apart; ``None`` = none.
        expected_id: id of the only version that is to be loaded; empty = any.
        in_place: whether the version that the name means is freed first.
        seconds_left: seconds until whoever asks stops waiting.
    """

    name: str
    path: str
    step: int | None = None
    expected_id: str = ""
    in_place: bool = False
    seconds_left: float = math.inf


class Replicas(Protocol):
    """Interface to all replicas that take calls."""

    async def each(self, method: str, *arguments: object) -> list[Any]:
        """Calls a method of ``SharedReadings`` in every replica, and returns what each returned, or the ``CoreError`` that it failed with;
        a replica that is lost meanwhile has failed with ``WorkerUnavailable``.
        """


class NamesOfReadings(Protocol):
    """Interface of ``ReadingTable`` as replicas see it. Methods raise ``WorkerUnavailable`` while the table cannot be reached."""

    async def current(self, known: SharedNames) -> SharedNames: ...  # noqa: D102 - as in ReadingTable

    async def changed(self, known: SharedNames) -> SharedNames: ...  # noqa: D102

    async def load(self, known: SharedNames, order: LoadOrder) -> LoadedReading: ...  # noqa: D102

    async def unload(self, known: SharedNames, name: str) -> Reading: ...  # noqa: D102

    async def lose(self, known: SharedNames, key: str) -> None: ...  # noqa: D102


class ReadingTable:
    """Table of what the names of readings mean in all replicas.

    Every method takes what the replica that asks has last seen of the table. A table that takes the place of one that was lost begins with
    what the replicas have last seen of that one.

    Args:
        max_readings: the largest number of names, as in the settings.
        replicas: all replicas.
    """

    def __init__(self, max_readings: int, replicas: Replicas) -> None:
        self._max_readings = max_readings
        self._replicas = replicas
        self._names = SharedNames()
        self._change = asyncio.Event()  # It is set, and replaced by a new one, at each change.
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # By name, held while what it means is changed.
        self._loading = asyncio.Lock()
        self._lost_key = ""  # The version that is being loaded, if a replica has lost it already.
        self._tasks: set[asyncio.Task[LoadedReading]] = set()

    async def current(self, known: SharedNames) -> SharedNames:
        """Returns what all names mean now."""
        self._adopt(known)
        return self._names

    async def changed(self, known: SharedNames) -> SharedNames:
        """Waits until the names mean anything else than in ``known``, but not for ever, and returns what they mean then."""
        self._adopt(known)
        if self._names.revision <= known.revision:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._change.wait(), LONGEST_POLL_SECONDS)
        return self._names

    async def load(self, known: SharedNames, order: LoadOrder) -> LoadedReading:
        """Loads a reading in every replica or in none, and lets a name mean it. Returns once every replica knows.

        One load runs at a time. If this coroutine is cancelled, the load runs on.

        Raises:
            CoreError: as ``ReadingRegistry.load``; the name means what it meant, or nothing if that was to be replaced in place.
        """
        self._adopt(known)
        # In a context of its own: Ray cancels everything that a call which is given up has begun, and tells it by the context.
        loading = asyncio.create_task(self._load_in_turn(order), context=contextvars.Context())
        self._tasks.add(loading)
        loading.add_done_callback(self._ended)
        return await asyncio.shield(loading)

    async def unload(self, known: SharedNames, name: str) -> Reading:
        """Lets a name mean nothing any more in every replica, and returns what it meant.

        Raises:
            InvalidRequest: there is no reading of this name.
            FailedPrecondition: the reading was lost.
        """
        self._adopt(known)
        async with self._turn(name):
            if name not in self._names.named:
                raise self._names.missing("name", name)
            removed = self._names.named[name].reading
            self._publish(named=_without(self._names.named, name))
            await self._replicas.each("follow", self._names.revision)
        return removed

    async def lose(self, known: SharedNames, key: str) -> None:
        """Records that a replica cannot read a version as it was. The names that mean it mean nothing any more in any replica."""
        self._adopt(known)
        if key == self._names.loading:
            self._lost_key = key
        lost = [name for name, version in self._names.named.items() if version.key == key]
        if lost:
            earlier = [name for name in self._names.lost if name not in lost]
            self._publish(named=_without(self._names.named, *lost), lost=(*earlier, *lost)[-MAX_LOST_NAMES:])

    # ------------------------------------------------------------------------------------------------------------------------ loading

    async def _load_in_turn(self, order: LoadOrder) -> LoadedReading:
        deadline = time.monotonic() + order.seconds_left
        async with self._turn(order.name), self._loading:
            with self._closing(order.name if order.in_place else ""):
                return await self._load(order, deadline)

    async def _load(self, order: LoadOrder, deadline: float) -> LoadedReading:
        name, named = order.name, self._names.named
        if name not in named and len(named) >= self._max_readings:
            raise LimitExceeded("name", len(named) + 1, "readings", "max_readings", self._max_readings, "unload one of them first")
        replaced = named.get(name)
        if order.in_place and replaced is not None:
            outcomes = await self._replicas.each("drain", self._names.revision, replaced.key, deadline - time.monotonic())
            _raise_failures(outcomes)
            self._publish(named=_without(self._names.named, name))
        key = f"{name[:SHOWN_IN_KEY]}.{time.time_ns()}"
        self._publish(loading=key)
        loaded = await self._replicas.each("hold", self._names.revision, key, order)
        _raise_failures(loaded)
        reading = replace(loaded[0].reading, name=name, step=order.step)
        if any(each.reading.id != reading.id for each in loaded):
            raise ReadingIncomplete("the files changed while the replicas read them: they are being written")
        if self._lost_key == key:
            raise WorkerUnavailable("a worker was lost after it had loaded the reading", RETRY_SECONDS)
        if not order.in_place:
            replaced = self._names.named.get(name)  # It may have been lost meanwhile.
        # The name changes here, at once: each replica asks what it means, and holds the version.
        self._publish(
            named={**self._names.named, name: SharedVersion(key, order.path, reading)},
            lost=tuple(lost for lost in self._names.lost if lost != name),
            closed="",
            loading="",
        )
        await self._replicas.each("follow", self._names.revision)
        return LoadedReading(
            reading,
            None if replaced is None else replaced.reading,
            {probe: max(each.golden_drift.get(probe, 0.0) for each in loaded) for probe in loaded[0].golden_drift},
            max(each.device_bytes for each in loaded),
        )

    @contextmanager
    def _closing(self, name: str) -> Iterator[None]:
        """Context manager of one load, during which calls that name a reading wait, if the reading is replaced in place."""
        self._publish(closed=name)
        try:
            yield
        finally:
            self._publish(closed="", loading="")

    def _ended(self, loading: asyncio.Task[LoadedReading]) -> None:
        self._tasks.discard(loading)
        if not loading.cancelled():
            loading.exception()  # Nobody else asks for it if the call was given up.

    def _turn(self, name: str) -> asyncio.Lock:
        """Returns the lock that is held while what a name means is changed; who comes first has it first."""
        return self._turns.setdefault(name, asyncio.Lock())

    # ------------------------------------------------------------------------------------------------------------------------ changes

    def _adopt(self, known: SharedNames) -> None:
        """Takes over what a replica has seen of an earlier table, if that is newer. No load of that table goes on."""
        if known.revision > self._names.revision:
            self._names = known
            self._publish(closed="", loading="")

    def _publish(self, **changes: Any) -> None:  # noqa: ANN401
        """Changes what names mean. Revisions are times, so that those of a table that takes another's place are larger."""
        changed = replace(self._names, **changes)
        if changed == self._names:
            return
        self._names = replace(changed, revision=max(time.time_ns(), self._names.revision + 1))
        change, self._change = self._change, asyncio.Event()
        change.set()


def _without(named: Mapping[str, SharedVersion], *names: str) -> dict[str, SharedVersion]:
    return {name: version for name, version in named.items() if name not in names}


def _raise_failures(outcomes: list[Any]) -> None:
    """Raises the error of a replica that failed; what lies in the files says more than a replica that was lost meanwhile."""
    if not outcomes:
        raise WorkerUnavailable("no replica takes calls at present", RETRY_SECONDS)
    failures = [outcome for outcome in outcomes if isinstance(outcome, CoreError)]
    if failures:
        raise next((failure for failure in failures if isinstance(failure, InvalidRequest)), failures[0])
