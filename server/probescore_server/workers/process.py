"""One process of a worker, as the front process sees it: its start, what goes to and fro, a watch whether it gets on, and how it ended."""

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
from probescore_server.offloading import (
    MAX_ROLLOUTS_PICKLED_ON_LOOP,
    MAX_SPANS_PICKLED_ON_LOOP,
    MAX_TEXT_BYTES_PICKLED_ON_LOOP,
    MAX_TEXTS_PICKLED_ON_LOOP,
)
from probescore_server.rollouts import EngineInfo, EngineStatistics
from probescore_server.settings import ServerSettings
from probescore_server.workers.liveness import LivenessWatch, LossReason, WorkerTimeLimits
from probescore_server.workers.messages import (
    BatchScored,
    DeviceLost,
    EncodeTexts,
    Failed,
    FromWorker,
    Heartbeat,
    LoadingProgress,
    MemoryMoved,
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

# By its name: it is imported where it runs.
MAIN = "probescore_server.workers.main:run_worker"

# For the batch that computes when a worker is told to stop; nobody waits for its scores any more.
STOP_SECONDS = 5.0
# For a process that was killed, or whose pipe is closed, to be gone. A driver can hold one for ever: the next one is started beside it.
DEATH_SECONDS = 5.0
# For all weights to leave a device or come back, also to and from memory that is swapped out.
MOVE_SECONDS = 600.0
# Of the shortest limit: how often it is looked whether a worker gets on.
WATCH_SHARE = 0.1
MAX_WATCH_SECONDS = 1.0
# How a process ends by itself that computes something it should not have been given.
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS)
VMSTAT = Path("/proc/vmstat")


def _start_main(main: str, connection: socket.socket, spec: WorkerSpec) -> None:
    """What a worker's process begins with."""
    module, _, function = main.partition(":")
    getattr(importlib.import_module(module), function)(connection, spec)


class WorkerProcess:
    """One process, from its start to its end.

    Attributes:
        ended: set once it is gone, or given up.
        loss: why it is lost, if it was not somebody's will.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, self._theirs = socket.socketpair()
        self.process = context.Process(target=_start_main, args=(MAIN, self._theirs, spec), name=f"probescore-{spec.device}", daemon=True)
        self.ended = asyncio.Event()
        self.loss: LossReason | None = None
        self._spec = spec
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[EngineInfo] = self._loop.create_future()
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self.statistics = EngineStatistics()
        self._pipe = EventLoopEnd(self._receive, self._pipe_closed)
        self._time_limits = _time_limits(spec.settings)
        self._watch = LivenessWatch(self._time_limits, time.monotonic())
        self._starting_with = ""
        self._oom_kills = _oom_kills()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> EngineInfo:
        """Raises ``StartupError`` if it refuses to start, or dies first, or ``WorkerLost`` if it says nothing any more."""
        await asyncio.to_thread(self.process.start)
        self._theirs.close()  # or its death would not close the pipe
        await self._loop.create_unix_connection(lambda: self._pipe, sock=self._ours)
        self._do(self._keep_watch())
        return await self._started

    async def ask(self, message: ScoreBatch | EncodeTexts | Sleep | Wake) -> Any:  # noqa: ANN401
        """The answer to a message; raises what it says, or ``EOFError`` if the process is lost first."""
        if not isinstance(message, EncodeTexts):  # the watch knows of texts from the worker
            self._watch.asked(message.number, _seconds_for(message, self._time_limits), time.monotonic())
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
        """Ends the process, if it still runs, and waits for its end; but not for ever."""
        for task in self._tasks:
            task.cancel()
        if self.loss is None:
            self.send(Stop())
            await self._gone_within(STOP_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            if not await self._gone_within(DEATH_SECONDS):
                logger.error("worker cannot be killed", device=self._spec.device, pid=self.process.pid)
        self._pipe.close()

    async def _gone_within(self, seconds: float) -> bool:
        if self.process.is_alive():
            await asyncio.to_thread(self.process.join, seconds)
        return not self.process.is_alive()

    def blame(self, loss: LossReason) -> None:
        """Says why it is lost, unless that is known. What alone is under way is why, as far as is known."""
        if self.loss is None:
            order = loss.order or (next(iter(self._answers)) if len(self._answers) == 1 else 0)
            self.loss = replace(loss, order=order, doing=self._watch.step.name if self._started.done() else self._starting_with)

    # ---------------------------------------------------------------------------------------------------------- what it says

    def _receive(self, message: FromWorker) -> None:
        now = time.monotonic()
        match message:
            case LoadingProgress():
                self._starting_with = message.message
                logger.info(message.message, device=self._spec.device)
            case Ready():
                self._watch.ready()
                _settle(self._started, message.info)
            case Refused():
                _settle(self._started, StartupError(message.message))
            case BatchScored():
                self._answer(message.number, message.batch, now)
            case TextsEncoded():
                self._answer(message.number, message.ids, now)
            case MemoryMoved():
                self._answer(message.number, message.transfer, now)
            case Failed():
                self._answer(message.number, message.error, now)
            case EngineStatistics():
                self.statistics = message
            case Heartbeat():
                self._watch.at(message.step, now)
                self._watch.tokenises(message.texts, now)
            case DeviceLost():
                self._give_up(LossReason("device", f"its device failed; the server's log has it as incident {message.incident}"))

    def _answer(self, number: int, outcome: object, now: float) -> None:
        self._watch.answered(number, now)
        _settle(self._answers.get(number), outcome)

    # ------------------------------------------------------------------------------------------------------------ how it ends

    async def _keep_watch(self) -> None:
        """Gives it up when it says nothing any more, or does not get on."""
        pause = min(WATCH_SHARE * min(self._time_limits.silent_seconds, self._time_limits.step_seconds), MAX_WATCH_SECONDS)
        while not self.ended.is_set():
            before = time.monotonic()
            await asyncio.sleep(pause)
            now = time.monotonic()
            if now - before > 2 * pause:  # stopped, or suspended with the whole machine: as the worker may have been
                self._watch.excuse(now - before)
            self._watch.heard(self._pipe.heard)
            if loss := self._watch.loss(now):
                self._give_up(loss)

    def _give_up(self, loss: LossReason) -> None:
        self.blame(loss)
        self.process.kill()  # which ends one that is stopped, too
        self._end()

    def _pipe_closed(self) -> None:
        self._do(self._find_out())

    async def _find_out(self) -> None:
        """Its pipe is closed: it is gone, or about to be."""
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
        loss, worker = self.loss, f"the worker on {self._spec.device}"
        if loss is None:
            return StartupError(f"{worker} died while it was starting")
        if loss.reason == "silent":
            return WorkerLost(loss.reason, loss.problem, self._spec.settings.worker_restart_seconds, loss.doing)
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
    """What it may take, until its first step if it has any."""
    return limits.for_tokens(message.tokens) if isinstance(message, ScoreBatch) else MOVE_SECONDS


def _oom_kills() -> int:
    """How often the kernel has killed something since memory was short; 0 where it does not say."""
    try:
        counters = dict(line.split() for line in VMSTAT.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(counters.get("oom_kill", 0))


def _takes_long(message: ToWorker) -> bool:
    """Whether to encode a message takes so long that it would hold up the event loop: it has many rollouts, spans or texts."""
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
        return  # whoever asked has left
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
