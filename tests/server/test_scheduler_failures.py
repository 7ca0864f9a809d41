"""Batches that fail, run out of memory or are lost with their worker: who hears of it, and what is tried again."""

from __future__ import annotations

import asyncio

import pytest
from hand_worker import HandWorker, group, is_empty, names_of, scheduler_for, settle

from probescore_server.errors import InternalFault, OutOfMemory, WorkerUnavailable
from probescore_server.scheduling.batch_budget import GOOD_BATCHES, GROW, BatchBudget
from probescore_server.scheduling.scheduler import Scheduler


async def test_a_dead_worker_fails_its_batch_and_what_waits_stays() -> None:
    worker = HandWorker()
    scheduler = scheduler_for(worker)
    hit = scheduler.submit([group("hit")], job="j")
    waiting = scheduler.submit([group("waiting")], job="j")
    await settle()
    await worker.die(WorkerUnavailable("died", 2.0))
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
    worker.cancel(1, 1)  # that nobody asked for
    await worker.finish()
    with pytest.raises(InternalFault):
        await names_of(call)


# ------------------------------------------------------------------------------------------------------- with a batch prepared


async def test_a_prepared_batch_is_computed_once_while_the_one_before_it_is_halved() -> None:
    worker = HandWorker({"poison"}, ready=False)
    scheduler = scheduler_for(worker, batch=10)
    names = ["poison", "a", "b", "c"]
    calls = {name: scheduler.submit([group(name)], job="j") for name in names}
    worker.ready = True
    scheduler.dispatch()
    await settle()
    await worker.finish_all()
    assert worker.batches == [["poison", "a"], ["b", "c"], ["poison"], ["a"]]
    with pytest.raises(InternalFault):
        await names_of(calls.pop("poison"))
    for name, call in calls.items():
        assert await names_of(call) == [name]
    assert is_empty(scheduler)


async def test_poison_among_calls_that_share_a_prompt_fails_its_own_call_only() -> None:
    worker = HandWorker({"3"}, ready=False)
    scheduler = scheduler_for(worker)
    calls = {str(number): scheduler.submit([group(str(number), prompt_id=1)], job=str(number)) for number in range(6)}
    worker.ready = True
    scheduler.dispatch()
    await settle()
    assert len(worker.batches[0]) == 6
    await worker.finish_all()
    with pytest.raises(InternalFault):
        await names_of(calls.pop("3"))
    for name, call in calls.items():
        assert await names_of(call) == [name]


async def test_a_worker_that_dies_fails_what_it_computed_and_what_it_had_prepared_waits_again_as_before() -> None:
    worker = HandWorker()
    scheduler = scheduler_for(worker, batch=5)
    hit = scheduler.submit([group("hit")], job="j")
    prepared = scheduler.submit([group("p1"), group("p2")], job="j")
    behind = scheduler.submit([group("behind")], job="k")
    reading = asyncio.create_task(names_of(prepared))
    await settle()
    assert worker.batches == [["hit"], ["p1"]]
    await worker.die(WorkerUnavailable("died", 2.0))
    with pytest.raises(WorkerUnavailable):
        await names_of(hit)
    assert (scheduler.queued_tokens, scheduler.queued_rollouts) == (15, 3)
    worker.ready = True
    scheduler.dispatch()
    await settle()
    await worker.finish_all()
    assert worker.batches == [["hit"], ["p1"], ["p1"], ["behind"], ["p2"]]
    assert await reading == ["p1", "p2"]
    assert await names_of(behind) == ["behind"]
    assert is_empty(scheduler)


async def test_a_call_with_a_part_in_each_batch_fails_when_the_worker_dies_and_leaves_nothing_behind() -> None:
    worker = HandWorker()
    scheduler = scheduler_for(worker, batch=5)
    call = scheduler.submit([group("a"), group("b"), group("c")], job="j")
    await settle()
    await worker.die(WorkerUnavailable("died", 2.0))
    with pytest.raises(WorkerUnavailable):
        await names_of(call)
    assert is_empty(scheduler)


