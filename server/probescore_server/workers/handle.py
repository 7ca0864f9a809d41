"""The front process's end of a worker, through all its restarts: batches and texts go to it, and it sleeps and wakes."""

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

# How much longer than `worker_restart_seconds` the pause between attempts to start may get.
MAX_BACKOFF = 60.0


class PinnedContent:
    """What the workers of one server serve: the bytes that the first of them has loaded.

    Every start reads the files again; what they hold by then must not pass for what the server has announced, nor a second worker score
    with other weights than the first.
    """

    def __init__(self) -> None:
        self._info: EngineInfo | None = None

    def check(self, info: EngineInfo) -> None:
        """Takes the first, and compares every other one with it.

        Raises:
            StartupError: the model's files or a probe's hold something else by now; says which.
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
    """One worker, through all its restarts. Everything here runs on one event loop.

    Args:
        spec: what to load, where.
        on_change: called whenever `ready` or `failed_starts` changes.
        pinned: shared by the workers of one server.
        on_lost: told why, one of ``liveness.REASONS_LOST``, whenever it was lost.

    Attributes:
        info: what it has loaded; ``None`` before it was ready for the first time.
        restarts: how often it was started again.
        failed_starts: attempts to start since it was last ready.
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
        self._stalled_starts = 0  # in a row
        self._changed = asyncio.Event()  # another one after each change
        self._numbers = itertools.count(1)
        self._running: WorkerProcess | None = None  # while it is up
        self._awake = asyncio.Event()
        self._awake.set()
        self._moving = asyncio.Lock()
        self._start_seconds = 0.0

    @property
    def ready(self) -> bool:
        """Whether it can score."""
        return self.up and not self.asleep

    @property
    def up(self) -> bool:
        """Whether there is a process that has loaded what it should, awake or asleep."""
        return self._running is not None and not self._running.ended.is_set()

    @property
    def asleep(self) -> bool:
        """Whether it is to leave its device alone until `wake`. This outlasts its death: a process that dies asleep is not started again
        before, since loading would take the memory that was given away.
        """
        return not self._awake.is_set()

    @property
    def statistics(self) -> EngineStatistics:
        """As of the last thing that it answered; nothing while it is down."""
        return EngineStatistics() if self._running is None else self._running.statistics

    async def run(self) -> None:
        """Starts the worker, and starts it again whenever it dies, until cancelled.

        Raises:
            StartupError: its first start failed.
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
        """From a start to the death that follows."""
        began = time.monotonic()
        logger.info("starting worker", device=self.spec.device, model=self.spec.settings.model)
        try:
            info = await running.start()
            self._pinned.check(info)
        except WorkerLost as error:
            # stopped, or the machine is: nothing that it would refuse. Who waits goes on waiting if it happens once.
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
        """A number for `score` and `cancel`."""
        return next(self._numbers)

    async def score(self, number: int, rollouts: Sequence[CheckedRollout]) -> ScoredBatch:
        """Scores a batch, after those that it has already. What comes while it sleeps waits.

        Raises:
            WorkerUnavailable: it is not up, or died.
            WorkerLost: it was lost, and this or another batch may be why.
            OutOfMemory: the batch needs more memory than there is.
            InternalFault: the batch failed.
        """
        await self._awake.wait()
        batch: ScoredBatch = await self._ask(ScoreBatch(number, rollouts))
        return batch

    def cancel(self, number: int, index: int) -> None:
        """Gives up one rollout of a batch that it has; its result will be ``None``. Too late, it does nothing."""
        if self._running is not None:
            self._running.send(CancelRollout(number, index))

    async def encode(self, texts: Sequence[PendingText]) -> dict[str, NDArray[np.int32]]:
        """Tokenises, beside the batch that computes and while it sleeps; if it died asleep, once it is woken. If it is cancelled, what is
        left of the texts is given up.

        Returns:
            Ids ``(T,)`` int32 by `PendingText.field`.

        Raises:
            InvalidRequest: a text that cannot be tokenised, naming its field.
            WorkerUnavailable: it is not up, or died.
            WorkerLost: it was lost; these texts are why if its `order` is not 0.
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
        """Waits until it is up again; raises ``WorkerUnavailable`` if it does not start."""
        while not self.up:
            if self.failed_starts:
                raise self.unavailable()
            await self._changed.wait()

    async def sleep(self) -> Transfer:
        """Makes it give its device's memory back, after the batch that computes. Asking again changes nothing. If the caller does not wait
        for the end, it sleeps all the same.

        Raises:
            WorkerUnavailable: it is not up, or died.
            InternalFault: something went wrong, and it is awake as before.
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
        """Makes it take its device's memory again. Asking again changes nothing. If the caller does not wait for the end, it must be asked
        again.

        Raises:
            WorkerUnavailable: its device has no room yet; or it is not up, or died, and is now being started again.
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
                    self._set_awake(True)  # that is what it was asked for, and it is started again for it
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
        """The error for work that it cannot do before it is up again."""
        return WorkerUnavailable("the worker is down and being restarted", self._pause_seconds + self._start_seconds)

    @property
    def _pause_seconds(self) -> float:
        return self.spec.settings.worker_restart_seconds * min(2.0**self.failed_starts, MAX_BACKOFF)
