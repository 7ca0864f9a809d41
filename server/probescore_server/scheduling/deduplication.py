"""Tracks which rollouts the worker processes compute and which calls (each the work of one request) wait for the results, so that identical
rollouts are computed once.

Two rollouts are identical if their prompts, their completions with all follow-ups, masks and spans, and their options are equal; names that
are only returned do not count. Each rollout keeps its own call, with the call's deadline: a computation continues while any call waits for
its result. If the computation fails, all of these calls fail, since the same work would fail again.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from probescore.types import CompletionScores, Usage
from probescore_server.errors import CoreError
from probescore_server.rollouts import CheckedRollout, Continuation, RolloutResult, ScoredBatch
from probescore_server.scheduling.call import Call, PromptKey, RequestedRollout
from probescore_server.scheduling.ordered_set import OrderedSet


class Worker(Protocol):
    """Interface (Protocol) of a worker as the scheduler uses it. A worker scores batches of rollouts one after the other in a separate
    process.
    """

    @property
    def ready(self) -> bool:
        """Returns whether a worker process can take a batch of rollouts now."""

    def new_batch(self) -> int:
        """Returns a batch number that a worker process has not been given before."""

    async def score(self, number: int, rollouts: Sequence[CheckedRollout]) -> ScoredBatch:
        """Has a worker process score a batch of rollouts under the given batch number.

        Raises:
            WorkerUnavailable: the worker process ended.
            WorkerLost: the worker process crashed or was stuck, and this or another batch may be the cause.
            OutOfMemory: the batch needs more memory than the device has.
            InternalFault: the batch failed for any other reason.
        """

    def cancel(self, number: int, index: int) -> None:
        """Cancels the rollout with the given index in the worker's batch with the given number. The worker may be computing the rollout
        already.
        """


@dataclass(frozen=True, slots=True)
class BatchSlot:
    """Value object with the place at which a rollout is computed: ``rollouts[index]`` of the batch with the number ``batch`` of a worker
    process.
    """

    worker: Worker
    batch: int
    index: int


@dataclass(eq=False, slots=True)
class Computation:
    """Record of one rollout that a worker process computes, or soon will, once for all calls (requests) that wait for the result.

    Attributes:
        rollout: the rollout, as given by the first of the calls that need its scores.
        key: a value that is equal for identical rollouts.
        items: the identical rollouts that wait for the result, one or more from each waiting call. The response to the first one reports
            the computed tokens. Empty = no call waits any more.
        place: the place of the rollout in a worker's batch; ``None`` while the rollout is in no batch.
    """

    rollout: CheckedRollout
    key: tuple[PromptKey, Hashable]
    items: OrderedSet[RequestedRollout] = field(default_factory=OrderedSet)
    place: BatchSlot | None = None


class ComputationsInFlight:
    """Index of the computations of rollouts that worker processes have begun and not finished, keyed by the rollouts' content, so that a
    rollout which arrives meanwhile with the same content waits for the result that is under way.
    """

    def __init__(self) -> None:
        self._by_key: dict[object, Computation] = {}
        self._by_rollout: dict[RequestedRollout, Computation] = {}

    def begin(self, items: Sequence[RequestedRollout], now: float) -> Computation | None:
        """Starts one computation, at the time ``now``, for rollouts that are all identical, and returns the record of this computation.

        If an identical rollout is being computed already, the given rollouts wait for that result instead, and ``None`` is returned.
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
        """Returns whether a rollout identical to the given one is being computed."""
        return item.key in self._by_key

    def withdraw(self, call: Call) -> None:
        """Removes a call (the work of one request) from all computations for which it waits, and cancels the computations for which no
        other call waits.
        """
        for item in call.computing:
            computation = self._by_rollout.pop(item)
            computation.items.remove(item)
            if not computation.items:
                self._forget(computation)
                if computation.place is not None:
                    computation.place.worker.cancel(computation.place.batch, computation.place.index)
        call.computing.clear()

    def deliver(self, computations: Iterable[Computation], scored: ScoredBatch) -> None:
        """Gives each waiting call (the work of one request) its results of a scored batch. Cancelled rollouts have no result.

        Args:
            computations: the computations in the batch, one for all rollouts that are identical.
            scored: the results of these computations, in the same order.
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
        """Ends with ``error`` every call (the work of one request) that waits for the result of a computation."""
        for call in {item.call for item in computation.items}:
            call.fail(error)

    def take_back(self, computation: Computation) -> list[RequestedRollout]:
        """Removes the computation of a rollout, and returns the identical rollouts that waited for its result, in the order in which they
        were added.
        """
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
    """Yields a copy of a result for each identical rollout that waits for the result, with that rollout's own names.

    The first copy reports the tokens as computed, and the other copies report them as shared.
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
