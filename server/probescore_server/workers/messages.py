"""Defines the messages between the server's front process, which owns the port, and a worker process: frozen dataclasses, pickled and sent
over a socket pair that only these two processes have.

An order is a message that gets a response. The ``number`` of the response is that of its order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from probescore.types import LoadedReading, Reading, Transfer
from probescore_server.activity import ActivityStep, TextBeingTokenised
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
from probescore_server.rollouts import CheckedRollout, EngineInfo, EngineStatistics, ScoredBatch
from probescore_server.settings import ServerSettings
from probescore_server.spool import SpooledFile
from probescore_server.validation.texts import PendingText
from probescore_server.workers.codec import Encoded, decode_results, decode_rollouts, encode_results, encode_rollouts

READING_AGAIN = "reading adapters and checkpoints again"
"""Text of the step of a worker's start in which it loads the readings that the worker process before it had."""


@dataclass(frozen=True)
class ReadingSource:
    """Value object that says which files a worker process makes a reading of (an adapter or checkpoint beside the frozen model).

    Attributes:
        slot: the name under which workers hold the version: one for each load, whatever name requests use for the reading.
        directory: the directory of the files, with every link resolved.
        id: the only version that is to be loaded; empty = the one that the files are.
    """

    slot: str
    directory: Path
    id: str = ""


@dataclass(frozen=True)
class WorkerSpec:
    """Value object that says which model and probes a worker process loads, and on which device it computes.

    Attributes:
        settings: the server's settings, which name the model and probes.
        device: the device, such as ``cpu`` or ``cuda:0``.
        threads: number of CPU threads that the worker uses.
        probes: where the content of each probe file is kept in memory.
        min_layers: least number of the model's blocks to load.
        is_first: whether no worker of the server has been ready yet. A name in the setting ``accept_mismatch`` (probes that are served
            though made for another model revision) that belongs to no probe is then refused; later the probe may have been removed.
        readings: the readings to load; one whose files are no longer the same is left out.
    """

    settings: ServerSettings
    device: str
    threads: int
    probes: tuple[SpooledFile, ...] = ()
    min_layers: int = 0
    is_first: bool = True
    readings: tuple[ReadingSource, ...] = ()


# -------------------------------------------------------------------------------------------------------------------- to a worker


@dataclass(frozen=True)
class ScoreBatch:
    """Message from the server's front process that orders a worker process to score a batch of rollouts after its earlier batches. The
    response is ``BatchScored`` or ``Failed``.
    """

    number: int
    rollouts: Sequence[CheckedRollout]

    @property
    def tokens(self) -> int:
        """Returns the largest number of tokens that computing a batch of rollouts can cost, with the prompt of each rollout counted."""
        return sum(rollout.tokens for rollout in self.rollouts)

    def __reduce__(self) -> tuple[Callable[[int, Encoded], ScoreBatch], tuple[int, Encoded]]:
        return _score_batch, (self.number, encode_rollouts(self.rollouts))


def _score_batch(number: int, rollouts: Encoded) -> ScoreBatch:
    return ScoreBatch(number, decode_rollouts(rollouts))


@dataclass(frozen=True)
class CancelRollout:
    """Message from the server's front process that tells a worker process to cancel the rollout ``index`` of the batch ``number``. It has
    no effect once the batch's results are sent.
    """

    number: int
    index: int


@dataclass(frozen=True)
class EncodeTexts:
    """Message from the server's front process that orders a worker process to tokenise texts while batches compute. The response is
    ``TextsEncoded`` or ``Failed``.
    """

    number: int
    texts: Sequence[PendingText]


@dataclass(frozen=True)
class CancelTexts:
    """Message from the server's front process that tells a worker process to drop the texts that an earlier ``EncodeTexts`` message with
    the same number gave it to tokenise. That message then gets no response.
    """

    number: int


@dataclass(frozen=True)
class Sleep:
    """Message from the server's front process that orders a worker process to free its device's memory after its earlier batches.

    The response is ``MemoryMoved``, or ``Failed`` if the worker could not do so and is awake as before.
    """

    number: int


@dataclass(frozen=True)
class Wake:
    """Message from the server's front process that orders a sleeping worker process to take its device's memory again.

    The response is ``MemoryMoved``, or ``Failed`` if the worker could not do so and is asleep as before.
    """

    number: int


@dataclass(frozen=True)
class HoldProbes:
    """Message from the server's front process that orders a worker process to serve exactly the probes of the files that the message names.

    New probes are loaded and checked while batches compute, and all are served from a moment between two batches on; a batch that was sent
    before is still scored with the earlier probes. The response is ``ProbesHeld`` or ``Failed``.
    """

    number: int
    files: tuple[SpooledFile, ...]


@dataclass(frozen=True)
class LoadReading:
    """Message from the server's front process that orders a worker process to load a reading (an adapter or checkpoint beside the frozen
    model) while batches compute. The response is ``ReadingLoaded`` or ``Failed``.
    """

    number: int
    source: ReadingSource


