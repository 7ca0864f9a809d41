"""The worker: a process of its own that runs the `Engine` on one device, and what it and the front process say to each other.

Messages are frozen dataclasses over a pipe that only these two processes hold. Torch is imported in the worker only: the front process
imports this module too.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np
import structlog
from numpy.typing import NDArray

from probescore_server.errors import InternalFault, InvalidRequest, StartupError
from probescore_server.logs import configure_logs
from probescore_server.requests import PendingText
from probescore_server.rollouts import EngineInfo, Rollout, ScoredBatch
from probescore_server.settings import ServerSettings

if TYPE_CHECKING:
    from probescore_server.engine import Engine

logger = structlog.get_logger(__name__)


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker loads, and where. `threads` are its CPU threads."""

    settings: ServerSettings
    device: str
    threads: int


# -------------------------------------------------------------------------------------------------------------------- to a worker


@dataclass(frozen=True)
class ScoreBatch:
    """Score these rollouts; answered by `BatchScored` or `Failed`. One at a time."""

    number: int
    rollouts: Sequence[Rollout]


@dataclass(frozen=True)
class CancelRollout:
    """Give up a rollout of batch `number`, if that still computes."""

    number: int
    index: int


@dataclass(frozen=True)
class EncodeTexts:
    """Tokenise these; answered by `TextsEncoded` or `Failed`, while batches compute."""

    number: int
    texts: Sequence[PendingText]


@dataclass(frozen=True)
class Stop:
    """End, after the batch that computes."""


ToWorker = ScoreBatch | CancelRollout | EncodeTexts | Stop

# ------------------------------------------------------------------------------------------------------------------ from a worker


@dataclass(frozen=True)
class Progress:
    """What the worker does while it starts, for people."""

    message: str


@dataclass(frozen=True)
class Ready:
    """Loaded, warm and self-tested."""

    info: EngineInfo


@dataclass(frozen=True)
class Refused:
    """It cannot start as configured."""

    message: str


@dataclass(frozen=True)
class BatchScored:
    """Answers `ScoreBatch`."""

    number: int
    batch: ScoredBatch


@dataclass(frozen=True)
class TextsEncoded:
    """Answers `EncodeTexts`: ids ``(T,)`` int32 by `PendingText.field`."""

    number: int
    ids: dict[str, NDArray[np.int32]]


@dataclass(frozen=True)
class Failed:
    """Answers either; an unexpected exception is in the log under the fault's incident and goes no further."""

    number: int
    error: InvalidRequest | InternalFault


FromWorker = Progress | Ready | Refused | BatchScored | TextsEncoded | Failed

# --------------------------------------------------------------------------------------------------------------------- the worker


def run_worker(connection: Connection, spec: WorkerSpec) -> None:
    """The main function of a worker process. It lives until it is told to stop or the front process is gone."""
    # The front process decides when a worker ends: Ctrl-C and a supervisor's SIGTERM reach the whole group, but accepted work is finished.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    configure_logs(spec.settings.log_format, spec.settings.log_level)
    _Worker(connection, spec).run()


class _Worker:
    """Three threads: this one loads and computes, one reads the pipe, one tokenises."""

    def __init__(self, connection: Connection, spec: WorkerSpec) -> None:
        self._connection = connection
        self._spec = spec
        self._sending = threading.Lock()
        self._batches: SimpleQueue[ScoreBatch | None] = SimpleQueue()
        self._texts: SimpleQueue[EncodeTexts] = SimpleQueue()
        self._newest_batch = 0
        self._cancelled: set[int] = set()

    def run(self) -> None:
        threading.Thread(target=self._read, daemon=True).start()
        try:
            engine = self._load()
        except StartupError as error:
            self._send(Refused(str(error)))
            return
        except Exception as error:
            logger.exception("loading failed")
            self._send(Refused(f"loading failed: {type(error).__name__}: {error}"))
            return
        threading.Thread(target=self._encode, args=(engine,), daemon=True).start()
        self._send(Ready(engine.info))
        while (batch := self._batches.get()) is not None:
            self._score(engine, batch)

    def _load(self) -> Engine:
        settings = self._spec.settings
        probes = probe_files(settings.probes)
        # read once, when the libraries are loaded; what transformers warns and reports of is for people who train
        os.environ.update(OMP_NUM_THREADS=str(self._spec.threads), TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1")
        # threads that spin while they wait make small batches many times slower as soon as another process wants a core
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        import torch

        from probescore_server.engine import Engine

        torch.set_num_threads(self._spec.threads)
        return Engine.load(
            settings.model,
            probes,
            revision=settings.revision,
            dtype=settings.dtype,
            device=self._spec.device,
            accept_mismatch=settings.accept_mismatch,
            trust_remote_code=settings.trust_remote_code,
            report=lambda message: self._send(Progress(message)),
        )

    def _send(self, message: FromWorker) -> None:
        with self._sending:
            self._connection.send(message)

    def _read(self) -> None:
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                # The front process is gone; nobody is left to compute for.
                os._exit(1)
            match message:
                case ScoreBatch():
                    self._newest_batch, self._cancelled = message.number, set()
                    self._batches.put(message)
                case CancelRollout() if message.number == self._newest_batch:
                    self._cancelled.add(message.index)
                case EncodeTexts():
                    self._texts.put(message)
                case Stop():
                    self._batches.put(None)

    def _score(self, engine: Engine, batch: ScoreBatch) -> None:
        cancelled = self._cancelled
        started = time.monotonic()
        try:
            results = engine.score_rollouts(batch.rollouts, is_cancelled=cancelled.__contains__)
        except Exception:
            self._send(Failed(batch.number, _logged_fault("a batch failed", rollouts=len(batch.rollouts))))
        else:
            self._send(BatchScored(batch.number, ScoredBatch(tuple(results), time.monotonic() - started)))

    def _encode(self, engine: Engine) -> None:
        while True:
            request = self._texts.get()
            try:
                ids = {text.field: _encode_one(engine, text) for text in request.texts}
            except InvalidRequest as error:
                self._send(Failed(request.number, error))
            except Exception:
                self._send(Failed(request.number, _logged_fault("tokenising failed")))
            else:
                self._send(TextsEncoded(request.number, ids))


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


def _encode_one(engine: Engine, text: PendingText) -> NDArray[np.int32]:
    if isinstance(text.content, str):
        return engine.encode_completion(text.content, field=text.field)
    return engine.encode_prompt(text.content, field=text.field)


def _logged_fault(event: str, **context: int) -> InternalFault:
    fault = InternalFault.new()
    logger.exception(event, incident=fault.incident, **context)
    return fault
