"""Implements the gRPC service ``ProbeAdminService``, which puts worker processes to sleep, so that their device memory is free, wakes them,
brings the served probes up to date with the probe files on disk, and loads and drops readings beside the frozen model.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias

import grpc

from probescore.types import Transfer
from probescore.v1 import admin_pb2, admin_pb2_grpc
from probescore.wire import loaded_reading_to_proto, reading_to_proto, reloaded_to_proto, transfers_to_proto
from probescore_server.front.common_fields import deadline_of
from probescore_server.front.metrics import Metrics
from probescore_server.registry.readings import ReadingRegistry
from probescore_server.registry.registry import ProbeRegistry
from probescore_server.workers.handle import WorkerHandle

ADMIN_SERVICE: str = admin_pb2.DESCRIPTOR.services_by_name["ProbeAdminService"].full_name

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class AdminServicer(admin_pb2_grpc.ProbeAdminServiceServicer):
    """Servicer of ``probescore.v1.ProbeAdminService``. Its methods raise errors as ``CoreError``, which ``ErrorInterceptor`` turns into
    gRPC statuses.
    """

    def __init__(self, workers: Sequence[WorkerHandle], registry: ProbeRegistry, readings: ReadingRegistry, metrics: Metrics) -> None:
        self._workers = workers
        self._registry = registry
        self._readings = readings
        self._metrics = metrics

    async def Sleep(self, request: admin_pb2.SleepRequest, context: Context) -> admin_pb2.SleepResponse:  # noqa: N802
        """Puts every worker process to sleep, so that the memory of its device is free, and responds once all are asleep."""
        return admin_pb2.SleepResponse(transfers=transfers_to_proto(await self._each("sleep", WorkerHandle.sleep)))

    async def Wake(self, request: admin_pb2.WakeRequest, context: Context) -> admin_pb2.WakeResponse:  # noqa: N802
        """Wakes every worker process, so that it takes its device's memory again, and responds once all are awake."""
        return admin_pb2.WakeResponse(transfers=transfers_to_proto(await self._each("wake", WorkerHandle.wake)))

    async def Reload(self, request: admin_pb2.ReloadRequest, context: Context) -> admin_pb2.ReloadResponse:  # noqa: N802
        """Brings the served probes up to date with the probe files on disk, and responds with the changes and the refused files."""
        return reloaded_to_proto(await self._registry.reload("Reload"))

    async def LoadReading(  # noqa: N802
        self, request: admin_pb2.LoadReadingRequest, context: Context
    ) -> admin_pb2.LoadReadingResponse:
        """Loads an adapter or a checkpoint on every worker process, and responds once its name means it."""
        loaded = await self._readings.load(
            request.name,
            request.path,
            step=request.step if request.HasField("step") else None,
            expected_id=request.expected_id,
            in_place=request.in_place,
            deadline=deadline_of(context, time.monotonic()),
        )
        return loaded_reading_to_proto(loaded)

    async def UnloadReading(  # noqa: N802
        self, request: admin_pb2.UnloadReadingRequest, context: Context
    ) -> admin_pb2.UnloadReadingResponse:
        """Lets a name mean no reading any more, and responds with what it meant."""
        return admin_pb2.UnloadReadingResponse(removed=reading_to_proto(await self._readings.unload(request.name)))

    async def _each(self, kind: str, move: Callable[[WorkerHandle], Awaitable[Transfer]]) -> list[Transfer]:
        """Calls ``move``, which puts a worker process to sleep or wakes it, for every worker process, even if some calls fail. Then it
        raises the first error if there is one.
        """
        outcomes = await asyncio.gather(*(move(worker) for worker in self._workers), return_exceptions=True)
        transfers = [outcome for outcome in outcomes if isinstance(outcome, Transfer)]
        for transfer in transfers:
            self._metrics.transfers.labels(kind).observe(transfer.seconds)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return transfers
