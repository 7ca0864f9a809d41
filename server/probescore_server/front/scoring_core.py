"""Connects all that scores requests, whoever owns the gRPC port: the workers, their scheduler, the servicer and the metrics.

It never imports torch.
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Callable

import structlog

from probescore_server.front.calls_under_way import CallsUnderWay
from probescore_server.front.metrics import Metrics
from probescore_server.front.scoring_service import ScoringServicer
from probescore_server.scheduling.scheduler import Scheduler
from probescore_server.settings import ServerSettings
from probescore_server.workers.handle import PinnedContent, WorkerHandle
from probescore_server.workers.messages import WorkerSpec

logger = structlog.get_logger(__name__)


class ScoringCore:
    """Scores requests on some devices, with one worker process for each. All of it runs on one event loop.

    Args:
        settings: the server's settings.
        devices: the devices, such as ``cuda:0``.
        on_change: called whenever a worker becomes ready, ends, falls asleep or wakes up.

    Attributes:
        metrics: the metrics of calls, workers and probes; whoever owns the core must serve them on a port.
        workers: the handles of the workers, in the order of the devices.
        scheduler: the scheduler that gives the workers their batches.
        under_way: bounds the calls that are under way.
        servicer: the implementation of ``probescore.v1.ScoringService``.
    """

    def __init__(self, settings: ServerSettings, devices: tuple[str, ...], on_change: Callable[[], None]) -> None:
        self.metrics = Metrics()
        self._on_change = on_change
        self._has_probes = bool(settings.probes)
        if settings.device_map != "none":
            devices = devices[:1]  # The one worker takes the other devices too.
        threads = settings.threads_per_worker or max(1, len(os.sched_getaffinity(0)) // len(devices))
        pinned = PinnedContent()
        self.workers = [
            WorkerHandle(WorkerSpec(settings, device, threads), self._changed, pinned, self.metrics.watch_losses(str(number), device))
            for number, device in enumerate(devices)
        ]
        self.scheduler = Scheduler(
            self.workers,
            max_queue_tokens=settings.max_queue_tokens,
            max_batch_tokens=settings.max_batch_tokens,
            on_batch=self.metrics.count_batch,
            on_out_of_memory=self.metrics.out_of_memory.inc,
        )
        for number, worker in enumerate(self.workers):
            budget = functools.partial(self.scheduler.batch_budget, worker)
            self.metrics.watch_batch_budget(str(number), worker.spec.device, budget)
            self.metrics.watch_worker(str(number), worker.spec.device, functools.partial(getattr, worker, "statistics"))
        self.metrics.watch_queue(lambda: self.scheduler.queued_tokens, lambda: self.scheduler.queued_rollouts)
        self.under_way = CallsUnderWay(settings.max_calls, settings.max_in_flight_bytes)
        self.servicer = ScoringServicer(settings, self.workers, self.scheduler, self.metrics)

    @property
    def serving(self) -> bool:
        """Tells whether calls are accepted: some worker is ready or asleep.

        Calls wait while all workers sleep. The server still counts as serving, since an orchestrator that restarted it would take the
        memory that it gave back.
        """
        return any(worker.ready or worker.asleep for worker in self.workers)

    async def run(self) -> None:
        """Runs all worker processes until this coroutine is cancelled.

        Raises:
            StartupError: a worker cannot load the model or a probe.
        """
        if not self._has_probes:
            logger.warning("no probes", consequence="every request to score is refused", remedy="start with --probes FILE or DIRECTORY")
        running = [asyncio.create_task(worker.run()) for worker in self.workers]
        try:
            await asyncio.gather(*running)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    def _changed(self) -> None:
        """Passes a change of the workers' state on to the metrics, to the calls that wait, and to whoever owns the port."""
        ready = any(worker.ready for worker in self.workers)
        self.metrics.ready.set(ready)
        for number, worker in enumerate(self.workers):
            self.metrics.show_worker(str(number), worker.spec.device, ready=worker.ready, asleep=worker.asleep, restarts=worker.restarts)
            if worker.info is not None:
                self.metrics.probes.show_probes(worker.info)
        if ready:
            self.scheduler.dispatch()
        elif all(worker.failed_starts for worker in self.workers):
            self.scheduler.fail_waiting(self.workers[0].unavailable())
        self._on_change()
