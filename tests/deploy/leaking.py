"""An interceptor that keeps something of every call: what a soak must catch."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import grpc


class Leaking(grpc.aio.ServerInterceptor):
    """Keeps 20 kB a call."""

    def __init__(self) -> None:
        self._kept: list[bytes] = []

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        self._kept.append(bytes([len(self._kept) % 255 + 1]) * 20_000)
        return await continuation(handler_call_details)


interceptor = Leaking()
