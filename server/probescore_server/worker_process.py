"""The front process's end of a worker: starts it, speaks with it, notices its death and starts it again."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import multiprocessing
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from probescore_server.errors import StartupError, WorkerUnavailable
from probescore_server.requests import PendingText
from probescore_server.rollouts import EngineInfo, Rollout, ScoredBatch
from probescore_server.worker import (
    BatchScored,
    CancelRollout,
    EncodeTexts,
    Failed,
    FromWorker,
    Progress,
    Ready,
    Refused,
    ScoreBatch,
    Stop,
    TextsEncoded,
    ToWorker,
    WorkerSpec,
    run_worker,
)

logger = structlog.get_logger(__name__)

# How much longer than `worker_restart_seconds` the pause between attempts to start may get.
MAX_BACKOFF = 60.0
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
        self._computing = 0  # number of the newest batch
        self._life: _Life | None = None  # while it is ready
        self._start_seconds = 0.0

    @property
    def ready(self) -> bool:
        """Whether it can score."""
        return self._life is not None

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

    async def score(self, rollouts: Sequence[Rollout]) -> ScoredBatch:
        """Scores one batch; one at a time.

        Raises:
            WorkerUnavailable: it is not up, or died.
            InternalFault: the batch failed.
        """
        self._computing = next(self._numbers)
        batch: ScoredBatch = await self._ask(ScoreBatch(self._computing, rollouts))
        return batch

    def cancel(self, index: int) -> None:
        """Gives up one rollout of the batch that is computing; its result will be ``None``."""
        if self._life is not None:
            self._life.send(CancelRollout(self._computing, index))

    async def encode(self, texts: Sequence[PendingText]) -> dict[str, NDArray[np.int32]]:
        """Tokenises, beside the batch that computes.

        Returns:
            Ids ``(T,)`` int32 by `PendingText.field`.

        Raises:
            InvalidRequest: a text that cannot be tokenised, naming its field.
            WorkerUnavailable: it is not up, or died.
            InternalFault: something else went wrong.
        """
        ids: dict[str, NDArray[np.int32]] = await self._ask(EncodeTexts(next(self._numbers), texts))
        return ids

    async def _ask(self, message: ScoreBatch | EncodeTexts) -> Any:  # noqa: ANN401
        if self._life is None:
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
    """One process, from its start to its end. The pipe is read and written by threads, so that the event loop never waits for it."""

    def __init__(self, spec: WorkerSpec) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, self._theirs = context.Pipe()
        self.process = context.Process(target=run_worker, args=(self._theirs, spec), name=f"probescore-{spec.device}", daemon=True)
        self.ended = asyncio.Event()
        self._spec = spec
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[EngineInfo] = self._loop.create_future()
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="worker-pipe-writer")

    async def start(self) -> EngineInfo:
        """Raises ``StartupError`` if it refuses to start, or dies first."""
        await asyncio.to_thread(self.process.start)
        self._theirs.close()  # or its death would not close the pipe
        threading.Thread(target=self._read, name="worker-pipe-reader", daemon=True).start()
        return await self._started

    async def ask(self, message: ScoreBatch | EncodeTexts) -> Any:  # noqa: ANN401
        """The answer to a message; raises what it says, or ``EOFError`` if the process dies first."""
        answer = self._answers[message.number] = self._loop.create_future()
        self.send(message)
        try:
            return await answer
        finally:
            del self._answers[message.number]

    def send(self, message: ToWorker) -> None:
        """Sends in the background, in order. What a dead process would not get is dropped: the reader notices and answers for it."""
        self._writer.submit(self._write, message)

    async def stop(self) -> None:
        """Ends the process, if it still runs, and waits for its end."""
        self.send(Stop())
        if self.process.is_alive():
            await asyncio.to_thread(self.process.join, STOP_SECONDS)
            self.process.kill()
            await asyncio.to_thread(self.process.join)
        self._writer.shutdown(wait=False)

    def _write(self, message: ToWorker) -> None:
        with contextlib.suppress(OSError):
            self._connection.send(message)

    def _read(self) -> None:
        with self._connection:
            while True:
                try:
                    message = self._connection.recv()
                except (EOFError, OSError):
                    break
                self._loop.call_soon_threadsafe(self._receive, message)
        self._loop.call_soon_threadsafe(self._end)

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
            case Failed():
                _settle(self._answers.get(message.number), message.error)

    def _end(self) -> None:
        _settle(self._started, StartupError(f"the worker on {self._spec.device} died while it was starting"))
        for answer in self._answers.values():
            _settle(answer, EOFError())
        self.ended.set()


def _settle(future: asyncio.Future[Any] | None, outcome: object) -> None:
    if future is None or future.done():
        return  # whoever asked has left
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
