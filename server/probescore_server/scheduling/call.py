"""Defines a call: the work of one request to score rollouts, shared by the scheduler and the code that responds to the request."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, TypeAlias

from probescore_server.errors import CoreError
from probescore_server.rollouts import CheckedRollout, Continuation, RolloutResult
from probescore_server.scheduling.ordered_set import OrderedSet

PromptKey: TypeAlias = tuple[bytes, Hashable]
"""Type of what two rollouts have in common for which a prompt is computed once: its token ids as bytes, and the weights with which they are
read, since each reading, and each adapter that probes bring, computes the prompt by itself.
"""


@dataclass(frozen=True)
class FinishedRollout:
    """Value object with the result of one scored rollout, and the rollout's place in its request,
    ``groups[group].completions[completion]``.
    """

    group: int
    completion: int
    result: RolloutResult


@dataclass(frozen=True)
class Delivery:
    """Value object with the results of those rollouts of one call (the work of one request) that were scored in the same batch.

    Attributes:
        finished: the results.
        compute_seconds: the seconds that the whole batch took to compute.
        tokens: the number of tokens of these rollouts, those of their prompts counted once for each rollout.
        activation_bytes: the number of bytes of the activations in their results; 0 if the results are scores.
    """

    finished: tuple[FinishedRollout, ...]
    compute_seconds: float
    tokens: int
    activation_bytes: int = 0


@dataclass(eq=False, slots=True)
class RequestedRollout:
    """Value object with one rollout that a call (the work of one request) needs scored, and the rollout's place in the call.

    Attributes:
        call: the call that the rollout belongs to.
        group: index of the rollout's group in the call.
        completion: index of the rollout in that group.
        rollout: the prompt with one completion and the scoring options.
        key: a value that is equal for two rollouts if and only if their scores must be the same. The value contains the token ids, masks,
            spans and options, but no names that are only returned to the client.
    """

    call: Call
    group: int
    completion: int
    rollout: CheckedRollout
    key: tuple[PromptKey, Hashable]

    @property
    def tokens(self) -> int:
        """Counts a rollout's tokens without those of its prompt, which all rollouts of its group have in common."""
        return self.rollout.tokens - self.rollout.prompt_tokens

    @property
    def activation_bytes(self) -> int:
        """Counts the bytes of a rollout's activations in the response; 0 if the request asks for scores."""
        return self.rollout.activation_bytes


@dataclass(eq=False, slots=True)
class WaitingGroup:
    """Collection of those rollouts with the same prompt, from one group of a request, that still wait for a worker process.

    Attributes:
        call: the call that the group belongs to.
        prompt: the prompt's key.
        items: the waiting rollouts, in the request's order.
        tokens: the number of tokens of the prompt, counted once, and of the waiting rollouts.
    """

    call: Call
    prompt: PromptKey
    items: OrderedSet[RequestedRollout]
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = self.prompt_tokens + sum(item.tokens for item in self.items)

    @property
    def prompt_tokens(self) -> int:
        """Counts the tokens of the prompt that waiting rollouts of a group have in common. At least one rollout must wait."""
        return next(iter(self.items)).rollout.prompt_tokens

    def remove(self, item: RequestedRollout) -> int:
        """Removes a rollout from those of its group that wait, and returns by how many tokens the group's waiting tokens decrease.

        These are the rollout's tokens without its prompt, plus the prompt's tokens if no other rollout with the prompt waits in this group.
        """
        self.items.remove(item)
        freed = item.tokens if self.items else self.tokens
        self.tokens -= freed
        return freed


class CallScheduler(Protocol):
    """Interface (Protocol) of the scheduler, with the methods that a call (the work of one request) uses."""

    def withdraw(self, call: Call) -> None:
        """Ends a call (the work of one request): drops its waiting rollouts, and cancels the rollouts that are computed for no other
        call.
        """

    def dispatch(self) -> None:
        """Gives free worker processes new batches. A call (the work of one request) requests this after its results were read, since its
        remaining rollouts may then be computed.
        """


