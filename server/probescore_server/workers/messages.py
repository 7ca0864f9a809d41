"""What the front process and a worker say to each other: frozen dataclasses over a pipe that only these two hold."""

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
    """What a worker loads, and where. `threads` are its CPU threads."""

    settings: ServerSettings
    device: str
    threads: int


# -------------------------------------------------------------------------------------------------------------------- to a worker


@dataclass(frozen=True)
class ScoreBatch:
    """Score these rollouts, after the batches before; answered by `BatchScored` or `Failed`."""

    number: int
    rollouts: Sequence[CheckedRollout]

    @property
    def tokens(self) -> int:
        """The most that it can cost."""
        return sum(rollout.tokens for rollout in self.rollouts)

    def __reduce__(self) -> tuple[Callable[[int, Encoded], ScoreBatch], tuple[int, Encoded]]:
        return _score_batch, (self.number, encode_rollouts(self.rollouts))


def _score_batch(number: int, rollouts: Encoded) -> ScoreBatch:
    return ScoreBatch(number, decode_rollouts(rollouts))


@dataclass(frozen=True)
class CancelRollout:
    """Give up a rollout of batch `number`, if that has not been answered."""

    number: int
    index: int


@dataclass(frozen=True)
class EncodeTexts:
    """Tokenise these; answered by `TextsEncoded` or `Failed`, while batches compute."""

    number: int
    texts: Sequence[PendingText]


@dataclass(frozen=True)
class CancelTexts:
    """Give up the texts of an `EncodeTexts`: what has not been tokenised will not be, and nothing answers."""

    number: int


@dataclass(frozen=True)
class Sleep:
    """Give the device's memory back, after the batches before; answered by `MemoryMoved` or `Failed`, and then awake as before."""

    number: int


@dataclass(frozen=True)
class Wake:
    """Take the device's memory again; answered by `MemoryMoved`, or by `Failed`, and then asleep as before."""

    number: int


@dataclass(frozen=True)
class Stop:
    """End, after the batch that computes."""


Order = ScoreBatch | Sleep | Wake
ToWorker = ScoreBatch | CancelRollout | EncodeTexts | CancelTexts | Sleep | Wake | Stop

# ------------------------------------------------------------------------------------------------------------------ from a worker


@dataclass(frozen=True)
class LoadingProgress:
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

    def __reduce__(self) -> tuple[Callable[[int, Encoded, float], BatchScored], tuple[int, Encoded, float]]:
        return _batch_scored, (self.number, encode_results(self.batch.results), self.batch.compute_seconds)


def _batch_scored(number: int, results: Encoded, compute_seconds: float) -> BatchScored:
    return BatchScored(number, ScoredBatch(decode_results(results), compute_seconds))


@dataclass(frozen=True)
class TextsEncoded:
    """Answers `EncodeTexts`: ids ``(T,)`` int32 by `PendingText.field`."""

    number: int
    ids: dict[str, NDArray[np.int32]]


@dataclass(frozen=True)
class MemoryMoved:
    """Answers `Sleep` and `Wake`."""

    number: int
    transfer: Transfer


@dataclass(frozen=True)
class Failed:
    """Answers any of them; an unexpected exception is in the log under the fault's incident and goes no further."""

    number: int
    error: InvalidRequest | InternalFault | OutOfMemory | WorkerUnavailable


@dataclass(frozen=True)
class Heartbeat:
    """A sign of life, with the step that computes or computed last and what each lane of texts tokenises; no answer waits for it."""

    step: ActivityStep
    texts: tuple[TextBeingTokenised, ...]


@dataclass(frozen=True)
class DeviceLost:
    """Nothing will compute on the device again in this process, and what it has gets no answer; the log has why under this number."""

    incident: str


FromWorker = (
    LoadingProgress | Ready | Refused | BatchScored | TextsEncoded | MemoryMoved | Failed | EngineStatistics | Heartbeat | DeviceLost
)
"""`EngineStatistics`: as of now; no answer waits for it."""
