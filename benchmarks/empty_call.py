"""The least that a call can cost: gRPC for Python between two processes, bytes in, bytes out, and a pause where a server would compute."""

from __future__ import annotations

import asyncio
import struct
import subprocess
import sys
import time
from types import TracebackType
from typing import Any, Self, cast

import grpc

METHOD = "Wait"
SERVICE = "benchmarks.EmptyCall"
_SECONDS = struct.Struct("!d")
# about as long as a request and an answer of one rollout of 64 tokens with one probe's mean
_PADDING = bytes(400)


class EmptyCall:
    """A server that does nothing, and a client of it; a context manager that stops both."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, "-m", "benchmarks.empty_call"], stdout=subprocess.PIPE, text=True)
        port = int(cast("Any", self._process.stdout).readline())
        self._channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        self._call = self._channel.unary_unary(f"/{SERVICE}/{METHOD}")

    def pids(self) -> list[int]:
        """Of the server."""
        return [self._process.pid]

    def seconds(self, pause: float) -> float:
        """What a call takes beside the pause that its server makes, of about so many seconds."""
        started = time.perf_counter()
        answer = self._call(_SECONDS.pack(pause) + _PADDING, timeout=60)
        return time.perf_counter() - started - float(_SECONDS.unpack_from(answer)[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._channel.close()
        self._process.kill()
        self._process.communicate()


async def _wait(request: bytes, context: object) -> bytes:
    started = time.perf_counter()
    await asyncio.sleep(_SECONDS.unpack_from(request)[0])
    return _SECONDS.pack(time.perf_counter() - started) + _PADDING


async def _serve() -> None:
    server = grpc.aio.server()
    handlers = {METHOD: grpc.unary_unary_rpc_method_handler(_wait)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_serve())
