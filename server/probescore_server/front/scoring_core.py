"""Connects the parts of the server that score requests: worker processes, scheduler, servicer and metrics.

Both the plain server and the Ray Serve application, which differ in how they listen for RPCs, use this module. It never imports torch.
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
from probescore_server.registry.readings import ReadingRegistry
from probescore_server.registry.registry import ProbeRegistry
from probescore_server.scheduling.scheduler import Scheduler
from probescore_server.settings import ServerSettings
from probescore_server.workers.handle import PinnedContent, WorkerHandle
from probescore_server.workers.messages import WorkerSpec

logger = structlog.get_logger(__name__)


class ScoringCore:
    """Core of a server, which scores requests on some devices, with one worker process for each device. All methods must run on one event
    loop.

    Args:
        settings: the server's settings.
        devices: the devices, such as ``cuda:0``.
        on_change: function that is called whenever a worker becomes ready, ends, falls asleep or wakes up.
        make_readings: constructor of the registry of readings, with the arguments of ``ReadingRegistry``.

    Attributes:
        metrics: the metrics of RPCs, workers and probes; the owner of the core must serve them over HTTP.
        workers: the handles of the workers, in the order of the devices.
        scheduler: the scheduler, which sends batches to the workers.
        registry: the registry of the probes that are served.
        readings: the registry of the readings beside the frozen model.
        under_way: the counter that limits the RPCs at the same time.
        servicer: the servicer of ``probescore.v1.ScoringService``.
    """

    def __init__(
        self,
        settings: ServerSettings,
        devices: tuple[str, ...],
        on_change: Callable[[], None],
        make_readings: Callable[..., ReadingRegistry] = ReadingRegistry,
    ) -> None:
        self.metrics = Metrics()
        self._settings = settings
        self._on_change = on_change
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
        changing = asyncio.Lock()
        self.registry = ProbeRegistry(settings, self.workers, pinned, self._probes_changed, self.metrics.count_reload, changing)
        counted = self.metrics.readings
        self.readings = make_readings(settings, self.workers, changing, self._readings_changed, counted.count_load, counted.lost.inc)
        self.under_way = CallsUnderWay(settings.max_calls, settings.max_in_flight_bytes)
        self.servicer = ScoringServicer(settings, self.workers, self.scheduler, self.registry, self.readings, self.metrics)

    @property
    def serving(self) -> bool:
        """Returns whether RPCs are accepted, which is so if some worker is ready or asleep.

        While all workers sleep, RPCs wait. The server still counts as serving then: an orchestrator that restarted the server would take
        the device memory that sleeping has freed.
        """
        return any(worker.ready or worker.asleep for worker in self.workers)

    async def run(self) -> None:
        """Runs the worker processes of all devices until this coroutine is cancelled.

        Raises:
            StartupError: a probe file cannot be read, or a worker cannot load the model or a probe.
        """
        await asyncio.to_thread(self.registry.open)
        if self.registry.is_empty:
            remedy = (
                "put a probe file into the directory, and send SIGHUP" if self._settings.probes else "start with --probes FILE or DIRECTORY"
            )
            logger.warning("no probes", consequence="every request to score is refused", remedy=remedy)
        running = [asyncio.create_task(worker.run()) for worker in self.workers]
        running.append(asyncio.create_task(self.registry.run()))
        try:
            await asyncio.gather(*running)
        finally:
            for task in running:
                if not task.cancelling():  # A second request would interrupt a worker handle while it ends its process.
                    task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    def _changed(self) -> None:
        """Notifies the metrics, the waiting RPCs and the owner of the core that the state of a worker has changed."""
        ready = any(worker.ready for worker in self.workers)
        self.metrics.ready.set(ready)
        for number, worker in enumerate(self.workers):
            self.metrics.show_worker(str(number), worker.spec.device, ready=worker.ready, asleep=worker.asleep, restarts=worker.restarts)
            self.registry.worker_changed(worker)
            self.readings.worker_changed(worker)
        if ready:
            self.scheduler.dispatch()
        elif all(worker.failed_starts for worker in self.workers):
            self.scheduler.fail_waiting(self.workers[0].unavailable())
        self._on_change()

    def _probes_changed(self) -> None:
        """Notifies the metrics and the servicer that other probes are served from now on, so that a probe's name may stand for another
        version.
        """
        if self.registry.info is not None:
            self.metrics.probes.show_probes(self.registry.info)
            self.metrics.calibrations.show_probes(self.registry.info)
        self.servicer.forget_options()

    def _readings_changed(self, count: int) -> None:
        """Notifies the metrics and the servicer that the name of a reading means another version from now on, or none."""
        self.metrics.readings.loaded.set(count)
        self.servicer.forget_options()
