"""Remembers rollouts that a worker process was computing when it died. Each such rollout is tried once more alone, and refused if a worker
dies again.

Rollouts are identified by their content, not by their request, so the suspicion remains if a client sends the same rollout again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

from probescore_server.errors import WorkerLost

MAX_SUSPECTS = 4096
REMEMBERED_SECONDS = 600.0
"""Seconds after which the suspicion against a rollout is forgotten. The cause may be fixed by then; if it is not, forgetting costs one
restart of a worker process.
"""


@dataclass(frozen=True)
class _Suspicion:
    """Value object with the last death of a worker process that was computing a rollout.

    Attributes:
        since: the time of that death in seconds on the scheduler's clock.
        again: the error of the second death, if a second worker process died while computing nothing but the rollout; else ``None``.
    """

    since: float
    again: WorkerLost | None


class Suspects:
    """Record of the rollouts that a worker process was computing when it died, keyed by content.

    Only hashes of the rollouts' keys are stored, since a key contains every token.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[int, _Suspicion] = OrderedDict()  # The oldest comes first.

    def __contains__(self, key: Hashable) -> bool:
        return hash(key) in self._known

    def lost(self, key: Hashable, error: WorkerLost, now: float, *, alone: bool) -> bool:
        """Records that a worker process died while computing a rollout, and returns whether this proves the rollout to be the cause.

        The rollout is the cause if a worker died with the rollout before, and now died while computing nothing else.

        Args:
            key: a value that is equal for rollouts of the same content.
            error: the error that says how the worker died.
            now: the time in seconds on the scheduler's clock.
            alone: whether the worker was computing nothing but the rollout.
        """
        again = alone and key in self
        self._known[hash(key)] = _Suspicion(now, error if again else None)
        self._known.move_to_end(hash(key))
        if len(self._known) > MAX_SUSPECTS:
            self._known.popitem(last=False)
        return again

    def lost_twice(self, key: Hashable, now: float) -> WorkerLost | None:
        """Returns the error to answer for a rollout during which two worker processes have died, and which must therefore not be tried
        again; ``None`` if fewer have died.

        Args:
            key: a value that is equal for rollouts of the same content.
            now: the time in seconds on the scheduler's clock.
        """
        while self._known and next(iter(self._known.values())).since < now - REMEMBERED_SECONDS:
            self._known.popitem(last=False)
        known = self._known.get(hash(key))
        return None if known is None else known.again

    def cleared(self, key: Hashable) -> None:
        """Removes the suspicion that a rollout made a worker process die, since the rollout has been scored."""
        self._known.pop(hash(key), None)
