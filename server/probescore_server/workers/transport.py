"""Transports messages between the front process and a worker process, as pickles over a socket pair, each preceded by its length.

The worker's threads block on their end. The front process's end is on the event loop, without a thread in between: a small message costs no
switch of threads, and a message that takes long to encode is encoded in a thread.
"""

from __future__ import annotations

import asyncio
import math
import pickle
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, cast

from probescore_server.event_loop import MAX_BYTES_UNPICKLED_ON_LOOP

_LENGTH = struct.Struct("!Q")


class BlockingEnd:
    """Is the worker process's end of the socket pair: any number of threads may send messages, and one thread receives."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._reader = connection.makefile("rb")
        self._sending = threading.Lock()

    def send(self, message: object) -> None:
        """Sends a whole message; raises ``OSError`` if the other end is closed."""
        encoded = _encode(message)
        with self._sending:
            self._connection.sendall(encoded)

    def receive(self) -> Any:  # noqa: ANN401
        """Waits for the next message and returns it; raises ``EOFError`` if the other end is closed."""
        header = self._reader.read(_LENGTH.size)
        if len(header) < _LENGTH.size:
            raise EOFError
        return pickle.loads(self._reader.read(_LENGTH.unpack(header)[0]))  # noqa: S301 - only our own process is at the other end


class EventLoopEnd(asyncio.Protocol):
    """Is the front process's end of the socket pair to a worker process, on the event loop.

    Args:
        on_message: called with each message that arrives.
        on_end: called once, when the other end is closed and ``on_message`` was called with everything before.

    Attributes:
        heard: when any bytes last arrived, in seconds on the monotonic clock; ``-inf`` before the first.
    """

    def __init__(self, on_message: Callable[[Any], None], on_end: Callable[[], None]) -> None:
        self._on_message = on_message
        self._on_end = on_end
        self.heard = -math.inf
        self._transport: asyncio.WriteTransport | None = None
        self._received = bytearray()
        self._to_encode: deque[object] = deque()
        self._tasks: set[asyncio.Task[None]] = set()

    # ------------------------------------------------------------------------------------------------------------------- sending

    def send(self, message: object, *, takes_long: bool) -> None:
        """Sends a message without waiting; messages keep their order. If the other process has ended, the message is dropped.

        Args:
            message: any object that can be pickled.
            takes_long: whether pickling takes so long that it must be done in a thread.
        """
        if takes_long or self._to_encode:
            self._to_encode.append(message)
            if len(self._to_encode) == 1:
                self._start(self._encode_in_threads())
        else:
            self._write(_encode(message))

    async def _encode_in_threads(self) -> None:
        while self._to_encode:
            self._write(await asyncio.to_thread(_encode, self._to_encode[0]))
            self._to_encode.popleft()

    def _write(self, encoded: bytes) -> None:
        if self._transport is not None:
            self._transport.write(encoded)

    def close(self) -> None:
        """Closes this end of the socket pair."""
        if self._transport is not None:
            self._transport.close()

    # ----------------------------------------------------------------------------------------------------------------- receiving

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keeps the transport; the event loop calls this method once the socket is connected."""
        self._transport = cast("asyncio.WriteTransport", transport)

    def data_received(self, data: bytes) -> None:
        """Calls ``on_message`` with each message that is complete; the event loop calls this method whenever bytes arrive."""
        self.heard = time.monotonic()
        self._received += data
        while len(self._received) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._received)[0]
            if len(self._received) < end:
                return
            encoded = bytes(memoryview(self._received)[_LENGTH.size : end])
            del self._received[:end]
            if len(encoded) > MAX_BYTES_UNPICKLED_ON_LOOP:
                self._start(self._decode_in_thread(encoded))
            else:
                self._on_message(pickle.loads(encoded))  # noqa: S301 - only our own process is at the other end

    async def _decode_in_thread(self, encoded: bytes) -> None:
        self._on_message(await asyncio.to_thread(pickle.loads, encoded))

    def connection_lost(self, error: Exception | None) -> None:
        """Calls ``on_end`` once all messages are handed over; the event loop calls this method when the socket is closed."""
        self._transport = None
        self._start(self._end())

    async def _end(self) -> None:
        await asyncio.gather(*(task for task in self._tasks if task is not asyncio.current_task()), return_exceptions=True)
        self._on_end()

    def _start(self, coroutine: Any) -> None:  # noqa: ANN401
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _encode(message: object) -> bytes:
    encoded = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(encoded)) + encoded
