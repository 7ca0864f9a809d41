"""What calls compute together: the prompts that they have in common, and rollouts that are identical."""

from __future__ import annotations

import asyncio
from dataclasses import fields, replace

import numpy as np
import pytest
from hand_worker import OPTIONS, HandWorker, group, is_empty, names_of, scheduler_for, settle

from probescore.reductions import Reduction
from probescore.types import Pool, Scope, Span, Tap, Usage
from probescore_server.errors import InternalFault
from probescore_server.rollouts import ActivationReads, CheckedRollout, Continuation, PinnedReading, ResolvedOptions, RolloutResult
from probescore_server.scheduling.call import Call, groups_of
from probescore_server.scheduling.scheduler import Scheduler


async def start(scheduler: Scheduler, worker: HandWorker) -> None:
    worker.ready = True
    scheduler.dispatch()
    await settle()


async def results_of(call: Call) -> list[RolloutResult]:
    return [one.result async for delivery in call for one in delivery.finished]


# --------------------------------------------------------------------------------------------------------------- the same prompt


async def test_what_waits_for_one_prompt_goes_together_whichever_calls_it_is_of_and_the_prompt_counts_once() -> None:
    worker = HandWorker(ready=False)
    scheduler = scheduler_for(worker, batch=12)  # 9 for the prompt, 1 for each completion
    for name, job, prompt in (("a", "j", 1), ("b", "j", 2), ("c", "j", 1), ("d", "k", 1)):
        scheduler.submit([group(name, prompt=9, prompt_id=prompt)], job=job)
    await start(scheduler, worker)
    assert worker.batches == [["a", "c", "d"]]
    await worker.finish()
    assert worker.batches == [["a", "c", "d"], ["b"]]


async def test_the_own_job_joins_before_others_do() -> None:
    worker = HandWorker(ready=False)
    scheduler = scheduler_for(worker, batch=11)
    for name, job in (("a", "j"), ("b", "k"), ("c", "j")):
        scheduler.submit([group(name, prompt=9, prompt_id=1)], job=job)
    await start(scheduler, worker)
    assert worker.batches[0] == ["a", "c"]


async def test_a_group_joins_as_a_whole_or_waits_for_its_own_turn() -> None:
    worker = HandWorker(ready=False)
    scheduler = scheduler_for(worker, batch=12)
    for names in (["a"], ["b1", "b2", "b3"], ["c"]):
        scheduler.submit([group(*names, prompt=9, prompt_id=1)], job="j")
    await start(scheduler, worker)
    await worker.finish_all()
    assert worker.batches == [["a", "c"], ["b1", "b2", "b3"]]


async def test_who_joins_has_had_a_turn() -> None:
    worker = HandWorker(ready=False)
    scheduler = scheduler_for(worker, batch=32)
    scheduler.submit([group("a", prompt=9, prompt_id=1)], job="a")
    scheduler.submit([group("b", prompt=9)], job="b")
    scheduler.submit([group("c1", prompt=9, prompt_id=1), group("c2", prompt=9)], job="c")
    scheduler.submit([group("d", prompt=9)], job="d")
    await start(scheduler, worker)
    await worker.finish_all()
    assert worker.batches == [["a", "c1", "b", "d"], ["c2"]]  # c2 comes after d, though c was before d when c1 joined


async def test_a_reader_who_is_behind_does_not_join() -> None:
    worker = HandWorker()
    scheduler = scheduler_for(worker, batch=10)
    slow = scheduler.submit([group(f"s{i}", prompt=9) for i in range(2)] + [group("s2", prompt=9, prompt_id=1)], job="s")
    await settle()
    await worker.finish_all()
    scheduler.submit([group("x", prompt=5, prompt_id=1)], job="x")
    await settle()
    assert [len(names) for names in worker.batches] == [1, 1, 1]
    assert slow.waiting


# ------------------------------------------------------------------------------------------------------------ identical rollouts


async def test_identical_rollouts_that_wait_are_computed_once_and_each_has_its_own_name() -> None:
    worker = HandWorker(ready=False)
    scheduler = scheduler_for(worker)
    twin = group("x", prompt_id=1)[0]
    calls = [
        scheduler.submit([[replace(twin, completion=replace(twin.completion, id=name, inexact_ids=name == "second"))]], job=name)
        for name in ("first", "second")
    ]
    await start(scheduler, worker)
    assert worker.batches == [["first"]]
    await worker.finish()
    (first,), (second,) = [await results_of(call) for call in calls]
    assert (first.scores.id, first.usage) == ("first", Usage(tokens_computed=5))
    assert (second.scores.id, second.scores.inexact_ids, second.usage) == ("second", True, Usage(tokens_shared=5))
    assert is_empty(scheduler)


async def test_one_that_comes_while_an_identical_one_computes_waits_for_that_and_takes_no_room() -> None:
    worker = HandWorker()
    scheduler = scheduler_for(worker)
    scheduler.submit([group("x", prompt_id=1)], job="j")
    await settle()
    late = scheduler.submit([group("x", "y", prompt_id=1)], job="k")
    assert (scheduler.queued_tokens, scheduler.queued_rollouts) == (5, 1)  # of y
    assert late.queue_seconds == 0.0
    await settle()
    await worker.finish_all()
    assert worker.batches == [["x"], ["y"]]
    assert await names_of(late) == ["x", "y"]