@dataclass(frozen=True)
class DropReading:
    """Message from the server's front process that tells a worker process that no later batch reads the version in a slot, so that its
    memory is freed after the batches that were sent before.
    """

    slot: str


@dataclass(frozen=True)
class Stop:
    """Message from the server's front process that tells a worker process to end after the orders that it was given before."""


Order = ScoreBatch | Sleep | Wake
ToWorker = ScoreBatch | CancelRollout | EncodeTexts | CancelTexts | Sleep | Wake | HoldProbes | LoadReading | DropReading | Stop

# ------------------------------------------------------------------------------------------------------------------ from a worker


@dataclass(frozen=True)
class LoadingProgress:
    """Message from a worker process that says, in a text for people, which step of loading the model and probes it has begun."""

    message: str


@dataclass(frozen=True)
class Ready:
    """Message from a worker process that it has loaded and tested the model and probes that ``info`` describes, and can score.

    ``keys`` is a dictionary from the digest of each probe file's content to the probe's key ``name@version``, and ``readings`` one of the
    descriptions of the readings that the worker holds, by their slots.
    """

    info: EngineInfo
    keys: dict[str, str] = field(default_factory=dict)
    readings: dict[str, Reading] = field(default_factory=dict)


@dataclass(frozen=True)
class Refused:
    """Message from a worker process with the reason why it cannot start with its settings."""

    error: StartupError


@dataclass(frozen=True)
class BatchScored:
    """Response of a worker process to the ``ScoreBatch`` message with the same number, with the results of the batch's rollouts."""

    number: int
    batch: ScoredBatch

    def __reduce__(self) -> tuple[Callable[[int, Encoded, float], BatchScored], tuple[int, Encoded, float]]:
        return _batch_scored, (self.number, encode_results(self.batch.results), self.batch.compute_seconds)


def _batch_scored(number: int, results: Encoded, compute_seconds: float) -> BatchScored:
    return BatchScored(number, ScoredBatch(decode_results(results), compute_seconds))


@dataclass(frozen=True)
class TextsEncoded:
    """Response of a worker process to the ``EncodeTexts`` message with the same number: a dictionary, keyed by ``PendingText.field``, of
    each text's token ids, ``(T,)`` int32.
    """

    number: int
    ids: dict[str, NDArray[np.int32]]


@dataclass(frozen=True)
class MemoryMoved:
    """Response of a worker process to the ``Sleep`` or ``Wake`` message with the same number, with the bytes of memory moved and the
    seconds taken.
    """

    number: int
    transfer: Transfer


@dataclass(frozen=True)
class ProbesHeld:
    """Response of a worker process to the ``HoldProbes`` message with the same number, which named the probe files to serve.

    Attributes:
        number: the number of that message.
        info: a description of the model and of the probes that the worker serves now.
        keys: a dictionary from the digest of the content of each file that is served to the probe's key ``name@version``.
        refusals: the refusals of the other files, which are not served.
        seconds: the seconds that loading and checking took.
        readings: descriptions of the readings that the worker holds, by their slots; what they say of probes is true of those served now.
    """

    number: int
    info: EngineInfo
    keys: dict[str, str]
    refusals: tuple[ProbeRefused, ...]
    seconds: float
    readings: dict[str, Reading] = field(default_factory=dict)


@dataclass(frozen=True)
class ReadingLoaded:
    """Response of a worker process to the ``LoadReading`` message with the same number: what was loaded, and descriptions of the readings
    that the worker holds now, by their slots.
    """

    number: int
    loaded: LoadedReading
    readings: dict[str, Reading]


@dataclass(frozen=True)
class Failed:
    """Response of a worker process with an error, to any order of the server's front process.

    Of an unexpected exception only an incident number is sent, as an ``InternalFault``; the worker's log has the details under this number.
    """

    number: int
    error: InvalidRequest | FailedPrecondition | InternalFault | OutOfMemory | ReadingIncomplete | WorkerUnavailable


@dataclass(frozen=True)
class Heartbeat:
    """Message that a worker process sends at intervals to show that it runs; it is not a response to an order.

    Attributes:
        step: the step of a batch (such as one run of a graph) that is being computed now or, if none is, the last one.
        texts: the text that each tokenising thread works on now.
    """

    step: ActivityStep
    texts: tuple[TextBeingTokenised, ...]


@dataclass(frozen=True)
class DeviceLost:
    """Message from a worker process that its device has failed for good, so that it will respond to none of its orders.

    ``incident`` is the number under which the worker's log has the cause.
    """

    incident: str


FromWorker = (
    LoadingProgress
    | Ready
    | Refused
    | BatchScored
    | TextsEncoded
    | MemoryMoved
    | ProbesHeld
    | ReadingLoaded
    | Failed
    | EngineStatistics
    | Heartbeat
    | DeviceLost
)
"""Type of the messages that a worker process sends. ``EngineStatistics`` and ``Heartbeat`` are sent at intervals and are not responses to
orders.
"""
