"""Controls one worker process from the server's front process, which owns the port: starts it, exchanges messages, kills it if it is stuck,
and finds out how it ended.
"""

from __future__ import annotations

import asyncio
import importlib
import multiprocessing
import signal
import socket
import time
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog

from probescore_server.errors import StartupError, WorkerLost
from probescore_server.event_loop import (
    MAX_ROLLOUTS_PICKLED_ON_LOOP,
    MAX_SPANS_PICKLED_ON_LOOP,
    MAX_TEXT_BYTES_PICKLED_ON_LOOP,
    MAX_TEXTS_PICKLED_ON_LOOP,
)
from probescore_server.rollouts import EngineStatistics
from probescore_server.settings import ServerSettings
from probescore_server.workers.liveness import LivenessWatch, LossReason, WorkerTimeLimits
from probescore_server.workers.messages import (
    BatchScored,
    DeviceLost,
    EncodeTexts,
    Failed,
    FromWorker,
    Heartbeat,
    HoldProbes,
    LoadingProgress,
    LoadReading,
    MemoryMoved,
    ProbesHeld,
    ReadingLoaded,
    Ready,
    Refused,
    ScoreBatch,
    Sleep,
    Stop,
    TextsEncoded,
    ToWorker,
    Wake,
    WorkerSpec,
)
from probescore_server.workers.transport import EventLoopEnd

logger = structlog.get_logger(__name__)

# It is given by its name since it is imported only in the worker process.
MAIN = "probescore_server.workers.main:run_worker"

# A worker that is told to stop may take these seconds for the batch that computes; nobody waits for its scores any more.
STOP_SECONDS = 5.0
# A process that was killed, or whose pipe is closed, should end within these seconds. A driver can hold one for ever: the next process is
# then started beside it.
DEATH_SECONDS = 5.0
# All weights may take these seconds to leave a device or come back, also to and from memory that is swapped out.
MOVE_SECONDS = 600.0
# A worker is checked for being stuck after this share of its shortest limit, and at least this often.
WATCH_SHARE = 0.1
MAX_WATCH_SECONDS = 1.0
# With these signals a process ends by itself if it computes something that it should not have been given.
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS)
VMSTAT = Path("/proc/vmstat")


def _start_main(main: str, connection: socket.socket, spec: WorkerSpec) -> None:
    """Imports the function that ``main`` names as ``module:function``, and calls the function in the new worker process."""
    module, _, function = main.partition(":")
    getattr(importlib.import_module(module), function)(connection, spec)


