"""Implements the scheduling policy: which calls (each the work of one request) are accepted, and when each worker process gets which batch.

There is no timer: when a worker becomes free, all waiting rollouts, up to a token budget, become its next batch. So batches grow under
load.

* The queue is limited in tokens. A call that does not fit into the queue is refused at once, with an estimate of when to try again.
* The module ``queue`` chooses the rollouts of a batch, their order and how prompts are shared. The module ``deduplication`` computes
  identical rollouts of several calls once.
* While a worker computes one batch, the next batch may already be sent to the worker, so that sending and decoding cost no extra time. A
  batch is sent ahead only if enough tokens wait to fill it (a prompt and identical rollouts counted once), since waiting longer would not
  make it larger. Its rollouts are those that the worker would get a little later anyway; calls that arrive in between wait for the batch.
* Rollouts of expired and withdrawn calls are never sent to a worker. If a worker has them already, withdrawn rollouts are cancelled in the
  middle of their batch.
* A batch that fails is halved until the rollout that fails is alone.
* A batch that does not fit into memory is halved too, and the worker then gets smaller batches (``batch_budget``). A single rollout that
  does not fit fails.
* If a worker process is ended on purpose, the batch that it was computing fails, and a batch that was only sent ahead returns to the queue.
* If a worker process dies in any other way (it crashed, its device failed, or it was killed because it was stuck), a rollout that it was
  computing may be the cause. Each rollout of that batch returns to the queue, is tried alone, and is refused if a worker dies with the
  rollout again (``suspects``).

All code of this module runs on one event loop and needs no locks.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from probescore_server.errors import (
    CoreError,
    DeadlineExpired,
    InternalFault,
    OutOfMemory,
    QueueFull,
    WorkerLost,
    WorkerLostTwice,
    WorkerUnavailable,
)
from probescore_server.rollouts import CheckedRollout
from probescore_server.scheduling.batch_budget import BatchBudget
from probescore_server.scheduling.call import Call, RequestedRollout, groups_of
from probescore_server.scheduling.deduplication import BatchSlot, Computation, ComputationsInFlight, Worker
from probescore_server.scheduling.queue import WaitingQueue
from probescore_server.scheduling.suspects import Suspects

logger = structlog.get_logger(__name__)

# A worker has at most two batches: one computes, one is prepared.
MAX_BATCHES = 2
MIN_RETRY_SECONDS = 0.1
MAX_RETRY_SECONDS = 60.0
# This is the weight of the newest batch in the running estimate of throughput.
THROUGHPUT_SMOOTHING = 0.3


@dataclass(eq=False, slots=True)
class _SentBatch:
    """Record of a batch that was sent to one worker process.

    Attributes:
        worker: the worker.
        computations: the batch's rollouts, each with all calls (requests) that wait for its result.
        started: whether the worker computes the batch now, as far as the scheduler knows.
        lost: whether the worker died, so that the unfinished rollouts are in the queue again.
    """

    worker: Worker
    computations: list[Computation]
    started: bool
    lost: bool = False


class Scheduler:
    """Scheduler that accepts calls (each the work of one request) into a queue and sends batches of their rollouts to worker processes. All
    methods must run on one event loop.

    Args:
        workers: the workers; if several are free, they get batches in this order.
        max_queue_tokens: the largest number of tokens that may wait, over all calls.
        max_batch_tokens: the largest number of tokens of one batch. A single larger rollout is a batch of its own.
        on_batch: function that is called for every batch sent to a worker, with the batch's number of tokens and number of rollouts.
        on_out_of_memory: function that is called for every batch that did not fit into a device's memory.
        clock: function that returns the time in seconds on a monotonic clock, on which deadlines are given.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        *,
        max_queue_tokens: int,
        max_batch_tokens: int,
        on_batch: Callable[[int, int], None] = lambda tokens, rollouts: None,
        on_out_of_memory: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self._max_queue_tokens = max_queue_tokens
        self._on_batch = on_batch
        self._on_out_of_memory = on_out_of_memory
        self._waiting = WaitingQueue(max_unread_tokens=max_batch_tokens)
        self._in_flight = ComputationsInFlight()
        self._suspects = Suspects()
        self._budgets = {worker: BatchBudget(max_batch_tokens) for worker in workers}
        self._batches: dict[Worker, list[_SentBatch]] = {worker: [] for worker in workers}  # The one that computes comes first.
        self._running: set[asyncio.Task[None]] = set()
        self._tokens_per_second: float | None = None

    @property
    def queued_tokens(self) -> int:
        """Counts the tokens of the rollouts that wait in the queue for a worker process, with a group's prompt counted once."""
        return self._waiting.tokens

    @property
    def queued_rollouts(self) -> int:
        """Counts the rollouts that wait in the queue for a worker process."""
        return self._waiting.rollouts

    def batch_budget(self, worker: Worker) -> int:
        """Returns the largest number of tokens that the next batch of rollouts for a worker process may have."""
        return self._budgets[worker].tokens

    def submit(self, groups: Sequence[Sequence[CheckedRollout]], *, job: str, priority: int = 0, deadline: float = math.inf) -> Call:
        """Adds the rollouts of one request to the queue, and returns a ``Call``, which yields their results.

        Args:
            groups: the checked rollouts, per group (a prompt with its completions); all have the same request options.
            job: name of the training job that sent the request; jobs take turns.
            priority: rollouts of the same job with a higher number go first.
            deadline: the time by which the work must be done, in seconds on the scheduler's clock.

        Raises:
            QueueFull: the rollouts do not fit into the queue beside those that wait already.
            WorkerLostTwice: one of the rollouts has caused the death of two worker processes.
            OutOfMemory: two worker processes that computed one of the rollouts were killed because the system's memory was short.
        """
        now = self.clock()
        call = Call(self, job, priority, deadline, now)
        admitted = groups_of(call, groups)
        for item in (item for group in admitted for item in group.items):
            if (error := self._suspects.lost_twice(item.key, now)) is not None:
                raise _refusal(item, error)
        if self.queued_tokens + sum(group.tokens for group in admitted) > self._max_queue_tokens:
            raise QueueFull(self.queued_tokens, self._max_queue_tokens, self._retry_seconds())
        for group in admitted:
            for item in [item for item in group.items if self._in_flight.has(item)]:
                group.remove(item)
                self._in_flight.begin([item], now)
        self._waiting.add(group for group in admitted if group.items)
        self.dispatch()
        return call

    def withdraw(self, call: Call) -> None:
        """Ends a call (the work of one request): drops its waiting rollouts, and cancels the rollouts that are computed for no other call.
        A finished call stays as it is.
        """
        self._waiting.drop(call)
        self._in_flight.withdraw(call)
        call.ended()

    def fail_waiting(self, error: CoreError) -> None:
        """Ends, with the given error, every call (the work of one request) that has waiting rollouts. The method is used when no worker
        process is left to compute the rollouts.
        """
        for call in list(self._waiting):
            call.fail(error)

    def dispatch(self) -> None:
        """Sends every free worker process a batch of waiting rollouts, and sends busy ones a next batch ahead if enough tokens wait. The
        method must be called when a worker process becomes ready.
        """
        for ahead in range(MAX_BATCHES):
            for worker, batches in self._batches.items():
                if worker.ready and len(batches) == ahead and self._waiting.rollouts:
                    self._give(worker, prepare=ahead > 0)

    # --------------------------------------------------------------------------------------------------------------- a batch runs

    def _give(self, worker: Worker, *, prepare: bool) -> None:
        now, budget = self.clock(), self._budgets[worker].tokens
        for call in self._waiting.expired(now):
            call.fail(DeadlineExpired("the deadline passed before the work reached the device"))
        if prepare and not self._waiting.holds(budget):
            return
        taken, tokens = self._waiting.next_batch(budget)
        begun = [self._in_flight.begin(identical, now) for identical in taken]
        computations = [computation for computation in begun if computation is not None]
        if computations:
            batch = _SentBatch(worker, computations, started=not prepare)
            self._batches[worker].append(batch)
            task = asyncio.create_task(self._run(batch))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            asyncio.get_running_loop().call_soon(self._on_batch, tokens, len(computations))  # The batch is sent before it is counted.

    async def _run(self, batch: _SentBatch) -> None:
        # The suspects are noted now, since the suspicions may change while a rollout is computed.
        suspects = [computation for computation in batch.computations if computation.key in self._suspects]
        try:
            await self._score(batch, [computation for computation in batch.computations if computation not in suspects])
            for suspect in suspects:
                await self._score(batch, [suspect])
        finally:
            self._fail_lost([computation for computation in batch.computations if computation.items])
            self._batches[batch.worker].remove(batch)
            self.dispatch()

    async def _score(self, batch: _SentBatch, computations: Sequence[Computation]) -> None:
        """Has a worker process score those rollouts of a batch for which requests still wait. If the rollouts fail together, each half of
        them is tried by itself.
        """
        computations = [computation for computation in computations if computation.items]
        if batch.lost:
            self._put_back(computations)
            return
        if not computations:
            return
        worker, number, tokens = batch.worker, batch.worker.new_batch(), _tokens(computations)
        for index, computation in enumerate(computations):
            computation.place = BatchSlot(worker, number, index)
        try:
            scored = await worker.score(number, [computation.rollout for computation in computations])
        except WorkerUnavailable as error:
            batch.lost = True
            self._lose(batch, computations, error, number)
            return
        except OutOfMemory as error:
            failure: CoreError | None = error
            self._budgets[worker].failed(tokens)
            self._on_out_of_memory()
            logger.warning("a batch did not fit into memory", tokens=tokens, rollouts=len(computations), budget=self.batch_budget(worker))
        except InternalFault as error:
            failure = error
        else:
            failure = None
            self._in_flight.deliver(computations, scored)
            for computation, result in zip(computations, scored.results, strict=True):
                if result is not None:
                    self._suspects.cleared(computation.key)
            self._budgets[worker].fitted(tokens)
            self._learn_throughput(tokens, scored.compute_seconds)
        self._answered(batch)
        if failure is not None:
            await self._split(batch, computations, failure)

    async def _split(self, batch: _SentBatch, computations: Sequence[Computation], failure: CoreError) -> None:
        for computation in computations:
            computation.place = None
        if len(computations) == 1:
            self._in_flight.fail(computations[0], failure)
        else:
            await self._score(batch, computations[: len(computations) // 2])
            await self._score(batch, computations[len(computations) // 2 :])

    def _answered(self, batch: _SentBatch) -> None:
        """Records which of its batches (at most two) a worker process computes now, after the process has responded to ``batch`` or to a
        part of it.

        The process then computes its other batch, if there is one, since the rest of ``batch`` is sent later.
        """
        batches = self._batches[batch.worker]
        for other in batches:
            other.started = other is not batch or len(batches) == 1

    def _lose(self, batch: _SentBatch, computations: Sequence[Computation], error: WorkerUnavailable, number: int) -> None:
        """Handles rollouts whose worker process ended or died before it had scored them.

        Rollouts that the worker was computing fail if the worker was ended on purpose, and are otherwise suspected of being the cause. All
        others go back into the queue.

        Args:
            batch: the batch that the rollouts belong to.
            computations: the rollouts.
            error: the error that says how the worker died.
            number: the number of the worker's batch with these rollouts.
        """
        for computation in computations:
            computation.place = None
        computed = error.order == number if isinstance(error, WorkerLost) and error.order else batch.started
        if not computed:
            self._put_back(computations)
        elif isinstance(error, WorkerLost):
            self._suspect(batch, computations, error)
        else:
            for computation in computations:
                self._in_flight.fail(computation, error)

    def _suspect(self, batch: _SentBatch, computations: Sequence[Computation], error: WorkerLost) -> None:
        """Puts rollouts that a worker process was computing when it died back into the queue, each to be tried alone.

        A rollout that was alone in the batch, and was suspected of an earlier death too, is refused instead.
        """
        tokens = _tokens(computations)
        if error.reason_lost == "memory":
            self._budgets[batch.worker].failed(tokens)
            self._on_out_of_memory()
        why = {"reason": error.reason_lost, "doing": error.doing}
        logger.warning("a worker was lost in a batch", tokens=tokens, rollouts=len(computations), **why)
        for computation in computations:
            if self._suspects.lost(computation.key, error, self.clock(), alone=len(computations) == 1):
                for item in list(computation.items):
                    item.call.fail(_refusal(item, error))
        self._put_back(computations)

    def _put_back(self, computations: Sequence[Computation]) -> None:
        """Puts rollouts that a worker process was given but did not score back at the head of the queue, in their earlier order."""
        for computation in reversed(computations):
            computation.place = None
            self._waiting.put_back(self._in_flight.take_back(computation))

    def _fail_lost(self, computations: Sequence[Computation]) -> None:
        """Ends, with an internal error, the calls (requests) whose rollouts a worker process neither scored nor refused, since these calls
        would otherwise wait for ever.
        """
        if computations:
            fault = InternalFault.new()
            logger.error("rollouts got lost in a batch", incident=fault.incident, rollouts=len(computations))
            for computation in computations:
                self._in_flight.fail(computation, fault)

    # ----------------------------------------------------------------------------------------------------- when to try again

    def _learn_throughput(self, tokens: int, seconds: float) -> None:
        measured = tokens / max(seconds, 1e-6)
        known = self._tokens_per_second
        self._tokens_per_second = measured if known is None else known + THROUGHPUT_SMOOTHING * (measured - known)

    def _retry_seconds(self) -> float:
        """Estimates the seconds after which a refused request may be sent again, which are those that a worker process needs for its share
        of the waiting tokens. Before the first batch the estimate is one second.
        """
        if not self._tokens_per_second:
            return 1.0
        working = max(1, sum(worker.ready for worker in self._batches))
        seconds = self.queued_tokens / (self._tokens_per_second * working)
        return min(max(seconds, MIN_RETRY_SECONDS), MAX_RETRY_SECONDS)


def _refusal(item: RequestedRollout, error: WorkerLost) -> CoreError:
    """Returns the error with which a request ends if two worker processes have died while they computed one of its rollouts."""
    if error.reason_lost == "memory":
        return OutOfMemory(item.rollout.tokens)
    return WorkerLostTwice(f"groups[{item.group}].completions[{item.completion}]", error.doing, error.problem)


def _tokens(computations: Sequence[Computation]) -> int:
    """Counts the tokens of rollouts that are computed together, with each distinct prompt counted once."""
    prompts = {computation.key[0]: computation.rollout.prompt_tokens for computation in computations}
    return sum(prompts.values()) + sum(computation.rollout.tokens - computation.rollout.prompt_tokens for computation in computations)
