"""Keeps the readings that are loaded beside the frozen model: which version each name means, and which versions are still in use."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from probescore.types import FROZEN, Reading
from probescore_server.backbone.kv_cache import CacheBudget, KeyValueCache
from probescore_server.errors import InvalidRequest
from probescore_server.readings.version import ReadingVersion
from probescore_server.rollouts import PinnedReading


@dataclass(eq=False)
class _Held:
    """A version with its own key-value cache, and the number of names and of admitted calls that mean it."""

    version: ReadingVersion
    cache: KeyValueCache
    uses: int = 0


@dataclass(frozen=True)
class PinnedReadings:
    """Value object with the readings that one call named, as the names were resolved when it was admitted.

    Attributes:
        wanted: names and versions, for the call's options.
        described: their descriptions, in the same order.
    """

    wanted: tuple[PinnedReading, ...] = ()
    described: tuple[Reading, ...] = ()


class ReadingSet:
    """Set of the readings beside the frozen model. Several threads may use it.

    A name is resolved once, when a call is admitted, and the version that it meant then stays until the call has ended. A version that no
    name and no call means any more is freed.

    Args:
        frozen: description of the frozen reading.
        budget: the bound on all key-value caches.
    """

    def __init__(self, frozen: Reading, budget: CacheBudget) -> None:
        self._frozen = frozen
        self._budget = budget
        self._changed = threading.Condition()
        self._named: dict[str, Reading] = {}
        self._held: dict[str, _Held] = {}
        self._closed: set[str] = set()

    @property
    def described(self) -> tuple[Reading, ...]:
        """Returns the descriptions of all readings, the frozen one first."""
        with self._changed:
            return (self._frozen, *self._named.values())

    def named(self, name: str) -> Reading | None:
        """Returns what a name means now; ``None`` = nothing."""
        with self._changed:
            return self._frozen if name == FROZEN else self._named.get(name)

    def version(self, reading_id: str) -> ReadingVersion:
        """Returns the version of an id, to which the call that asks must be pinned.

        Raises:
            RuntimeError: no name and no call means the version, so that it may be gone already.
        """
        with self._changed:
            if reading_id not in self._held:
                raise RuntimeError(f"the reading {reading_id} is not loaded: a call must be pinned to what it names until it has ended")
            return self._held[reading_id].version

    def cache(self, reading_id: str) -> KeyValueCache:
        """Returns the key-value cache of a version that is in use."""
        with self._changed:
            return self._held[reading_id].cache

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yields the tensors that the readings have of their own."""
        with self._changed:
            found = [tensor for held in self._held.values() for tensor in held.version.tensors]
        yield from found

    @contextmanager
    def kept(self, reading_id: str) -> Iterator[ReadingVersion | None]:
        """Context manager during which a version that is loaded already is not freed; ``None`` = it is not loaded."""
        with self._changed:
            held = self._held.get(reading_id)
            if held is not None:
                held.uses += 1
        try:
            yield None if held is None else held.version
        finally:
            if held is not None:
                self._release([reading_id])

    @contextmanager
    def pinned(self, names: Sequence[str]) -> Iterator[PinnedReadings]:
        """Context manager for a call that names readings: while it is open, the versions that the names mean now stay as they are.

        A name that is being replaced in place is waited for.

        Raises:
            InvalidRequest: naming ``readings[i]``: there is no such reading, or it is named twice.
        """
        pinned = self._pin(names)
        try:
            yield pinned
        finally:
            self._release([reading.id for reading in pinned.wanted if reading.id])

    def put(self, reading: Reading, version: ReadingVersion) -> Reading | None:
        """Lets a name mean a version from now on, and returns what it meant before.

        Args:
            reading: description with the name.
            version: the version of ``reading.id``; one of the same id that is there already is kept in its stead.
        """
        with self._changed:
            held = self._held.get(reading.id)
            if held is None:
                held = self._held[reading.id] = _Held(version, KeyValueCache(self._budget))
            held.uses += 1
            replaced = self._named.get(reading.name)
            self._named[reading.name] = reading
        self._release([replaced.id] if replaced is not None else [])
        return replaced

    def remove(self, name: str) -> Reading:
        """Lets a name mean nothing from now on, and returns what it meant.

        Raises:
            InvalidRequest: it means nothing already, or is ``frozen``.
        """
        with self._changed:
            if name == FROZEN:
                raise InvalidRequest("name", f"{FROZEN!r} is the frozen model itself, which is always there")
            if name not in self._named:
                raise self._unknown("name", name)
            removed = self._named.pop(name)
        self._release([removed.id])
        return removed

    @contextmanager
    def closed(self, name: str) -> Iterator[None]:
        """Context manager during which no call that names a reading is admitted; it begins once all admitted ones have ended."""
        with self._changed:
            self._closed.add(name)
            reading = self._named.get(name)
            names = sum(each.id == reading.id for each in self._named.values()) if reading is not None else 0
            self._changed.wait_for(lambda: reading is None or reading.id not in self._held or self._held[reading.id].uses <= names)
        try:
            yield
        finally:
            with self._changed:
                self._closed.discard(name)
                self._changed.notify_all()

    def _pin(self, names: Sequence[str]) -> PinnedReadings:
        if isinstance(names, str):
            raise InvalidRequest("readings", f"{names[:100]!r} is not a list of names")
        wanted: list[PinnedReading] = []
        described: list[Reading] = []
        with self._changed:
            self._changed.wait_for(lambda: not self._closed.intersection(names))
            for index, name in enumerate(names):
                reading = self._frozen if name == FROZEN else self._named.get(name)
                if reading is None:
                    raise self._unknown(f"readings[{index}]", name)
                if reading in described:
                    raise InvalidRequest(f"readings[{index}]", f"{name} appears twice")
                wanted.append(PinnedReading(name, "" if name == FROZEN else reading.id))
                described.append(reading)
            for each in wanted:
                if each.id:
                    self._held[each.id].uses += 1
        return PinnedReadings(tuple(wanted), tuple(described))

    def _unknown(self, field: str, name: str) -> InvalidRequest:
        known = ", ".join([FROZEN, *self._named])
        return InvalidRequest(field, f"unknown reading {name[:100]!r}; loaded: {known}", "UNKNOWN_READING")

    def _release(self, ids: Sequence[str]) -> None:
        freed = []
        with self._changed:
            for each in ids:
                self._held[each].uses -= 1
                if self._held[each].uses == 0:
                    freed.append(self._held.pop(each))
            self._changed.notify_all()
        for held in freed:
            self._budget.remove(held.cache)
            held.version.free()
        if freed:
            torch.cuda.empty_cache()  # nothing happens where there is no device
