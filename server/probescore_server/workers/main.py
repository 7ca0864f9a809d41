"""The worker: a process of its own that runs the `Engine` on one device. The front process knows this module by its name only."""

from __future__ import annotations

import gc
import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

import numpy as np
import structlog
from numpy.typing import NDArray

from probescore_server.activity import ACTIVITY
from probescore_server.errors import InternalFault, InvalidRequest, OutOfMemory, StartupError, WorkerUnavailable
from probescore_server.failures import FailureKind, kind_of
from probescore_server.logs import configure_logs
from probescore_server.rollouts import ScoredBatch
from probescore_server.validation.texts import ChatLimits, PendingText
from probescore_server.workers.messages import (
    BatchScored,
    CancelRollout,
    CancelTexts,
    DeviceLost,
    EncodeTexts,
    Failed,
    FromWorker,
    Heartbeat,
    LoadingProgress,
    MemoryMoved,
    Order,
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
    from probescore_server.engine.engine import Engine

logger = structlog.get_logger(__name__)

# Of what a worker may be silent, and at most.
HEARTBEAT_SHARE = 0.1
MAX_HEARTBEAT_SECONDS = 1.0

# How long after an answer a worker says what it holds, and how often while it is never without work.
OCCUPANCY_DELAY = 0.005
STATISTICS_SECONDS = 1.0


def run_worker(connection: socket.socket, spec: WorkerSpec) -> None:
    """The main function of a worker process. It lives until it is told to stop or the front process is gone."""
    # The front process decides when a worker ends: Ctrl-C and a supervisor's SIGTERM reach the whole group, but accepted work is finished.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    configure_logs(spec.settings.log_format, spec.settings.log_level)
    _WorkerRuntime(BlockingEnd(connection), spec).run()


class _WorkerRuntime:
    """Its threads: this one loads and computes, one reads the pipe, one for each lane of texts tokenises, one says that the process is
    there.
    """

    def __init__(self, pipe: BlockingEnd, spec: WorkerSpec) -> None:
        self._pipe = pipe
        self._spec = spec
        self._orders: SimpleQueue[Order | None] = SimpleQueue()
        self._statistics_sent = 0.0
        self._texts = TextQueue()
        self._cancelled: dict[int, set[int]] = {}  # by number of a batch that has not been answered, the indices given up

    def run(self) -> None:
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()
        try:
            engine = self._load()
        except StartupError as error:
            self._send(Refused(str(error)))
            return
        except Exception as error:
            logger.exception("loading failed")
            self._send(Refused(f"loading failed: {type(error).__name__}: {error}"))
            return
        # what was loaded stays: without this every full collection would look through it, for 0.2 seconds
        gc.collect()
        gc.freeze()
        for lane in TokenisingLane:
            threading.Thread(target=self._encode, args=(engine, lane), daemon=True).start()
        self._send(Ready(engine.info))
        self._send_statistics(engine)
        while (order := self._next_order(engine)) is not None:
            match order:
                case ScoreBatch():
                    self._score(engine, order)
                case Sleep():
                    self._sleep(engine, order)
                case Wake():
                    self._wake(engine, order)

    def _next_order(self, engine: Engine) -> Order | None:
        """Waits for one. In pauses, and every second without a pause, it says what the engine holds; the front process is busy with an
        answer at first.
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

    def _load(self) -> Engine:
        settings = self._spec.settings
        probes = probe_files(settings.probes)
        # read once, when the libraries are loaded; what transformers warns and reports of is for people who train
        os.environ.update(OMP_NUM_THREADS=str(self._spec.threads), TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1")
        # threads that spin while they wait make small batches many times slower as soon as another process wants a core
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        import torch

        from probescore_server.engine.engine import Engine

        torch.set_num_threads(self._spec.threads)
        if self._spec.device.startswith("cuda"):
            torch.cuda.set_per_process_memory_fraction(settings.device_memory_fraction, self._spec.device)
        return Engine.load(
            settings.model,
            probes,
            revision=settings.revision,
            dtype=settings.dtype,
            device=self._spec.device,
            device_map=None if settings.device_map == "none" else settings.device_map,
            accept_mismatch=settings.accept_mismatch,
            trust_remote_code=settings.trust_remote_code,
            max_kv_cache_bytes=settings.kv_cache_bytes,
            report=lambda message: self._send(LoadingProgress(message)),
        )

    def _send(self, message: FromWorker) -> None:
        self._pipe.send(message)

    def _read(self) -> None:
        while True:
            try:
                message = self._pipe.receive()
            except (EOFError, OSError):
                # The front process is gone; nobody is left to compute for.
                os._exit(1)
            except Exception:
                # a message that is lost would be waited for for ever; the next process starts afresh
                logger.exception("reading a message failed")
                os._exit(1)
            match message:
                case ScoreBatch():
                    self._cancelled[message.number] = set()
                    self._orders.put(message)
                case CancelRollout():
                    # of a batch that is answered nobody looks any more
                    self._cancelled.get(message.number, set()).add(message.index)
                case EncodeTexts():
                    self._texts.add(message.number, message.texts)
                case CancelTexts():
                    self._texts.drop(message.number)
                case Sleep() | Wake():
                    self._orders.put(message)
                case Stop():
                    self._orders.put(None)

    def _beat(self) -> None:
        """Says that the process is there, also while it computes: libraries let other threads run meanwhile."""
        seconds = min(HEARTBEAT_SHARE * self._spec.settings.worker_silent_seconds, MAX_HEARTBEAT_SECONDS)
        while True:
            try:
                self._send(Heartbeat(ACTIVITY.step, self._texts.in_hand()))
            except OSError:
                return  # the front process is gone; whoever reads the pipe ends this one
            time.sleep(seconds)

    def _end_if_lost(self, error: Exception) -> None:
        """Ends the process if its device is lost. The front process tries elsewhere what it has, or here once there is a new one."""
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
                engine.free_memory()  # only now: the exception held what the batch had allocated
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
            # weights that did not come back as they were must not score: the next process reads them from the files
            logger.exception("waking up failed")
            os._exit(1)

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


def probe_files(paths: Sequence[str]) -> list[Path]:
    """Files as they are given, and every ``*.onnx`` of a directory, sorted.

    Raises:
        StartupError: there is none in a directory.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        found = sorted(path.glob("*.onnx")) if path.is_dir() else [path]
        if not found:
            raise StartupError(f"probes: no *.onnx in the directory {path}")
        files += found
    return files


def _encode_one(engine: Engine, text: PendingText, limits: ChatLimits) -> NDArray[np.int32]:
    if isinstance(text.content, str):
        return engine.encode_completion(text.content, field=text.field)
    return engine.encode_prompt(text.content, field=text.field, limits=limits)


def _logged_fault(event: str, **context: int) -> InternalFault:
    fault = InternalFault.new()
    logger.exception(event, incident=fault.incident, **context)
    return fault
