"""Defines the messages between the front process and a worker process: frozen dataclasses, pickled over a pipe that only these two hold.

An order is a message that is answered. A message's ``number`` is that of the order, by which the answer is matched to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from probescore.types import Transfer
from probescore_server.activity import ActivityStep, TextBeingTokenised
from probescore_server.errors import InternalFault, InvalidRequest, OutOfMemory, WorkerUnavailable
from probescore_server.rollouts import CheckedRollout, EngineInfo, EngineStatistics, ScoredBatch
from probescore_server.settings import ServerSettings
from probescore_server.validation.texts import PendingText
from probescore_server.workers.codec import Encoded, decode_results, decode_rollouts, encode_results, encode_rollouts


@dataclass(frozen=True)
class WorkerSpec:
    """Says what a worker process loads, and where it computes.

    Attributes:
        settings: the server's settings, which name the model and probes.
        device: the device, such as ``cpu`` or ``cuda:0``.
        threads: number of CPU threads that the worker uses.
    """

    settings: ServerSettings
    device: str
    threads: int


# -------------------------------------------------------------------------------------------------------------------- to a worker


@dataclass(frozen=True)
class ScoreBatch:
    """Orders a worker process to score a batch of rollouts after its earlier batches; the answer is ``BatchScored`` or ``Failed``."""

    number: int
    rollouts: Sequence[CheckedRollout]

    @property
    def tokens(self) -> int:
        """Counts the most tokens that computing the batch can cost, with the prompt of each of its rollouts."""
        return sum(rollout.tokens for rollout in self.rollouts)

    def __reduce__(self) -> tuple[Callable[[int, Encoded], ScoreBatch], tuple[int, Encoded]]:
        return _score_batch, (self.number, encode_rollouts(self.rollouts))


def _score_batch(number: int, rollouts: Encoded) -> ScoreBatch:
    return ScoreBatch(number, decode_rollouts(rollouts))


@dataclass(frozen=True)
class CancelRollout:
    """Tells a worker process to give up the rollout ``index`` of the batch ``number``; it has no effect once the batch is answered."""

    number: int
    index: int


@dataclass(frozen=True)
class EncodeTexts:
    """Orders a worker process to tokenise texts, while batches compute; the answer is ``TextsEncoded`` or ``Failed``."""

    number: int
    texts: Sequence[PendingText]


@dataclass(frozen=True)
class CancelTexts:
    """Tells a worker process to give up the texts of the ``EncodeTexts`` of this number, which then gets no answer."""

    number: int


@dataclass(frozen=True)
class Sleep:
    """Orders a worker process to give its device's memory back after its earlier batches.

    The answer is ``MemoryMoved``, or ``Failed`` if the worker is awake as before.
    """

    number: int


@dataclass(frozen=True)
class Wake:
    """Orders a worker process to take its device's memory again.

    The answer is ``MemoryMoved``, or ``Failed`` if the worker is asleep as before.
    """

    number: int


@dataclass(frozen=True)
class Stop:
    """Tells a worker process to end after the orders that it has."""


Order = ScoreBatch | Sleep | Wake
ToWorker = ScoreBatch | CancelRollout | EncodeTexts | CancelTexts | Sleep | Wake | Stop

# ------------------------------------------------------------------------------------------------------------------ from a worker


@dataclass(frozen=True)
class LoadingProgress:
    """Says, in a text for people, what a worker process does while it starts."""

    message: str


@dataclass(frozen=True)
class Ready:
    """Says that a worker process has loaded and tested the model and the probes that ``info`` describes, and can score."""

    info: EngineInfo


@dataclass(frozen=True)
class Refused:
    """Says, in a text for people, why a worker process cannot start as configured."""

    message: str


@dataclass(frozen=True)
class BatchScored:
    """Answers the ``ScoreBatch`` of this number with the results of its rollouts."""

    number: int
    batch: ScoredBatch

    def __reduce__(self) -> tuple[Callable[[int, Encoded, float], BatchScored], tuple[int, Encoded, float]]:
        return _batch_scored, (self.number, encode_results(self.batch.results), self.batch.compute_seconds)


def _batch_scored(number: int, results: Encoded, compute_seconds: float) -> BatchScored:
    return BatchScored(number, ScoredBatch(decode_results(results), compute_seconds))


@dataclass(frozen=True)
class TextsEncoded:
    """Answers the ``EncodeTexts`` of this number with the token ids of each text, ``(T,)`` int32, by ``PendingText.field``."""

    number: int
    ids: dict[str, NDArray[np.int32]]


@dataclass(frozen=True)
class MemoryMoved:
    """Answers the ``Sleep`` or ``Wake`` of this number with the bytes that were moved and the seconds that it took."""

    number: int
    transfer: Transfer


@dataclass(frozen=True)
class Failed:
    """Answers any order to a worker process with an error.

    Of an unexpected exception only the incident number is sent, as an ``InternalFault``; the worker's log has the details under it.
    """

    number: int
    error: InvalidRequest | InternalFault | OutOfMemory | WorkerUnavailable


@dataclass(frozen=True)
class Heartbeat:
    """Says, at intervals, that a worker process runs; it answers no order.

    Attributes:
        step: the step that computes now, or computed last.
        texts: the text that each tokenising thread works on.
    """

    step: ActivityStep
    texts: tuple[TextBeingTokenised, ...]


@dataclass(frozen=True)
class DeviceLost:
    """Says that a worker process can never compute on its device again and answers none of its orders.

    ``incident`` is the number under which the log has the cause.
    """

    incident: str


FromWorker = (
    LoadingProgress | Ready | Refused | BatchScored | TextsEncoded | MemoryMoved | Failed | EngineStatistics | Heartbeat | DeviceLost
)
"""Is the type of the messages that a worker process sends. Of these, ``EngineStatistics`` is sent at intervals and answers no order."""
