"""Implements the gRPC service ``ProbeAdminService``, which puts worker processes to sleep, freeing their device memory, and wakes them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias

import grpc

from probescore.types import Transfer
from probescore.v1 import admin_pb2, admin_pb2_grpc
from probescore.wire import transfers_to_proto
from probescore_server.front.metrics import Metrics
from probescore_server.workers.handle import WorkerHandle

ADMIN_SERVICE: str = admin_pb2.DESCRIPTOR.services_by_name["ProbeAdminService"].full_name

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class AdminServicer(admin_pb2_grpc.ProbeAdminServiceServicer):
    """Implements ``probescore.v1.ProbeAdminService``. It raises errors as ``CoreError``, which ``ErrorInterceptor`` turns into statuses."""

    def __init__(self, workers: Sequence[WorkerHandle], metrics: Metrics) -> None:
        self._workers = workers
        self._metrics = metrics

    async def Sleep(self, request: admin_pb2.SleepRequest, context: Context) -> admin_pb2.SleepResponse:  # noqa: N802
        """Puts every worker to sleep, so that it gives its device's memory back, and answers once all are asleep."""
        return admin_pb2.SleepResponse(transfers=transfers_to_proto(await self._each("sleep", WorkerHandle.sleep)))

    async def Wake(self, request: admin_pb2.WakeRequest, context: Context) -> admin_pb2.WakeResponse:  # noqa: N802
        """Wakes every worker, so that it takes its device's memory again, and answers once all are awake."""
        return admin_pb2.WakeResponse(transfers=transfers_to_proto(await self._each("wake", WorkerHandle.wake)))

    async def _each(self, kind: str, move: Callable[[WorkerHandle], Awaitable[Transfer]]) -> list[Transfer]:
        """Puts every worker to sleep or wakes it, also if another one fails, and then raises the first failure."""
        outcomes = await asyncio.gather(*(move(worker) for worker in self._workers), return_exceptions=True)
        transfers = [outcome for outcome in outcomes if isinstance(outcome, Transfer)]
        for transfer in transfers:
            self._metrics.transfers.labels(kind).observe(transfer.seconds)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return transfers