class Call:
    """Work of one request: an async iterator over ``Delivery`` objects, which contain the results as batches finish.

    A call is also a context manager, which on exit withdraws all unfinished rollouts. If an error ended the call early, the iterator yields
    the results that finished before, and then raises the error, a ``CoreError``.

    Attributes:
        job: name of the training job that sent the request; jobs take turns in the queue.
        priority: rollouts of the same job with a higher number go first.
        deadline: the time by which the work must be done, in seconds on the scheduler's clock; infinity = there is no deadline.
        admitted: the time at which the scheduler accepted the call, in seconds on the same clock.
        waiting: the rollouts, by group and in order, that have not been given to a worker process.
        computing: the rollouts that a worker process computes now, or that wait for an identical rollout of another call that is computed
            now.
        unread_tokens: number of tokens of the rollouts whose results were delivered but not yet read.
        unread_activation_bytes: number of bytes of activations that were delivered and not yet read, or are read now: those of the delivery
            that iterating yielded last count until the next one is asked for, since they are still being sent.
        queue_seconds: seconds from acceptance until the first of the rollouts was given to a worker process; ``None`` before.
    """

    def __init__(self, scheduler: CallScheduler, job: str, priority: int, deadline: float, admitted: float) -> None:
        self.job = job
        self.priority = priority
        self.deadline = deadline
        self.admitted = admitted
        self.waiting: OrderedSet[WaitingGroup] = OrderedSet()
        self.computing: set[RequestedRollout] = set()
        self.unread_tokens = 0
        self.unread_activation_bytes = 0
        self._activation_bytes_being_read = 0
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
        if self._activation_bytes_being_read:
            self.unread_activation_bytes -= self._activation_bytes_being_read
            self._activation_bytes_being_read = 0
            self._scheduler.dispatch()
        while not self._deliveries:
            if self._failure is not None:
                raise self._failure
            if not self.waiting and not self.computing:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        delivery = self._deliveries.popleft()
        self.unread_tokens -= delivery.tokens
        self._activation_bytes_being_read = delivery.activation_bytes
        self._scheduler.dispatch()
        return delivery

    def start(self, item: RequestedRollout, now: float) -> None:
        """Records in a call (the work of one request) that from the time ``now`` on a worker process computes a rollout of the call, or an
        identical rollout of another call.
        """
        self.computing.add(item)
        if self.queue_seconds is None:
            self.queue_seconds = now - self.admitted

    def deliver(self, results: Sequence[tuple[RequestedRollout, RolloutResult]], compute_seconds: float) -> None:
        """Adds the results of one batch, which took ``compute_seconds`` to compute, to the results that iterating over a call (the work of
        one request) yields.
        """
        finished = tuple(FinishedRollout(item.group, item.completion, result) for item, result in results)
        tokens = sum(item.rollout.tokens for item, _ in results)
        activation_bytes = sum(item.activation_bytes for item, _ in results)
        self._deliveries.append(Delivery(finished, compute_seconds, tokens, activation_bytes))
        self.unread_tokens += tokens
        self.unread_activation_bytes += activation_bytes
        self._changed.set()

    def fail(self, error: CoreError) -> None:
        """Ends a call (the work of one request) with an error, which the call's iterator then raises. Nothing happens if the call has
        failed already.
        """
        if self._failure is None:
            self._failure = error
            self._scheduler.withdraw(self)

    def ended(self) -> None:
        """Wakes the code that iterates over a call (the work of one request), since no rollout of the call waits or is computed any
        more.
        """
        self._changed.set()


def groups_of(call: Call, rollouts: Sequence[Sequence[CheckedRollout]]) -> list[WaitingGroup]:
    """Returns the groups of waiting rollouts of a new call (the work of one request).

    The checked rollouts are given per group, and all have the same options.
    """
    options = rollouts[0][0].options.key
    groups = []
    for index, group in enumerate(rollouts):
        prompt = group[0].prompt_ids.tobytes(), group[0].options.weights
        items = OrderedSet(
            RequestedRollout(call, index, completion, rollout, (prompt, (options, _content(rollout.completion))))
            for completion, rollout in enumerate(group)
        )
        groups.append(WaitingGroup(call, prompt, items))
    return groups


def _content(continuation: Continuation) -> Hashable:
    """Returns everything that determines the scores of a completion or follow-up (text that continues a completion), as hashable values.

    Arrays become bytes, whose hash is computed once and whose comparison is exact.
    """
    mask = None if continuation.mask is None else continuation.mask.tobytes()
    return continuation.token_ids.tobytes(), mask, continuation.spans, tuple(map(_content, continuation.follow_ups))