class WorkerProcess:
    """Controller of one worker process, from the process's start to its end. It belongs to the server's front process, which owns the port,
    and runs on its event loop.

    Attributes:
        spec: the model, probes and device that the process was started with.
        process: the operating system's process.
        ended: an event that is set once the process has ended or was given up.
        loss: the reason why the process died; ``None`` while it runs, or if it was ended on purpose.
        statistics: the memory use and cache hits that the process last reported.
        starting_with: the step of its start that the process has reported last; empty before the first.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, self._theirs = socket.socketpair()
        self.process = context.Process(target=_start_main, args=(MAIN, self._theirs, spec), name=f"probescore-{spec.device}", daemon=True)
        self.ended = asyncio.Event()
        self.loss: LossReason | None = None
        self.spec = spec
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[Ready] = self._loop.create_future()
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self.statistics = EngineStatistics()
        self._pipe = EventLoopEnd(self._receive, self._pipe_closed)
        self._time_limits = _time_limits(spec.settings)
        self._watch = LivenessWatch(self._time_limits, time.monotonic())
        self.starting_with = ""
        self._oom_kills = _oom_kills()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> Ready:
        """Starts the worker process, waits until it is ready, and returns its description of the model and probes that it has loaded.

        Raises:
            StartupError: the process refuses to start, or ends before it is ready.
            WorkerLost: the process stopped sending messages while it started.
        """
        await asyncio.to_thread(self.process.start)
        self._theirs.close()  # Otherwise the end of the process would not close the pipe.
        await self._loop.create_unix_connection(lambda: self._pipe, sock=self._ours)
        self._do(self._keep_watch())
        return await self._started

    async def ask(self, message: ScoreBatch | EncodeTexts | Sleep | Wake | HoldProbes | LoadReading) -> Any:  # noqa: ANN401
        """Sends an order, such as a batch, to the worker process and returns the response. A response that is an error is raised.

        Raises:
            EOFError: the process ended before it responded.
        """
        # The watch knows of texts from the worker's heartbeats, and probes and readings are loaded beside the batches that it watches.
        if not isinstance(message, EncodeTexts | HoldProbes | LoadReading):
            self._watch.asked(message.number, _seconds_for(message, self._time_limits), time.monotonic())
        answer = self._answers[message.number] = self._loop.create_future()
        self.send(message)
        try:
            return await answer
        finally:
            del self._answers[message.number]

    def send(self, message: ToWorker) -> None:
        """Sends a message to the worker process without waiting. Messages keep their order, and are dropped if the process has ended."""
        self._pipe.send(message, takes_long=_takes_long(message))

    async def finish(self) -> None:
        """Ends the worker process once it has responded to every order that it was given."""
        await asyncio.gather(*self._answers.values(), return_exceptions=True)
        await self.stop()

    async def stop(self) -> None:
        """Ends the worker process if it still runs, first by a message and then by a signal, and waits some seconds for its end."""
        for task in self._tasks:
            task.cancel()
        if self.loss is None:
            self.send(Stop())
            await self._gone_within(STOP_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            if not await self._gone_within(DEATH_SECONDS):
                logger.error("worker cannot be killed", device=self.spec.device, pid=self.process.pid)
        self._pipe.close()

    async def _gone_within(self, seconds: float) -> bool:
        if self.process.is_alive():
            await asyncio.to_thread(self.process.join, seconds)
        return not self.process.is_alive()

    def blame(self, loss: LossReason) -> None:
        """Records why the worker process died, unless a reason is recorded already. If the process had only one order, that order counts as
        the cause.
        """
        if self.loss is None:
            order = loss.order or (next(iter(self._answers)) if len(self._answers) == 1 else 0)
            self.loss = replace(loss, order=order, doing=self._watch.step.name if self._started.done() else self.starting_with)

    # ---------------------------------------------------------------------------------------------------------- what it says

    def _receive(self, message: FromWorker) -> None:
        now = time.monotonic()
        match message:
            case LoadingProgress():
                self.starting_with = message.message
                logger.info(message.message, device=self.spec.device)
            case Ready():
                self._watch.ready()
                _settle(self._started, message)
            case Refused():
                _settle(self._started, message.error)
            case BatchScored():
                self._answer(message.number, message.batch, now)
            case TextsEncoded():
                self._answer(message.number, message.ids, now)
            case MemoryMoved():
                self._answer(message.number, message.transfer, now)
            case ProbesHeld() | ReadingLoaded():
                self._answer(message.number, message, now)
            case Failed():
                self._answer(message.number, message.error, now)
            case EngineStatistics():
                self.statistics = message
            case Heartbeat():
                self._watch.at(message.step, now)
                self._watch.tokenises(message.texts, now)
            case DeviceLost():
                self.give_up(LossReason("device", f"its device failed; the server's log has it as incident {message.incident}"))

    def _answer(self, number: int, outcome: object, now: float) -> None:
        self._watch.answered(number, now)
        _settle(self._answers.get(number), outcome)

    # ------------------------------------------------------------------------------------------------------------ how it ends

    async def _keep_watch(self) -> None:
        """Checks at intervals whether the worker process is stuck, and kills the process if it sends nothing or its work makes no
        progress.
        """
        pause = min(WATCH_SHARE * min(self._time_limits.silent_seconds, self._time_limits.step_seconds), MAX_WATCH_SECONDS)
        while not self.ended.is_set():
            before = time.monotonic()
            await asyncio.sleep(pause)
            now = time.monotonic()
            if now - before > 2 * pause:  # This process was stopped, or the machine suspended, and maybe the worker too.
                self._watch.excuse(now - before)
            self._watch.heard(self._pipe.heard)
            if loss := self._watch.loss(now):
                self.give_up(loss)

    def give_up(self, loss: LossReason) -> None:
        """Kills the worker process, and records the given reason why it was lost."""
        self.blame(loss)
        self.process.kill()  # This also ends a process that is stopped.
        self._end()

    def _pipe_closed(self) -> None:
        self._do(self._find_out())

    async def _find_out(self) -> None:
        """Finds out how the worker process ended, once its socket is closed, and makes all waiting ``start`` and ``ask`` function calls
        raise an error.
        """
        await self._gone_within(DEATH_SECONDS)
        code = self.process.exitcode
        if code is not None and -code in CRASHES:
            self.blame(LossReason("crash", f"it ended by {signal.Signals(-code).name}"))
        elif code == -signal.SIGKILL and _oom_kills() > self._oom_kills:
            self.blame(LossReason("memory", "the system's memory was short, and it was killed for it"))
        self._end()

    def _end(self) -> None:
        self.ended.set()
        _settle(self._started, self._failed_start())
        for answer in self._answers.values():
            _settle(answer, EOFError())

    def _failed_start(self) -> StartupError | WorkerLost:
        loss, worker = self.loss, f"the worker on {self.spec.device}"
        if loss is None:
            return StartupError(f"{worker} died while it was starting")
        if loss.reason == "silent":
            return WorkerLost(loss.reason, loss.problem, self.spec.settings.worker_restart_seconds, loss.doing)
        return StartupError(f"{worker} died while it was starting: {loss.problem}; it was at: {loss.doing or 'its start'}")

    def _do(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _time_limits(settings: ServerSettings) -> WorkerTimeLimits:
    return WorkerTimeLimits(
        silent_seconds=settings.worker_silent_seconds,
        start_seconds=settings.worker_start_seconds,
        step_seconds=settings.step_seconds,
        step_seconds_per_1000_tokens=settings.step_seconds_per_1000_tokens,
        chat_seconds=settings.max_chat_seconds,
    )


def _seconds_for(message: ScoreBatch | Sleep | Wake, limits: WorkerTimeLimits) -> float:
    """Returns the largest number of seconds that a worker process may take to respond to an order or, for a batch, to begin the batch's
    first step.
    """
    return limits.for_tokens(message.tokens) if isinstance(message, ScoreBatch) else MOVE_SECONDS


def _oom_kills() -> int:
    """Returns how many processes the kernel has killed so far for lack of memory; 0 if the kernel does not report this."""
    try:
        counters = dict(line.split() for line in VMSTAT.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(counters.get("oom_kill", 0))


def _takes_long(message: ToWorker) -> bool:
    """Returns whether a message to a worker process has so many rollouts, spans (token ranges) or texts that encoding it would block the
    event loop too long.
    """
    match message:
        case ScoreBatch(rollouts=rollouts):
            if len(rollouts) > MAX_ROLLOUTS_PICKLED_ON_LOOP:
                return True
            return sum(rollout.completion.tree_spans for rollout in rollouts) > MAX_SPANS_PICKLED_ON_LOOP
        case EncodeTexts(texts=texts):
            return len(texts) > MAX_TEXTS_PICKLED_ON_LOOP or sum(text.bytes for text in texts) > MAX_TEXT_BYTES_PICKLED_ON_LOOP
        case _:
            return False


def _settle(future: asyncio.Future[Any] | None, outcome: object) -> None:
    if future is None or future.done():
        return  # Nobody waits for it any more.
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
