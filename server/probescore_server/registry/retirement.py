"""Keeps retired probes, whose files are gone: how long each version is still served, and which versions requests under way use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from probescore_server.spool import SpooledFile


@dataclass(slots=True)
class RetiredProbe:
    """Record of a retired probe, whose file is gone; it is served only to requests that name its version.

    Attributes:
        name: the probe's name, of which only some retired versions are kept.
        source: the content that the file had.
        last_named: the time at which the probe was retired or, if later, a request last named the version, in seconds on a monotonic clock.
    """

    name: str
    source: SpooledFile
    last_named: float


class Retirement:
    """Collection of a server's retired probes, whose files are gone and which are still served for some time, oldest first.

    Args:
        pin_seconds: for how long a version is kept that no request names.
        max_versions: the largest number of retired versions of one probe name.
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
        """Returns the keys ``name@version`` of the retired probes (whose files are gone), oldest first."""
        return tuple(self._retired)

    @property
    def sources(self) -> dict[str, SpooledFile]:
        """Returns the content that the files of retired probes had before they were removed, a dictionary keyed by ``name@version``."""
        return {key: probe.source for key, probe in self._retired.items()}

    def retire(self, probes: Iterable[tuple[str, str, SpooledFile]]) -> None:
        """Adds retired probes, whose files are gone, to the collection: for each its key ``name@version``, its name and its file's
        content.
        """
        for key, name, source in probes:
            self._retired[key] = RetiredProbe(name, source, self._clock())

    def restore(self, keys: Iterable[str]) -> None:
        """Removes from the retired probes those whose files are there again."""
        for key in keys:
            self._retired.pop(key, None)

    def begin(self, keys: Collection[str]) -> None:
        """Counts the start of a request that names the given probes, some of which may be retired (their files are gone)."""
        self._calls.update(keys)
        self._touch(keys)

    def end(self, keys: Collection[str]) -> None:
        """Counts the end of a request whose start ``begin`` has counted."""
        self._calls.subtract(keys)
        for key in keys:
            if not self._calls[key]:
                del self._calls[key]
        self._touch(keys)

    def in_use(self, key: str) -> bool:
        """Returns whether a request that is under way names a probe."""
        return self._calls[key] > 0

    def take_expired(self) -> dict[str, SpooledFile]:
        """Removes the retired probes that are not to be served any longer, and returns the content that their files had, keyed by
        ``name@version``.

        These are the probes that no request has named for ``pin_seconds``, and the oldest versions of a name that has more than
        ``max_versions``.
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
        """Returns the seconds until the next retired probe (whose file is gone) may expire; ``None`` if there is no retired probe."""
        ends = [probe.last_named + self._pin_seconds for key, probe in self._retired.items() if not self.in_use(key)]
        ends += [self._clock() + self._pin_seconds for key in self._retired if self.in_use(key)]
        return max(0.0, min(ends) - self._clock()) if ends else None

    def _touch(self, keys: Iterable[str]) -> None:
        for key in keys:
            if key in self._retired:
                self._retired[key].last_named = self._clock()
