"""Implements the scheduling policy: which calls are admitted, and when each worker gets which batch.

There is no timer: a batch is whatever waits when a worker becomes free, up to a token budget, so that batches grow under load.

* Admission counts tokens. A call that does not fit into the queue is refused at once, with an estimate of when to try again.
* The module ``queue`` chooses the rollouts of a batch, their order and how prompts are shared. The module ``deduplication`` computes
  identical rollouts of several calls once.
* While a worker computes one batch it may have the next one prepared, so that sending and decoding cost no time. A batch is prepared only
  if as much waits as fits into it (a prompt and identical rollouts counted once): waiting longer would not make it larger. It is the same
  batch, by the same turns, as the worker would get a little later; calls that arrive in between wait for it.
* Expired and withdrawn work never reaches a worker, and withdrawn work that a worker has already is cancelled in the middle of its batch.
* A batch that fails is halved until the rollout that fails is alone.
* A batch for which memory is short is halved too, and the worker then gets smaller ones (``batch_budget``). A single rollout that does not
  fit fails.
* If a worker process is ended on purpose, the batch that it computed fails, and one that it had only prepared returns to the queue.
* If a worker process is lost in any other way (it got stuck, its device failed, it crashed), what it computed may be the cause: each
  rollout of that batch returns to the queue, is tried alone, and is refused if a worker is lost with it again (``suspects``).

Everything runs on one event loop, so nothing here locks.
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
    """Holds a batch that one worker got.

    Attributes:
        worker: the worker.
        computations: the batch's rollouts, each once for all calls that wait for it.
        started: whether the worker computes the batch now, as far as is known.
        lost: whether the worker was lost, so that what is unfinished waits again.
    """

    worker: Worker
    computations: list[Computation]
    started: bool
    lost: bool = False


class Scheduler:
    """Admits calls to the queue and hands batches of their rollouts to workers. All of it runs on one event loop.

    Args:
        workers: the workers, which are given batches in this order.
        max_queue_tokens: the most tokens that may wait, over all calls.
        max_batch_tokens: the most tokens of one batch. A single rollout that is larger is a batch of its own.
        on_batch: called for every batch that goes to a worker, with its number of tokens and its number of rollouts.
        on_out_of_memory: called for every batch for which memory was short.
        clock: returns the time in seconds on a monotonic clock, on which deadlines are given.
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
        """Counts the tokens that wait for a worker, a prompt once per group."""
        return self._waiting.tokens

    @property
    def queued_rollouts(self) -> int:
        """Counts the rollouts that wait for a worker."""
        return self._waiting.rollouts

    def batch_budget(self, worker: Worker) -> int:
        """Returns the most tokens that the next batch of a worker may have."""
        return self._budgets[worker].tokens

    def submit(self, groups: Sequence[Sequence[CheckedRollout]], *, job: str, priority: int = 0, deadline: float = math.inf) -> Call:
        """Admits the rollouts of one request to the queue, and returns the call that yields their results.

        Args:
            groups: the checked rollouts, per group; all have the same options.
            job: name of the training job that sent the request; jobs take turns.
            priority: rollouts of the same job with a higher number go first.
            deadline: when the work must be done, in seconds on the scheduler's clock.

        Raises:
            QueueFull: the rollouts do not fit into the queue beside what waits already.
            WorkerLostTwice: a worker process was lost twice with one of the rollouts.
            OutOfMemory: a worker process was twice killed, with one of the rollouts, because the system's memory was short.
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
        """Ends a call: drops its rollouts that wait and cancels those computed for no other call. A finished call stays as it is."""
        self._waiting.drop(call)
        self._in_flight.withdraw(call)
        call.ended()

    def fail_waiting(self, error: CoreError) -> None:
        """Ends, with ``error``, every call that has waiting rollouts; it is for when no worker is left to compute them."""
        for call in list(self._waiting):
            call.fail(error)

    def dispatch(self) -> None:
        """Gives every free worker a batch of waiting rollouts, and prepares a next one; it must be called when a worker becomes ready."""
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
        # The suspects are noted now, since what is known of rollouts may change while something computes.
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
        """Scores those rollouts of a batch that calls still wait for, in halves where they fail together."""
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
        """Marks which of its batches a worker computes once it has answered (a part of) ``batch``.

        It is the worker's other batch if there is one, since the rest of ``batch`` is sent after that.
        """
        batches = self._batches[batch.worker]
        for other in batches:
            other.started = other is not batch or len(batches) == 1

    def _lose(self, batch: _SentBatch, computations: Sequence[Computation], error: WorkerUnavailable, number: int) -> None:
        """Decides what becomes of rollouts whose worker process ended or was lost before it had scored them.

        Those that it computed fail or, if the loss was not on purpose, are suspected of it; others go back into the queue.

        Args:
            batch: the batch that the rollouts belong to.
            computations: the rollouts.
            error: how the worker was lost.
            number: the number under which the worker had these rollouts.
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
        """Puts rollouts that a worker process computed when it was lost back into the queue, each to be tried alone.

        A rollout that was alone in the batch and was suspected before is refused instead.
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
        """Puts rollouts back at the head of the queue, in the order in which they were taken."""
        for computation in reversed(computations):
            computation.place = None
            self._waiting.put_back(self._in_flight.take_back(computation))

    def _fail_lost(self, computations: Sequence[Computation]) -> None:
        """Ends, with an internal fault, the calls of rollouts that a worker neither scored nor refused, since they would wait for ever."""
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
        """Estimates the seconds that a worker takes for its share of what waits; before the first batch the estimate is one second."""
        if not self._tokens_per_second:
            return 1.0
        working = max(1, sum(worker.ready for worker in self._batches))
        seconds = self.queued_tokens / (self._tokens_per_second * working)
        return min(max(seconds, MIN_RETRY_SECONDS), MAX_RETRY_SECONDS)


def _refusal(item: RequestedRollout, error: WorkerLost) -> CoreError:
    """Returns the error that ends the call of a rollout with which a worker process was lost twice."""
    if error.reason_lost == "memory":
        return OutOfMemory(item.rollout.tokens)
    return WorkerLostTwice(f"groups[{item.group}].completions[{item.completion}]", error.doing, error.problem)


def _tokens(computations: Sequence[Computation]) -> int:
    """Counts the tokens of rollouts that are computed together, each distinct prompt once."""
    prompts = {computation.key[0]: len(computation.rollout.prompt_ids) for computation in computations}
    return sum(prompts.values()) + sum(computation.rollout.tokens - len(computation.rollout.prompt_ids) for computation in computations)
