"""What the front process and a worker send each other: pickles over a socket pair, each after its length.

A worker's threads block on their end. The front's end is on the event loop, without a thread in between: a small message costs no switch of
threads, and one that takes long to pack is packed in a thread.
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

from probescore_server.offloading import MAX_BYTES_UNPICKLED_ON_LOOP

_LENGTH = struct.Struct("!Q")


class BlockingEnd:
    """A worker's end: any number of threads send, one receives."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._reader = connection.makefile("rb")
        self._sending = threading.Lock()

    def send(self, message: object) -> None:
        """Sends a message whole; raises ``OSError`` if the other end is closed."""
        packed = _pack(message)
        with self._sending:
            self._connection.sendall(packed)

    def receive(self) -> Any:  # noqa: ANN401
        """The next message; raises ``EOFError`` if the other end is closed."""
        header = self._reader.read(_LENGTH.size)
        if len(header) < _LENGTH.size:
            raise EOFError
        return pickle.loads(self._reader.read(_LENGTH.unpack(header)[0]))  # noqa: S301 - only our own process is at the other end


class LoopEnd(asyncio.Protocol):
    """The front's end.

    Args:
        on_message: called with each message.
        on_end: called once, when the other end is closed and all that came before has been handed over.

    Attributes:
        heard: when anything came last, be it part of a message; on the monotonic clock.
    """

    def __init__(self, on_message: Callable[[Any], None], on_end: Callable[[], None]) -> None:
        self._on_message = on_message
        self._on_end = on_end
        self.heard = -math.inf
        self._transport: asyncio.WriteTransport | None = None
        self._received = bytearray()
        self._to_pack: deque[object] = deque()
        self._tasks: set[asyncio.Task[None]] = set()

    # ------------------------------------------------------------------------------------------------------------------- sending

    def send(self, message: object, *, takes_long: bool) -> None:
        """Sends in order, and never waits. What a process that is gone would not get is dropped.

        Args:
            message: anything that can be pickled.
            takes_long: to pack.
        """
        if takes_long or self._to_pack:
            self._to_pack.append(message)
            if len(self._to_pack) == 1:
                self._start(self._pack_in_threads())
        else:
            self._write(_pack(message))

    async def _pack_in_threads(self) -> None:
        while self._to_pack:
            self._write(await asyncio.to_thread(_pack, self._to_pack[0]))
            self._to_pack.popleft()

    def _write(self, packed: bytes) -> None:
        if self._transport is not None:
            self._transport.write(packed)

    def close(self) -> None:
        """Ends it, at this end."""
        if self._transport is not None:
            self._transport.close()

    # ----------------------------------------------------------------------------------------------------------------- receiving

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        self._transport = cast("asyncio.WriteTransport", transport)

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        self.heard = time.monotonic()
        self._received += data
        while len(self._received) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._received)[0]
            if len(self._received) < end:
                return
            packed = bytes(memoryview(self._received)[_LENGTH.size : end])
            del self._received[:end]
            if len(packed) > MAX_BYTES_UNPICKLED_ON_LOOP:
                self._start(self._unpack_in_thread(packed))
            else:
                self._on_message(pickle.loads(packed))  # noqa: S301 - only our own process is at the other end

    async def _unpack_in_thread(self, packed: bytes) -> None:
        self._on_message(await asyncio.to_thread(pickle.loads, packed))

    def connection_lost(self, error: Exception | None) -> None:
        """Called by the loop."""
        self._transport = None
        self._start(self._end())

    async def _end(self) -> None:
        await asyncio.gather(*(task for task in self._tasks if task is not asyncio.current_task()), return_exceptions=True)
        self._on_end()

    def _start(self, coroutine: Any) -> None:  # noqa: ANN401
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _pack(message: object) -> bytes:
    packed = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(packed)) + packed
