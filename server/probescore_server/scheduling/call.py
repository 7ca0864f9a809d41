"""A call: the work of one request, as the scheduler and whoever answers the request see it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol

from probescore_server.errors import CoreError
from probescore_server.rollouts import CheckedRollout, Continuation, RolloutResult
from probescore_server.scheduling.ordered_set import OrderedSet


@dataclass(frozen=True)
class FinishedRollout:
    """A result and where its rollout stood in the call: ``groups[group].completions[completion]``."""

    group: int
    completion: int
    result: RolloutResult


@dataclass(frozen=True)
class Delivery:
    """The rollouts of one call that finished in one batch."""

    finished: tuple[FinishedRollout, ...]
    compute_seconds: float
    tokens: int


@dataclass(eq=False, slots=True)
class RequestedRollout:
    """A rollout of a call.

    Attributes:
        group: index of its rollout group in the call.
        completion: its index in that group.
        key: equal for two rollouts if and only if their scores are the same: all that is read and asked for, but no names.
    """

    call: Call
    group: int
    completion: int
    rollout: CheckedRollout
    key: tuple[bytes, Hashable]

    @property
    def tokens(self) -> int:
        """Without the prompt."""
        return self.rollout.tokens - len(self.rollout.prompt_ids)


@dataclass(eq=False, slots=True)
class WaitingGroup:
    """What still waits of one rollout group.

    Attributes:
        prompt: bytes of the prompt's ids.
        items: in order.
        tokens: the prompt's, counted once, and those of the items.
    """

    call: Call
    prompt: bytes
    items: OrderedSet[RequestedRollout]
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = self.prompt_tokens + sum(item.tokens for item in self.items)

    @property
    def prompt_tokens(self) -> int:
        """The same for all of its items, of which there is at least one."""
        return len(next(iter(self.items)).rollout.prompt_ids)

    def remove(self, item: RequestedRollout) -> int:
        """Removes an item and returns the tokens that are no longer needed: its own, or all if it was the last."""
        self.items.remove(item)
        freed = item.tokens if self.items else self.tokens
        self.tokens -= freed
        return freed


class CallScheduler(Protocol):
    """What a call asks of the scheduler that admitted it."""

    def withdraw(self, call: Call) -> None:
        """Ends it."""

    def dispatch(self) -> None:
        """Its reader has caught up."""


class Call:
    """The work of one request: a context manager that withdraws what is unfinished, and an async iterator over ``Delivery``.

    Iterating raises the ``CoreError`` that ended the call early, after what had finished before it.

    Attributes:
        job: whose turns it takes.
        waiting: what has not reached a worker, in order.
        computing: what a worker has, its own or an identical one.
        unread_tokens: of what was delivered and has not been read.
        queue_seconds: from admission until the first of its rollouts reached a worker; ``None`` before that.
    """

    def __init__(self, scheduler: CallScheduler, job: str, priority: int, deadline: float, admitted: float) -> None:
        self.job = job
        self.priority = priority
        self.deadline = deadline
        self.admitted = admitted
        self.waiting: OrderedSet[WaitingGroup] = OrderedSet()
        self.computing: set[RequestedRollout] = set()
        self.unread_tokens = 0
        self.queue_seconds: float | None = None
        self._scheduler = scheduler
        self._deliveries: deque[Delivery] = deque()
        self._failure: CoreError | None = None
        self._changed = asyncio.Event()

    def __enter__(self) -> Call:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._scheduler.withdraw(self)

    def __aiter__(self) -> Call:
        return self

    async def __anext__(self) -> Delivery:
        while not self._deliveries:
            if self._failure is not None:
                raise self._failure
            if not self.waiting and not self.computing:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        delivery = self._deliveries.popleft()
        self.unread_tokens -= delivery.tokens
        self._scheduler.dispatch()
        return delivery

    def start(self, item: RequestedRollout, now: float) -> None:
        """A worker has this one, or an identical one."""
        self.computing.add(item)
        if self.queue_seconds is None:
            self.queue_seconds = now - self.admitted

    def deliver(self, results: Sequence[tuple[RequestedRollout, RolloutResult]], compute_seconds: float) -> None:
        """Hands results to the reader."""
        finished = tuple(FinishedRollout(item.group, item.completion, result) for item, result in results)
        tokens = sum(item.rollout.tokens for item, _ in results)
        self._deliveries.append(Delivery(finished, compute_seconds, tokens))
        self.unread_tokens += tokens
        self._changed.set()

    def fail(self, error: CoreError) -> None:
        """Ends it with an error, unless it had failed before."""
        if self._failure is None:
            self._failure = error
            self._scheduler.withdraw(self)

    def ended(self) -> None:
        """Nothing waits or computes any more."""
        self._changed.set()


def groups_of(call: Call, rollouts: Sequence[Sequence[CheckedRollout]]) -> list[WaitingGroup]:
    """The work of a request, given per rollout group. All rollouts of a request have the same options."""
    options = rollouts[0][0].options.key
    groups = []
    for index, group in enumerate(rollouts):
        prompt = group[0].prompt_ids.tobytes()
        items = OrderedSet(
            RequestedRollout(call, index, completion, rollout, (prompt, (options, _content(rollout.completion))))
            for completion, rollout in enumerate(group)
        )
        groups.append(WaitingGroup(call, prompt, items))
    return groups


def _content(continuation: Continuation) -> Hashable:
    """Everything of a continuation that its scores depend on; bytes, whose hash is computed once and whose comparison is exact."""
    mask = None if continuation.mask is None else continuation.mask.tobytes()
    return continuation.token_ids.tobytes(), mask, continuation.spans, tuple(map(_content, continuation.follow_ups))
