"""Decides when the next request to a judge's endpoint may be sent."""

from __future__ import annotations

import threading
import time


class RequestPace:
    """Pace at which several threads send requests: evenly spaced at a given rate, and not before a time that the endpoint has asked for.

    It can be pickled; the copy begins anew.

    Args:
        per_minute: most requests that are sent in a minute; ``None`` = no limit.

    Attributes:
        taken: number of requests that were sent.
    """

    def __init__(self, per_minute: float | None) -> None:
        self._per_minute = per_minute
        self._lock = threading.Lock()
        self._next = 0.0
        self._not_before = 0.0
        self.taken = 0

    def turn(self) -> float:
        """Returns the time, by ``time.monotonic``, at which the caller may send a request. The turn is the caller's alone."""
        with self._lock:
            at = max(time.monotonic(), self._next, self._not_before)
            if self._per_minute is not None:
                self._next = at + 60 / self._per_minute
            return at

    def count(self) -> bool:
        """Counts a request as sent, and returns true."""
        with self._lock:
            self.taken += 1
        return True

    @property
    def paused_until(self) -> float:
        """Returns the time, by ``time.monotonic``, before which no request is sent."""
        return self._not_before

    def pause(self, seconds: float) -> None:
        """Lets no request be sent for some seconds, also by other threads."""
        with self._lock:
            self._not_before = max(self._not_before, time.monotonic() + seconds)

    def __reduce__(self) -> tuple[type[RequestPace], tuple[float | None]]:
        return type(self), (self._per_minute,)
