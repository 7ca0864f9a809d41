"""Main module of a worker process, which runs the engine (the language model and its probes) on one device.

The server's front process, which owns the port, does not import this module, but starts it by its name. So the front process never imports
torch.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
import structlog
from numpy.typing import NDArray

from probescore.types import FROZEN
from probescore_server.activity import ACTIVITY
from probescore_server.errors import (
    FailedPrecondition,
    InternalFault,
    InvalidRequest,
    OutOfMemory,
    ProbeRefused,
    ReadingIncomplete,
    StartupError,
    WorkerUnavailable,
)
from probescore_server.failures import FailureKind, kind_of
from probescore_server.logs import configure_logs
from probescore_server.reading_paths import check_links
from probescore_server.rollouts import ScoredBatch
from probescore_server.spool import SpooledFile
from probescore_server.validation.texts import ChatLimits, PendingText
from probescore_server.workers.messages import (
    READING_AGAIN,
    BatchScored,
    CancelRollout,
    CancelTexts,
    DeviceLost,
    DropReading,
    EncodeTexts,
    Failed,
    FromWorker,
    Heartbeat,
    HoldProbes,
    LoadingProgress,
    LoadReading,
    MemoryMoved,
    Order,
    ProbesHeld,
    ReadingLoaded,
    ReadingSource,
    Ready,
    Refused,
    ScoreBatch,
    Sleep,
    Stop,
    TextsEncoded,
    Wake,
    WorkerSpec,
)
from probescore_server.workers.text_queue import TextQueue, TokenisingLane
from probescore_server.workers.transport import BlockingEnd

if TYPE_CHECKING:
    from probescore.types import LoadedReading, Reading
    from probescore_server.engine.engine import Engine
    from probescore_server.engine.served_probes import ServedProbes
    from probescore_server.probes.format.probe_file import ProbeFile

logger = structlog.get_logger(__name__)

# A worker sends a heartbeat after this share of the time for which it may be silent, and at least this often.
HEARTBEAT_SHARE = 0.1
MAX_HEARTBEAT_SECONDS = 1.0

# A worker reports its memory use this many seconds after a response, and this often while it is never without work.
OCCUPANCY_DELAY = 0.005
STATISTICS_SECONDS = 1.0

# A batch of golden rollouts of a new probe, for which all other batches wait, may take this share of the time for one step of a batch.
GOLDEN_SHARE = 0.5


def run_worker(connection: socket.socket, spec: WorkerSpec) -> None:
    """Runs a worker process: loads the model and probes, and executes orders until it is told to stop or the server's front process has
    ended.

    Args:
        connection: the worker's end of the socket pair that connects the worker with the front process.
        spec: the model and probes that the worker loads, and its device.
    """
    # The front process decides when a worker ends: Ctrl-C and a supervisor's SIGTERM reach the whole group, but accepted work is
    # finished; of SIGHUP the front process tells the worker what follows.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    configure_logs(spec.settings.log_format, spec.settings.log_level)
    _WorkerRuntime(BlockingEnd(connection), spec).run()


@dataclass(frozen=True, eq=False)
class _ProbesReady:
    """Order that one thread of a worker process gives to the main thread: to serve probes that were loaded and checked while batches
    computed.
    """

    number: int
    probes: ServedProbes
    keys: dict[str, str]
    refusals: tuple[ProbeRefused, ...]
    seconds: float


@dataclass(frozen=True, eq=False)
class _ReadingReady:
    """Order that one thread of a worker process gives to the main thread: to say that a reading was loaded, between two batches."""

    number: int
    loaded: LoadedReading


_MainOrder = Order | DropReading | _ProbesReady | _ReadingReady


class _WorkerRuntime:
    """Set of threads of a worker process: the main thread loads and computes, one thread reads messages, two tokenise, one loads and checks
    probes and readings while batches compute, and one sends heartbeats.
    """

    def __init__(self, pipe: BlockingEnd, spec: WorkerSpec) -> None:
        self._pipe = pipe
        self._spec = spec
        self._orders: SimpleQueue[_MainOrder | None] = SimpleQueue()
        self._to_load: SimpleQueue[HoldProbes | LoadReading | None] = SimpleQueue()  # None: to return memory that was freed.
        self._statistics_sent = 0.0
        self._texts = TextQueue()
        self._cancelled: dict[int, set[int]] = {}  # It holds the indices given up, by batch.

    def run(self) -> None:
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()
        try:
            engine, keys = self._load()
        except StartupError as error:
            self._send(Refused(error))
            return
        except Exception as error:
            logger.exception("loading failed")
            self._send(Refused(StartupError(f"loading failed: {type(error).__name__}: {error}")))
            return
        # What was loaded stays: without this, every full garbage collection would look through it, for 0.2 seconds.
        gc.collect()
        gc.freeze()
        for lane in TokenisingLane:
            threading.Thread(target=self._encode, args=(engine, lane), daemon=True).start()
        self._load_again(engine)
        threading.Thread(target=self._load_beside, args=(engine,), daemon=True).start()
        self._send(Ready(engine.info, keys, _readings_of(engine)))
        self._send_statistics(engine)
        while (order := self._next_order(engine)) is not None:
            match order:
                case ScoreBatch():
                    self._score(engine, order)
                case Sleep():
                    self._sleep(engine, order)
                case Wake():
                    self._wake(engine, order)
                case _ProbesReady():
                    self._adopt_probes(engine, order)
                case _ReadingReady():
                    self._send(ReadingLoaded(order.number, order.loaded, _readings_of(engine)))
                case DropReading():
                    self._drop_reading(engine, order)
            del order  # It may be the last to hold probes that are not served any more.

    def _next_order(self, engine: Engine) -> _MainOrder | None:
        """Waits for the next order (a message from the server's front process that needs a response) and returns it; ``None`` means that
        the worker process must stop.

        The worker process's statistics are also sent here, whenever no order waits, and every second otherwise. They are sent shortly after
        a response and not together with it, since the front process is busy with the response at first.
        """
        try:
            order = self._orders.get(timeout=OCCUPANCY_DELAY)
        except Empty:
            self._send_statistics(engine)
            return self._orders.get()
        if time.monotonic() > self._statistics_sent + STATISTICS_SECONDS:
            self._send_statistics(engine)
        return order

    def _send_statistics(self, engine: Engine) -> None:
        self._statistics_sent = time.monotonic()
        self._send(engine.statistics())

    def _load(self) -> tuple[Engine, dict[str, str]]:
        settings = self._spec.settings
        # These are read once, when the libraries are loaded. The warnings and reports of transformers are for people who train.
        os.environ.update(OMP_NUM_THREADS=str(self._spec.threads), TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1")
        # Threads that spin while they wait make small batches many times slower as soon as another process wants a core.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        import torch

        from probescore_server.engine.engine import Engine
        from probescore_server.probes.loading.compatibility import is_accepted

        torch.set_num_threads(self._spec.threads)
        if self._spec.device.startswith("cuda"):
            torch.cuda.set_per_process_memory_fraction(settings.device_memory_fraction, self._spec.device)
        files = _parse(self._spec.probes)
        accept_mismatch = settings.accept_mismatch
        if not self._spec.is_first:
            accept_mismatch = tuple(name for name in accept_mismatch if any(is_accepted(file.manifest, [name]) for file in files.values()))
        try:
            engine = Engine.load(
                settings.model,
                [*files.values()],
                taps=settings.allow_activations,
                revision=settings.revision,
                dtype=settings.dtype,
                device=self._spec.device,
                device_map=None if settings.device_map == "none" else settings.device_map,
                accept_mismatch=accept_mismatch,
                trust_remote_code=settings.trust_remote_code,
                max_kv_cache_bytes=settings.kv_cache_bytes,
                min_layers=self._spec.min_layers,
                report=lambda message: self._send(LoadingProgress(message)),
            )
        except InvalidRequest as error:  # It is about the taps, the only argument that a request may have too.
            raise StartupError(f"allow_activations: {error.problem}") from None
        return engine, {sha256: file.manifest.key for sha256, file in files.items()}

    def _send(self, message: FromWorker) -> None:
        self._pipe.send(message)

    def _read(self) -> None:
        while True:
            try:
                message = self._pipe.receive()
            except (EOFError, OSError):
                # The front process has ended, so no result is needed any more.
                os._exit(1)
            except Exception:
                # The front process would wait for ever for the response to an unreadable message; the next process starts afresh.
                logger.exception("reading a message failed")
                os._exit(1)
            match message:
                case ScoreBatch():
                    self._cancelled[message.number] = set()
                    self._orders.put(message)
                case CancelRollout():
                    # There is no entry for a batch whose results have been sent.
                    self._cancelled.get(message.number, set()).add(message.index)
                case EncodeTexts():
                    self._texts.add(message.number, message.texts)
                case CancelTexts():
                    self._texts.drop(message.number)
                case Sleep() | Wake() | DropReading():
                    self._orders.put(message)
                case HoldProbes() | LoadReading():
                    self._to_load.put(message)
                case Stop():
                    self._orders.put(None)

    def _beat(self) -> None:
        """Sends heartbeats (messages that show that the worker process runs) for ever, even while the main thread computes, since libraries
        let other threads run meanwhile.
        """
        seconds = min(HEARTBEAT_SHARE * self._spec.settings.worker_silent_seconds, MAX_HEARTBEAT_SECONDS)
        while True:
            try:
                self._send(Heartbeat(ACTIVITY.step, self._texts.in_hand()))
            except OSError:
                return  # The front process has ended; the thread that reads the pipe ends this process.
            time.sleep(seconds)

    def _end_if_lost(self, error: Exception) -> None:
        """Ends the worker process if an error says that its device has failed. The server's front process then gives the work to another
        worker process.
        """
        if kind_of(error) is FailureKind.DEVICE_LOST:
            self._send(DeviceLost(_logged_fault("the device is lost").incident))
            os._exit(1)

    def _score(self, engine: Engine, batch: ScoreBatch) -> None:
        started = time.monotonic()
        ACTIVITY.begin_order(batch.number, batch.tokens)
        failure: OutOfMemory | InternalFault
        try:
            results = engine.score_rollouts(batch.rollouts, is_cancelled=self._cancelled[batch.number].__contains__)
            self._send(BatchScored(batch.number, ScoredBatch(tuple(results), time.monotonic() - started)))
            return
        except Exception as error:
            self._end_if_lost(error)
            if kind_of(error) is FailureKind.MEMORY_SHORT:
                failure = OutOfMemory(batch.tokens)
                logger.warning("memory is short", problem=str(error), rollouts=len(batch.rollouts))
            else:
                failure = _logged_fault("a batch failed", rollouts=len(batch.rollouts))
        finally:
            del self._cancelled[batch.number]
        if isinstance(failure, OutOfMemory):
            try:
                engine.free_memory()  # It comes only now since the exception held what the batch had allocated.
            except Exception as error:
                self._end_if_lost(error)
                _logged_fault("freeing memory failed")
        self._send(Failed(batch.number, failure))

    def _sleep(self, engine: Engine, order: Sleep) -> None:
        try:
            self._send(MemoryMoved(order.number, engine.sleep()))
        except Exception as error:
            self._end_if_lost(error)
            self._send(Failed(order.number, _logged_fault("falling asleep failed")))

    def _wake(self, engine: Engine, order: Wake) -> None:
        try:
            self._send(MemoryMoved(order.number, engine.wake()))
        except WorkerUnavailable as error:
            self._send(Failed(order.number, error))
        except Exception as error:
            self._end_if_lost(error)
            # Weights that may not have come back as they were must not score: the next process reads them from the files.
            logger.exception("waking up failed")
            os._exit(1)

    def _load_beside(self, engine: Engine) -> None:
        """Loads and checks probes and readings for ever, one order at a time, in a thread of the worker process beside the batches that the
        main thread computes.
        """
        while True:
            order = self._to_load.get()
            if order is None:
                engine.trim()
                continue
            try:
                if isinstance(order, LoadReading):
                    self._orders.put(_ReadingReady(order.number, self._load_reading(engine, order.source)))
                else:
                    self._orders.put(self._prepared(engine, order))
            except Exception as error:
                self._end_if_lost(error)
                if isinstance(order, LoadReading) and isinstance(error, InvalidRequest | FailedPrecondition | ReadingIncomplete):
                    self._send(Failed(order.number, error))
                else:
                    self._send(Failed(order.number, _logged_fault("loading failed")))
                self._to_load.put(None)  # The exception held what was loaded until now.

    def _load_reading(self, engine: Engine, source: ReadingSource) -> LoadedReading:
        """Loads a reading, and checks the links in its directory once more, since it may be long ago that they were checked."""
        check_links(source.directory, self._spec.settings.readings_root or source.directory)
        try:
            return engine.load_reading(source.slot, source.directory, expected_id=source.id or None)
        except Exception as error:
            if kind_of(error) is not FailureKind.MEMORY_SHORT:
                raise
            logger.warning("memory is short for a reading", problem=str(error))
        problem = "memory is short for this reading; unload another one, or load it in place of the one before (in_place)"
        raise FailedPrecondition(problem, "READING_OUT_OF_MEMORY")

    def _load_again(self, engine: Engine) -> None:
        """Loads the readings that the worker process before this one had, as far as their files are still the same."""
        if not self._spec.readings:
            return
        self._send(LoadingProgress(READING_AGAIN))
        for source in self._spec.readings:
            try:
                self._load_reading(engine, source)
            except Exception as error:
                self._end_if_lost(error)
                logger.exception("a reading cannot be loaded again", directory=str(source.directory), id=source.id)
        self._send(LoadingProgress("ready"))

    def _drop_reading(self, engine: Engine, order: DropReading) -> None:
        with suppress(InvalidRequest):  # It is gone already.
            engine.unload_reading(order.slot)
        self._to_load.put(None)

    def _prepared(self, engine: Engine, order: HoldProbes) -> _ProbesReady:
        started, settings = time.monotonic(), self._spec.settings
        refusals: list[ProbeRefused] = []
        files = _parse(order.files, refusals)
        checks: dict[str, Any] = {"accept_mismatch": settings.accept_mismatch, "max_batch_seconds": GOLDEN_SHARE * settings.step_seconds}
        try:
            probes, found = engine.prepare_probes([*files.values()], **checks)
        except Exception as error:
            new = [file for file in files.values() if not engine.serves(file)]
            if kind_of(error) is not FailureKind.MEMORY_SHORT or not new:
                raise
            logger.warning("memory is short for probes", problem=str(error))
            found = [ProbeRefused(file.file, "file", "a probe for which memory is short", "room for it on the device") for file in new]
            probes, _ = engine.prepare_probes([file for file in files.values() if file not in new], **checks)
        held = {sha256: file.manifest.key for sha256, file in files.items() if probes.has(file.manifest)}
        return _ProbesReady(order.number, probes, held, (*refusals, *found), time.monotonic() - started)

    def _adopt_probes(self, engine: Engine, ready: _ProbesReady) -> None:
        engine.adopt_probes(ready.probes)
        self._send(ProbesHeld(ready.number, engine.info, ready.keys, ready.refusals, ready.seconds, _readings_of(engine)))
        self._to_load.put(None)

    def _encode(self, engine: Engine, lane: TokenisingLane) -> None:
        settings = self._spec.settings
        limits = ChatLimits(settings.max_text_bytes_per_token * settings.max_rollout_tokens, settings.max_chat_seconds)
        while True:
            number, text = self._texts.take(lane)
            failure: InvalidRequest | InternalFault
            try:
                ids = _encode_one(engine, text, limits)
            except InvalidRequest as error:
                failure = error
            except Exception:
                failure = _logged_fault("tokenising failed")
            else:
                if (all_ids := self._texts.done(number, text, ids)) is not None:
                    self._send(TextsEncoded(number, all_ids))
                continue
            if self._texts.drop(number):
                self._send(Failed(number, failure))


def _parse(spooled: Sequence[SpooledFile], refusals: list[ProbeRefused] | None = None) -> dict[str, ProbeFile]:
    """Parses probe files, and returns them in a dictionary keyed by the digest of each file's content.

    Args:
        spooled: where the content of each file is kept in memory.
        refusals: list that receives the errors of refused files; ``None`` = the first such error is raised.

    Raises:
        ProbeRefused: a file fails a check that needs no model.
    """
    from probescore_server.probes.format.probe_file import parse_probe_file

    files = {}
    for each in spooled:
        try:
            adapter = None if each.adapter is None else each.adapter.read()
            files[each.sha256] = parse_probe_file(each.read(), each.file, adapter)
        except ProbeRefused as refusal:
            if refusals is None:
                raise
            refusals.append(refusal)
    return files


def _readings_of(engine: Engine) -> dict[str, Reading]:
    """Returns the descriptions of the readings beside the frozen model that an engine holds, by their slots."""
    return {reading.name: reading for reading in engine.readings() if reading.name != FROZEN}


def _encode_one(engine: Engine, text: PendingText, limits: ChatLimits) -> NDArray[np.int32]:
    if isinstance(text.content, str):
        return engine.encode_completion(text.content, field=text.field)
    return engine.encode_prompt(text.content, field=text.field, limits=limits)


def _logged_fault(event: str, **context: int) -> InternalFault:
    fault = InternalFault.new()
    logger.exception(event, incident=fault.incident, **context)
    return fault
