"""What workers have, and who waits for it: identical rollouts are computed once, whichever calls they are of.

Two rollouts are identical if their prompt, their completion with all its follow-ups, masks and spans, and their options are; ids and what
else is only echoed do not count. Each keeps its own call, and with it its deadline: the work goes on while anyone waits for it. If it
fails, it fails for all of them, since the same work would fail again.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from probescore.types import CompletionScores, Usage
from probescore_server.errors import CoreError
from probescore_server.rollouts import CheckedRollout, Continuation, RolloutResult, ScoredBatch
from probescore_server.scheduling.call import Call, RequestedRollout
from probescore_server.scheduling.ordered_set import OrderedSet


class Worker(Protocol):
    """What the scheduler asks of a worker: batches, which it computes one after the other."""

    @property
    def ready(self) -> bool:
        """Whether it can take a batch."""

    def new_batch(self) -> int:
        """A number for a batch."""

    async def score(self, number: int, rollouts: Sequence[CheckedRollout]) -> ScoredBatch:
        """Scores a batch.

        Raises:
            WorkerUnavailable: it died.
            WorkerLost: it was lost, and this or another batch may be why.
            OutOfMemory: the batch needs more memory than there is.
            InternalFault: the batch failed.
        """

    def cancel(self, number: int, index: int) -> None:
        """Gives up one rollout of a batch that it has."""


@dataclass(frozen=True, slots=True)
class BatchSlot:
    """Where a rollout computes: ``rollouts[index]`` of a worker's batch."""

    worker: Worker
    batch: int
    index: int


@dataclass(eq=False, slots=True)
class Computation:
    """A rollout that a worker has or is about to get.

    Attributes:
        rollout: as the first who asked for it gave it.
        items: who waits for it: the first is told what it cost. Empty = nobody any more.
        place: where it computes; ``None`` while it is with no worker.
    """

    rollout: CheckedRollout
    key: tuple[bytes, Hashable]
    items: OrderedSet[RequestedRollout] = field(default_factory=OrderedSet)
    place: BatchSlot | None = None


class ComputationsInFlight:
    """The work that is under way, by what it computes."""

    def __init__(self) -> None:
        self._by_key: dict[object, Computation] = {}
        self._by_rollout: dict[RequestedRollout, Computation] = {}

    def begin(self, items: Sequence[RequestedRollout], now: float) -> Computation | None:
        """Work for identical rollouts, unless such is under way already: then they wait for that."""
        key = items[0].key
        known = self._by_key.get(key)
        computation = known or Computation(items[0].rollout, key)
        self._by_key[key] = computation
        for item in items:
            computation.items.add(item)
            self._by_rollout[item] = computation
            item.call.start(item, now)
        return None if known else computation

    def has(self, item: RequestedRollout) -> bool:
        """Whether such work is under way."""
        return item.key in self._by_key

    def withdraw(self, call: Call) -> None:
        """A call no longer waits for anything. What nobody waits for any more is cancelled."""
        for item in call.computing:
            computation = self._by_rollout.pop(item)
            computation.items.remove(item)
            if not computation.items:
                self._forget(computation)
                if computation.place is not None:
                    computation.place.worker.cancel(computation.place.batch, computation.place.index)
        call.computing.clear()

    def deliver(self, computations: Iterable[Computation], scored: ScoredBatch) -> None:
        """Gives each call its results; what was cancelled has none."""
        by_call: dict[Call, list[tuple[RequestedRollout, RolloutResult]]] = {}
        for computation, result in zip(computations, scored.results, strict=True):
            if result is not None:
                for item, own in zip(computation.items, _own_results(computation, result), strict=True):
                    by_call.setdefault(item.call, []).append((item, own))
                self.take_back(computation)
        for call, results in by_call.items():
            call.deliver(results, scored.compute_seconds)

    def fail(self, computation: Computation, error: CoreError) -> None:
        """Ends every call that waits for it."""
        for call in {item.call for item in computation.items}:
            call.fail(error)

    def take_back(self, computation: Computation) -> list[RequestedRollout]:
        """Ends work; returns who waited for it."""
        self._forget(computation)
        items = list(computation.items)
        computation.items.clear()
        for item in items:
            del self._by_rollout[item]
            item.call.computing.discard(item)
        return items

    def _forget(self, computation: Computation) -> None:
        if self._by_key.get(computation.key) is computation:
            del self._by_key[computation.key]


def _own_results(computation: Computation, result: RolloutResult) -> Iterator[RolloutResult]:
    """By who waits for it, the result under their own names: the first pays for it, the others share."""
    usage = result.usage
    for item in computation.items:
        named = item.rollout is computation.rollout
        yield replace(result, scores=result.scores if named else _renamed(result.scores, item.rollout.completion), usage=usage)
        usage = Usage(tokens_shared=usage.tokens)


def _renamed(scores: CompletionScores, continuation: Continuation) -> CompletionScores:
    follow_ups = zip(scores.follow_ups, continuation.follow_ups, strict=True)
    return replace(
        scores,
        id=continuation.id,
        inexact_ids=continuation.inexact_ids,
        follow_ups=tuple(_renamed(*follow_up) for follow_up in follow_ups),
    )