async def test_a_batch_that_followed_and_computes_fails_with_its_worker() -> None:
    worker = HandWorker()
    scheduler = scheduler_for(worker, batch=5)
    first, second = (scheduler.submit([group(name)], job="j") for name in "ab")
    await settle()
    await worker.finish()
    await worker.die(WorkerUnavailable("died", 2.0))
    assert await names_of(first) == ["a"]
    with pytest.raises(WorkerUnavailable):
        await names_of(second)


# ------------------------------------------------------------------------------------------------------------- out of memory


async def test_a_batch_for_which_memory_is_short_is_split_and_the_next_ones_are_smaller() -> None:
    worker = HandWorker(memory=12, ready=False)
    scheduler = scheduler_for(worker, batch=20)
    calls = [scheduler.submit([group(str(number))], job="j") for number in range(8)]
    worker.ready = True
    scheduler.dispatch()
    await settle()
    await worker.finish_all()
    assert worker.batches[0] == ["0", "1", "2", "3"]
    assert [names for names in worker.batches[1:] if set(names) <= set("0123")] == [["0", "1"], ["2", "3"]]
    assert scheduler.batch_budget(worker) == 15
    for number, call in enumerate(calls):
        assert await names_of(call) == [str(number)]


async def test_a_rollout_that_does_not_fit_alone_fails_its_call_naming_its_tokens_and_is_not_tried_again() -> None:
    worker = HandWorker(memory=12, ready=False)
    scheduler = scheduler_for(worker)
    large = scheduler.submit([group("large", prompt=9, tokens=4)], job="j")
    small = scheduler.submit([group("small")], job="j")
    worker.ready = True
    scheduler.dispatch()
    await settle()
    await worker.finish_all()
    with pytest.raises(OutOfMemory, match="a rollout of 13 tokens"):
        await names_of(large)
    assert await names_of(small) == ["small"]
    assert worker.batches == [["large", "small"], ["large"], ["small"]]
    assert is_empty(scheduler)


def test_a_budget_falls_to_three_quarters_of_what_failed_and_never_below_one() -> None:
    budget = BatchBudget(1000)
    budget.failed(800)
    assert budget.tokens == 600
    budget.failed(2000)  # a single rollout beyond any budget
    assert budget.tokens == 600
    for _ in range(20):
        budget.failed(1)
    assert budget.tokens == 1


def test_a_budget_grows_again_after_enough_good_batches_and_more_slowly_after_each_failure() -> None:
    budget = BatchBudget(1000)
    budget.failed(1000)
    waits = []
    for _ in range(2):
        before, good = budget.tokens, 0
        while budget.tokens == before:
            budget.fitted(before)
            good += 1
        waits.append(good)
        assert budget.tokens == int(before * GROW)
        budget.failed(budget.tokens)
    assert waits == [GOOD_BATCHES, 2 * GOOD_BATCHES]


def test_small_batches_say_nothing_of_memory_and_no_budget_grows_beyond_the_setting() -> None:
    budget = BatchBudget(1000)
    budget.failed(1000)
    for _ in range(1000):
        budget.fitted(budget.tokens // 2 - 1)
    assert budget.tokens == 750
    for _ in range(1000):
        budget.fitted(budget.tokens)
    assert budget.tokens == 1000


async def test_whoever_counts_is_told_of_batches_and_of_short_memory() -> None:
    worker = HandWorker(memory=5, ready=False)
    batches: list[int] = []
    short: list[None] = []
    scheduler = Scheduler(
        [worker],
        max_queue_tokens=100,
        max_batch_tokens=100,
        on_batch=lambda tokens, rollouts: batches.append(tokens),
        on_out_of_memory=lambda: short.append(None),
    )
    scheduler.submit([group("a"), group("b")], job="j")
    worker.ready = True
    scheduler.dispatch()
    await settle()
    await worker.finish_all()
    assert (batches, len(short)) == ([10], 1)
