"""Rollouts with which a worker was lost: each is tried once more with nothing beside it, and one that does it again is refused.

They are known by what is computed, not by who asks: a caller who left and comes back with the same finds what is known of it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

from probescore_server.errors import WorkerLost

MAX_SUSPECTS = 4096
REMEMBERED_SECONDS = 600.0
"""Whatever it was may be mended by then, and if not, it costs a worker's restart."""


@dataclass(frozen=True)
class _Suspicion:
    since: float
    again: WorkerLost | None


class Suspects:
    """What is known of rollouts with which a worker was lost. Of their keys only the hashes are kept, since keys hold every token."""

    def __init__(self) -> None:
        self._known: OrderedDict[int, _Suspicion] = OrderedDict()  # the oldest first

    def __contains__(self, key: Hashable) -> bool:
        return hash(key) in self._known

    def lost(self, key: Hashable, error: WorkerLost, now: float, *, alone: bool) -> bool:
        """A worker was lost with it; returns whether for the second time, and now with nothing else."""
        again = alone and key in self
        self._known[hash(key)] = _Suspicion(now, error if again else None)
        self._known.move_to_end(hash(key))
        if len(self._known) > MAX_SUSPECTS:
            self._known.popitem(last=False)
        return again

    def lost_twice(self, key: Hashable, now: float) -> WorkerLost | None:
        """How it was lost the second time, if it was; then it is not to be tried."""
        while self._known and next(iter(self._known.values())).since < now - REMEMBERED_SECONDS:
            self._known.popitem(last=False)
        known = self._known.get(hash(key))
        return None if known is None else known.again

    def cleared(self, key: Hashable) -> None:
        """It has been scored."""
        self._known.pop(hash(key), None)
