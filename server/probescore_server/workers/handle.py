"""Defines the handle of a worker, by which the server's front process (which owns the port) sends batches and texts to a worker process and
restarts the process when it ends.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from probescore.types import LoadedReading, ModelInfo, ProbeInfo, Reading, Transfer
from probescore_server.errors import FailedPrecondition, InternalFault, StartupError, WorkerLost, WorkerUnavailable
from probescore_server.rollouts import CheckedRollout, EngineInfo, EngineStatistics, ScoredBatch
from probescore_server.spool import SpooledFile
from probescore_server.validation.texts import PendingText
from probescore_server.workers.liveness import LossReason
from probescore_server.workers.messages import (
    READING_AGAIN,
    CancelRollout,
    CancelTexts,
    DropReading,
    EncodeTexts,
    HoldProbes,
    LoadReading,
    ProbesHeld,
    ReadingLoaded,
    ReadingSource,
    Ready,
    ScoreBatch,
    Sleep,
    Wake,
    WorkerSpec,
)
from probescore_server.workers.process import WorkerProcess

logger = structlog.get_logger(__name__)

# The pause between attempts to start may get this many times as long as ``worker_restart_seconds``.
MAX_BACKOFF = 60.0


class PinnedContent:
    """Record of the model and probes that the worker processes of a server have loaded, against which everything that a later process loads
    is checked.

    Every start of a worker process reads the model's files again. If they have changed, the worker must not score under the fingerprints
    that the server has announced, nor with other weights than the server's other workers. A probe's name and version mean the same content
    as long as the server runs.
    """

    def __init__(self) -> None:
        self._model: tuple[ModelInfo, str] | None = None
        self._weights: dict[int, str] = {}  # It holds a digest for each number of blocks that workers have loaded.
        self._probes: dict[str, tuple[str, str]] = {}

    def check(self, info: EngineInfo) -> None:
        """Stores the description of what the first worker process has loaded, and compares every later description with the earlier ones.

        Raises:
            StartupError: the content of the model's files or of a probe has changed; the error names the model or the probes.
        """
        # A worker that has loaded more blocks also says what it would have loaded with fewer.
        model = replace(info.model, num_loaded_layers=0), info.tokenizer_fingerprint
        self._model = self._model or model
        digests = {**info.shallower, info.model.num_loaded_layers: info.content}
        changed = [f"probe {probe.key}" for probe in info.probes if self.differs(probe)]
        if model != self._model or any(self._weights.get(layers, found) != found for layers, found in digests.items()):
            changed = [f"model {self._model[0].id}", *changed]
        if changed:
            raise StartupError(
                f"the files of the model or of a probe have changed since the server started ({', '.join(changed[:5])}); restart the server"
            )
        self._weights |= digests
        self.remember(info.probes)

    def remember(self, probes: Iterable[ProbeInfo]) -> None:
        """Stores which content each probe's name and version stand for, so that a later probe with the same name and version but other
        content is noticed.
        """
        self._probes |= {probe.key: (probe.graph_sha256, probe.manifest_sha256) for probe in probes}

    def differs(self, probe: ProbeInfo) -> bool:
        """Returns whether a probe's name and version have stood for other content (another probe file) since the server started."""
        digests = probe.graph_sha256, probe.manifest_sha256
        return self._probes.get(probe.key, digests) != digests


@dataclass(frozen=True, eq=False)
class Successor:
    """Value object with a worker process that is ready to take the place of another one on the same device, and its message of what model
    and probes it has loaded.
    """

    process: WorkerProcess
    ready: Ready


