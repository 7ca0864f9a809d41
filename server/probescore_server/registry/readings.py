"""Implements the registry of readings: adapters and checkpoints that the probes read beside the frozen model, loaded, replaced and dropped
while the server scores.

A load has every worker process read the files under a new slot, beside what it holds, and then changes in one step what the name means. A
call (the work of one request) resolves names once, when it is admitted, to versions whose content never changes, and workers hold a version
until no name and no admitted call means it any more. So no call mixes two versions, and workers need not change at the same moment.

Changes of one name take turns in the order in which they come. What waits for calls to end waits for a bounded time, so that a call which
never ends holds up nobody for ever, nor lets versions pile up.

A worker process that is started again reads the files again. A version whose files are no longer the same is lost: it is dropped
everywhere, so that no two workers answer one name with different weights, and the calls that mean it fail.

All code of this module runs on one event loop, except for looking at directories.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import structlog

from probescore.types import FROZEN, LoadedReading, Reading
from probescore_server.errors import (
    CoreError,
    FailedPrecondition,
    InternalFault,
    InvalidRequest,
    LimitExceeded,
    ReadingIncomplete,
    ReadingRefused,
    WorkerUnavailable,
)
from probescore_server.reading_paths import resolve_reading_path
from probescore_server.rollouts import EngineInfo, PinnedReading
from probescore_server.settings import ServerSettings
from probescore_server.validation.options import check_reading_name
from probescore_server.workers.handle import WorkerHandle
from probescore_server.workers.messages import ReadingSource

logger = structlog.get_logger(__name__)

MAX_LOST_NAMES = 64
"""Number of names of lost readings that are remembered, so that calls which name them are told what has happened."""


@dataclass(eq=False)
class HeldVersion:
    """Record of one version of a reading that every worker process holds.

    Attributes:
        source: where it is read from, and the slot under which workers hold it.
        described: the description by the first worker that loaded it, under the name that it was loaded for.
        uses: number of names and of admitted calls that mean it.
        on_lost: functions, by the call that means the version, that end the call if the version is lost.
        lost: what has happened, as a text for people, if the version is lost.
    """

    source: ReadingSource
    described: Reading
    uses: int = 0
    on_lost: dict[object, Callable[[CoreError], None]] = field(default_factory=dict)
    lost: str = ""


@dataclass(frozen=True, eq=False)
class _NamedVersion:
    """Value object with what a name means: a version, and the label that was given when it was loaded under this name."""

    version: HeldVersion
    step: int | None


class PinnedNames:
    """Pin of the readings that one call (the work of one request) names: what the names mean when they are resolved stays loaded until the
    call has ended.

    Attributes:
        wanted: names and versions, for the call's options; empty before names are resolved, and if the call names none.
        described: their descriptions, in the same order.
    """

    def __init__(self, registry: ReadingRegistry) -> None:
        self.wanted: tuple[PinnedReading, ...] = ()
        self.described: tuple[Reading, ...] = ()
        self._registry = registry
        self._versions: list[HeldVersion] = []

    async def resolve(self, names: Sequence[str], info: EngineInfo, field: str = "readings[{}]") -> None:
        """Resolves the names of readings in a request, once. A name that is being replaced in place is waited for.

        Args:
            names: the names.
            info: the model and probes that are served.
            field: path of a name in the request, with ``{}`` for its index.

        Raises:
            InvalidRequest: naming the field: there is no such reading, or it is named twice.
            FailedPrecondition: a reading that is named was lost.
        """
        if names:
            self.wanted, self.described, self._versions = await self._registry.resolve(names, info, field)

    def call_if_lost(self, fail: Callable[[CoreError], None]) -> None:
        """Has a function called with an error if one of the readings is lost before the call has ended, or was lost already."""
        for version in self._versions:
            if version.lost:
                fail(reading_loss(version.lost))
            version.on_lost[self] = fail

    def release(self) -> None:
        """Ends the pin, so that versions which no name means any more may be freed."""
        for version in self._versions:
            version.on_lost.pop(self, None)
        self._registry.release(self._versions)


class ReadingRegistry:
    """Registry of the readings of one server beside the frozen model.

    Args:
        settings: the server's settings.
        workers: the handles of all worker processes.
        changing: lock that is held while the set of what worker processes hold is changed, so that a process which takes another's place
            misses nothing.
        on_change: function that is called with the number of readings whenever what a name means has changed.
        on_load: function that is called after every load with the seconds that it took, or with the error that ended it.
        on_lost: function that is called for each name whose reading is lost.
    """

    def __init__(
        self,
        settings: ServerSettings,
        workers: Sequence[WorkerHandle],
        changing: asyncio.Lock,
        on_change: Callable[[int], None] = lambda count: None,
        on_load: Callable[[float | CoreError], None] = lambda outcome: None,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self._settings = settings
        self._workers = workers
        self._changing = changing
        self._on_change = on_change
        self._on_load = on_load
        self._on_lost = on_lost
        self._named: dict[str, _NamedVersion] = {}
        self._versions: dict[str, HeldVersion] = {}  # By slot, all that some name or call means.
        self._loading: ReadingSource | None = None
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # By name, held while what it means is changed.
        self._closed: dict[str, asyncio.Event] = {}  # Names that are being replaced in place, with what is set afterwards.
        self._freed = asyncio.Event()  # It is set, and replaced by a new one, whenever a call has ended.
        self._lost: dict[str, str] = {}  # By name, what has happened, as a text for people.
        self._numbers = itertools.count(1)
        self._tasks: set[asyncio.Task[Any]] = set()

    def described(self, info: EngineInfo) -> tuple[Reading, ...]:
        """Returns descriptions of the readings that a request can name, the frozen one first; empty if the server does not offer others."""
        if self._settings.readings_root is None:
            return ()
        return info.frozen_reading, *(self._describe(name) for name in self._named)

    # ------------------------------------------------------------------------------------------------------------------------ by calls

    @contextmanager
    def pinning(self) -> Iterator[PinnedNames]:
        """Context manager around a call (the work of one request), which yields the pin of the readings that the call names."""
        pin = PinnedNames(self)
        try:
            yield pin
        finally:
            pin.release()

    async def resolve(
        self, names: Sequence[str], info: EngineInfo, field: str = "readings[{}]"
    ) -> tuple[tuple[PinnedReading, ...], tuple[Reading, ...], list[HeldVersion]]:
        """Resolves names, and counts a use of each version until ``release``; see ``PinnedNames.resolve``."""
        while closed := [self._closed[name] for name in names if name in self._closed]:
            await closed[0].wait()
        # From here to the end nothing is awaited: all names are resolved at one moment.
        for index, name in enumerate(names):
            if name in names[:index]:
                raise named_twice(field.format(index), name)
            if name != FROZEN and name not in self._named:
                raise self._missing(field.format(index), name)
        wanted, described, versions = [], [], []
        for name in names:
            if name == FROZEN:
                wanted.append(PinnedReading(FROZEN))
                described.append(info.frozen_reading)
                continue
            version = self._named[name].version
            version.uses += 1
            versions.append(version)
            wanted.append(PinnedReading(name, version.source.id))
            described.append(self._describe(name))
        return tuple(wanted), tuple(described), versions

    def release(self, versions: Sequence[HeldVersion]) -> None:
        """Counts one use less of some versions, and frees those that nobody uses any more."""
        if not versions:
            return
        for version in versions:
            version.uses -= 1
            if not version.uses and self._versions.get(version.source.slot) is version:
                del self._versions[version.source.slot]
        freed, self._freed = self._freed, asyncio.Event()
        freed.set()
        self._settle()

    # ------------------------------------------------------------------------------------------------------------------------ changing

    async def load(
        self, name: str, path: str, *, step: int | None, expected_id: str, in_place: bool, deadline: float = math.inf
    ) -> LoadedReading:
        """Loads an adapter or a checkpoint on every worker process, and lets a name mean it.

        One load runs at a time. If this coroutine is cancelled, the load runs on.

        Calls under way that use earlier versions are waited for, at most for the setting ``drain_seconds``, where the load would otherwise
        replace a version under them, or leave more versions without a name than the setting ``max_readings``.

        Args:
            name: the name by which requests ask for the reading. A reading of this name is replaced.
            path: directory of the files, absolute or relative to the setting ``readings_root``.
            step: label to tell versions apart, such as the training step.
            expected_id: id of the only version that is to be loaded; empty = any.
            in_place: whether the version that the name means is freed first. Calls that name the reading wait meanwhile. If loading fails,
                the name means nothing.
            deadline: when whoever asks stops waiting, in seconds of ``time.monotonic``; from then on calls are not waited for.

        Raises:
            InvalidRequest: an argument is wrong; the error names it.
            ReadingRefused: the files would not be computed correctly.
            ReadingIncomplete: the files are being written.
            FailedPrecondition: the server loads no readings, sleeps, or its memory is short, the files are not ``expected_id``, or calls
                under way did not end in time, and the name means what it meant.
            WorkerUnavailable: a worker process is not up, or was lost while it loaded; no worker holds the new version.
            InternalFault: loading failed for another reason.
        """
        root = self._root()
        check_reading_name(name, step)
        directory = await asyncio.to_thread(resolve_reading_path, path, root)
        self._check_awake()
        source = ReadingSource(f"load-{next(self._numbers)}", directory, expected_id)
        loading = self._load_in_turn(name, source, step, in_place, deadline)
        try:
            return await asyncio.shield(self._start(loading))
        except ReadingRefused as refusal:
            raise shown_refusal(refusal, path, directory) from None

    async def unload(self, name: str) -> Reading:
        """Lets a name mean no reading any more, and returns what it meant. Its memory is freed once the calls that began before have ended.

        Loads of the same name that came before are waited for, and what they load is unloaded.

        Raises:
            InvalidRequest: there is no reading of this name, or it is ``frozen``.
            FailedPrecondition: the server loads no readings, or the reading was lost.
        """
        self._root()
        check_not_frozen(name)
        async with self._turn(name):
            if name not in self._named:
                raise self._missing("name", name)
            removed = self._describe(name)
            self._drop(name)
        logger.info("reading unloaded", reading=name, id=removed.id)
        return removed

    def worker_changed(self, worker: WorkerHandle) -> None:
        """Records that a worker process has changed its state. What it could not read again is lost, and what it holds in vain is freed."""
        if worker.up:
            missing = [version for version in self._versions.values() if version.source.slot not in worker.readings]
            for version in missing:
                self._lose(version)
        self._settle()

    async def _load_in_turn(self, name: str, source: ReadingSource, step: int | None, in_place: bool, deadline: float) -> LoadedReading:
        async with self._turn(name), self._changing:
            started = time.monotonic()
            self._loading = source
            try:
                with self._closing(name, in_place):
                    loaded = await self._load(name, source, step, in_place, deadline)
            except Exception as failure:
                error = failure if isinstance(failure, CoreError) else InternalFault.new()
                logger.error(
                    "reading not loaded", reading=name, directory=str(source.directory), problem=str(error), exc_info=error is not failure
                )
                self._on_load(error)
                raise error from None
            finally:
                self._loading = None
                self._settle()
            seconds = time.monotonic() - started
        reading, replaced = loaded.reading, loaded.replaced
        logger.info(
            "reading loaded",
            reading=name,
            id=reading.id,
            step=step,
            kind=reading.kind.value,
            replaced=None if replaced is None else replaced.id,
            device_bytes=loaded.device_bytes,
            seconds=round(seconds, 3),
        )
        self._on_load(seconds)
        return loaded

    async def _load(self, name: str, source: ReadingSource, step: int | None, in_place: bool, deadline: float) -> LoadedReading:
        self._check_room(name)
        for worker in self._workers:
            self._check_awake()
            await worker.until_back()
        replaced = self._describe(name) if name in self._named else None
        await self._until_few_are_unnamed(deadline)
        if in_place and replaced is not None:
            await self._until_unused(name, deadline)
            if name in self._named:  # It may have been unloaded, or lost, meanwhile.
                self._drop(name)
        outcomes = await asyncio.gather(*(worker.load_reading(source) for worker in self._workers), return_exceptions=True)
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if failures:
            # What lies in the files says more than a worker that was lost meanwhile.
            raise next((failure for failure in failures if isinstance(failure, InvalidRequest)), failures[0])
        loaded = [outcome for outcome in outcomes if isinstance(outcome, LoadedReading)]
        first = loaded[0].reading
        if any(each.reading.id != first.id for each in loaded):
            raise ReadingIncomplete("the files changed while the workers read them: they are being written")
        for worker in self._workers:
            if not worker.up or source.slot not in worker.readings:
                raise worker.unavailable()
        # From here to the end nothing is awaited: every worker holds the version, and the name changes at once.
        if replaced is not None and not in_place:
            replaced = self._describe(name) if name in self._named else None  # It may have been unloaded, or lost, meanwhile.
        version = HeldVersion(replace(source, id=first.id), replace(first, name=name, step=step), uses=1)
        self._versions[source.slot] = version
        before = self._named.get(name)
        self._named[name] = _NamedVersion(version, step)
        self._lost.pop(name, None)
        self._changed()
        self.release([before.version] if before is not None else [])
        return replace(loaded[0], reading=self._describe(name), replaced=replaced)

    def _check_room(self, name: str) -> None:
        if name not in self._named and len(self._named) >= self._settings.max_readings:
            most = self._settings.max_readings
            raise LimitExceeded("name", len(self._named) + 1, "readings", "max_readings", most, "unload one of them first")

    @contextmanager
    def _closing(self, name: str, in_place: bool) -> Iterator[None]:
        """Context manager during which calls that name a reading wait, if the reading is replaced in place."""
        if not in_place:
            yield
            return
        over = self._closed[name] = asyncio.Event()
        try:
            yield
        finally:
            del self._closed[name]
            over.set()

    def _turn(self, name: str) -> asyncio.Lock:
        """Returns the lock that is held while what a name means is changed; who comes first has it first."""
        return self._turns.setdefault(name, asyncio.Lock())

    async def _until_unused(self, name: str, deadline: float) -> None:
        """Waits until no admitted call means the version that a name means."""

        def calls() -> int:
            return self._named[name].version.uses - 1 if name in self._named else 0

        shown = self._named[name].version.described.name if name in self._named else name
        problem = f"calls that began before still read {shown!r}, which cannot be replaced in place under them: end them, or load it beside"
        await self._until(lambda: not calls(), deadline, problem)

    async def _until_few_are_unnamed(self, deadline: float) -> None:
        """Waits until fewer versions than may be loaded under names are there for admitted calls alone."""
        most = self._settings.max_readings
        problem = (
            f"{most} versions that were replaced or unloaded (max_readings) are still read by calls that began before: end these calls, "
            "such as streams that nobody reads"
        )
        await self._until(lambda: len(self._versions) - len(self._named) < most, deadline, problem)

    async def _until(self, is_so: Callable[[], bool], deadline: float, problem: str) -> None:
        """Waits for calls to end until something is so.

        Raises:
            FailedPrecondition: with ``problem``: it is not so in time.
        """
        allowed = self._settings.drain_seconds
        try:
            async with asyncio.timeout(min(allowed, deadline - time.monotonic())):
                while not is_so():
                    await self._freed.wait()
        except TimeoutError:
            raise FailedPrecondition(f"{problem}; waited for {allowed:g} s at most (drain_seconds)", "READING_IN_USE") from None

    def _drop(self, name: str) -> None:
        meaning = self._named.pop(name)
        self._changed()
        self.release([meaning.version])

    def _lose(self, version: HeldVersion) -> None:
        """Drops a version that a worker process could not read again, and ends the calls that mean it."""
        names = [name for name, meaning in self._named.items() if meaning.version is version]
        name = version.described.name
        version.lost = lost_problem(name)
        logger.error("reading lost", readings=names, id=version.source.id, directory=str(version.source.directory))
        for name in names:
            self._lost[name] = version.lost
            self._on_lost()
            self._drop(name)
        while len(self._lost) > MAX_LOST_NAMES:
            del self._lost[next(iter(self._lost))]
        self._versions.pop(version.source.slot, None)
        for fail in [*version.on_lost.values()]:
            fail(reading_loss(version.lost))

    # -------------------------------------------------------------------------------------------------------------------------- workers

    def _settle(self) -> None:
        """Makes worker processes free what nobody means any more, and says what those that are started later must read."""
        sources = tuple(version.source for version in self._versions.values())
        kept = {source.slot for source in sources}
        if self._loading is not None:
            kept.add(self._loading.slot)
        for worker in self._workers:
            if worker.spec.readings != sources:
                worker.spec = replace(worker.spec, readings=sources)
            if worker.ready:
                for slot in worker.readings.keys() - kept:
                    worker.drop_reading(slot)

    def _describe(self, name: str) -> Reading:
        """Returns the description of what a name means, of which the workers know best what is true of the probes that they serve now."""
        version, step = self._named[name].version, self._named[name].step
        slot = version.source.slot
        described = next((worker.readings[slot] for worker in self._workers if slot in worker.readings), version.described)
        return replace(described, name=name, step=step)

    def _changed(self) -> None:
        self._on_change(len(self._named))

    def _root(self) -> Path:
        if self._settings.readings_root is None:
            raise FailedPrecondition("this server loads no readings: start it with --readings-root", "READINGS_OFF")
        return self._settings.readings_root

    def _check_awake(self) -> None:
        if any(worker.asleep for worker in self._workers):
            raise FailedPrecondition("the server sleeps, and loads no reading: wake it first", "ASLEEP")
        if any(worker.info is None for worker in self._workers):
            raise WorkerUnavailable("the server is starting", retry_seconds=1.0)

    def _missing(self, at: str, name: str) -> CoreError:
        """Returns the error for a name that means nothing: it was lost, or there is no such reading."""
        return reading_loss(self._lost[name]) if name in self._lost else unknown_reading(at, name, self._named)

    def _start(self, coroutine: Coroutine[Any, Any, LoadedReading]) -> asyncio.Task[LoadedReading]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def lost_problem(name: str) -> str:
    """Returns the text that says that the reading of a name was lost."""
    return f"the reading {name!r} was lost: a worker was started again, and could not read it as it was; load it again"


def reading_loss(problem: str) -> FailedPrecondition:
    """Returns the error for a reading that was lost."""
    return FailedPrecondition(problem, "READING_LOST")


def unknown_reading(at: str, name: str, named: Iterable[str]) -> InvalidRequest:
    """Returns the error for a name that means nothing, where only the names ``named`` do."""
    return InvalidRequest(at, f"unknown reading {name[:100]!r}; loaded: {', '.join([FROZEN, *named])}", "UNKNOWN_READING")


def named_twice(at: str, name: str) -> InvalidRequest:
    """Returns the error for a request that names a reading a second time, at the field ``at``."""
    return InvalidRequest(at, f"{name[:100]!r} appears twice")


def check_not_frozen(name: str) -> None:
    """Raises ``InvalidRequest`` if a name that is to mean nothing any more is that of the frozen model."""
    if name == FROZEN:
        raise InvalidRequest("name", f"{FROZEN!r} is the frozen model itself, which is always there")


def shown_refusal(refusal: ReadingRefused, path: str, directory: Path) -> CoreError:
    """Returns a refusal as the client may see it: under the name of the directory that the client itself gave, not of what a link there
    leads to.
    """
    problem = refusal.problem.replace(repr(directory.name), repr(Path(path).name))
    if refusal.field == "expected_id":
        return FailedPrecondition(f"expected_id: {problem}", "READING_MISMATCH")
    return ReadingRefused(refusal.field, problem, refusal.reason)
