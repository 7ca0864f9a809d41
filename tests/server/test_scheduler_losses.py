"""Workers that are lost with what they compute: each rollout of it is tried once more, alone, and what does it again is refused by name."""

from __future__ import annotations

import asyncio

import pytest
from hand_worker import HandWorker, group, is_empty, names_of, scheduler_for, settle
from hypothesis import given, settings
from hypothesis import strategies as st

from probescore_server.errors import OutOfMemory, WorkerLost, WorkerLostTwice, WorkerUnavailable
from probescore_server.scheduling.scheduler import Scheduler
from probescore_server.scheduling.suspects import REMEMBERED_SECONDS


def lost(reason: str = "overdue", order: int = 0) -> WorkerLost:
    return WorkerLost(reason, "it did not get on for 60 s", 1.0, "probe loop@1", order)


class Fragile(HandWorker):
    """Is lost with any batch that has one of `poison` in it, and is back at once."""

    async def score(self, number, rollouts):
        try:
            return await super().score(number, rollouts)
        except Exception as error:
            if isinstance(error, WorkerUnavailable):
                raise
            raise lost(order=number) from None


async def come_back(worker: HandWorker, scheduler: Scheduler) -> None:
    worker.ready = True
    scheduler.dispatch()
    await settle()


async def test_what_it_computed_is_tried_alone_and_everybody_has_their_scores() -> None:
    worker = HandWorker(ready=False)
    scheduler = scheduler_for(worker)
    calls = {name: scheduler.submit([group(name)], job=name) for name in "abc"}
    await come_back(worker, scheduler)
    await worker.die(lost())
    assert scheduler.queued_rollouts == 3
    await come_back(worker, scheduler)
    await worker.finish_all()
    assert worker.batches == [["a", "b", "c"], ["a"], ["b"], ["c"]]
    for name, call in calls.items():
        assert await names_of(call) == [name]
    assert is_empty(scheduler)
    # what has been scored is trusted again
    again = [scheduler.submit([group(name, prompt_id=1)], job="j") for name in "xy"]
    await settle()
    await worker.finish_all()
    assert [await names_of(call) for call in again] == [["x"], ["y"]]


async def test_one_that_does_it_again_is_refused_by_its_name_and_the_rest_is_scored() -> None:
    worker = Fragile({"bad"}, ready=False)
    scheduler = scheduler_for(worker)
    good = scheduler.submit([group("good")], job="j")
    bad = scheduler.submit([group("innocent"), group("fine", "bad")], job="k")
    await come_back(worker, scheduler)
    await worker.finish_all()
    with pytest.raises(WorkerLostTwice) as refused:
        await names_of(bad)
    assert (refused.value.field, refused.value.doing) == ("groups[1].completions[1]", "probe loop@1")
    assert "groups[1].completions[1] with probe loop@1" in str(refused.value)
    assert await names_of(good) == ["good"]
    assert worker.batches.count(["bad"]) == 1
    assert is_empty(scheduler)


async def test_it_is_refused_at_once_when_it_comes_back_until_it_is_forgotten() -> None:
    worker, clock = Fragile({"bad"}), [0.0]
    scheduler = scheduler_for(worker, clock=clock)
    bad = group("bad", prompt_id=1)
    first = scheduler.submit([bad], job="j")
    await settle()
    await worker.finish_all()
    with pytest.raises(WorkerLostTwice):
        await names_of(first)
    assert worker.batches == [["bad"], ["bad"]]
    with pytest.raises(WorkerLostTwice, match=r"groups\[1\]\.completions\[0\]"):
        scheduler.submit([group("good"), bad], job="j")
    assert is_empty(scheduler)
    clock[0] += REMEMBERED_SECONDS + 1
    scheduler.submit([bad], job="j")
    await settle()
    assert len(worker.batches) == 3


async def test_a_caller_who_left_and_comes_back_finds_what_was_learnt() -> None:
    worker = Fragile({"bad"})
    scheduler = scheduler_for(worker)
    bad = group("bad", prompt_id=1)
    with scheduler.submit([bad], job="j"):
        await settle()
    again = scheduler.submit([bad], job="j")
    await worker.finish_all()
    with pytest.raises(WorkerLostTwice):
        await names_of(again)


async def test_a_suspicion_that_is_forgotten_while_its_batch_computes_loses_nothing() -> None:
    worker, clock = HandWorker(ready=False), [0.0]
    scheduler = scheduler_for(worker, clock=clock)
    suspect = scheduler.submit([group("suspect")], job="j")
    await come_back(worker, scheduler)
    await worker.die(lost())
    fresh = scheduler.submit([group("fresh")], job="k")
    await come_back(worker, scheduler)
    assert worker.batches[-1] == ["fresh"]
    clock[0] += REMEMBERED_SECONDS + 1
    scheduler.submit([group("later")], job="l")  # whoever comes makes old ones be forgotten
    await worker.finish_all()
    assert (await names_of(suspect), await names_of(fresh)) == (["suspect"], ["fresh"])