class WorkerHandle:
    """Handle of one worker in the server's front process, which owns the port. It starts the worker process, restarts the process whenever
    it ends, and sends work to it.

    All methods must run on one event loop.

    Args:
        spec: the model and probes that the worker loads, and its device.
        on_change: function that is called whenever ``ready``, ``asleep`` or ``failed_starts`` changes.
        pinned: the record, shared by all workers of the server, of the content that each of them must have loaded.
        on_lost: function that is called whenever the worker process died, with the reason, one of ``liveness.REASONS_LOST``.

    Attributes:
        spec: the model and probes that the worker loads, and its device. If the attribute is changed, the new value counts for later starts
            of the process; a process that is starting meanwhile loads the new probes before it counts as up.
        info: a description of the loaded model and probes; ``None`` before the worker was ready for the first time.
        keys: the probes that the running process serves: a dictionary from the digest of a file's content to ``name@version``.
        readings: descriptions of the readings that the running process holds, by their slots.
        loading: the content of probe files that a process which is starting may still read.
        restarts: how often the worker process was started again.
        failed_starts: number of attempts to start that failed since the worker was last ready.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        on_change: Callable[[], None],
        pinned: PinnedContent | None = None,
        on_lost: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self.spec = spec
        self._pinned = pinned or PinnedContent()
        self.info: EngineInfo | None = None
        self.keys: dict[str, str] = {}
        self.readings: dict[str, Reading] = {}
        self.loading: tuple[SpooledFile, ...] = ()
        self._reads_again = True  # It is false if the last process ended while it loaded readings.
        self.restarts = 0
        self.failed_starts = 0
        self._on_change = on_change
        self._on_lost = on_lost
        self._stalled_starts = 0  # This counts stalled starts in a row.
        self._changed = asyncio.Event()  # It is set, and replaced by a new one, at each change.
        self._numbers = itertools.count(1)
        self._running: WorkerProcess | None = None  # It is set while the worker is up.
        self._awake = asyncio.Event()
        self._awake.set()
        self._moving = asyncio.Lock()
        self._start_seconds = 0.0
        self._finishing: set[asyncio.Task[None]] = set()

    @property
    def ready(self) -> bool:
        """Returns whether the worker can score now: its process has loaded the model and probes and is awake."""
        return self.up and not self.asleep

    @property
    def up(self) -> bool:
        """Returns whether the worker's process runs and has loaded the model and probes, awake or asleep."""
        return self._running is not None and not self._running.ended.is_set()

    @property
    def asleep(self) -> bool:
        """Returns whether the worker is asleep, which means that it leaves its device's memory free until ``wake`` is called.

        The worker stays asleep if its process ends. The process is then not started again before ``wake``, since loading would take the
        memory that sleeping has freed.
        """
        return not self._awake.is_set()

    @property
    def statistics(self) -> EngineStatistics:
        """Returns the worker's memory use and cache hits, as last reported by the worker process; all are 0 while the worker is down."""
        return EngineStatistics() if self._running is None else self._running.statistics

    async def run(self) -> None:
        """Starts the worker process, and starts it again whenever it ends, until this coroutine is cancelled.

        Raises:
            StartupError: the first start failed, so that the worker was never ready.
        """
        try:
            while True:
                await self._run_process()
        finally:
            for task in self._finishing:
                task.cancel()
            await asyncio.gather(*self._finishing, return_exceptions=True)

    async def _run_process(self) -> None:
        """Starts one worker process, waits for the end of the process, or of the one that has taken its place, and then pauses before the
        next start.
        """
        running = WorkerProcess(self.spec if self._reads_again else replace(self.spec, readings=()))
        self.loading = self.spec.probes
        try:
            await self._run_once(running)
        finally:
            self._reads_again = self._running is not None or running.starting_with != READING_AGAIN
            self.loading, self.readings = (), {}
            running, self._running = self._running or running, None
            await running.stop()
        loss = running.loss or LossReason("died", "")
        why = {"reason": loss.reason, "problem": loss.problem, "doing": loss.doing}
        logger.error("worker died", device=self.spec.device, exit_code=running.process.exitcode, **why)
        self._on_lost(loss.reason)
        self._tell()
        await asyncio.sleep(self._pause_seconds)
        await self._awake.wait()
        self.restarts += 1

    async def _run_once(self, running: WorkerProcess) -> None:
        """Starts one worker process, waits until it is ready, and returns once the process has ended or failed to start."""
        began = time.monotonic()
        logger.info("starting worker", device=self.spec.device, model=self.spec.settings.model)
        try:
            ready = await running.start()
            self._pinned.check(ready.info)
            info, keys, readings = await self._follow(running, ready)
        except EOFError:
            return
        except WorkerLost as error:
            # The process, or the whole machine, was stopped; the worker did not refuse to start. A call that waits goes on waiting the
            # first time that this happens.
            self._stalled_starts += 1
            self.failed_starts += self._stalled_starts > 1
            logger.error("worker stalled while it was starting", device=self.spec.device, problem=str(error), doing=error.doing)
            return
        except StartupError as error:
            if self.info is None:
                raise
            self.failed_starts += 1
            running.blame(LossReason("start", str(error)))
            logger.error("worker did not start again", device=self.spec.device, problem=str(error))
            return
        self.info, self.keys, self._running, self.failed_starts, self._stalled_starts = info, keys, running, 0, 0
        self.readings = readings
        self.loading = ()
        self._keep_depth(info)
        self._start_seconds = time.monotonic() - began
        logger.info("worker ready", device=self.spec.device, seconds=round(self._start_seconds, 1), pid=running.process.pid)
        self._tell()
        while not running.ended.is_set():
            await running.ended.wait()
            running = self._running or running  # It is another one if that has taken over.

    async def _follow(self, running: WorkerProcess, ready: Ready) -> tuple[EngineInfo, dict[str, str], dict[str, Reading]]:
        """Makes a worker process that has just started serve the probes that the worker's specification names now, if the specification has
        changed meanwhile.

        Returns:
            A description of the model and probes that the process serves, a dictionary from the digest of each probe file's content to
            the probe's key ``name@version``, and one of the readings that the process holds.

        Raises:
            StartupError: the process refuses a probe.
            EOFError: the process ended.
        """
        started_with, info, keys, readings = running.spec.probes, ready.info, ready.keys, ready.readings
        while started_with != self.spec.probes:
            started_with = self.spec.probes
            held: ProbesHeld = await running.ask(HoldProbes(next(self._numbers), started_with))
            if held.refusals:
                raise StartupError(str(held.refusals[0]))
            self._pinned.check(held.info)
            info, keys, readings = held.info, held.keys, held.readings
        return info, keys, readings

    def new_batch(self) -> int:
        """Returns a new number for a batch, to be given to ``score`` and ``cancel``."""
        return next(self._numbers)

    async def score(self, number: int, rollouts: Sequence[CheckedRollout]) -> ScoredBatch:
        """Scores a batch of rollouts after the batches that were sent to the worker before. While the worker sleeps, the batch waits.

        Raises:
            WorkerUnavailable: the worker is not up, or its process ended.
            WorkerLost: the worker process crashed or was stuck, and this or another batch may be the cause.
            OutOfMemory: the batch needs more memory than the device has.
            InternalFault: the batch failed for any other reason.
        """
        await self._awake.wait()
        batch: ScoredBatch = await self._ask(ScoreBatch(number, rollouts))
        return batch

    def cancel(self, number: int, index: int) -> None:
        """Cancels one rollout of a batch that was sent to the worker process; the rollout's result is then ``None``. This has no effect
        once the batch's results have arrived.
        """
        if self._running is not None:
            self._running.send(CancelRollout(number, index))

    async def encode(self, texts: Sequence[PendingText]) -> dict[str, NDArray[np.int32]]:
        """Tokenises texts in the worker process, while batches compute and also while the worker sleeps.

        If the worker process ended while asleep, this coroutine waits until the worker is woken. If the coroutine is cancelled, the
        remaining texts are not tokenised.

        Returns:
            A dictionary, keyed by ``PendingText.field``, of the token ids of each text, ``(T,)`` int32.

        Raises:
            InvalidRequest: a text cannot be tokenised; the error names the text's field.
            WorkerUnavailable: the worker is not up, or its process ended.
            WorkerLost: the worker process crashed or was stuck; these texts are the cause if the error's ``order`` is not 0.
            InternalFault: tokenising failed for any other reason.
        """
        if not self.up:
            await self._awake.wait()
        number = next(self._numbers)
        try:
            ids: dict[str, NDArray[np.int32]] = await self._ask(EncodeTexts(number, texts))
        except asyncio.CancelledError:
            if self._running is not None:
                self._running.send(CancelTexts(number))
            raise
        except WorkerLost as error:
            error.order = number if error.order == number else 0
            raise
        return ids

    async def until_back(self) -> None:
        """Waits until the worker process runs again with the model loaded; raises ``WorkerUnavailable`` if the process cannot start."""
        while not self.up:
            if self.failed_starts:
                raise self.unavailable()
            await self._changed.wait()

    async def sleep(self) -> Transfer:
        """Makes the worker free its device's memory once it has computed the batches that it was given, and returns the bytes moved and
        freed and the seconds taken.

        If the worker sleeps already, nothing changes. The worker falls asleep even if this coroutine is cancelled.

        Raises:
            WorkerUnavailable: the worker is not up, or its process ended.
            InternalFault: the worker could not free its memory, and is awake as before.
        """
        async with self._moving:
            if not self.up:
                if self.asleep:
                    return Transfer(self.spec.device)
                raise self.unavailable()
            self._set_awake(False)
            try:
                transfer = await self._ask(Sleep(next(self._numbers)))
            except InternalFault:
                self._set_awake(True)
                raise
            return self._logged("worker asleep", transfer)

    async def wake(self) -> Transfer:
        """Makes a sleeping worker take its device's memory again, and returns the bytes moved and taken and the seconds needed.

        If the worker is awake already, nothing changes. If this coroutine is cancelled, the worker must be woken again.

        Raises:
            WorkerUnavailable: the device has too little free memory yet; or the worker is not up, or its process ended, and is now being
                started again.
        """
        async with self._moving:
            if self.ready:
                return Transfer(self.spec.device)
            if not self.up:
                self._set_awake(True)
                raise self.unavailable()
            try:
                transfer = await self._ask(Wake(next(self._numbers)))
            except WorkerUnavailable:
                if not self.up:
                    self._set_awake(True)  # The caller wants the worker awake, so it is started again.
                raise
            self._set_awake(True)
            return self._logged("worker awake", transfer)

    async def hold(self, files: tuple[SpooledFile, ...]) -> ProbesHeld:
        """Makes the running worker process serve exactly the probes of the given files, which it loads and checks while it scores. While
        the worker sleeps, the coroutine waits; the worker does not fall asleep while it loads.

        Raises:
            WorkerUnavailable: the worker is not up, or its process ended.
            WorkerLost: the worker process crashed or was stuck, and the probes may be the cause.
            InternalFault: loading failed for another reason than a probe.
        """
        while True:
            await self._awake.wait()
            async with self._moving:
                if self.asleep:
                    continue
                held: ProbesHeld = await self._ask_in_time(HoldProbes(next(self._numbers), files), "its probes")
                self.info, self.keys, self.readings = held.info, held.keys, held.readings
                return held

    async def load_reading(self, source: ReadingSource) -> LoadedReading:
        """Makes the running worker process load a reading (an adapter or checkpoint beside the frozen model) while it scores. The worker
        does not fall asleep while it loads.

        Raises:
            ReadingRefused: the files would not be computed correctly.
            ReadingIncomplete: the files are being written.
            FailedPrecondition: the worker sleeps, or its memory is short.
            WorkerUnavailable: the worker is not up, or its process ended.
            WorkerLost: the worker process crashed or was stuck, and the reading may be the cause.
            InternalFault: loading failed for another reason.
        """
        async with self._moving:
            if self.asleep:
                raise FailedPrecondition("the server sleeps, and loads no reading: wake it first", "ASLEEP")
            answer: ReadingLoaded = await self._ask_in_time(LoadReading(next(self._numbers), source), "a reading")
            self.readings = answer.readings
            return answer.loaded

    def drop_reading(self, slot: str) -> None:
        """Makes the running worker process free the reading in a slot after the batches that it was given before."""
        if self._running is not None:
            self._running.send(DropReading(slot))
        self.readings = {other: reading for other, reading in self.readings.items() if other != slot}

    async def _ask_in_time(self, message: HoldProbes | LoadReading, what: str) -> Any:  # noqa: ANN401
        """Gives the worker process an order to load something, for which it has ``worker_start_seconds``."""
        running, seconds = self._running, self.spec.settings.worker_start_seconds
        try:
            async with asyncio.timeout(seconds):
                return await self._ask(message)
        except TimeoutError:
            problem = f"it did not load {what} within {seconds:g} s (worker_start_seconds)"
            if running is not None:
                running.give_up(LossReason("overdue", problem))
            raise WorkerLost("overdue", problem, self._pause_seconds) from None

    async def start_successor(self, files: tuple[SpooledFile, ...]) -> Successor:
        """Starts a second worker process on the worker's device, which loads as many of the model's blocks as the probes of the given files
        need. The first process goes on scoring until ``take_over`` is called.

        Raises:
            ProbeRefused: a probe file is refused.
            StartupError: the process cannot start, or has loaded another model than the running one.
        """
        layers = 0 if self.info is None else self.info.model.num_loaded_layers
        process = WorkerProcess(replace(self.spec, probes=files, min_layers=layers, is_first=False))
        try:
            ready = await process.start()
            self._pinned.check(ready.info)
        except BaseException:
            await process.stop()
            raise
        return Successor(process, ready)

    def take_over(self, successor: Successor) -> None:
        """Gives all later work of a worker to its successor, a process that was started to replace the running one. The earlier process
        finishes the work that it has, and ends.
        """
        before, self._running = self._running, successor.process
        self.info, self.keys, self.readings = successor.ready.info, successor.ready.keys, successor.ready.readings
        self._keep_depth(self.info)
        logger.info("a deeper worker has taken over", device=self.spec.device, pid=successor.process.process.pid)
        if before is not None:
            self._do(self._finish(before))
        if self.asleep:  # It was put to sleep while the successor started.
            self._do(successor.process.ask(Sleep(next(self._numbers))))
        self._tell()

    def _do(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(coroutine)
        self._finishing.add(task)
        task.add_done_callback(self._finishing.discard)

    def _keep_depth(self, info: EngineInfo) -> None:
        """Makes every later process of the worker load at least as many of the model's blocks as are loaded now, even if the probe that
        needs them is removed by then.
        """
        self.spec = replace(self.spec, min_layers=info.model.num_loaded_layers, is_first=False)

    async def _finish(self, process: WorkerProcess) -> None:
        try:
            await process.finish()
        finally:
            await process.stop()
            process.ended.set()

    def _set_awake(self, awake: bool) -> None:
        if awake:
            self._awake.set()
        else:
            self._awake.clear()
        self._tell()

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        self._on_change()

    def _logged(self, event: str, transfer: Transfer) -> Transfer:
        gibibytes = {"weights_gib": transfer.weight_bytes, "device_gib": transfer.device_bytes}
        rounded = {name: round(number / 2**30, 3) for name, number in gibibytes.items()}
        logger.info(event, device=self.spec.device, seconds=round(transfer.seconds, 3), **rounded)
        return transfer

    async def _ask(self, message: ScoreBatch | EncodeTexts | Sleep | Wake | HoldProbes | LoadReading) -> Any:  # noqa: ANN401
        running = self._running
        if running is None or not self.up:
            raise self.unavailable()
        try:
            return await running.ask(message)
        except EOFError:
            unavailable = self.unavailable()
            if (loss := running.loss) is None:
                raise unavailable from None
            raise WorkerLost(loss.reason, loss.problem, unavailable.retry_seconds, loss.doing, loss.order) from None

    def unavailable(self) -> WorkerUnavailable:
        """Returns the error for work that cannot be done until the worker process is up again. The error says after how many seconds to try
        again.
        """
        return WorkerUnavailable("the worker is down and being restarted", self._pause_seconds + self._start_seconds)

    @property
    def _pause_seconds(self) -> float:
        return self.spec.settings.worker_restart_seconds * min(2.0**self.failed_starts, MAX_BACKOFF)