async def test_identical_completions_of_one_group_are_computed_once() -> None:
    worker = HandWorker()
    scheduler = scheduler_for(worker)
    call = scheduler.submit([group("x", "y", "x", "x")], job="j")
    await settle()
    await worker.finish()
    assert worker.batches == [["x", "y"]]
    assert sorted(await names_of(call)) == ["x", "x", "x", "y"]


async def test_the_work_goes_on_while_anyone_waits_for_it() -> None:
    worker = HandWorker()
    scheduler = scheduler_for(worker)
    first, second, third = (scheduler.submit([group("x", prompt_id=1)], job="j") for _ in range(3))
    await settle()
    scheduler.withdraw(first)
    scheduler.withdraw(third)
    assert worker.given_up == []
    await worker.finish()
    ((result),) = await results_of(second)
    assert result.usage == Usage(tokens_computed=5)  # who is left pays


async def test_the_last_to_leave_cancels_it_and_one_that_comes_then_does_not_wait_for_what_was_cancelled() -> None:
    worker = HandWorker()
    scheduler = scheduler_for(worker)
    calls = [scheduler.submit([group("x", prompt_id=1)], job="j") for _ in range(2)]
    await settle()
    for call in calls:
        scheduler.withdraw(call)
    assert worker.given_up == ["x"]
    late = scheduler.submit([group("x", prompt_id=1)], job="j")
    await settle()
    await worker.finish_all()
    assert await names_of(late) == ["x"]
    assert worker.batches == [["x"], ["x"]]
    assert is_empty(scheduler)


async def test_what_fails_fails_for_all_who_wait_for_it() -> None:
    worker = HandWorker({"x"})
    scheduler = scheduler_for(worker)
    calls = [scheduler.submit([group("x", prompt_id=1)], job="j") for _ in range(2)]
    await settle()
    await worker.finish_all()
    for call in calls:
        with pytest.raises(InternalFault):
            await names_of(call)
    assert worker.batches == [["x"]]


async def test_a_reader_who_is_behind_is_not_handed_what_others_compute() -> None:
    worker = HandWorker()
    scheduler = scheduler_for(worker, batch=5)
    slow = scheduler.submit([group(name, prompt_id=index) for index, name in enumerate("abc")], job="s")
    await settle()
    await worker.finish_all()
    other = scheduler.submit([group("c", prompt_id=2)], job="o")
    reading = asyncio.create_task(names_of(other))
    await settle()
    await worker.finish_all()
    assert await reading == ["c"]
    assert slow.unread_tokens == 10


# ---------------------------------------------------------------------------------------------------------- what identical means

CONTINUATION = Continuation(np.array([1, 2], np.int32))
CHANGED_CONTINUATION = {
    "token_ids": np.array([1, 3], np.int32),
    "mask": np.array([True, False]),
    "spans": (Span("a", 0, 1),),
    "follow_ups": (CONTINUATION,),
}
CHANGED_OPTIONS = {
    "probes": ("p@2",),
    "reductions": (Reduction.parse("max"),),
    "token_scores": frozenset({"p@1"}),
    "scope": Scope.ALL,
    "return_token_ids": True,
    "return_token_texts": True,
    "activations": ActivationReads((Tap("resid_post", 1),), (Pool.MEAN,), tokens=False),
    "readings": (PinnedReading("policy", "sha256:1"),),
    "adapters": frozenset({"sha256:2"}),
}
ECHOED = {"id": "a", "inexact_ids": True}


def key(completion: Continuation, options: ResolvedOptions = OPTIONS, prompt: tuple[int, ...] = (5,)) -> object:
    (group,) = groups_of(None, [[CheckedRollout(np.array(prompt, np.int32), completion, options)]])
    return next(iter(group.items)).key


def test_every_field_that_scores_depend_on_makes_a_difference_and_names_make_none() -> None:
    assert {field.name for field in fields(Continuation)} == {*CHANGED_CONTINUATION, *ECHOED}
    assert {field.name for field in fields(ResolvedOptions)} == {*CHANGED_OPTIONS}
    keys = [key(CONTINUATION), key(CONTINUATION, prompt=(5, 1)), key(CONTINUATION, prompt=())]
    keys += [key(replace(CONTINUATION, **{name: value})) for name, value in CHANGED_CONTINUATION.items()]
    keys += [key(replace(CONTINUATION, follow_ups=(replace(CONTINUATION, mask=np.array([False, True])),)))]
    keys += [key(CONTINUATION, replace(OPTIONS, **{name: value})) for name, value in CHANGED_OPTIONS.items()]
    assert len(set(keys)) == len(keys)
    assert {key(replace(CONTINUATION, **{name: value})) for name, value in ECHOED.items()} == {key(CONTINUATION)}
    assert key(CONTINUATION, replace(OPTIONS, token_scores=frozenset("abc"))) == key(
        CONTINUATION, replace(OPTIONS, token_scores=frozenset("cba"))
    )


async def test_follow_ups_have_their_own_names_too() -> None:
    worker = HandWorker()
    scheduler = scheduler_for(worker)
    named = [
        CheckedRollout(
            np.zeros(2, np.int32), replace(CONTINUATION, id=name, follow_ups=(replace(CONTINUATION, id=name + ".then"),)), OPTIONS
        )
        for name in "ab"
    ]
    call = scheduler.submit([named], job="j")
    await settle()
    await worker.finish()
    assert [(one.scores.id, one.scores.follow_ups[0].id) for one in await results_of(call)] == [("a", "a.then"), ("b", "b.then")]
