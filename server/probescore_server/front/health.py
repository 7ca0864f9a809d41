"""Implements the gRPC health service.

It reports ``NOT_SERVING`` while no worker can score or sleeps, and for good once the server drains, that is, finishes its calls and stops.
"""

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
    """Implements ``grpc.health.v1.Health`` for the server as a whole, for the scoring service, and for the health service itself.

    Of itself the health service reports ``SERVING`` from its start until the server drains. This is for the liveness probe of an
    orchestrator: a server that still loads its model, or whose worker is being restarted, must not be restarted, since it would begin anew.
    """

    def __init__(self) -> None:
        super().__init__()
        self._draining = asyncio.Event()

    async def set_serving(self, serving: bool) -> None:
        """Sets whether the server and the scoring service are reported as serving. It has no effect once the server drains."""
        await self.set(health.SERVICE_NAME, HealthCheckResponse.SERVING)
        for service in SERVICES:
            await self.set(service, HealthCheckResponse.SERVING if serving else HealthCheckResponse.NOT_SERVING)

    async def drain(self) -> None:
        """Reports ``NOT_SERVING`` for good and ends all ``Watch`` calls, which would otherwise keep the server from stopping."""
        await self.enter_graceful_shutdown()
        self._draining.set()

    async def Watch(self, request: HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]) -> None:  # noqa: N802
        """Answers the RPC ``Watch``: sends the health status of a service, and each change of it, until the server drains."""
        watching = asyncio.create_task(super().Watch(request, context))
        draining = asyncio.create_task(self._draining.wait())
        try:
            await asyncio.wait([watching, draining], return_when=asyncio.FIRST_COMPLETED)
        finally:
            watching.cancel()
            draining.cancel()
            await asyncio.gather(watching, draining, return_exceptions=True)
        await context.write(HealthCheckResponse(status=HealthCheckResponse.NOT_SERVING))
