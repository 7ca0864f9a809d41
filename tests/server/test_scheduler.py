"""The scheduling policy, with a worker whose batches the test finishes by hand."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probescore.types import CompletionScores, CompletionStatus, Usage
from probescore_server.errors import DeadlineExpired, InternalFault, QueueFull, WorkerUnavailable
from probescore_server.rollouts import Continuation, Rollout, RolloutResult, ScoredBatch, ScoreOptions
from probescore_server.scheduler import Call, Scheduler

OPTIONS = ScoreOptions(probes=("p@1",))


class HandWorker:
    """Keeps each batch until the test says how it ends. `poison` names completions that fail any batch they are in."""

    def __init__(self, poison: frozenset[str] = frozenset(), *, ready: bool = True) -> None:
        self.ready = ready
        self.batches: list[list[str]] = []
        self.cancelled: list[int] = []
        self._poison = poison
        self._ends: asyncio.Future[None] | None = None

    async def score(self, rollouts: Sequence[Rollout]) -> ScoredBatch:
        names = [rollout.completion.id for rollout in rollouts]
        self.batches.append(names)
        self.cancelled = []
        self._ends = asyncio.get_running_loop().create_future()
        await self._ends
        if self._poison.intersection(names):
            raise InternalFault("0123")
        results = [None if index in self.cancelled else result_of(rollout) for index, rollout in enumerate(rollouts)]
        return ScoredBatch(tuple(results), 0.5)

    def cancel(self, index: int) -> None:
        self.cancelled.append(index)

    async def finish(self, error: Exception | None = None) -> None:
        """Ends the batch that computes and lets everybody react."""
        assert self._ends is not None
        if error is None:
            self._ends.set_result(None)
        else:
            self._ends.set_exception(error)
        await settle()

    async def finish_all(self) -> None:
        while self._ends is not None and not self._ends.done():
            await self.finish()


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def result_of(rollout: Rollout) -> RolloutResult:
    scores = CompletionScores(rollout.completion.id, CompletionStatus.OK, {})
    return RolloutResult(scores, Usage(tokens_computed=rollout.tokens))


def group(*names: str, prompt: int = 4, tokens: int = 1) -> list[Rollout]:
    prompt_ids = np.zeros(prompt, np.int32)
    return [Rollout(prompt_ids, Continuation(np.zeros(tokens, np.int32), id=name), OPTIONS) for name in names]


def scheduler_for(*workers: HandWorker, queue: int = 10_000, batch: int = 100, clock: list[float] | None = None) -> Scheduler:
    now = clock or [0.0]
    return Scheduler(workers, max_queue_tokens=queue, max_batch_tokens=batch, clock=lambda: now[0])


async def names_of(call: Call) -> list[str]:
    return [one.result.scores.id async for delivery in call for one in delivery.finished]


# -------------------------------------------------------------------------------------------------------------------- batching


async def test_a_batch_is_whatever_waits_when_the_worker_frees() -> None:
    worker = HandWorker()
    scheduler = scheduler_for(worker)
    for name in "abc":
        scheduler.submit([group(name)], job=name)
    await settle()
    assert worker.batches == [["a"]]  # nothing waited for company
    await worker.finish()
    assert worker.batches == [["a"], ["b", "c"]]


async def test_a_batch_stops_at_the_token_budget_and_counts_a_prompt_once() -> None:
    worker = HandWorker(ready=False)
    scheduler = scheduler_for(worker, batch=14)
    scheduler.submit([group("a1", "a2", "a3", prompt=4), group("b1", prompt=4), group("c1", prompt=4)], job="j")
    worker.ready = True
    scheduler.dispatch()
    await settle()
    assert worker.batches == [["a1", "a2", "a3", "b1"]]  # 4 + 3 and 4 + 1 tokens; another 5 would make 17


async def test_rollouts_of_one_prompt_stay_together_where_they_fit_one_batch() -> None:
    worker = HandWorker(ready=False)
    scheduler = scheduler_for(worker, batch=10)
    scheduler.submit([group("a1", "a2")], job="j")
    scheduler.submit([group("b1", "b2")], job="j")
    worker.ready = True
    scheduler.dispatch()
    await settle()
    await worker.finish_all()
    assert worker.batches == [["a1", "a2"], ["b1", "b2"]]  # not a1, a2, b1: 6 + 5 tokens


async def test_a_group_larger_than_a_batch_is_split_into_full_batches() -> None:
    worker = HandWorker()
    scheduler = scheduler_for(worker, batch=6)
    call = scheduler.submit([group("1", "2", "3", "4", "5", prompt=4)], job="j")
    reading = asyncio.create_task(names_of(call))
    await settle()
    await worker.finish_all()
    assert worker.batches == [["1", "2"], ["3", "4"], ["5"]]
    assert await reading == ["1", "2", "3", "4", "5"]
    assert (scheduler.queued_tokens, scheduler.queued_rollouts) == (0, 0)


async def test_a_rollout_larger_than_a_batch_makes_a_batch_of_its_own() -> None:
    worker = HandWorker()
    scheduler = scheduler_for(worker, batch=3)
    scheduler.submit([group("big", "small", prompt=0, tokens=9)], job="j")
    await settle()
    assert worker.batches == [["big"]]


async def test_every_free_worker_gets_a_batch_and_a_worker_that_is_down_gets_none() -> None:
    first, down, third = HandWorker(), HandWorker(ready=False), HandWorker()
    scheduler = scheduler_for(first, down, third, batch=5)
    scheduler.submit([group("a"), group("b"), group("c")], job="j")
    await settle()
    assert (first.batches, down.batches, third.batches) == ([["a"]], [], [["b"]])


# -------------------------------------------------------------------------------------------------------------------- fairness


async def test_jobs_take_turns_however_much_each_has_waiting() -> None:
    worker = HandWorker(ready=False)
    scheduler = scheduler_for(worker, batch=10)
    for number in range(4):
        scheduler.submit([group(f"a{number}")], job="a")
    scheduler.submit([group("b0")], job="b")
    worker.ready = True
    scheduler.dispatch()
    await settle()
    await worker.finish_all()
    assert worker.batches == [["a0", "b0"], ["a1", "a2"], ["a3"]]


async def test_a_job_that_had_its_turn_waits_for_the_others_from_batch_to_batch() -> None:
    worker = HandWorker(ready=False)
    scheduler = scheduler_for(worker, batch=5)  # room for one group
    for name in ("a0", "a1", "b0", "b1", "c0"):
        scheduler.submit([group(name)], job=name[0])
    worker.ready = True
    scheduler.dispatch()
    await settle()
    await worker.finish_all()
    assert worker.batches == [["a0"], ["b0"], ["c0"], ["a1"], ["b1"]]


async def test_within_a_job_higher_priority_goes_first_then_first_come_first_served() -> None:
    worker = HandWorker(ready=False)
    scheduler = scheduler_for(worker, batch=100)
    for name, priority in (("low", -1), ("first", 0), ("second", 0), ("high", 5)):
        scheduler.submit([group(name)], job="j", priority=priority)
    worker.ready = True
    scheduler.dispatch()
    await settle()
    assert worker.batches == [["high", "first", "second", "low"]]


async def test_a_group_that_did_not_fit_goes_first_next_time() -> None:
    worker = HandWorker(ready=False)
    scheduler = scheduler_for(worker, batch=20)
    scheduler.submit([group("small")], job="a")
    scheduler.submit([group("large", prompt=17)], job="b")
    scheduler.submit([group("other")], job="c")
    worker.ready = True
    scheduler.dispatch()
    await settle()
    scheduler.submit([group("late")], job="d")
    await worker.finish()
    assert worker.batches == [["small", "other"], ["large"]]


# ------------------------------------------------------------------------------------------------------------------- admission


async def test_exactly_the_calls_that_do_not_fit_are_refused_and_told_when_to_retry() -> None:
    worker = HandWorker(ready=False)
    scheduler = scheduler_for(worker, queue=50)
    for number in range(10):
        scheduler.submit([group(str(number))], job="j")
    for _ in range(3):
        with pytest.raises(QueueFull) as refused:
            scheduler.submit([group("too many")], job="j")
        assert (refused.value.queued_tokens, refused.value.max_queue_tokens) == (50, 50)
        assert refused.value.retry_seconds > 0
    assert (scheduler.queued_tokens, scheduler.queued_rollouts) == (50, 10)


async def test_the_retry_estimate_is_the_time_that_the_queue_takes_at_the_measured_speed() -> None:
    clock = [0.0]
    worker = HandWorker()
    scheduler = scheduler_for(worker, queue=40, batch=20, clock=clock)
    scheduler.submit([group("a", prompt=19)], job="j")
    await settle()
    clock[0] = 2.0  # 20 tokens in 2 seconds
    await worker.finish()
    scheduler.submit([group("b", prompt=19)], job="j")
    scheduler.submit([group("c", prompt=39)], job="j")
    with pytest.raises(QueueFull) as refusal:
        scheduler.submit([group("d")], job="j")
    assert refusal.value.retry_seconds == pytest.approx(4.0)


# ------------------------------------------------------------------------------------------------------ deadlines, cancellation


async def test_expired_work_never_reaches_a_worker() -> None:
    clock = [0.0]
    worker = HandWorker()
    scheduler = scheduler_for(worker, clock=clock)
    scheduler.submit([group("first")], job="j")
    expiring = scheduler.submit([group("expiring")], job="j", deadline=1.0)
    scheduler.submit([group("patient")], job="j", deadline=math.inf)
    await settle()
    clock[0] = 1.0
    await worker.finish()
    with pytest.raises(DeadlineExpired):
        await names_of(expiring)
    assert worker.batches == [["first"], ["patient"]]
    assert scheduler.queued_tokens == 0


async def test_withdrawn_work_that_waits_frees_its_room_at_once() -> None:
    worker = HandWorker()
    scheduler = scheduler_for(worker, queue=5)
    scheduler.submit([group("computing")], job="j")
    with scheduler.submit([group("waiting")], job="j"):
        pass
    assert (scheduler.queued_tokens, scheduler.queued_rollouts) == (0, 0)
    scheduler.submit([group("next")], job="j")
    await settle()
    await worker.finish()
    assert worker.batches == [["computing"], ["next"]]


async def test_withdrawn_work_that_computes_is_cancelled_and_its_neighbours_are_not() -> None:
    worker = HandWorker(ready=False)
    scheduler = scheduler_for(worker)
    staying = scheduler.submit([group("s1")], job="j")
    leaving = scheduler.submit([group("l1", "l2")], job="j")
    worker.ready = True
    scheduler.dispatch()
    await settle()
    scheduler.withdraw(leaving)
    assert sorted(worker.cancelled) == [1, 2]
    await worker.finish()
    assert await names_of(staying) == ["s1"]
    assert await names_of(leaving) == []


# --------------------------------------------------------------------------------------------------------------------- failures


async def test_a_dead_worker_fails_its_batch_and_what_waits_stays() -> None:
    worker = HandWorker()
    scheduler = scheduler_for(worker)
    hit = scheduler.submit([group("hit")], job="j")
    waiting = scheduler.submit([group("waiting")], job="j")
    await settle()
    worker.ready = False
    await worker.finish(WorkerUnavailable("died", 2.0))
    with pytest.raises(WorkerUnavailable):
        await names_of(hit)
    assert scheduler.queued_rollouts == 1
    worker.ready = True
    scheduler.dispatch()
    await settle()
    await worker.finish()
    assert await names_of(waiting) == ["waiting"]


async def test_a_batch_that_fails_is_halved_until_what_fails_is_alone() -> None:
    worker = HandWorker(frozenset({"5"}), ready=False)
    scheduler = scheduler_for(worker)
    calls = {str(number): scheduler.submit([group(str(number))], job="j") for number in range(8)}
    worker.ready = True
    scheduler.dispatch()
    await settle()
    await worker.finish_all()
    with pytest.raises(InternalFault):
        await names_of(calls.pop("5"))
    for name, call in calls.items():
        assert await names_of(call) == [name]


async def test_when_nobody_is_left_everything_that_waits_fails() -> None:
    scheduler = scheduler_for(HandWorker(ready=False))
    calls = [scheduler.submit([group(name)], job=name) for name in "ab"]
    scheduler.fail_waiting(WorkerUnavailable("gone", 1.0))
    for call in calls:
        with pytest.raises(WorkerUnavailable):
            await names_of(call)
    assert scheduler.queued_tokens == 0


async def test_a_worker_that_breaks_its_promise_fails_its_calls_instead_of_leaving_them_waiting() -> None:
    worker = HandWorker()
    scheduler = scheduler_for(worker)
    call = scheduler.submit([group("a", "b")], job="j")
    await settle()
    worker.cancel(1)  # that nobody asked for
    await worker.finish()
    with pytest.raises(InternalFault):
        await names_of(call)


# --------------------------------------------------------------------------------------------------------------------- streaming


async def test_results_are_delivered_as_batches_finish_and_what_finished_before_a_failure_still_arrives() -> None:
    worker = HandWorker()
    scheduler = scheduler_for(worker, batch=5)
    call = scheduler.submit([group("a"), group("b")], job="j")
    await settle()
    await worker.finish()
    first = await anext(call)
    assert [one.completion for one in first.finished] == [0]
    assert call.queue_seconds == 0.0
    await settle()
    await worker.finish(WorkerUnavailable("died", 1.0))
    with pytest.raises(WorkerUnavailable):
        await anext(call)


async def test_a_reader_who_is_a_batch_behind_gets_no_further_batch_and_does_not_hold_up_others() -> None:
    worker = HandWorker()
    scheduler = scheduler_for(worker, batch=5)
    slow = scheduler.submit([group(f"s{i}") for i in range(5)], job="j")
    await settle()
    await worker.finish()
    assert worker.batches == [["s0"]]
    quick = scheduler.submit([group("q")], job="j")
    reading = asyncio.create_task(names_of(quick))
    await settle()
    await worker.finish()
    assert await reading == ["q"]
    assert worker.batches == [["s0"], ["q"]]
    await anext(slow)
    await settle()
    assert worker.batches == [["s0"], ["q"], ["s1"]]


# ------------------------------------------------------------------------------------------------------------------- invariants

Plan = st.lists(
    st.tuples(
        st.sampled_from("abc"),  # job
        st.integers(-2, 2),  # priority
        st.lists(st.tuples(st.integers(0, 30), st.integers(1, 5)), min_size=1, max_size=4),  # groups: prompt tokens, completions
        st.booleans(),  # withdrawn while it is under way
    ),
    min_size=1,
    max_size=8,
)


@given(plan=Plan, batch=st.integers(1, 60))
@settings(deadline=None, max_examples=150)
def test_every_rollout_is_answered_exactly_once_and_nothing_stays_behind(plan: list, batch: int) -> None:
    async def run() -> None:
        worker = HandWorker()
        scheduler = scheduler_for(worker, batch=batch)
        reading = []
        for number, (job, priority, shapes, leaves) in enumerate(plan):
            groups = [
                group(*(f"{number}.{i}.{j}" for j in range(completions)), prompt=prompt) for i, (prompt, completions) in enumerate(shapes)
            ]
            call = scheduler.submit(groups, job=job, priority=priority)
            await settle()
            if leaves:
                scheduler.withdraw(call)
            else:
                expected = sorted(rollout.completion.id for one in groups for rollout in one)
                reading.append((expected, asyncio.create_task(names_of(call))))
        await settle()
        await worker.finish_all()
        for expected, task in reading:
            assert sorted(await task) == expected
        computed = [name for names in worker.batches for name in names]
        assert len(computed) == len(set(computed))
        assert (scheduler.queued_tokens, scheduler.queued_rollouts) == (0, 0)
        assert not scheduler._jobs
        assert not scheduler._busy

    asyncio.run(run())
