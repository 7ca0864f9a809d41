"""What scores, whoever owns the port: workers, the scheduler before them, the servicer and its metrics. It never imports torch."""

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
    """Scores on some devices. Everything here runs on one event loop.

    Args:
        settings: as read.
        devices: one worker each.
        on_change: called whenever a worker becomes ready, dies, falls asleep or wakes up.

    Attributes:
        metrics: of calls, workers and probes; not served by anyone yet.
        workers: in the order of the devices.
        scheduler: before them.
        under_way: bounds its calls.
        servicer: ``probescore.v1.ScoringService``.
    """

    def __init__(self, settings: ServerSettings, devices: tuple[str, ...], on_change: Callable[[], None]) -> None:
        self.metrics = Metrics()
        self._on_change = on_change
        self._has_probes = bool(settings.probes)
        if settings.device_map != "none":
            devices = devices[:1]  # one worker, which takes the others too
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
        """Whether calls will be answered. Those to workers that sleep are accepted and wait: who restarted a server for not answering would
        take the memory that it gave away.
        """
        return any(worker.ready or worker.asleep for worker in self.workers)

    async def run(self) -> None:
        """Runs the workers until cancelled.

        Raises:
            StartupError: a worker cannot load what it should serve.
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
        """Tells everyone what the workers' state means: metrics, the work that waits, and whoever owns the port."""
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
