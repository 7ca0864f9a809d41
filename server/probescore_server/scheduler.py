"""The scheduling policy: what is admitted, and which rollouts make the next batch.

There is no timer: a batch is whatever waits when a worker frees, up to a token budget, so that batches grow by themselves under load.

* Admission counts tokens. A call that does not fit in the queue is refused at once, with an estimate of when to come back.
* Jobs take turns, one rollout group a turn. Within a job: higher priority first, then first come, first served.
* Rollouts of one prompt stay together. A group is split only if it is larger than a whole batch.
* Expired and withdrawn work never reaches a worker, and withdrawn work that is already there is cancelled in the middle of its batch.
* A reader who is a batch behind gets no further batch until it has caught up.
* A batch that fails is halved until what fails is alone.

Everything runs on one event loop, so nothing here locks.
"""

from __future__ import annotations

import asyncio
import bisect
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol

import structlog

from probescore_server.errors import CoreError, DeadlineExpired, InternalFault, QueueFull, WorkerUnavailable
from probescore_server.rollouts import Rollout, RolloutResult, ScoredBatch

logger = structlog.get_logger(__name__)

MIN_RETRY_SECONDS = 0.1
MAX_RETRY_SECONDS = 60.0
# Weight of the newest batch in the running estimate of throughput.
THROUGHPUT_SMOOTHING = 0.3


class Worker(Protocol):
    """What the scheduler asks of a worker: one batch at a time."""

    @property
    def ready(self) -> bool:
        """Whether it can take a batch."""

    async def score(self, rollouts: Sequence[Rollout]) -> ScoredBatch:
        """Scores one batch; raises ``WorkerUnavailable`` if the worker dies, ``InternalFault`` if the batch fails."""

    def cancel(self, index: int) -> None:
        """Gives up one rollout of the batch that is computing."""


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


@dataclass(eq=False)
class _Item:
    """A rollout of a call, and where it computes."""

    call: Call
    group: int
    completion: int
    rollout: Rollout
    place: tuple[Worker, int] | None = None

    @property
    def tokens(self) -> int:
        return self.rollout.completion.tree_tokens


@dataclass
class _Group:
    """What still waits of one rollout group. The prompt's tokens are counted once."""

    prompt_tokens: int
    items: deque[_Item]
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = self.prompt_tokens + sum(item.tokens for item in self.items)

    def take(self, room: int, *, split: bool) -> tuple[list[_Item], int]:
        """Removes what fits in `room` tokens, and says how many tokens that is: all of it, or, if `split`, at least one rollout."""
        if self.tokens > room and not split:
            return [], 0
        taken: list[_Item] = []
        tokens = self.prompt_tokens
        while self.items and (not taken or tokens + self.items[0].tokens <= room):
            taken.append(self.items.popleft())
            tokens += taken[-1].tokens
        self.tokens = self.tokens - tokens + self.prompt_tokens if self.items else 0
        return taken, tokens


class Call:
    """The work of one request: a context manager that withdraws what is unfinished, and an async iterator over ``Delivery``.

    Iterating raises the ``CoreError`` that ended the call early, after what had finished before it.

    Attributes:
        queue_seconds: from admission until the first of its rollouts reached a worker; ``None`` before that.
    """

    def __init__(self, scheduler: Scheduler, job: str, priority: int, deadline: float) -> None:
        self.job = job
        self.priority = priority
        self.deadline = deadline
        self.queue_seconds: float | None = None
        self._scheduler = scheduler
        self._admitted = scheduler.clock()
        self._waiting: deque[_Group] = deque()
        self._computing: set[_Item] = set()
        self._deliveries: deque[Delivery] = deque()
        self._unread_tokens = 0
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
            if not self._waiting and not self._computing:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        delivery = self._deliveries.popleft()
        self._unread_tokens -= delivery.tokens
        self._scheduler.dispatch()
        return delivery

    @property
    def waiting_tokens(self) -> int:
        """Tokens that have not reached a worker."""
        return sum(group.tokens for group in self._waiting)

    @property
    def waiting_rollouts(self) -> int:
        """Rollouts that have not reached a worker."""
        return sum(len(group.items) for group in self._waiting)


