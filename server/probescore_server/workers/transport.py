"""Transports messages between the server's front process, which owns the port, and a worker process, as pickles over a socket pair.

A message is a header, a pickle, and the buffers that the pickle refers to, if any: the large arrays of a response, which are neither copied
into the pickle nor out of it. The header has the number of buffers and the length of each part.

The worker's threads block on their end of the socket pair. The front process's end is on the event loop: a small message needs no switch of
threads, and a message that takes long to encode is encoded in a thread.
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
from collections.abc import Callable, Sequence
from typing import Any, cast

from probescore_server.event_loop import MAX_BYTES_UNPICKLED_ON_LOOP

_COUNT = struct.Struct("!I")
_LENGTH = struct.Struct("!Q")


class BlockingEnd:
    """Worker process's end of the socket pair that connects it with the server's front process. Any number of threads may send messages,
    and one thread receives them.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._reader = connection.makefile("rb")
        self._sending = threading.Lock()

    def send(self, message: object) -> None:
        """Sends a whole message; raises ``OSError`` if the other end of the socket pair is closed."""
        parts = _encode(message)
        with self._sending:
            for part in parts:
                self._connection.sendall(part)

    def receive(self) -> Any:  # noqa: ANN401
        """Waits for the next message and returns the message; raises ``EOFError`` if the other end of the socket pair is closed."""
        count = _COUNT.unpack(self._read(_COUNT.size))[0]
        lengths = [_LENGTH.unpack(self._read(_LENGTH.size))[0] for _ in range(1 + count)]
        encoded, *buffers = [self._read(length) for length in lengths]
        return pickle.loads(encoded, buffers=buffers)  # noqa: S301 - only our own process is at the other end

    def _read(self, length: int) -> bytes:
        content = self._reader.read(length)
        if len(content) < length:
            raise EOFError
        return content


class EventLoopEnd(asyncio.Protocol):
    """End of the socket pair between the server's front process and a worker process that the front process has, on its event loop.

    Args:
        on_message: function that is called with each message that arrives.
        on_end: function that is called once, when the other end is closed and ``on_message`` was called with all earlier messages.

    Attributes:
        heard: the time at which bytes last arrived, in seconds on the monotonic clock; ``-inf`` before the first bytes.
    """

    def __init__(self, on_message: Callable[[Any], None], on_end: Callable[[], None]) -> None:
        self._on_message = on_message
        self._on_end = on_end
        self.heard = -math.inf
        self._transport: asyncio.WriteTransport | None = None
        self._incoming = _IncomingMessage()
        self._to_encode: deque[object] = deque()
        self._tasks: set[asyncio.Task[None]] = set()

    # ------------------------------------------------------------------------------------------------------------------- sending

    def send(self, message: object, *, takes_long: bool) -> None:
        """Sends a message to the worker process without waiting. Messages keep their order, and are dropped if the process has ended.

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

    def _write(self, parts: Sequence[bytes | memoryview]) -> None:
        if self._transport is not None:
            self._transport.writelines(parts)

    def close(self) -> None:
        """Closes the front process's end of the socket pair that connects it with a worker process."""
        if self._transport is not None:
            self._transport.close()

    # ----------------------------------------------------------------------------------------------------------------- receiving

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Stores asyncio's transport of the socket; the event loop calls this method once the socket is connected."""
        self._transport = cast("asyncio.WriteTransport", transport)

    def data_received(self, data: bytes) -> None:
        """Calls ``on_message`` with each message that has arrived completely; the event loop calls this method whenever bytes arrive."""
        self.heard = time.monotonic()
        left = memoryview(data)
        while left:
            left = self._incoming.take(left)
            if self._incoming.is_whole:
                (encoded, *buffers), self._incoming = self._incoming.parts, _IncomingMessage()
                if len(encoded) > MAX_BYTES_UNPICKLED_ON_LOOP:
                    self._start(self._decode_in_thread(encoded, buffers))
                else:
                    self._on_message(pickle.loads(encoded, buffers=buffers))  # noqa: S301 - only our own process is at the other end

    async def _decode_in_thread(self, encoded: bytearray, buffers: Sequence[bytearray]) -> None:
        self._on_message(await asyncio.to_thread(pickle.loads, encoded, buffers=buffers))

    def connection_lost(self, error: Exception | None) -> None:
        """Calls ``on_end`` once ``on_message`` has received all messages; the event loop calls this method when the socket is closed."""
        self._transport = None
        self._start(self._end())

    async def _end(self) -> None:
        await asyncio.gather(*(task for task in self._tasks if task is not asyncio.current_task()), return_exceptions=True)
        self._on_end()

    def _start(self, coroutine: Any) -> None:  # noqa: ANN401
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _IncomingMessage:
    """Collector of the bytes of one message that arrives over a socket. Each byte is copied once, into the memory that the message's arrays
    then keep.

    Attributes:
        parts: the pickle, then its buffers; empty before the header is known.
        is_whole: whether all bytes are there.
    """

    def __init__(self) -> None:
        self.parts: list[bytearray] = []
        self.is_whole = False
        self._header = bytearray()
        self._filled: deque[memoryview] = deque()  # What is still to be filled of each part.

    def take(self, data: memoryview) -> memoryview:
        """Takes the next bytes that arrived for a message, and returns those of them that belong to the message after it."""
        while data and not self.parts:
            wanted = _COUNT.size
            if len(self._header) >= wanted:
                wanted += (1 + _COUNT.unpack_from(self._header)[0]) * _LENGTH.size
            more = wanted - len(self._header)
            self._header += data[:more]
            data = data[more:]
            if len(self._header) == wanted > _COUNT.size:
                lengths = [_LENGTH.unpack_from(self._header, start)[0] for start in range(_COUNT.size, wanted, _LENGTH.size)]
                self.parts = [bytearray(length) for length in lengths]
                self._filled.extend(memoryview(part) for part in self.parts if part)
        while data and self._filled:
            space = self._filled.popleft()
            count = min(len(space), len(data))
            space[:count] = data[:count]
            data = data[count:]
            if count < len(space):
                self._filled.appendleft(space[count:])
        self.is_whole = bool(self.parts) and not self._filled
        return data


def _encode(message: object) -> list[bytes | memoryview]:
    buffers: list[pickle.PickleBuffer] = []
    encoded = pickle.dumps(message, pickle.HIGHEST_PROTOCOL, buffer_callback=buffers.append)
    raw = [buffer.raw() for buffer in buffers]
    header = _COUNT.pack(len(raw)) + b"".join(_LENGTH.pack(len(part)) for part in (encoded, *raw))
    return [header + encoded, *raw]
