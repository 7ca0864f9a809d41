"""Defines the front process's handle of a worker, which sends batches and texts to the worker process and restarts it when it ends."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from probescore.types import Transfer
from probescore_server.errors import InternalFault, StartupError, WorkerLost, WorkerUnavailable
from probescore_server.rollouts import CheckedRollout, EngineInfo, EngineStatistics, ScoredBatch
from probescore_server.validation.texts import PendingText
from probescore_server.workers.liveness import LossReason
from probescore_server.workers.messages import (
    CancelRollout,
    CancelTexts,
    EncodeTexts,
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
    """Remembers what the first worker of a server has loaded, and refuses a later worker that has loaded anything else.

    Every start of a worker process reads the files again. If these have changed, the worker must not score under the fingerprints that the
    server has announced, nor with other weights than the server's other workers.
    """

    def __init__(self) -> None:
        self._info: EngineInfo | None = None

    def check(self, info: EngineInfo) -> None:
        """Keeps the first description of what a worker has loaded, and compares every later one with it.

        Raises:
            StartupError: the content of the model's files or of a probe's has changed; names the model or the probes.
        """
        first = self._info = self._info or info
        now, before = ({probe.key: probe for probe in each.probes} for each in (info, first))
        changed = [f"probe {key}" for key in sorted(now.keys() | before.keys()) if now.get(key) != before.get(key)]
        if (info.model, info.content, info.tokenizer_fingerprint) != (first.model, first.content, first.tokenizer_fingerprint):
            changed = [f"model {first.model.id}", *changed]
        if changed:
            raise StartupError(
                f"the files of the model or of a probe have changed since the server started ({', '.join(changed[:5])}); restart the server"
            )


class WorkerHandle:
    """Is the front process's handle of one worker: it starts the worker process, restarts it whenever it ends, and sends work to it.

    All of it runs on one event loop.

    Args:
        spec: what the worker loads, and on which device.
        on_change: called whenever ``ready``, ``asleep`` or ``failed_starts`` changes.
        pinned: what all workers of the server must have loaded; shared by these workers.
        on_lost: called with the reason, one of ``liveness.REASONS_LOST``, whenever the worker process was lost.

    Attributes:
        spec: what the worker loads, and on which device.
        info: what the worker has loaded; ``None`` before the worker was ready for the first time.
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

    @property
    def ready(self) -> bool:
        """Tells whether the worker can score now: its process has loaded everything and is awake."""
        return self.up and not self.asleep

    @property
    def up(self) -> bool:
        """Tells whether the worker's process runs and has loaded everything, awake or asleep."""
        return self._running is not None and not self._running.ended.is_set()

    @property
    def asleep(self) -> bool:
        """Tells whether the worker leaves its device's memory free until ``wake`` is called.

        The worker stays asleep if its process ends: the process is not started again before ``wake``, since loading would take the memory
        that was given back.
        """
        return not self._awake.is_set()

    @property
    def statistics(self) -> EngineStatistics:
        """Returns the worker's memory use and cache hits as it last reported them; all are 0 while the worker is down."""
        return EngineStatistics() if self._running is None else self._running.statistics

    async def run(self) -> None:
        """Starts the worker process, and starts it again whenever it ends, until this coroutine is cancelled.

        Raises:
            StartupError: the first start failed, so that the worker was never ready.
        """
        while True:
            running = WorkerProcess(self.spec)
            try:
                await self._run_once(running)
            finally:
                self._running = None
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
        """Starts one worker process, waits until it is ready, and returns once it has ended or has failed to start."""
        began = time.monotonic()
        logger.info("starting worker", device=self.spec.device, model=self.spec.settings.model)
        try:
            info = await running.start()
            self._pinned.check(info)
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
        self.info, self._running, self.failed_starts, self._stalled_starts = info, running, 0, 0
        self._start_seconds = time.monotonic() - began
        logger.info("worker ready", device=self.spec.device, seconds=round(self._start_seconds, 1), pid=running.process.pid)
        self._tell()
        await running.ended.wait()

    def new_batch(self) -> int:
        """Returns a new number for a batch, to be given to ``score`` and ``cancel``."""
        return next(self._numbers)

    async def score(self, number: int, rollouts: Sequence[CheckedRollout]) -> ScoredBatch:
        """Scores a batch of rollouts after the batches that the worker has already. While the worker sleeps, the batch waits.

        Raises:
            WorkerUnavailable: the worker is not up, or its process ended.
            WorkerLost: the worker's process was lost, and this or another batch may be the cause.
            OutOfMemory: the batch needs more memory than the device has.
            InternalFault: the batch failed for any other reason.
        """
        await self._awake.wait()
        batch: ScoredBatch = await self._ask(ScoreBatch(number, rollouts))
        return batch

    def cancel(self, number: int, index: int) -> None:
        """Cancels one rollout of a batch, whose result will be ``None``. It has no effect once the batch is answered."""
        if self._running is not None:
            self._running.send(CancelRollout(number, index))

    async def encode(self, texts: Sequence[PendingText]) -> dict[str, NDArray[np.int32]]:
        """Tokenises texts in the worker process, while batches compute and also while the worker sleeps.

        If the worker's process ended while asleep, this waits until the worker is woken. If this coroutine is cancelled, the remaining
        texts are given up.

        Returns:
            The token ids of each text, ``(T,)`` int32, by ``PendingText.field``.

        Raises:
            InvalidRequest: a text cannot be tokenised; names its field.
            WorkerUnavailable: the worker is not up, or its process ended.
            WorkerLost: the worker's process was lost; these texts are the cause if the error's ``order`` is not 0.
            InternalFault: something else went wrong.
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
        """Waits until the worker is up again; raises ``WorkerUnavailable`` if it cannot start."""
        while not self.up:
            if self.failed_starts:
                raise self.unavailable()
            await self._changed.wait()

    async def sleep(self) -> Transfer:
        """Makes the worker give its device's memory back after the batches that it has, and returns the bytes and seconds of it.

        Calling it again while the worker sleeps changes nothing. The worker falls asleep even if this coroutine is cancelled.

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
        """Makes the worker take its device's memory again, and returns the bytes and seconds of it.

        Calling it again while the worker is awake changes nothing. If this coroutine is cancelled, it must be called again.

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

    async def _ask(self, message: ScoreBatch | EncodeTexts | Sleep | Wake) -> Any:  # noqa: ANN401
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
        """Returns the error for work that cannot be done before the worker is up again, with the seconds after which to try again."""
        return WorkerUnavailable("the worker is down and being restarted", self._pause_seconds + self._start_seconds)

    @property
    def _pause_seconds(self) -> float:
        return self.spec.settings.worker_restart_seconds * min(2.0**self.failed_starts, MAX_BACKOFF)
