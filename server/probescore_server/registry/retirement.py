"""Keeps the versions of probes whose files are gone: how long each is still served, and which are in use by calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from probescore_server.spool import SpooledFile


@dataclass(slots=True)
class RetiredProbe:
    """Record of a probe whose file is gone, and which is served to calls that name its version.

    Attributes:
        name: the probe's name, of which only some retired versions are kept.
        source: the content of the file.
        last_named: the time at which the probe was retired or, if later, a call last named the version, in seconds on the clock.
    """

    name: str
    source: SpooledFile
    last_named: float


class Retirement:
    """Collection of the retired probes of a server, oldest first.

    Args:
        pin_seconds: for how long a version is kept that no call names.
        max_versions: the largest number of retired versions of one name.
        clock: function that returns the time in seconds on a monotonic clock.
    """

    def __init__(self, pin_seconds: float, max_versions: int, clock: Callable[[], float]) -> None:
        self._pin_seconds = pin_seconds
        self._max_versions = max_versions
        self._clock = clock
        self._retired: dict[str, RetiredProbe] = {}
        self._calls: Counter[str] = Counter()

    @property
    def keys(self) -> tuple[str, ...]:
        """Returns the keys ``name@version`` of the retired probes, oldest first."""
        return tuple(self._retired)

    @property
    def sources(self) -> dict[str, SpooledFile]:
        """Returns a dictionary, keyed by ``name@version``, of the content of the retired probes' files."""
        return {key: probe.source for key, probe in self._retired.items()}

    def retire(self, probes: Iterable[tuple[str, str, SpooledFile]]) -> None:
        """Adds probes whose files are gone: for each its key ``name@version``, its name and its content."""
        for key, name, source in probes:
            self._retired[key] = RetiredProbe(name, source, self._clock())

    def restore(self, keys: Iterable[str]) -> None:
        """Takes probes out whose files are there again."""
        for key in keys:
            self._retired.pop(key, None)

    def begin(self, keys: Collection[str]) -> None:
        """Counts a call that names these probes, among others maybe retired ones."""
        self._calls.update(keys)
        self._touch(keys)

    def end(self, keys: Collection[str]) -> None:
        """Counts the end of a call that ``begin`` has counted."""
        self._calls.subtract(keys)
        for key in keys:
            if not self._calls[key]:
                del self._calls[key]
        self._touch(keys)

    def in_use(self, key: str) -> bool:
        """Returns whether a call that is under way names a probe."""
        return self._calls[key] > 0

    def take_expired(self) -> dict[str, SpooledFile]:
        """Removes the probes that are not served any longer, and returns the content of their files, keyed by ``name@version``.

        These are the ones that no call has named for ``pin_seconds``, and the oldest ones of a name with more than ``max_versions``.
        """
        now, kept, expired = self._clock(), Counter[str](), {}
        for key, probe in reversed(list(self._retired.items())):
            unnamed = now - probe.last_named >= self._pin_seconds and not self.in_use(key)
            if unnamed or kept[probe.name] >= self._max_versions:
                expired[key] = self._retired.pop(key).source
            else:
                kept[probe.name] += 1
        return expired

    def seconds_left(self) -> float | None:
        """Returns the seconds until the next probe may expire; ``None`` if there is no retired probe."""
        ends = [probe.last_named + self._pin_seconds for key, probe in self._retired.items() if not self.in_use(key)]
        ends += [self._clock() + self._pin_seconds for key in self._retired if self.in_use(key)]
        return max(0.0, min(ends) - self._clock()) if ends else None

    def _touch(self, keys: Iterable[str]) -> None:
        for key in keys:
            if key in self._retired:
                self._retired[key].last_named = self._clock()
