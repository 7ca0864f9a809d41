"""Bounds the calls that are under way in a server, and the bytes of their requests, over all clients together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from probescore_server.errors import ServerBusy

RETRY_SECONDS = 1.0


class CallsUnderWay:
    """Counts the calls that are under way in one server, and refuses further ones above two limits. All of it runs on one event loop.

    Args:
        max_calls: the most calls that may be under way.
        max_bytes: the most bytes of the requests under way; a single larger request is taken while there is no other.
    """

    def __init__(self, max_calls: int, max_bytes: int) -> None:
        self._max_calls = max_calls
        self._max_bytes = max_bytes
        self._calls = 0
        self._bytes = 0

    @contextmanager
    def call(self, size: int) -> Iterator[None]:
        """Is a context manager that counts one call, whose request has ``size`` bytes, as under way while the ``with`` block runs.

        Raises:
            ServerBusy: with this call, one of the limits would be exceeded.
        """
        if self._calls >= self._max_calls:
            raise ServerBusy(self._calls + 1, "calls", "max_calls", self._max_calls, RETRY_SECONDS)
        if self._calls and self._bytes + size > self._max_bytes:
            raise ServerBusy(self._bytes + size, "bytes of requests", "max_in_flight_bytes", self._max_bytes, RETRY_SECONDS)
        self._calls += 1
        self._bytes += size
        try:
            yield
        finally:
            self._calls -= 1
            self._bytes -= size
