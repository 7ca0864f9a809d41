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
from probescore_server.scheduling.call import Call, Item
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
class Work:
    """A rollout that a worker has or is about to get.

    Attributes:
        rollout: as the first who asked for it gave it.
        items: who waits for it: the first is told what it cost. Empty = nobody any more.
        place: where it computes; ``None`` while it is with no worker.
    """

    rollout: CheckedRollout
    key: tuple[bytes, Hashable]
    items: OrderedSet[Item] = field(default_factory=OrderedSet)
    place: BatchSlot | None = None


class InFlight:
    """The work that is under way, by what it computes."""

    def __init__(self) -> None:
        self._by_key: dict[object, Work] = {}
        self._by_item: dict[Item, Work] = {}

    def begin(self, items: Sequence[Item], now: float) -> Work | None:
        """Work for identical rollouts, unless such is under way already: then they wait for that."""
        key = items[0].key
        known = self._by_key.get(key)
        work = known or Work(items[0].rollout, key)
        self._by_key[key] = work
        for item in items:
            work.items.add(item)
            self._by_item[item] = work
            item.call.start(item, now)
        return None if known else work

    def has(self, item: Item) -> bool:
        """Whether such work is under way."""
        return item.key in self._by_key

    def withdraw(self, call: Call) -> None:
        """A call no longer waits for anything. What nobody waits for any more is cancelled."""
        for item in call.computing:
            work = self._by_item.pop(item)
            work.items.remove(item)
            if not work.items:
                self._forget(work)
                if work.place is not None:
                    work.place.worker.cancel(work.place.batch, work.place.index)
        call.computing.clear()

    def deliver(self, works: Iterable[Work], scored: ScoredBatch) -> None:
        """Gives each call its results; what was cancelled has none."""
        by_call: dict[Call, list[tuple[Item, RolloutResult]]] = {}
        for work, result in zip(works, scored.results, strict=True):
            if result is not None:
                for item, own in zip(work.items, _own_results(work, result), strict=True):
                    by_call.setdefault(item.call, []).append((item, own))
                self.take_back(work)
        for call, results in by_call.items():
            call.deliver(results, scored.compute_seconds)

    def fail(self, work: Work, error: CoreError) -> None:
        """Ends every call that waits for it."""
        for call in {item.call for item in work.items}:
            call.fail(error)

    def take_back(self, work: Work) -> list[Item]:
        """Ends work; returns who waited for it."""
        self._forget(work)
        items = list(work.items)
        work.items.clear()
        for item in items:
            del self._by_item[item]
            item.call.computing.discard(item)
        return items

    def _forget(self, work: Work) -> None:
        if self._by_key.get(work.key) is work:
            del self._by_key[work.key]


def _own_results(work: Work, result: RolloutResult) -> Iterator[RolloutResult]:
    """By who waits for it, the result under their own names: the first pays for it, the others share."""
    usage = result.usage
    for item in work.items:
        named = item.rollout is work.rollout
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
