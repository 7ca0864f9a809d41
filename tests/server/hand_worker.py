"""A worker whose batches the test finishes by hand, and rollouts to give it."""

from __future__ import annotations

import asyncio
import itertools
import zlib
from collections.abc import Collection, Sequence

import numpy as np

from probescore.types import CompletionScores, CompletionStatus, Usage
from probescore_server.errors import InternalFault, OutOfMemory
from probescore_server.rollouts import CheckedRollout, Continuation, ResolvedOptions, RolloutResult, ScoredBatch
from probescore_server.scheduling.call import Call
from probescore_server.scheduling.scheduler import Scheduler

OPTIONS = ResolvedOptions(probes=("p@1",))


class HandWorker:
    """Keeps each batch until the test says how it ends; batches end in the order in which they came.

    Args:
        poison: completions that fail any batch that they are in.
        memory: tokens, a prompt counted once; a larger batch runs out of it. None = enough.

    Attributes:
        batches: the ids of the completions of every batch.
        given_up: ids of the completions that were cancelled.
    """

    def __init__(self, poison: Collection[str] = (), *, memory: int | None = None, ready: bool = True) -> None:
        self.ready = ready
        self.batches: list[list[str]] = []
        self.given_up: list[str] = []
        self.compute_seconds = 0.5
        self._poison = frozenset(poison)
        self._memory = memory
        self._numbers = itertools.count(1)
        self._cancelled: dict[int, set[int]] = {}
        self._rollouts: dict[int, Sequence[CheckedRollout]] = {}
        self._ends: dict[int, asyncio.Future[None]] = {}

    def new_batch(self) -> int:
        return next(self._numbers)

    async def score(self, number: int, rollouts: Sequence[CheckedRollout]) -> ScoredBatch:
        names = [rollout.completion.id for rollout in rollouts]
        self.batches.append(names)
        self._rollouts[number], self._cancelled[number] = rollouts, set()
        self._ends[number] = asyncio.get_running_loop().create_future()
        try:
            await self._ends[number]
        finally:
            del self._ends[number], self._rollouts[number]
            cancelled = self._cancelled.pop(number)
        if self._poison.intersection(names):
            raise InternalFault("0123")
        if self._memory is not None and tokens_of(rollouts) > self._memory:
            raise OutOfMemory(sum(rollout.tokens for rollout in rollouts))
        results = [None if index in cancelled else result_of(rollout) for index, rollout in enumerate(rollouts)]
        return ScoredBatch(tuple(results), self.compute_seconds)

    def cancel(self, number: int, index: int) -> None:
        self._cancelled[number].add(index)
        self.given_up.append(self._rollouts[number][index].completion.id)

    @property
    def holds(self) -> int:
        """Batches that it has."""
        return len(self._ends)

    async def finish(self, error: Exception | None = None) -> None:
        """Ends the batch that computes and lets everybody react."""
        end = next(iter(self._ends.values()))
        if error is None:
            end.set_result(None)
        else:
            end.set_exception(error)
        await settle()

    async def die(self, error: Exception) -> None:
        """Ends every batch that it has."""
        self.ready = False
        for end in list(self._ends.values()):
            end.set_exception(error)
        await settle()

    async def finish_all(self) -> None:
        while self._ends:
            await self.finish()


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def tokens_of(rollouts: Sequence[CheckedRollout]) -> int:
    """Of a batch, each prompt once."""
    prompts = {rollout.prompt_ids.tobytes(): len(rollout.prompt_ids) for rollout in rollouts}
    return sum(prompts.values()) + sum(rollout.tokens - len(rollout.prompt_ids) for rollout in rollouts)


def result_of(rollout: CheckedRollout) -> RolloutResult:
    return RolloutResult(scores_of(rollout.completion), Usage(tokens_computed=rollout.tokens))


def scores_of(continuation: Continuation) -> CompletionScores:
    follow_ups = tuple(map(scores_of, continuation.follow_ups))
    return CompletionScores(continuation.id, CompletionStatus.OK, {}, inexact_ids=continuation.inexact_ids, follow_ups=follow_ups)


_distinct = itertools.count(1)


def group(*names: str, prompt: int = 4, tokens: int = 1, prompt_id: int | None = None) -> list[CheckedRollout]:
    """Rollouts of one prompt of `prompt` tokens, unlike any other unless `prompt_id` says so; a completion's tokens spell its name."""
    prompt_ids = np.full(prompt, next(_distinct) if prompt_id is None else -prompt_id, np.int32)
    return [
        CheckedRollout(prompt_ids, Continuation(np.full(tokens, zlib.crc32(name.encode()) >> 1, np.int32), id=name), OPTIONS)
        for name in names
    ]


def scheduler_for(*workers: HandWorker, queue: int = 10_000, batch: int = 100, clock: list[float] | None = None) -> Scheduler:
    now = clock or [0.0]
    return Scheduler(workers, max_queue_tokens=queue, max_batch_tokens=batch, clock=lambda: now[0])


async def names_of(call: Call) -> list[str]:
    return [one.result.scores.id async for delivery in call for one in delivery.finished]


def is_empty(scheduler: Scheduler) -> bool:
    """Whether nothing of any call is left in it."""
    waiting, in_flight = scheduler._waiting, scheduler._in_flight
    left = [waiting._jobs, waiting._prompts, waiting.tokens, waiting.rollouts, waiting._distinct_tokens]
    left += [in_flight._by_key, in_flight._by_rollout, *scheduler._batches.values(), scheduler._running]
    return not any(left)