class Scheduler:
    """Admits calls and hands batches to workers.

    Args:
        workers: served in this order.
        max_queue_tokens: tokens that may wait, over all calls.
        max_batch_tokens: tokens of one batch. A single rollout that is larger still makes a batch of its own.
        on_batch: told of every batch as it reaches a worker: its tokens.
        clock: seconds, monotonic; deadlines are on it.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        *,
        max_queue_tokens: int,
        max_batch_tokens: int,
        on_batch: Callable[[int], None] = lambda tokens: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self._workers = workers
        self._max_queue_tokens = max_queue_tokens
        self._max_batch_tokens = max_batch_tokens
        self._on_batch = on_batch
        self._jobs: OrderedDict[str, list[Call]] = OrderedDict()  # the next turn first
        self._busy: dict[Worker, asyncio.Task[None]] = {}
        self._tokens_per_second: float | None = None
        self.queued_tokens = 0
        self.queued_rollouts = 0

    def submit(self, groups: Sequence[Sequence[Rollout]], *, job: str, priority: int = 0, deadline: float = math.inf) -> Call:
        """Admits the rollouts of one request, given per group.

        Raises:
            QueueFull: they do not fit beside what waits already.
        """
        call = Call(self, job, priority, deadline)
        for index, group in enumerate(groups):
            items = deque(_Item(call, index, completion, rollout) for completion, rollout in enumerate(group))
            call._waiting.append(_Group(len(group[0].prompt_ids), items))
        tokens = call.waiting_tokens
        if self.queued_tokens + tokens > self._max_queue_tokens:
            raise QueueFull(self.queued_tokens, self._max_queue_tokens, self._retry_seconds())
        self.queued_tokens += tokens
        self.queued_rollouts += call.waiting_rollouts
        bisect.insort(self._jobs.setdefault(job, []), call, key=lambda queued: -queued.priority)
        self.dispatch()
        return call

    def withdraw(self, call: Call) -> None:
        """Ends a call: what waits is dropped, what computes is cancelled. Does nothing to a call that has finished."""
        self.queued_tokens -= call.waiting_tokens
        self.queued_rollouts -= call.waiting_rollouts
        call._waiting.clear()
        self._leave_queue(call)
        for item in call._computing:
            if item.place is not None:
                worker, index = item.place
                worker.cancel(index)
        call._computing.clear()
        call._changed.set()

    def fail_waiting(self, error: CoreError) -> None:
        """Ends every call that waits with an error: there is nobody left to take them."""
        for call in [call for calls in self._jobs.values() for call in calls]:
            self._fail(call, error)

    def dispatch(self) -> None:
        """Gives every free worker a batch; to be called when a worker becomes ready."""
        for worker in self._workers:
            if worker.ready and worker not in self._busy:
                batch, tokens = self._next_batch()
                if not batch:
                    return
                self._on_batch(tokens)
                self._busy[worker] = asyncio.create_task(self._run(worker, batch, tokens))

    # ------------------------------------------------------------------------------------------------------------ the next batch

    def _next_batch(self) -> tuple[list[_Item], int]:
        batch: list[_Item] = []
        room = self._max_batch_tokens
        turns = deque(self._jobs)
        while turns:
            job = turns.popleft()
            taken, tokens = self._take(job, room, split=not batch)
            if taken:
                batch += taken
                room -= tokens
                if job in self._jobs:
                    self._jobs.move_to_end(job)
                    turns.append(job)
            # A job whose group does not fit keeps its place: it goes first in the next batch, where all the room is its own.
        return batch, self._max_batch_tokens - room

    def _take(self, job: str, room: int, *, split: bool) -> tuple[list[_Item], int]:
        for call in tuple(self._jobs[job]):
            if call.deadline <= self.clock():
                self._fail(call, DeadlineExpired("the deadline passed before the work reached the device"))
            elif call._unread_tokens < self._max_batch_tokens:
                return self._take_from(call, room, split=split)
        return [], 0

    def _take_from(self, call: Call, room: int, *, split: bool) -> tuple[list[_Item], int]:
        group = call._waiting[0]
        before = group.tokens
        taken, tokens = group.take(room, split=split)
        self.queued_tokens -= before - group.tokens
        self.queued_rollouts -= len(taken)
        call._computing.update(taken)
        if taken and call.queue_seconds is None:
            call.queue_seconds = self.clock() - call._admitted
        if not group.items:
            call._waiting.popleft()
        if not call._waiting:
            self._leave_queue(call)
        return taken, tokens

    def _leave_queue(self, call: Call) -> None:
        calls = self._jobs.get(call.job, [])
        if call in calls:
            calls.remove(call)
            if not calls:
                del self._jobs[call.job]

    # --------------------------------------------------------------------------------------------------------------- a batch runs

    async def _run(self, worker: Worker, batch: list[_Item], tokens: int) -> None:
        started = self.clock()
        try:
            await self._score(worker, batch)
        finally:
            self._fail_lost([item for item in batch if item in item.call._computing])
            del self._busy[worker]
            self._learn_throughput(tokens, self.clock() - started)
            self.dispatch()

    async def _score(self, worker: Worker, batch: Iterable[_Item]) -> None:
        items = [item for item in batch if item in item.call._computing]
        if not items:
            return
        for index, item in enumerate(items):
            item.place = (worker, index)
        try:
            scored = await worker.score([item.rollout for item in items])
        except WorkerUnavailable as error:
            for item in items:
                self._fail(item.call, error)
        except InternalFault as error:
            for item in items:
                item.place = None
            if len(items) == 1:
                self._fail(items[0].call, error)
            else:
                await self._score(worker, items[: len(items) // 2])
                await self._score(worker, items[len(items) // 2 :])
        else:
            self._deliver(items, scored)

    def _deliver(self, items: Sequence[_Item], scored: ScoredBatch) -> None:
        by_call: dict[Call, list[tuple[_Item, RolloutResult]]] = {}
        for item, result in zip(items, scored.results, strict=True):
            if item in item.call._computing and result is not None:
                by_call.setdefault(item.call, []).append((item, result))
        for call, pairs in by_call.items():
            finished = tuple(FinishedRollout(item.group, item.completion, result) for item, result in pairs)
            tokens = sum(item.rollout.tokens for item, _ in pairs)
            call._computing.difference_update(item for item, _ in pairs)
            call._deliveries.append(Delivery(finished, scored.compute_seconds, tokens))
            call._unread_tokens += tokens
            call._changed.set()

    def _fail_lost(self, items: Sequence[_Item]) -> None:
        """Whatever goes wrong, a call ends: rollouts that a worker neither scored nor refused would keep it waiting for ever."""
        if items:
            fault = InternalFault.new()
            logger.error("rollouts got lost in a batch", incident=fault.incident, rollouts=len(items))
            for item in items:
                self._fail(item.call, fault)

    def _fail(self, call: Call, error: CoreError) -> None:
        if call._failure is None:
            call._failure = error
            self.withdraw(call)

    # -------------------------------------------------------------------------------------------------------- when to come back

    def _learn_throughput(self, tokens: int, seconds: float) -> None:
        measured = tokens / max(seconds, 1e-6)
        known = self._tokens_per_second
        self._tokens_per_second = measured if known is None else known + THROUGHPUT_SMOOTHING * (measured - known)

    def _retry_seconds(self) -> float:
        """How long a worker takes for its share of what waits; a guess of one second before the first batch."""
        if not self._tokens_per_second:
            return 1.0
        working = max(1, sum(worker.ready for worker in self._workers))
        seconds = self.queued_tokens / (self._tokens_per_second * working)
        return min(max(seconds, MIN_RETRY_SECONDS), MAX_RETRY_SECONDS)
