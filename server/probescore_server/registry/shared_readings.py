"""Implements the registry of readings of one replica: a scoring server that shares its address with others, so that a name must mean the
same version in all of them. ``reading_table`` says what names mean; the registry of this module holds what it says.

All code of this module runs on one event loop, except for looking at directories.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import structlog

from probescore.types import FROZEN, LoadedReading, Reading
from probescore_server.errors import CoreError, ReadingRefused, WorkerLost, WorkerUnavailable
from probescore_server.reading_paths import resolve_reading_path
from probescore_server.registry.reading_table import RETRY_SECONDS, LoadOrder, NamesOfReadings, SharedNames, SharedVersion
from probescore_server.registry.readings import HeldVersion, ReadingRegistry, check_not_frozen, named_twice, reading_loss, shown_refusal
from probescore_server.rollouts import EngineInfo, PinnedReading
from probescore_server.validation.options import check_reading_name

logger = structlog.get_logger(__name__)


class SharedReadings(ReadingRegistry):
    """Registry of the readings of one replica. Calls and clients use it as they use that of a single server, and what they load or unload
    is loaded or unloaded in every replica.

    It holds versions as a single server does, under keys instead of names, and follows what the table says that names mean. Before
    ``join`` has returned, the replica must take no calls; ``run`` must run from then on.

    Args:
        table: the table of what names mean in all replicas.
        arguments: those of ``ReadingRegistry``.
    """

    def __init__(self, table: NamesOfReadings, *arguments: Any) -> None:  # noqa: ANN401
        super().__init__(*arguments)
        self._table = table
        self._names = SharedNames()  # What the names mean, as this replica has followed it.
        self._followed = asyncio.Event()  # It is set, and replaced by a new one, whenever the replica has followed a change.
        self._reports: set[asyncio.Task[None]] = set()

    # ------------------------------------------------------------------------------------------------------------------------ by calls

    def described(self, info: EngineInfo) -> tuple[Reading, ...]:
        """Returns descriptions of the readings that a request can name, the frozen one first."""
        return info.frozen_reading, *(self._describe_shared(name, version) for name, version in self._names.named.items())

    async def resolve(
        self, names: Sequence[str], info: EngineInfo, field: str = "readings[{}]"
    ) -> tuple[tuple[PinnedReading, ...], tuple[Reading, ...], list[HeldVersion]]:
        """Resolves names to what they mean in all replicas now, and counts a use of each version until ``release``.

        Raises:
            InvalidRequest: naming the field: there is no such reading, or it is named twice.
            FailedPrecondition: a reading that is named was lost.
            WorkerUnavailable: this replica does not hold the version, or nobody can say what the name means.
        """
        if any(name != FROZEN for name in names):
            await self.follow((await self._table.current(self._names)).revision)
            while self._names.closed and self._names.closed in names:
                await self._followed.wait()
        # From here to the end nothing is awaited that waits: all names are resolved at one moment.
        for index, name in enumerate(names):
            if name in names[:index]:
                raise named_twice(field.format(index), name)
            if name != FROZEN and name not in self._names.named:
                raise self._names.missing(field.format(index), name)
        keys = [name if name == FROZEN else self._held_key(name) for name in names]
        wanted, described, versions = await super().resolve(keys, info, field)
        return (
            tuple(replace(each, name=name) for each, name in zip(wanted, names, strict=True)),
            tuple(replace(each, name=name) for each, name in zip(described, names, strict=True)),
            versions,
        )

    def _held_key(self, name: str) -> str:
        key = self._names.named[name].key
        if key in self._lost:
            raise reading_loss(self._lost[key])
        if key not in self._named:
            raise WorkerUnavailable(f"this replica is about to load the reading {name!r}", RETRY_SECONDS)
        return key

    # --------------------------------------------------------------------------------------------------------------------- by clients

    async def load(
        self, name: str, path: str, *, step: int | None, expected_id: str, in_place: bool, deadline: float = math.inf
    ) -> LoadedReading:
        """Loads an adapter or a checkpoint in every replica or in none, and lets a name mean it; see ``ReadingRegistry.load``."""
        root = self._root()
        check_reading_name(name, step)
        directory = await asyncio.to_thread(resolve_reading_path, path, root)
        self._check_awake()
        relative = directory.relative_to(await asyncio.to_thread(root.resolve))
        order = LoadOrder(name, str(relative), step, expected_id, in_place, deadline - time.monotonic())
        try:
            return await self._table.load(self._names, order)
        except ReadingRefused as refusal:
            raise shown_refusal(refusal, path, directory) from None

    async def unload(self, name: str) -> Reading:
        """Lets a name mean no reading any more in any replica, and returns what it meant; see ``ReadingRegistry.unload``."""
        self._root()
        check_not_frozen(name)
        return await self._table.unload(self._names, name)

    # ------------------------------------------------------------------------------------------------------------------- by the table

    async def drain(self, revision: int, key: str, seconds: float) -> None:
        """Waits until no admitted call means a version, whose name is closed in a revision of the table.

        Raises:
            FailedPrecondition: calls did not end within ``seconds`` or the setting ``drain_seconds``.
        """
        await self.follow(revision)
        if key in self._named:
            await self._until_unused(key, time.monotonic() + seconds)

    async def hold(self, revision: int, key: str, order: LoadOrder) -> LoadedReading:
        """Loads a version under a key, which a revision of the table says is being loaded; see ``ReadingRegistry.load``."""
        await self.follow(revision)
        return await self._load_here(key, order.name, order.path, order.step, order.expected_id)

    async def follow(self, revision: int) -> None:
        """Waits until this replica has followed the table up to a revision.

        Raises:
            WorkerUnavailable: it has not within the setting ``worker_start_seconds``.
        """
        try:
            async with asyncio.timeout(self._settings.worker_start_seconds):
                while self._names.revision < revision:
                    await self._followed.wait()
        except TimeoutError:
            raise WorkerUnavailable("this replica is late in loading readings", RETRY_SECONDS) from None

    # ---------------------------------------------------------------------------------------------------------------------- following

    async def join(self) -> None:
        """Loads every reading that the other replicas have, and returns once this replica has them or they are lost."""
        while True:
            try:
                names = await self._table.current(self._names)
                await self._follow(names)
                return
            except WorkerUnavailable as problem:
                logger.warning("readings are not loaded yet", problem=str(problem))
                await asyncio.sleep(problem.retry_seconds)

    async def run(self) -> None:
        """Follows the table until this coroutine is cancelled."""
        while True:
            try:
                await self._follow(await self._table.changed(self._names))
            except CoreError as problem:
                logger.warning("the table of readings is not followed", problem=str(problem))
                await asyncio.sleep(RETRY_SECONDS)

    async def _follow(self, names: SharedNames) -> None:
        """Frees what no name means any more, and loads what is missing. This is done also if nothing has changed, since a load that was
        given up may have ended meanwhile.
        """
        for key in self._named.keys() - names.keys:
            described = self._named[key].version.described
            logger.info("reading unloaded", reading=described.name, id=described.id)
            self._drop(key)
        for version in names.named.values():
            if version.key not in self._named and version.key not in self._lost:
                await self._load_shared(version)
        self._names = names
        followed, self._followed = self._followed, asyncio.Event()
        followed.set()

    async def _load_shared(self, version: SharedVersion) -> None:
        """Loads a version that other replicas have; if its files are no longer the same, it is lost in all of them."""
        reading = version.reading
        try:
            await self._load_here(version.key, reading.name, version.path, reading.step, reading.id)
        except CoreError as error:
            if isinstance(error, WorkerUnavailable) and not isinstance(error, WorkerLost):
                raise
            logger.error("reading lost", readings=[reading.name], id=reading.id, directory=version.path, problem=str(error))
            self._on_lost()
            await self._table.lose(self._names, version.key)

    async def _load_here(self, key: str, name: str, path: str, step: int | None, expected_id: str) -> LoadedReading:
        loaded = await super().load(key, path, step=step, expected_id=expected_id, in_place=False)
        if key not in self._named:
            raise WorkerUnavailable("a worker was lost after it had loaded the reading", RETRY_SECONDS)
        version = self._named[key].version
        version.described = replace(version.described, name=name)
        return loaded

    def _lose(self, version: HeldVersion) -> None:
        keys = [key for key, meaning in self._named.items() if meaning.version is version]
        super()._lose(version)
        for key in keys:
            report = asyncio.create_task(self._report_loss(key))
            self._reports.add(report)
            report.add_done_callback(self._reports.discard)

    async def _report_loss(self, key: str) -> None:
        while True:
            try:
                await self._table.lose(self._names, key)
                return
            except CoreError:
                await asyncio.sleep(RETRY_SECONDS)

    def _check_room(self, name: str) -> None:
        """Does nothing: the table bounds the names, and while one of them is replaced there is one key more."""

    def _describe_shared(self, name: str, version: SharedVersion) -> Reading:
        return replace(self._describe(version.key), name=name) if version.key in self._named else version.reading
