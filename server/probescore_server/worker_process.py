"""The front process's end of a worker: starts it, speaks with it, notices its death and starts it again."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from probescore.types import Transfer
from probescore_server.errors import InternalFault, StartupError, WorkerUnavailable
from probescore_server.pipe import LoopEnd
from probescore_server.requests import PendingText
from probescore_server.rollouts import EngineInfo, Occupancy, Rollout, ScoredBatch
from probescore_server.worker import (
    BatchScored,
    CancelRollout,
    CancelTexts,
    EncodeTexts,
    Failed,
    FromWorker,
    Moved,
    Progress,
    Ready,
    Refused,
    ScoreBatch,
    Sleep,
    Stop,
    TextsEncoded,
    ToWorker,
    Wake,
    WorkerSpec,
    run_worker,
)

logger = structlog.get_logger(__name__)

# How much longer than `worker_restart_seconds` the pause between attempts to start may get.
MAX_BACKOFF = 60.0
# Packing more than this would hold up the event loop: some µs each, and more with thousands of ids.
MAX_ROLLOUTS_PACKED_ON_LOOP = 64
MAX_SPANS_PACKED_ON_LOOP = 1024
MAX_TEXTS_PACKED_ON_LOOP = 1024
MAX_TEXT_BYTES_PACKED_ON_LOOP = 65_536
# For the batch that computes when a worker is told to stop; nobody waits for its scores any more.
STOP_SECONDS = 5.0


class WorkerProcess:
    """One worker, through all its restarts. Everything here runs on one event loop.

    Args:
        spec: what to load, where.
        on_change: called whenever `ready` or `failed_starts` changes.

    Attributes:
        info: what it has loaded; ``None`` before it was ready for the first time.
        restarts: how often it was started again.
        failed_starts: attempts to start since it was last ready.
    """

    def __init__(self, spec: WorkerSpec, on_change: Callable[[], None]) -> None:
        self.spec = spec
        self.info: EngineInfo | None = None
        self.restarts = 0
        self.failed_starts = 0
        self._on_change = on_change
        self._numbers = itertools.count(1)
        self._life: _Life | None = None  # while it is up
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
        return self._life is not None and not self._life.ended.is_set()

    @property
    def asleep(self) -> bool:
        """Whether it is to leave its device alone until `wake`. This outlasts its death: a process that dies asleep is not started again
        before, since loading would take the memory that was given away.
        """
        return not self._awake.is_set()

    @property
    def occupancy(self) -> Occupancy:
        """As of the last thing that it answered; nothing while it is down."""
        return Occupancy() if self._life is None else self._life.occupancy

    async def run(self) -> None:
        """Starts the worker, and starts it again whenever it dies, until cancelled.

        Raises:
            StartupError: its first start failed.
        """
        while True:
            life = _Life(self.spec)
            try:
                await self._live(life)
            finally:
                self._life = None
                await life.stop()
            logger.error("worker died", device=self.spec.device, exit_code=life.process.exitcode)
            self._on_change()
            await asyncio.sleep(self._pause_seconds)
            await self._awake.wait()
            self.restarts += 1

    async def _live(self, life: _Life) -> None:
        """From a start to the death that follows."""
        began = time.monotonic()
        logger.info("starting worker", device=self.spec.device, model=self.spec.settings.model)
        try:
            info = await life.start()
            _check_same(self.info, info)
        except StartupError as error:
            if self.info is None:
                raise
            self.failed_starts += 1
            logger.error("worker did not start again", device=self.spec.device, problem=str(error))
            return
        self.info, self._life, self.failed_starts = info, life, 0
        self._start_seconds = time.monotonic() - began
        logger.info("worker ready", device=self.spec.device, seconds=round(self._start_seconds, 1), pid=life.process.pid)
        self._on_change()
        await life.ended.wait()

    def new_batch(self) -> int:
        """A number for `score` and `cancel`."""
        return next(self._numbers)

    async def score(self, number: int, rollouts: Sequence[Rollout]) -> ScoredBatch:
        """Scores a batch, after those that it has already. What comes while it sleeps waits.

        Raises:
            WorkerUnavailable: it is not up, or died.
            OutOfMemory: the batch needs more memory than there is.
            InternalFault: the batch failed.
        """
        await self._awake.wait()
        batch: ScoredBatch = await self._ask(ScoreBatch(number, rollouts))
        return batch

    def cancel(self, number: int, index: int) -> None:
        """Gives up one rollout of a batch that it has; its result will be ``None``. Too late, it does nothing."""
        if self._life is not None:
            self._life.send(CancelRollout(number, index))

    async def encode(self, texts: Sequence[PendingText]) -> dict[str, NDArray[np.int32]]:
        """Tokenises, beside the batch that computes and while it sleeps; if it died asleep, once it is woken. If it is cancelled,
        what is left of the texts is given up.

        Returns:
            Ids ``(T,)`` int32 by `PendingText.field`.

        Raises:
            InvalidRequest: a text that cannot be tokenised, naming its field.
            WorkerUnavailable: it is not up, or died.
            InternalFault: something else went wrong.
        """
        if not self.up:
            await self._awake.wait()
        number = next(self._numbers)
        try:
            ids: dict[str, NDArray[np.int32]] = await self._ask(EncodeTexts(number, texts))
        except asyncio.CancelledError:
            if self._life is not None:
                self._life.send(CancelTexts(number))
            raise
        return ids

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
            transfer = await self._ask(Wake(next(self._numbers)))
            self._set_awake(True)
            return self._logged("worker awake", transfer)

    def _set_awake(self, awake: bool) -> None:
        if awake:
            self._awake.set()
        else:
            self._awake.clear()
        self._on_change()

    def _logged(self, event: str, transfer: Transfer) -> Transfer:
        gibibytes = {"weights_gib": transfer.weight_bytes, "device_gib": transfer.device_bytes}
        rounded = {name: round(number / 2**30, 3) for name, number in gibibytes.items()}
        logger.info(event, device=self.spec.device, seconds=round(transfer.seconds, 3), **rounded)
        return transfer

    async def _ask(self, message: ScoreBatch | EncodeTexts | Sleep | Wake) -> Any:  # noqa: ANN401
        if self._life is None or not self.up:
            raise self.unavailable()
        try:
            return await self._life.ask(message)
        except EOFError:
            raise self.unavailable() from None

    def unavailable(self) -> WorkerUnavailable:
        """The error for work that it cannot do before it is up again."""
        return WorkerUnavailable("the worker is down and being restarted", self._pause_seconds + self._start_seconds)

    @property
    def _pause_seconds(self) -> float:
        return self.spec.settings.worker_restart_seconds * min(2.0**self.failed_starts, MAX_BACKOFF)


def _check_same(before: EngineInfo | None, now: EngineInfo) -> None:
    """A restart reads the files again; what they hold by now must not pass for what the server has announced."""
    if before is not None and (before.model, before.probes) != (now.model, now.probes):
        raise StartupError("the files of the model or of a probe have changed since the server started; restart the server")


class _Life:
    """One process, from its start to its end."""

    def __init__(self, spec: WorkerSpec) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, self._theirs = socket.socketpair()
        self.process = context.Process(target=run_worker, args=(self._theirs, spec), name=f"probescore-{spec.device}", daemon=True)
        self.ended = asyncio.Event()
        self._spec = spec
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[EngineInfo] = self._loop.create_future()
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self.occupancy = Occupancy()
        self._pipe = LoopEnd(self._receive, self._end)

    async def start(self) -> EngineInfo:
        """Raises ``StartupError`` if it refuses to start, or dies first."""
        await asyncio.to_thread(self.process.start)
        self._theirs.close()  # or its death would not close the pipe
        await self._loop.create_unix_connection(lambda: self._pipe, sock=self._ours)
        return await self._started

    async def ask(self, message: ScoreBatch | EncodeTexts | Sleep | Wake) -> Any:  # noqa: ANN401
        """The answer to a message; raises what it says, or ``EOFError`` if the process dies first."""
        answer = self._answers[message.number] = self._loop.create_future()
        self.send(message)
        try:
            return await answer
        finally:
            del self._answers[message.number]

    def send(self, message: ToWorker) -> None:
        """Sends in order, without waiting. What a dead process would not get is dropped: `_end` answers for it."""
        self._pipe.send(message, takes_long=_takes_long(message))

    async def stop(self) -> None:
        """Ends the process, if it still runs, and waits for its end."""
        self.send(Stop())
        if self.process.is_alive():
            await asyncio.to_thread(self.process.join, STOP_SECONDS)
            self.process.kill()
            await asyncio.to_thread(self.process.join)
        self._pipe.close()

    def _receive(self, message: FromWorker) -> None:
        match message:
            case Progress():
                logger.info(message.message, device=self._spec.device)
            case Ready():
                _settle(self._started, message.info)
            case Refused():
                _settle(self._started, StartupError(message.message))
            case BatchScored():
                _settle(self._answers.get(message.number), message.batch)
            case TextsEncoded():
                _settle(self._answers.get(message.number), message.ids)
            case Moved():
                _settle(self._answers.get(message.number), message.transfer)
            case Failed():
                _settle(self._answers.get(message.number), message.error)
            case Occupancy():
                self.occupancy = message

    def _end(self) -> None:
        self.ended.set()
        _settle(self._started, StartupError(f"the worker on {self._spec.device} died while it was starting"))
        for answer in self._answers.values():
            _settle(answer, EOFError())


def _takes_long(message: ToWorker) -> bool:
    """To pack."""
    match message:
        case ScoreBatch(rollouts=rollouts):
            if len(rollouts) > MAX_ROLLOUTS_PACKED_ON_LOOP:
                return True
            return sum(rollout.completion.tree_spans for rollout in rollouts) > MAX_SPANS_PACKED_ON_LOOP
        case EncodeTexts(texts=texts):
            return len(texts) > MAX_TEXTS_PACKED_ON_LOOP or sum(text.bytes for text in texts) > MAX_TEXT_BYTES_PACKED_ON_LOOP
        case _:
            return False


def _settle(future: asyncio.Future[Any] | None, outcome: object) -> None:
    if future is None or future.done():
        return  # whoever asked has left
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
