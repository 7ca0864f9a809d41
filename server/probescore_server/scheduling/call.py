"""Defines a call, the work of one request to score rollouts, as the scheduler and the code that answers the request share it."""

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
    """Holds the result of one rollout, and the rollout's place in its request, ``groups[group].completions[completion]``."""

    group: int
    completion: int
    result: RolloutResult


@dataclass(frozen=True)
class Delivery:
    """Holds the results of those rollouts of one call that were scored in the same batch.

    Attributes:
        finished: the results.
        compute_seconds: the seconds that the whole batch took to compute.
        tokens: the number of tokens of these rollouts, those of their prompts counted once for each rollout.
    """

    finished: tuple[FinishedRollout, ...]
    compute_seconds: float
    tokens: int


@dataclass(eq=False, slots=True)
class RequestedRollout:
    """Holds one rollout that a call, which is the work of one request, asks to have scored, and the rollout's place in the call.

    Attributes:
        call: the call that the rollout belongs to.
        group: index of the rollout's group in the call.
        completion: index of the rollout in that group.
        rollout: the prompt with one completion and how they are scored.
        key: a value that is equal for two rollouts if and only if their scores must be the same. It holds the token ids, masks, spans and
            options, but no names that are only returned.
    """

    call: Call
    group: int
    completion: int
    rollout: CheckedRollout
    key: tuple[bytes, Hashable]

    @property
    def tokens(self) -> int:
        """Counts the rollout's tokens without those of its prompt, which the rollouts of a group share."""
        return self.rollout.tokens - len(self.rollout.prompt_ids)


@dataclass(eq=False, slots=True)
class WaitingGroup:
    """Holds those rollouts of one group, which all have the same prompt, that still wait for a worker process.

    Attributes:
        call: the call that the group belongs to.
        prompt: the prompt's token ids as bytes.
        items: the waiting rollouts, in the request's order.
        tokens: the number of tokens of the prompt, counted once, and of the waiting rollouts.
    """

    call: Call
    prompt: bytes
    items: OrderedSet[RequestedRollout]
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = self.prompt_tokens + sum(item.tokens for item in self.items)

    @property
    def prompt_tokens(self) -> int:
        """Counts the tokens of the group's prompt. At least one rollout of the group must wait."""
        return len(next(iter(self.items)).rollout.prompt_ids)

    def remove(self, item: RequestedRollout) -> int:
        """Removes a rollout from its group, and returns the number of tokens that no longer wait.

        These are the rollout's own, and the prompt's too if the rollout was the last one.
        """
        self.items.remove(item)
        freed = item.tokens if self.items else self.tokens
        self.tokens -= freed
        return freed


class CallScheduler(Protocol):
    """Declares the methods that a call needs of the scheduler that admitted it."""

    def withdraw(self, call: Call) -> None:
        """Ends a call: drops its rollouts that wait and cancels those that are computed for no other call."""

    def dispatch(self) -> None:
        """Gives free workers new batches; a call asks for it after its results were read, since it may then get further ones."""


class Call:
    """Is the work of one request: an async iterator over ``Delivery`` objects, which hold the results as batches finish.

    It is also a context manager, which on leaving withdraws what is unfinished. If an error ended the call early, iterating yields what
    finished before and then raises that ``CoreError``.

    Attributes:
        job: name of the training job that sent the request; jobs take turns in the queue.
        priority: rollouts of the same job with a higher number go first.
        deadline: when the work must be done, in seconds on the scheduler's clock; infinity = there is no deadline.
        admitted: when the scheduler took the call, on the same clock.
        waiting: the rollouts, by group and in order, that have not reached a worker.
        computing: the rollouts that a worker computes, or for which a worker computes an identical one of another call.
        unread_tokens: number of tokens of the rollouts that were delivered and have not been read.
        queue_seconds: seconds from admission until the first of the rollouts reached a worker; ``None`` before that.
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
        """Notes that a worker computes this rollout, or an identical one of another call, from the time ``now`` on."""
        self.computing.add(item)
        if self.queue_seconds is None:
            self.queue_seconds = now - self.admitted

    def deliver(self, results: Sequence[tuple[RequestedRollout, RolloutResult]], compute_seconds: float) -> None:
        """Adds the results of one batch, which took ``compute_seconds`` to compute, for the code that iterates over the call to read."""
        finished = tuple(FinishedRollout(item.group, item.completion, result) for item, result in results)
        tokens = sum(item.rollout.tokens for item, _ in results)
        self._deliveries.append(Delivery(finished, compute_seconds, tokens))
        self.unread_tokens += tokens
        self._changed.set()

    def fail(self, error: CoreError) -> None:
        """Ends the call with an error, which iterating raises, unless the call had failed before."""
        if self._failure is None:
            self._failure = error
            self._scheduler.withdraw(self)

    def ended(self) -> None:
        """Wakes the code that iterates over the call, since none of the call's rollouts waits or computes any more."""
        self._changed.set()


def groups_of(call: Call, rollouts: Sequence[Sequence[CheckedRollout]]) -> list[WaitingGroup]:
    """Returns the waiting groups of a new call, made from its checked rollouts, which are given per group and all have the same options."""
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
    """Returns everything of a completion or follow-up that its scores depend on, as hashable values.

    Arrays become bytes, whose hash is computed once and whose comparison is exact.
    """
    mask = None if continuation.mask is None else continuation.mask.tobytes()
    return continuation.token_ids.tobytes(), mask, continuation.spans, tuple(map(_content, continuation.follow_ups))
