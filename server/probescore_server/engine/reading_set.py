"""Keeps the readings that are loaded beside the frozen model: which version each name means, and which versions are still in use."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from probescore.types import FROZEN, Reading, Tap
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
class _Meaning:
    """What a name means: the id of a version, with the label that was given together with the name."""

    id: str
    step: int | None


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

    What a description says of probes is true of those that read the taps which the caller names.

    Args:
        frozen: description of the frozen reading.
        budget: the bound on all key-value caches.
    """

    def __init__(self, frozen: Reading, budget: CacheBudget) -> None:
        self._frozen = frozen
        self._budget = budget
        self._changed = threading.Condition()
        self._named: dict[str, _Meaning] = {}
        self._held: dict[str, _Held] = {}
        self._closed: set[str] = set()

    def described(self, taps: Collection[Tap]) -> tuple[Reading, ...]:
        """Returns the descriptions of all readings, the frozen one first, where probes read these taps."""
        with self._changed:
            return tuple(self._described(name, taps) for name in (FROZEN, *self._named))

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
    def pinned(self, names: Sequence[str], taps: Collection[Tap], field: str = "readings[{}]") -> Iterator[PinnedReadings]:
        """Context manager for a call that names readings: while it is open, the versions that the names mean now stay as they are.

        A name that is being replaced in place is waited for.

        Args:
            names: names of readings.
            taps: the taps that the probes read which are served to the call.
            field: path of a name in the call's arguments, with ``{}`` for its index.

        Raises:
            InvalidRequest: naming the field: there is no such reading, or it is named twice.
        """
        pinned = self._pin(names, taps, field)
        try:
            yield pinned
        finally:
            self._release([reading.id for reading in pinned.wanted if reading.id])

    def put(self, name: str, step: int | None, version: ReadingVersion, taps: Collection[Tap]) -> Reading | None:
        """Lets a name mean a version from now on, and returns what it meant before.

        Args:
            name: the name.
            step: label of the version under this name.
            version: the version; one of the same id that is there already is kept in its stead.
            taps: the taps that probes read, for the description of what the name meant before.
        """
        with self._changed:
            held = self._held.get(version.id)
            if held is None:
                held = self._held[version.id] = _Held(version, KeyValueCache(self._budget))
            held.uses += 1
            replaced = self._described(name, taps) if name in self._named else None
            self._named[name] = _Meaning(version.id, step)
        self._release([replaced.id] if replaced is not None else [])
        return replaced

    def remove(self, name: str, taps: Collection[Tap]) -> Reading:
        """Lets a name mean nothing from now on, and returns what it meant, where probes read these taps. A name that is being replaced in
        place is waited for.

        Raises:
            InvalidRequest: it means nothing already, or is ``frozen``.
        """
        if name == FROZEN:
            raise InvalidRequest("name", f"{FROZEN!r} is the frozen model itself, which is always there")
        with self._changed:
            self._changed.wait_for(lambda: name not in self._closed)
        removed = self.drop(name, taps)
        if removed is None:
            raise self._unknown("name", name)
        return removed

    def drop(self, name: str, taps: Collection[Tap]) -> Reading | None:
        """Lets a name mean nothing from now on, and returns what it meant, where probes read these taps; ``None`` = nothing."""
        with self._changed:
            removed = self._described(name, taps) if name in self._named else None
            self._named.pop(name, None)
        self._release([removed.id] if removed is not None else [])
        return removed

    @contextmanager
    def closed(self, name: str) -> Iterator[None]:
        """Context manager during which no call that names a reading is admitted; it begins once all admitted ones have ended."""
        with self._changed:
            self._closed.add(name)
            meant = self._named.get(name)
            names = sum(each.id == meant.id for each in self._named.values()) if meant is not None else 0
            self._changed.wait_for(lambda: meant is None or meant.id not in self._held or self._held[meant.id].uses <= names)
        try:
            yield
        finally:
            with self._changed:
                self._closed.discard(name)
                self._changed.notify_all()

    def _pin(self, names: Sequence[str], taps: Collection[Tap], field: str) -> PinnedReadings:
        if isinstance(names, str):
            raise InvalidRequest("readings", f"{names[:100]!r} is not a list of names")
        wanted: list[PinnedReading] = []
        described: list[Reading] = []
        with self._changed:
            self._changed.wait_for(lambda: not self._closed.intersection(names))
            for index, name in enumerate(names):
                if name != FROZEN and name not in self._named:
                    raise self._unknown(field.format(index), name)
                if name in names[:index]:
                    raise InvalidRequest(field.format(index), f"{name} appears twice")
                wanted.append(PinnedReading(name, "" if name == FROZEN else self._named[name].id))
                described.append(self._described(name, taps))
            for each in wanted:
                if each.id:
                    self._held[each.id].uses += 1
        return PinnedReadings(tuple(wanted), tuple(described))

    def _described(self, name: str, taps: Collection[Tap]) -> Reading:
        if name == FROZEN:
            return self._frozen
        meant = self._named[name]
        return self._held[meant.id].version.described(name, meant.step, taps)

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