async def test_what_was_given_up_before_it_was_scored_is_still_suspected() -> None:
    worker = HandWorker()
    scheduler = scheduler_for(worker)
    bad = group("bad", prompt_id=1)
    with scheduler.submit([bad], job="j"):
        await settle()
        await worker.die(lost())
        await come_back(worker, scheduler)
        assert worker.batches == [["bad"], ["bad"]]
    await worker.finish()
    assert worker.given_up == ["bad"]
    again = scheduler.submit([bad], job="j")
    await settle()
    await worker.die(lost())
    with pytest.raises(WorkerLostTwice):
        await asyncio.wait_for(names_of(again), 10)


async def test_all_who_wait_for_the_same_are_told_under_their_own_names() -> None:
    worker = Fragile({"bad"}, ready=False)
    scheduler = scheduler_for(worker)
    first = scheduler.submit([group("bad", prompt_id=1)], job="j")
    second = scheduler.submit([group("other"), group("bad", prompt_id=1)], job="k")
    await come_back(worker, scheduler)
    await worker.finish_all()
    for call, field in ((first, "groups[0].completions[0]"), (second, "groups[1].completions[0]")):
        with pytest.raises(WorkerLostTwice) as refused:
            await names_of(call)
        assert refused.value.field == field


async def test_what_was_only_prepared_and_what_texts_are_to_blame_for_is_not_suspected() -> None:
    worker = HandWorker()
    scheduler = scheduler_for(worker, batch=5)
    calls = [scheduler.submit([group(name)], job="j") for name in "ab"]
    await settle()
    assert worker.batches == [["a"], ["b"]]
    for _ in range(3):  # however often
        await worker.die(lost(order=999))
        await come_back(worker, scheduler)
    await worker.finish_all()
    assert [await names_of(call) for call in calls] == [["a"], ["b"]]
    assert len(scheduler._suspects._known) == 0


async def test_killed_for_memory_it_gets_less_and_a_single_rollout_is_too_large() -> None:
    short: list[None] = []
    worker = HandWorker(ready=False)
    scheduler = Scheduler([worker], max_queue_tokens=1000, max_batch_tokens=100, on_out_of_memory=lambda: short.append(None))
    large, small = (scheduler.submit([group(name, tokens=16)], job="j") for name in ("large", "small"))
    await come_back(worker, scheduler)
    await worker.die(lost("memory"))
    assert scheduler.batch_budget(worker) == 30
    await come_back(worker, scheduler)
    assert worker.batches[1] == ["large"]
    await worker.die(lost("memory"))
    with pytest.raises(OutOfMemory, match="a rollout of 20 tokens"):
        await names_of(large)
    await come_back(worker, scheduler)
    await worker.finish_all()
    assert await names_of(small) == ["small"]
    assert len(short) == 2


async def test_what_is_left_of_a_batch_that_was_halved_waits_again_when_the_worker_dies() -> None:
    worker = HandWorker({"poison"}, ready=False)
    scheduler = scheduler_for(worker)
    calls = {name: scheduler.submit([group(name)], job="j") for name in ("poison", "a", "b", "c")}
    await come_back(worker, scheduler)
    await worker.finish()
    assert worker.batches[-1] == ["poison", "a"]
    await worker.die(lost())
    await come_back(worker, scheduler)
    await worker.finish_all()
    for name in "abc":
        assert await names_of(calls[name]) == [name]


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    bad=st.sets(st.integers(0, 23), max_size=4),
    workers=st.integers(1, 3),
    budget=st.integers(5, 60),
)
def test_whatever_is_lost_exactly_the_calls_that_do_it_are_refused(sizes: list[int], bad: set[int], workers: int, budget: int) -> None:
    async def run() -> None:
        poison = {str(number) for number in bad}
        hands = [Fragile(poison, ready=False) for _ in range(workers)]
        scheduler = scheduler_for(*hands, batch=budget)
        numbers = iter(range(24))
        named = [[str(next(numbers)) for _ in range(size)] for size in sizes]
        calls = [scheduler.submit([group(*names)], job=str(index % 2)) for index, names in enumerate(named)]
        for hand in hands:
            hand.ready = True
        scheduler.dispatch()
        reading = [asyncio.create_task(names_of(call)) for call in calls]
        for _ in range(200):
            await settle()
            for hand in hands:
                if hand.holds:
                    await hand.finish()
        outcomes = await asyncio.wait_for(asyncio.gather(*reading, return_exceptions=True), 10)
        for names, outcome in zip(named, outcomes, strict=True):
            if poison.intersection(names):
                assert isinstance(outcome, WorkerLostTwice)
            else:
                assert outcome == names or sorted(outcome) == sorted(names)
        for hand in hands:
            assert max((hand.batches.count([name]) for name in poison), default=0) <= 2
        assert is_empty(scheduler)

    asyncio.run(run())
