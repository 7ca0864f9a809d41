"""Tracks which rollouts the workers compute and which calls wait for them, so that identical rollouts of any calls are computed once.

Two rollouts are identical if their prompt, their completion with all its follow-ups, masks and spans, and their options are equal; names
that are only returned do not count. Each rollout keeps its own call, and with it the call's deadline: a computation goes on while any call
waits for it. If it fails, it fails for all of these calls, since the same work would fail again.
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
    """Declares the methods that the scheduler needs of a worker, which scores batches of rollouts one after the other in a process."""

    @property
    def ready(self) -> bool:
        """Tells whether the worker can take a batch now."""

    def new_batch(self) -> int:
        """Returns a number that no earlier batch of the worker has."""

    async def score(self, number: int, rollouts: Sequence[CheckedRollout]) -> ScoredBatch:
        """Scores a batch of rollouts, which gets the given number.

        Raises:
            WorkerUnavailable: the worker process ended.
            WorkerLost: the worker process was lost, and this or another batch may be the cause.
            OutOfMemory: the batch needs more memory than the device has.
            InternalFault: the batch failed for any other reason.
        """

    def cancel(self, number: int, index: int) -> None:
        """Cancels the rollout of this index in the batch of this number, which the worker has and may be computing."""


@dataclass(frozen=True, slots=True)
class BatchSlot:
    """Says where a rollout is computed: it is ``rollouts[index]`` of the batch of number ``batch`` of a worker."""

    worker: Worker
    batch: int
    index: int


@dataclass(eq=False, slots=True)
class Computation:
    """Holds a rollout that a worker computes or is about to get, once for all calls that wait for it.

    Attributes:
        rollout: the rollout, as the first call that asked for it gave it.
        key: a value that is equal for identical rollouts.
        items: the rollouts of calls that wait for the result. The first one's answer states the cost. Empty = no call waits any more.
        place: the worker's batch that the rollout is in; ``None`` while it is in none.
    """

    rollout: CheckedRollout
    key: tuple[bytes, Hashable]
    items: OrderedSet[RequestedRollout] = field(default_factory=OrderedSet)
    place: BatchSlot | None = None


class ComputationsInFlight:
    """Holds the computations that are under way on all workers, and finds them by what they compute."""

    def __init__(self) -> None:
        self._by_key: dict[object, Computation] = {}
        self._by_rollout: dict[RequestedRollout, Computation] = {}

    def begin(self, items: Sequence[RequestedRollout], now: float) -> Computation | None:
        """Starts one computation for rollouts that are all identical, at the time ``now``, and returns it.

        If an identical rollout is computed already, these wait for its result instead, and ``None`` is returned.
        """
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
        """Tells whether an identical rollout is being computed."""
        return item.key in self._by_key

    def withdraw(self, call: Call) -> None:
        """Removes a call from all computations whose results it waits for, and cancels those that no other call waits for."""
        for item in call.computing:
            computation = self._by_rollout.pop(item)
            computation.items.remove(item)
            if not computation.items:
                self._forget(computation)
                if computation.place is not None:
                    computation.place.worker.cancel(computation.place.batch, computation.place.index)
        call.computing.clear()

    def deliver(self, computations: Iterable[Computation], scored: ScoredBatch) -> None:
        """Gives each waiting call the results of a scored batch. Cancelled rollouts have no result.

        Args:
            computations: the batch's computations.
            scored: their results, in the same order.
        """
        by_call: dict[Call, list[tuple[RequestedRollout, RolloutResult]]] = {}
        for computation, result in zip(computations, scored.results, strict=True):
            if result is not None:
                for item, own in zip(computation.items, _own_results(computation, result), strict=True):
                    by_call.setdefault(item.call, []).append((item, own))
                self.take_back(computation)
        for call, results in by_call.items():
            call.deliver(results, scored.compute_seconds)

    def fail(self, computation: Computation, error: CoreError) -> None:
        """Ends, with ``error``, every call that waits for the result of a computation."""
        for call in {item.call for item in computation.items}:
            call.fail(error)

    def take_back(self, computation: Computation) -> list[RequestedRollout]:
        """Removes a computation, and returns the rollouts of calls that waited for it, in the order in which they came."""
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
    """Yields a copy of a result for each rollout that waits for it, with that rollout's own names.

    The first copy states the tokens that were computed; the others state them as shared.
    """
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
