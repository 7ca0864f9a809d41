"""Limits the number of RPCs that a server works on at the same time, and the bytes of their requests or responses, over all clients
together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from probescore_server.errors import ServerBusy

RETRY_SECONDS = 1.0


class CallsUnderWay:
    """Counter of the RPCs that a server works on now, which refuses further RPCs above two limits. All methods must run on one event loop.

    Args:
        max_calls: the largest number of RPCs at the same time.
        max_bytes: the largest sum of the bytes of these RPCs' requests or responses; an RPC with more is accepted if there is no other.
        unit, limit: for messages, which bytes are counted, such as ``bytes of requests``, and the name of the setting that limits them.
    """

    def __init__(self, max_calls: int, max_bytes: int, *, unit: str = "bytes of requests", limit: str = "max_in_flight_bytes") -> None:
        self._unit = unit
        self._limit = limit
        self._max_calls = max_calls
        self._max_bytes = max_bytes
        self._calls = 0
        self._bytes = 0

    @contextmanager
    def call(self, size: int) -> Iterator[None]:
        """Context manager that counts one RPC, and ``size`` bytes of its request or response, while the ``with`` block runs.

        Raises:
            ServerBusy: with this RPC, the server would work on too many RPCs or bytes at the same time.
        """
        if self._calls >= self._max_calls:
            raise ServerBusy(self._calls + 1, "calls", "max_calls", self._max_calls, RETRY_SECONDS)
        if self._calls and self._bytes + size > self._max_bytes:
            raise ServerBusy(self._bytes + size, self._unit, self._limit, self._max_bytes, RETRY_SECONDS)
        self._calls += 1
        self._bytes += size
        try:
            yield
        finally:
            self._calls -= 1
            self._bytes -= size
