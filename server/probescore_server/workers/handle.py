"""The front process's end of a worker: starts it, speaks with it, notices its death and starts it again."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import multiprocessing
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from probescore.types import Transfer
from probescore_server.errors import InternalFault, StartupError, WorkerLost, WorkerUnavailable
from probescore_server.offloading import (
    MAX_ROLLOUTS_PICKLED_ON_LOOP,
    MAX_SPANS_PICKLED_ON_LOOP,
    MAX_TEXT_BYTES_PICKLED_ON_LOOP,
    MAX_TEXTS_PICKLED_ON_LOOP,
)
from probescore_server.rollouts import CheckedRollout, EngineInfo, Occupancy, ScoredBatch
from probescore_server.settings import ServerSettings
from probescore_server.validation import PendingText
from probescore_server.workers.liveness import Loss, Patience, Watch
from probescore_server.workers.messages import (
    Alive,
    BatchScored,
    CancelRollout,
    CancelTexts,
    DeviceLost,
    EncodeTexts,
    Failed,
    FromWorker,
    LoadingProgress,
    Moved,
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
from probescore_server.workers.transport import LoopEnd

logger = structlog.get_logger(__name__)

# By its name: it is imported where it runs.
MAIN = "probescore_server.workers.main:run_worker"

# How much longer than `worker_restart_seconds` the pause between attempts to start may get.
MAX_BACKOFF = 60.0
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


class Pinned:
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


class WorkerProcess:
    """One worker, through all its restarts. Everything here runs on one event loop.

    Args:
        spec: what to load, where.
        on_change: called whenever `ready` or `failed_starts` changes.
        pinned: shared by the workers of one server.
        on_lost: told why, one of ``progress.REASONS_LOST``, whenever it was lost.

    Attributes:
        info: what it has loaded; ``None`` before it was ready for the first time.
        restarts: how often it was started again.
        failed_starts: attempts to start since it was last ready.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        on_change: Callable[[], None],
        pinned: Pinned | None = None,
        on_lost: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self.spec = spec
        self._pinned = pinned or Pinned()
        self.info: EngineInfo | None = None
        self.restarts = 0
        self.failed_starts = 0
        self._on_change = on_change
        self._on_lost = on_lost
        self._stalled_starts = 0  # in a row
        self._changed = asyncio.Event()  # another one after each change
        self._numbers = itertools.count(1)
        self._life: _RunningProcess | None = None  # while it is up
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
            life = _RunningProcess(self.spec)
            try:
                await self._live(life)
            finally:
                self._life = None
                await life.stop()
            loss = life.loss or Loss("died", "")
            why = {"reason": loss.reason, "problem": loss.problem, "doing": loss.doing}
            logger.error("worker died", device=self.spec.device, exit_code=life.process.exitcode, **why)
            self._on_lost(loss.reason)
            self._tell()
            await asyncio.sleep(self._pause_seconds)
            await self._awake.wait()
            self.restarts += 1

    async def _live(self, life: _RunningProcess) -> None:
        """From a start to the death that follows."""
        began = time.monotonic()
        logger.info("starting worker", device=self.spec.device, model=self.spec.settings.model)
        try:
            info = await life.start()
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
            life.blame(Loss("start", str(error)))
            logger.error("worker did not start again", device=self.spec.device, problem=str(error))
            return
        self.info, self._life, self.failed_starts, self._stalled_starts = info, life, 0, 0
        self._start_seconds = time.monotonic() - began
        logger.info("worker ready", device=self.spec.device, seconds=round(self._start_seconds, 1), pid=life.process.pid)
        self._tell()
        await life.ended.wait()

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
        if self._life is not None:
            self._life.send(CancelRollout(number, index))

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
            if self._life is not None:
                self._life.send(CancelTexts(number))
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
        life = self._life
        if life is None or not self.up:
            raise self.unavailable()
        try:
            return await life.ask(message)
        except EOFError:
            unavailable = self.unavailable()
            if (loss := life.loss) is None:
                raise unavailable from None
            raise WorkerLost(loss.reason, loss.problem, unavailable.retry_seconds, loss.doing, loss.order) from None

    def unavailable(self) -> WorkerUnavailable:
        """The error for work that it cannot do before it is up again."""
        return WorkerUnavailable("the worker is down and being restarted", self._pause_seconds + self._start_seconds)

    @property
    def _pause_seconds(self) -> float:
        return self.spec.settings.worker_restart_seconds * min(2.0**self.failed_starts, MAX_BACKOFF)


