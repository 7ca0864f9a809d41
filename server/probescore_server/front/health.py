"""The health service: `NOT_SERVING` until some worker can score or sleeps, and for good once the server drains."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from probescore.v1 import scoring_pb2

SCORING_SERVICE: str = scoring_pb2.DESCRIPTOR.services_by_name["ScoringService"].full_name
SERVICES = ("", SCORING_SERVICE)


class HealthService(health.aio.HealthServicer):
    """``grpc.health.v1.Health`` for the server as a whole, for the scoring service, and for itself.

    Of itself it says `SERVING` from its start until the server drains: what a liveness probe asks for, since whoever restarted a server
    that loads, or whose worker is started again, would have it begin anew.
    """

    def __init__(self) -> None:
        super().__init__()
        self._draining = asyncio.Event()

    async def set_serving(self, serving: bool) -> None:
        """Says whether the server takes calls that it will answer. Without effect once it drains."""
        await self.set(health.SERVICE_NAME, HealthCheckResponse.SERVING)
        for service in SERVICES:
            await self.set(service, HealthCheckResponse.SERVING if serving else HealthCheckResponse.NOT_SERVING)

    async def drain(self) -> None:
        """Says `NOT_SERVING` for good and ends the watches, which would otherwise keep the server from stopping."""
        await self.enter_graceful_shutdown()
        self._draining.set()

    async def Watch(self, request: HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]) -> None:  # noqa: N802
        """Sends the status and each change of it, until the server drains."""
        watching = asyncio.create_task(super().Watch(request, context))
        draining = asyncio.create_task(self._draining.wait())
        try:
            await asyncio.wait([watching, draining], return_when=asyncio.FIRST_COMPLETED)
        finally:
            watching.cancel()
            draining.cancel()
            await asyncio.gather(watching, draining, return_exceptions=True)
        await context.write(HealthCheckResponse(status=HealthCheckResponse.NOT_SERVING))
