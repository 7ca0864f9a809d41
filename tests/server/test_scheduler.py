"""The scheduling policy, with a worker whose batches the test finishes by hand."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace

import numpy as np
import pytest
from hand_worker import OPTIONS, HandWorker, group, is_empty, names_of, scheduler_for, settle

from probescore_server.errors import DeadlineExpired, QueueFull, WorkerUnavailable
from probescore_server.rollouts import CheckedRollout, Continuation
from probescore_server.scheduling import queue

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
    assert worker.batches == [["big"], ["small"]]


@pytest.mark.parametrize("shape", ["completions", "without tokens", "prompts", "calls", "follow-ups"])
async def test_a_batch_is_bounded_however_short_its_rollouts_are(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "MAX_CONTINUATIONS", 4)
    worker = HandWorker(ready=False)
    scheduler = scheduler_for(worker, batch=10_000)
    names = [f"a{index}" for index in range(12)]
    match shape:
        case "completions":
            calls = [[group(*names)]]
        case "without tokens":
            # unlike one another, or they would be computed once
            masks = [np.array([index >> bit & 1 for bit in range(4)], np.bool_) for index in range(12)]
            empty = [Continuation(np.zeros(0, np.int32), mask, id=name) for name, mask in zip(names, masks, strict=True)]
            calls = [[[CheckedRollout(np.zeros(4, np.int32), each, OPTIONS) for each in empty]]]
        case "prompts":
            calls = [[group(name) for name in names]]
        case "calls":
            calls = [[group(name, prompt_id=1)] for name in names]
        case "follow-ups":
            nothing = Continuation(np.zeros(0, np.int32))
            forked = [replace(rollout.completion, follow_ups=(nothing,)) for rollout in group(*names)]
            calls = [[[CheckedRollout(np.zeros(4, np.int32), each, OPTIONS) for each in forked]]]
    for groups in calls:
        scheduler.submit(groups, job="large")
    scheduler.submit([group("small")], job="small")
    worker.ready = True
    scheduler.dispatch()
    await settle()
    await worker.finish_all()
    most = 3 if shape == "follow-ups" else 4  # of two continuations each, and "small" of one
    assert max(map(len, worker.batches)) == most
    assert sorted(name for batch in worker.batches for name in batch) == sorted([*names, "small"])
    assert any("small" in batch for batch in worker.batches[:3])
    assert is_empty(scheduler)


async def test_every_free_worker_gets_a_batch_and_a_worker_that_is_down_gets_none() -> None:
    first, down, third = HandWorker(), HandWorker(ready=False), HandWorker()
    scheduler = scheduler_for(first, down, third, batch=5)
    scheduler.submit([group("a"), group("b")], job="j")
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
    worker = HandWorker()
    worker.compute_seconds = 2.0  # for 20 tokens
    scheduler = scheduler_for(worker, queue=40, batch=20)
    scheduler.submit([group("a", prompt=19)], job="j")
    await settle()
    await worker.finish()
    for name in "bcde":  # one computes, one is prepared, two wait
        scheduler.submit([group(name, prompt=19)], job="j")
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
    assert sorted(worker.given_up) == ["l1", "l2"]
    await worker.finish()
    assert await names_of(staying) == ["s1"]
    assert await names_of(leaving) == []


# ----------------------------------------------------------------------------------------------------------- one batch prepared


async def test_while_a_batch_computes_the_next_one_is_prepared_if_as_much_waits_as_fits_into_it() -> None:
    worker = HandWorker()
    scheduler = scheduler_for(worker, batch=10)
    for name in "abc":
        scheduler.submit([group(name)], job="j")
    await settle()
    assert worker.batches == [["a"], ["b", "c"]]
    assert worker.holds == 2
    for name in "defg":
        scheduler.submit([group(name)], job="j")
    await settle()
    assert worker.holds == 2  # and no third
    await worker.finish()
    assert worker.batches == [["a"], ["b", "c"], ["d", "e"]]


async def test_less_than_a_batch_goes_on_waiting_for_company() -> None:
    worker = HandWorker()
    scheduler = scheduler_for(worker, batch=10)
    scheduler.submit([group("a")], job="j")
    scheduler.submit([group("b", prompt=8)], job="j")
    await settle()
    scheduler.submit([group("c", prompt=0)], job="j")
    await settle()
    assert worker.batches == [["a"], ["b", "c"]]  # 9 tokens are less than a batch, 10 are not


@pytest.mark.parametrize("same", ["prompt", "rollout"])
async def test_what_is_computed_once_counts_once_for_a_full_batch(same: str) -> None:
    worker = HandWorker()
    scheduler = scheduler_for(worker, batch=10)
    scheduler.submit([group("a")], job="j")
    for name in "bcd":
        scheduler.submit([group(name if same == "prompt" else "b", prompt_id=1)], job="j")
    await settle()
    assert worker.batches == [["a"]]


async def test_what_a_reader_who_is_behind_waits_for_fills_no_batch() -> None:
    worker = HandWorker()
    scheduler = scheduler_for(worker, batch=10)
    scheduler.submit([group("s1", prompt=19), group("s2", prompt=19), group("s3", prompt=19)], job="s")
    await settle()
    await worker.finish_all()
    assert worker.batches == [["s1"], ["s2"]]
    for name in "ab":
        scheduler.submit([group(name, prompt=0)], job="j")
    await settle()
    assert worker.batches == [["s1"], ["s2"], ["a"]]


async def test_a_worker_without_work_comes_before_one_that_prepares() -> None:
    first, second = HandWorker(), HandWorker(ready=False)
    scheduler = scheduler_for(first, second, batch=5)
    for name in "abc":
        scheduler.submit([group(name)], job="j")
    second.ready = True
    await settle()
    await first.finish()
    assert (first.batches, second.batches) == ([["a"], ["b"]], [["c"]])


async def test_withdrawn_work_is_cancelled_in_the_batch_that_has_it() -> None:
    worker = HandWorker()
    scheduler = scheduler_for(worker, batch=5)
    computing, prepared = (scheduler.submit([group(name)], job="j") for name in "ab")
    await settle()
    scheduler.withdraw(prepared)
    assert worker.given_up == ["b"]
    await worker.finish()
    assert await names_of(computing) == ["a"]


async def test_a_worker_that_falls_asleep_gets_nothing_more_and_ends_what_it_has() -> None:
    worker = HandWorker()
    scheduler = scheduler_for(worker, batch=5)
    calls = [scheduler.submit([group(name)], job="j") for name in "abc"]
    await settle()
    worker.ready = False
    await worker.finish_all()
    assert worker.batches == [["a"], ["b"]]
    worker.ready = True
    scheduler.dispatch()
    await settle()
    await worker.finish_all()
    assert [await names_of(call) for call in calls] == [["a"], ["b"], ["c"]]


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


async def test_a_reader_who_is_a_batch_behind_gets_no_more_than_is_on_its_way_and_does_not_hold_up_others() -> None:
    worker = HandWorker()
    scheduler = scheduler_for(worker, batch=5)
    slow = scheduler.submit([group(f"s{i}") for i in range(5)], job="j")
    await settle()
    await worker.finish_all()
    assert worker.batches == [["s0"], ["s1"]]  # the second had been prepared
    quick = scheduler.submit([group("q")], job="j")
    reading = asyncio.create_task(names_of(quick))
    await settle()
    await worker.finish()
    assert await reading == ["q"]
    assert worker.batches == [["s0"], ["s1"], ["q"]]
    for _ in range(2):
        await anext(slow)
    await settle()
    assert worker.batches == [["s0"], ["s1"], ["q"], ["s2"], ["s3"]]


# ------------------------------------------------------------------------------------------------------------------- activations


def reading(rollouts: list[CheckedRollout], activation_bytes: int) -> list[CheckedRollout]:
    return [replace(rollout, activation_bytes=activation_bytes) for rollout in rollouts]


async def test_a_batch_is_bounded_in_bytes_of_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "MAX_ACTIVATION_BYTES", 100)
    worker = HandWorker(ready=False)
    scheduler = scheduler_for(worker)
    shared = {"prompt_id": 7}
    one = scheduler.submit([reading(group("a1", "a2", "a3", **shared), 40), reading(group("b1"), 10)], job="a")
    two = scheduler.submit([reading(group("c1", **shared), 101), group("d1", **shared)], job="c")
    finished = [asyncio.create_task(names_of(call)) for call in (one, two)]
    worker.ready = True
    scheduler.dispatch()
    await settle()
    await worker.finish_all()
    assert [sorted(names) for names in await asyncio.gather(*finished)] == [["a1", "a2", "a3", "b1"], ["c1", "d1"]]
    sizes = {"a1": 40, "a2": 40, "a3": 40, "b1": 10, "c1": 101, "d1": 0}
    for names in worker.batches:
        read = [name for name in names if sizes[name]]
        assert len(read) <= 1 or sum(sizes[name] for name in read) <= 100, worker.batches
    assert is_empty(scheduler)


async def test_more_is_read_for_a_call_only_once_its_answer_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "MAX_ACTIVATION_BYTES", 100)
    worker = HandWorker()
    scheduler = scheduler_for(worker)
    call = scheduler.submit([reading(group("1", "2", "3", "4", "5"), 60)], job="slow")
    await settle()
    await worker.finish_all()
    assert worker.batches == [["1"], ["2"]]  # 120 bytes are unread
    other = asyncio.create_task(names_of(scheduler.submit([group("scored")], job="other")))
    await settle()
    await worker.finish_all()
    assert await other == ["scored"]
    await anext(call)
    await settle()
    assert worker.batches[2:] == [["scored"]]  # what was taken is being sent, and still held
    await anext(call)
    await settle()
    assert worker.batches[3:] == [["3"]]
    scheduler.withdraw(call)
    await worker.finish_all()
    assert is_empty(scheduler)