def _run(main: str, connection: socket.socket, spec: WorkerSpec) -> None:
    """What a worker's process begins with."""
    module, _, function = main.partition(":")
    getattr(importlib.import_module(module), function)(connection, spec)


class _RunningProcess:
    """One process, from its start to its end.

    Attributes:
        ended: set once it is gone, or given up.
        loss: why it is lost, if it was not somebody's will.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, self._theirs = socket.socketpair()
        self.process = context.Process(target=_run, args=(MAIN, self._theirs, spec), name=f"probescore-{spec.device}", daemon=True)
        self.ended = asyncio.Event()
        self.loss: Loss | None = None
        self._spec = spec
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[EngineInfo] = self._loop.create_future()
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self.occupancy = Occupancy()
        self._pipe = LoopEnd(self._receive, self._pipe_closed)
        self._patience = _patience(spec.settings)
        self._watch = Watch(self._patience, time.monotonic())
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
            self._watch.asked(message.number, _seconds_for(message, self._patience), time.monotonic())
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

    def blame(self, loss: Loss) -> None:
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
            case Moved():
                self._answer(message.number, message.transfer, now)
            case Failed():
                self._answer(message.number, message.error, now)
            case Occupancy():
                self.occupancy = message
            case Alive():
                self._watch.at(message.step, now)
                self._watch.tokenises(message.texts, now)
            case DeviceLost():
                self._give_up(Loss("device", f"its device failed; the server's log has it as incident {message.incident}"))

    def _answer(self, number: int, outcome: object, now: float) -> None:
        self._watch.answered(number, now)
        _settle(self._answers.get(number), outcome)

    # ------------------------------------------------------------------------------------------------------------ how it ends

    async def _keep_watch(self) -> None:
        """Gives it up when it says nothing any more, or does not get on."""
        pause = min(WATCH_SHARE * min(self._patience.silent_seconds, self._patience.step_seconds), MAX_WATCH_SECONDS)
        while not self.ended.is_set():
            before = time.monotonic()
            await asyncio.sleep(pause)
            now = time.monotonic()
            if now - before > 2 * pause:  # stopped, or suspended with the whole machine: as the worker may have been
                self._watch.excuse(now - before)
            self._watch.heard(self._pipe.heard)
            if loss := self._watch.loss(now):
                self._give_up(loss)

    def _give_up(self, loss: Loss) -> None:
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
            self.blame(Loss("crash", f"it ended by {signal.Signals(-code).name}"))
        elif code == -signal.SIGKILL and _oom_kills() > self._oom_kills:
            self.blame(Loss("memory", "the system's memory was short, and it was killed for it"))
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


def _patience(settings: ServerSettings) -> Patience:
    return Patience(
        silent_seconds=settings.worker_silent_seconds,
        start_seconds=settings.worker_start_seconds,
        step_seconds=settings.step_seconds,
        step_seconds_per_1000_tokens=settings.step_seconds_per_1000_tokens,
        chat_seconds=settings.max_chat_seconds,
    )


def _seconds_for(message: ScoreBatch | Sleep | Wake, patience: Patience) -> float:
    """What it may take, until its first step if it has any."""
    return patience.for_tokens(message.tokens) if isinstance(message, ScoreBatch) else MOVE_SECONDS


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
