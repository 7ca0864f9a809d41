"""Implements the gRPC health service.

The service reports ``NOT_SERVING`` while no worker process can score, while the workers sleep, and from the moment the server drains
(finishes its RPCs and stops).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
from grpc_health.v1 import health
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from probescore.v1 import scoring_pb2

SCORING_SERVICE: str = scoring_pb2.DESCRIPTOR.services_by_name["ScoringService"].full_name
SERVICES = ("", SCORING_SERVICE)


class HealthService(health.aio.HealthServicer):
    """Servicer of ``grpc.health.v1.Health``, which reports the status of the server as a whole, of the scoring service, and of the health
    service itself.

    The status of the health service itself is ``SERVING`` from its start until the server drains (finishes its RPCs and stops). That status
    is meant for the liveness probe of an orchestrator: a server that still loads its model, or whose worker process is being restarted,
    must not be restarted, since it would begin anew.

    Args:
        further: full names of further services that serve whenever the scoring service does.
    """

    def __init__(self, further: Sequence[str] = ()) -> None:
        super().__init__()
        self._services = (*SERVICES, *further)
        self._draining = asyncio.Event()

    async def set_serving(self, serving: bool) -> None:
        """Sets whether the server and the scoring service are reported as serving. The function call has no effect once the server drains,
        that is, finishes its RPCs and stops.
        """
        await self.set(health.SERVICE_NAME, HealthCheckResponse.SERVING)
        for service in self._services:
            await self.set(service, HealthCheckResponse.SERVING if serving else HealthCheckResponse.NOT_SERVING)

    async def drain(self) -> None:
        """Reports ``NOT_SERVING`` from now on and ends all ``Watch`` RPCs, which would otherwise keep the server from stopping."""
        await self.enter_graceful_shutdown()
        self._draining.set()

    async def Watch(self, request: HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]) -> None:  # noqa: N802
        """Handles the RPC ``Watch``: sends the health status of a service, and each change of the status, until the server drains."""
        watching = asyncio.create_task(super().Watch(request, context))
        draining = asyncio.create_task(self._draining.wait())
        try:
            await asyncio.wait([watching, draining], return_when=asyncio.FIRST_COMPLETED)
        finally:
            watching.cancel()
            draining.cancel()
            await asyncio.gather(watching, draining, return_exceptions=True)
        await context.write(HealthCheckResponse(status=HealthCheckResponse.NOT_SERVING))
