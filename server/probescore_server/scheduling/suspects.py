"""Remembers the rollouts with which a worker process was lost: each is tried once more alone, and is refused if it happens again.

The rollouts are known by their content, not by the call: a caller that sends the same rollout again finds it still suspected.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

from probescore_server.errors import WorkerLost

MAX_SUSPECTS = 4096
REMEMBERED_SECONDS = 600.0
"""The suspicion against a rollout is forgotten after these seconds: the cause may be fixed by then, and if not, it costs one restart."""


@dataclass(frozen=True)
class _Suspicion:
    """Says when a worker process was last lost while it computed a rollout.

    Attributes:
        since: the time in seconds on the scheduler's clock.
        again: the error, if it was lost with the rollout a second time and with nothing else; else ``None``.
    """

    since: float
    again: WorkerLost | None


class Suspects:
    """Holds the rollouts with which a worker process was lost, by their keys, which are equal for rollouts of the same content.

    Only the keys' hashes are kept, since keys hold every token.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[int, _Suspicion] = OrderedDict()  # The oldest comes first.

    def __contains__(self, key: Hashable) -> bool:
        return hash(key) in self._known

    def lost(self, key: Hashable, error: WorkerLost, now: float, *, alone: bool) -> bool:
        """Notes that a worker process was lost while it computed a rollout, and returns whether the rollout is now proved to be the cause.

        It is if a worker was lost with it before, and now with nothing else.

        Args:
            key: a value that is equal for rollouts of the same content.
            error: how the worker was lost.
            now: the time in seconds on the scheduler's clock.
            alone: whether the worker computed nothing else.
        """
        again = alone and key in self
        self._known[hash(key)] = _Suspicion(now, error if again else None)
        self._known.move_to_end(hash(key))
        if len(self._known) > MAX_SUSPECTS:
            self._known.popitem(last=False)
        return again

    def lost_twice(self, key: Hashable, now: float) -> WorkerLost | None:
        """Returns the error of a worker's second loss with a rollout, which must then not be tried; ``None`` if there was no second loss.

        Args:
            key: a value that is equal for rollouts of the same content.
            now: the time in seconds on the scheduler's clock.
        """
        while self._known and next(iter(self._known.values())).since < now - REMEMBERED_SECONDS:
            self._known.popitem(last=False)
        known = self._known.get(hash(key))
        return None if known is None else known.again

    def cleared(self, key: Hashable) -> None:
        """Forgets that a worker process was lost with a rollout, since the rollout has been scored."""
        self._known.pop(hash(key), None)
