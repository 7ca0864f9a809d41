"""What is under way in a server, calls and the bytes of their requests: bounded, whoever sends them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from probescore_server.errors import ServerBusy

RETRY_SECONDS = 1.0


class CallsUnderWay:
    """The calls of one server that compute something. Everything here runs on one event loop.

    Args:
        max_calls: further ones are refused.
        max_bytes: of their requests, likewise; a larger request is taken while there is no other.
    """

    def __init__(self, max_calls: int, max_bytes: int) -> None:
        self._max_calls = max_calls
        self._max_bytes = max_bytes
        self._calls = 0
        self._bytes = 0

    @contextmanager
    def call(self, size: int) -> Iterator[None]:
        """Holds room for a call with a request of so many bytes.

        Raises:
            ServerBusy: there is none.
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
