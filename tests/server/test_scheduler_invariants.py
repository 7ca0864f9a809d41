"""What holds for the scheduler whatever arrives, leaves, fails, runs out of memory or dies, in whatever order."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from hand_worker import HandWorker, group, is_empty, names_of, scheduler_for, settle, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st

from probescore_server.errors import InternalFault, OutOfMemory, WorkerUnavailable
from probescore_server.rollouts import CheckedRollout, ScoredBatch
from probescore_server.scheduling.call import Call

PROMPTS = st.sampled_from([(0, 1), (3, 2), (9, 3), (30, 4)])  # tokens, id
NAMES = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4)
POISON, TOO_LARGE = "f", 25


@dataclass(frozen=True)
class Submit:
    job: str
    priority: int
    groups: tuple[tuple[tuple[int, int], list[str]], ...]


@dataclass(frozen=True)
class Withdraw:
    call: int


@dataclass(frozen=True)
class Finish:
    worker: int


@dataclass(frozen=True)
class Die:
    worker: int


Submits = st.builds(
    Submit, st.sampled_from("jkl"), st.integers(-1, 1), st.lists(st.tuples(PROMPTS, NAMES), min_size=1, max_size=3).map(tuple)
)
Events = st.lists(
    Submits | Submits | st.builds(Withdraw, st.integers(0, 9)) | st.builds(Finish, st.integers(0, 1)) | st.builds(Die, st.integers(0, 1)),
    max_size=25,
)


class WatchedWorker(HandWorker):
    """Checks every batch as it arrives, beside those of all workers."""

    max_tokens = 0
    all: Sequence[WatchedWorker] = ()

    def wanted(self) -> list[CheckedRollout]:
        """What it computes and nobody has given up."""
        batches = self._rollouts.items()
        return [rollout for number, batch in batches for index, rollout in enumerate(batch) if index not in self._cancelled[number]]

    async def score(self, number: int, rollouts: Sequence[CheckedRollout]) -> ScoredBatch:
        assert len(rollouts) == 1 or tokens_of(rollouts) <= self.max_tokens
        wanted = [identity(rollout) for rollout in rollouts] + [identity(rollout) for worker in self.all for rollout in worker.wanted()]
        assert max(Counter(wanted).values()) == 1  # nothing identical twice, in any batch of any worker
        return await super().score(number, rollouts)


def identity(rollout: CheckedRollout) -> tuple[bytes, bytes]:
    return rollout.prompt_ids.tobytes(), rollout.completion.token_ids.tobytes()


async def answer_to(call: Call) -> list[str] | type[Exception]:
    try:
        return await names_of(call)
    except (InternalFault, OutOfMemory, WorkerUnavailable) as error:
        return type(error)


@given(events=Events, batch=st.integers(1, 60))
@settings(max_examples=300)
def test_every_call_is_answered_exactly_once_or_fails_by_a_fault_of_its_own_and_nothing_stays_behind(events: list, batch: int) -> None:
    async def run() -> None:
        workers = [WatchedWorker(POISON, memory=TOO_LARGE), WatchedWorker(POISON, memory=TOO_LARGE)]
        scheduler = scheduler_for(*workers, batch=batch)
        calls: list[tuple[Submit, Call, asyncio.Task]] = []
        withdrawn, deaths = set(), 0
        for worker in workers:
            worker.max_tokens, worker.all = batch, workers
        for event in events:
            match event:
                case Submit():
                    groups = [group(*names, prompt=tokens, prompt_id=number) for (tokens, number), names in event.groups]
                    call = scheduler.submit(groups, job=event.job, priority=event.priority)
                    calls.append((event, call, asyncio.create_task(answer_to(call))))
                case Withdraw() if event.call < len(calls):
                    scheduler.withdraw(calls[event.call][1])
                    withdrawn.add(event.call)
                case Finish() if workers[event.worker].holds:
                    await workers[event.worker].finish()
                case Die():
                    deaths += 1
                    await workers[event.worker].die(WorkerUnavailable("died", 1.0))
                    workers[event.worker].ready = True
                    scheduler.dispatch()
            await settle()
        while any(worker.holds for worker in workers):
            for worker in workers:
                await worker.finish_all()
        for number, (asked, _, task) in enumerate(calls):
            answer = await task
            expected = sorted(name for _, names in asked.groups for name in names)
            if isinstance(answer, list):
                assert sorted(answer) == expected or (number in withdrawn and not Counter(answer) - Counter(expected))
            elif answer is InternalFault:
                assert POISON in expected
            elif answer is OutOfMemory:
                assert any(tokens + 1 > TOO_LARGE for (tokens, _), _ in asked.groups)
            else:
                assert deaths
        assert is_empty(scheduler)

    asyncio.run(run())


MANY_PROMPTS = st.tuples(st.sampled_from([0, 3, 30]), st.integers(1, 6))
Arrivals = st.lists(st.tuples(st.sampled_from("abc"), MANY_PROMPTS, NAMES), max_size=25)


@given(
    queued=Arrivals,
    following=Arrivals,
    late=st.tuples(MANY_PROMPTS, NAMES),
    batch=st.integers(34, 80),  # from the largest group on
)
@settings(max_examples=200)
def test_a_job_waits_for_at_most_one_batch_of_each_other_job_whatever_they_share(
    queued: list, following: list, late: tuple, batch: int
) -> None:
    async def run() -> None:
        worker = HandWorker(ready=False)
        scheduler = scheduler_for(worker, batch=batch)
        reading = set()

        def submit(job: str, prompt: tuple[int, int], names: list[str]) -> Call:
            call = scheduler.submit([group(*names, prompt=prompt[0], prompt_id=prompt[1])], job=job)
            reading.add(asyncio.create_task(names_of(call)))
            return call

        for job, prompt, names in queued:
            submit(job, prompt, names)
        mine = submit("late", *late)
        worker.ready = True
        for arrival in [*following, *[None] * 10]:
            scheduler.dispatch()
            await settle()
            if not mine.waiting:
                break
            if arrival is not None:
                submit(*arrival)
            await worker.finish()
        assert not mine.waiting
        assert len(worker.batches) <= len({job for job, _, _ in queued}) + 1
        await worker.finish_all()
        await asyncio.gather(*reading)

    asyncio.run(run())


async def test_thousands_of_calls_leave_nothing_behind() -> None:
    worker = HandWorker({"7"}, memory=40)
    scheduler = scheduler_for(worker, batch=50)
    reading: set[asyncio.Task] = set()
    for number in range(5000):
        name = str(number % 97)
        call = scheduler.submit([group(name, prompt_id=number % 13)], job=str(number % 7), deadline=1.0 if number % 11 else 0.0)
        task = asyncio.create_task(leave(call) if number % 3 == 0 else answered(call))
        reading.add(task)
        task.add_done_callback(reading.discard)
        if number % 10 == 9:
            await settle()
            await worker.finish_all()
    await settle()
    await worker.finish_all()
    assert not reading
    assert is_empty(scheduler)
    assert not worker.holds


async def leave(call: Call) -> None:
    with call:
        await asyncio.sleep(0)


async def answered(call: Call) -> None:
    with call:
        await asyncio.gather(names_of(call), return_exceptions=True)
