"""A rollout counts once for each reading that its request names, and its tokens for each adapter that probes bring: in the queue, in a
batch, and in every limit of a request.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hand_worker import OPTIONS, HandWorker, group, names_of, scheduler_for, settle

from probescore import RolloutGroup
from probescore.types import ModelInfo, OutputPer, ProbeInfo, ScoreUnit, Span
from probescore_server.errors import LimitExceeded, QueueFull
from probescore_server.request_cost import RequestCost
from probescore_server.rollouts import CheckedRollout, EngineInfo, PinnedReading, ResolvedOptions
from probescore_server.validation.options import resolve_options
from probescore_server.validation.rollouts import resolve_rollouts

BOTH = (PinnedReading("frozen"), PinnedReading("policy", "sha256:1"))


def on(readings: tuple[PinnedReading, ...], rollouts: list[CheckedRollout]) -> list[CheckedRollout]:
    """The same rollouts of a request that names readings."""
    options = replace(OPTIONS, readings=readings)
    return [replace(rollout, options=options) for rollout in rollouts]


def test_a_rollout_counts_once_for_each_reading() -> None:
    (rollout,) = group("a", prompt=4, tokens=3)
    assert (rollout.tokens, rollout.prompt_tokens) == (7, 4)
    for readings in ((), BOTH[:1], BOTH[1:], BOTH, (*BOTH, PinnedReading("other", "sha256:2"))):
        (own,) = on(readings, [rollout])
        times = max(1, len(readings))
        assert (own.tokens, own.prompt_tokens) == (7 * times, 4 * times)


async def test_the_queue_holds_half_as_much_on_two_readings() -> None:
    worker = HandWorker(ready=False)
    scheduler = scheduler_for(worker, queue=20)
    scheduler.submit([on(BOTH, group("a", "b", prompt=4, tokens=2))], job="j")
    assert scheduler.queued_tokens == 16
    with pytest.raises(QueueFull):
        scheduler.submit([on(BOTH, group("c", prompt=2, tokens=1))], job="j")
    scheduler.submit([group("c", prompt=2, tokens=1)], job="j")
    assert scheduler.queued_tokens == 19


async def test_a_batch_holds_half_as_much_on_two_readings() -> None:
    for readings, batches in (((), [["a", "b"]]), (BOTH, [["a"], ["b"]])):
        worker = HandWorker()
        scheduler = scheduler_for(worker, batch=12)
        call = scheduler.submit([on(readings, group(name, prompt=4, tokens=2)) for name in "ab"], job="j")
        await settle()
        await worker.finish_all()
        assert sorted(await names_of(call)) == ["a", "b"]
        assert worker.batches == batches


async def test_a_prompt_is_shared_by_those_who_read_the_same_only() -> None:
    worker = HandWorker(ready=False)
    scheduler = scheduler_for(worker, batch=16)
    calls = [
        scheduler.submit([on(readings, group(name, prompt_id=1, prompt=4, tokens=2))], job=f"job {name}")
        for name, readings in (("a", ()), ("b", BOTH), ("c", ()), ("d", BOTH[1:]))
    ]
    worker.ready = True
    scheduler.dispatch()
    await settle()
    await worker.finish_all()
    assert [await names_of(call) for call in calls] == [["a"], ["b"], ["c"], ["d"]]
    assert worker.batches == [["a", "c", "d"], ["b"]]  # 4 + 2 + 2, and 4 + 2; b needs 12


async def test_a_prompt_is_shared_by_those_who_read_with_the_same_adapters_only() -> None:
    worker = HandWorker(ready=False)
    scheduler = scheduler_for(worker, batch=16)
    adapters = {"a": frozenset({"A"}), "b": frozenset({"", "A"}), "c": frozenset({"A"}), "d": frozenset({"B"})}
    calls = []
    for name, own in adapters.items():
        rollouts = [replace(each, options=replace(OPTIONS, adapters=own)) for each in group(name, prompt_id=1, prompt=4, tokens=2)]
        calls.append(scheduler.submit([rollouts], job=f"job {name}"))
    worker.ready = True
    scheduler.dispatch()
    await settle()
    await worker.finish_all()
    assert [await names_of(call) for call in calls] == [["a"], ["b"], ["c"], ["d"]]
    assert worker.batches == [["a", "c", "d"], ["b"]]  # 4 + 2 + 2, and 4 + 2; b needs 12


INFO = EngineInfo(
    model=ModelInfo("m", "", "sha256:0", "llama", 8, 2, 2, 100, 0),
    tokenizer_fingerprint="",
    bos_token_id=None,
    probes=(
        ProbeInfo(
            name="p",
            version="1",
            description="",
            graph_sha256="",
            manifest_sha256="",
            taps=(),
            unit=ScoreUnit.LOGIT,
            output_per=OutputPer.TOKEN,
            labels=("l",),
            default_reduction=None,
            calibrations=(),
            accepted_mismatches=(),
            manifest_json="{}",
        ),
    ),
    device="cpu",
    dtype="float32",
    execution_path="universal",
)


@pytest.mark.parametrize("limit", ["max_request_tokens", "max_request_values", "max_span_scores"])
def test_each_limit_of_a_request_counts_all_readings(limit: str) -> None:
    from probescore import Completion

    groups = [RolloutGroup([1, 2, 3], [Completion([4, 5, 6, 7], spans=(Span("s", 0, 4),))])]
    once = {"max_request_tokens": 7, "max_request_values": 2 + 4, "max_span_scores": 4}[limit]
    for readings in ((), BOTH[:1], BOTH, (*BOTH, PinnedReading("other", "sha256:2"))):
        options = ResolvedOptions(probes=("p@1",), token_scores=frozenset({"p@1"}), readings=readings)
        needed = once * max(1, len(readings))
        resolve_rollouts(groups, INFO, options, **{limit: needed})
        with pytest.raises(LimitExceeded) as refused:
            resolve_rollouts(groups, INFO, options, **{limit: needed - 1})
        assert (refused.value.value, refused.value.limit) == (needed, limit)
    resolve_rollouts(groups, INFO, ResolvedOptions(probes=("p@1",), readings=BOTH), max_rollout_tokens=7)  # one sequence is one sequence


def test_costs_without_readings_are_as_they_were() -> None:
    options = ResolvedOptions(probes=("p@1",), token_scores=frozenset({"p@1"}))
    assert RequestCost.of(INFO, options) == RequestCost.of(INFO, replace(options, readings=BOTH[:1]))
    assert np.array_equal(RequestCost.of(INFO, replace(options, readings=BOTH)).row_values, 2)


def test_tokens_count_for_each_adapter_and_numbers_do_not() -> None:
    (probe,) = INFO.probes
    brought = {"plain": "", "twin": "", "a": "A", "also-a": "A", "b": "B"}
    adapters = {f"{name}@1": adapter for name, adapter in brought.items() if adapter}
    info = replace(INFO, probes=tuple(replace(probe, name=name) for name in brought), adapters=adapters)
    groups = [RolloutGroup([1, 2, 3], [[4, 5, 6, 7], [8]])]
    for count in range(1, len(brought) + 1):
        for names in combinations(brought, count):
            options = resolve_options(info, probes=names)
            passes = len({brought[name] for name in names})
            resolve_rollouts(groups, info, options, max_request_tokens=8 * passes, max_request_values=2 * count)
            for limit, needed in (("max_request_tokens", 8 * passes), ("max_request_values", 2 * count)):
                with pytest.raises(LimitExceeded) as refused:
                    resolve_rollouts(groups, info, options, **{limit: needed - 1})
                assert (refused.value.value, refused.value.limit) == (needed, limit)
            ((first, _),) = resolve_rollouts(groups, info, options)
            assert (first.tokens, first.prompt_tokens) == (7 * passes, 3 * passes)
