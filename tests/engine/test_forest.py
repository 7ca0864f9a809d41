"""The forest: nothing is computed twice, and every token is where it belongs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from probescore.types import Scope
from probescore_server.backbone.forest import Forest, Placement, ProbeReads
from probescore_server.rollouts import CheckedRollout, Continuation, ResolvedOptions

PROBES = {"plain@1": ProbeReads(), "sees@1": ProbeReads(sees_prompt=True), "asks@1": ProbeReads(follow_up=(7, 8))}
PROBES["asks-sees@1"] = ProbeReads(sees_prompt=True, follow_up=(7, 8))


def array(ids: list[int]) -> np.ndarray:
    return np.array(ids, np.int32)


def rollout(
    prompt: list[int],
    completion: list[int],
    *follow_ups: Continuation,
    probes: tuple[str, ...] = ("plain@1",),
    scope: Scope = Scope.COMPLETION,
) -> CheckedRollout:
    return CheckedRollout(array(prompt), Continuation(array(completion), follow_ups=follow_ups), ResolvedOptions(probes, scope=scope))


def build(*rollouts: CheckedRollout) -> Forest:
    return Forest.build(rollouts, PROBES)


def ids_of(forest: Forest, segments: tuple[int, ...]) -> list[int]:
    return [token for index in segments for token in forest.segments[index].token_ids.tolist()]


def read(forest: Forest) -> list[list[int]]:
    return [segment.token_ids.tolist() for segment in forest.segments if segment.read]


def test_identical_prompts_are_one_root_and_identical_completions_one_child() -> None:
    forest = build(rollout([1, 2], [3]), rollout([1, 2], [4]), rollout([1, 2], [3]))
    assert [segment.token_ids.tolist() for segment in forest.segments] == [[1, 2], [3], [4]]
    assert [segment.parent for segment in forest.segments] == [None, 0, 0]
    assert [segment.rollouts for segment in forest.segments] == [{0, 1, 2}, {0, 2}, {1}]


def test_same_tokens_after_other_tokens_are_another_segment() -> None:
    forest = build(rollout([1], [3]), rollout([2], [3]))
    assert len(forest.segments) == 4


def test_positions_continue() -> None:
    forest = build(rollout([1, 2], [3, 4, 5], Continuation(array([6]))))
    assert [segment.position for segment in forest.segments] == [0, 2, 5]


def test_empty_prompt_makes_the_completion_a_root() -> None:
    forest = build(rollout([], [3]))
    assert forest.segments[0].parent is None
    assert forest.placements[0].context == ()


def test_empty_completion_is_no_segment_and_its_follow_ups_continue_the_prompt() -> None:
    forest = build(rollout([1], [], Continuation(array([3]))))
    placement = forest.placements[0]
    assert (placement.segment, placement.chain) == (None, (0,))
    assert placement.follow_ups[0].context == (0,)


def test_usage_adds_up_to_every_token_asked_for() -> None:
    forest = build(rollout([1, 2], [3]), rollout([1, 2], [3], Continuation(array([4]))))
    assert [(usage.tokens_computed, usage.tokens_shared) for usage in map(forest.usage, range(2))] == [(3, 0), (1, 3)]


def test_cached_tokens_are_not_computed_and_count_once() -> None:
    forest = build(rollout([1, 2], [3]), rollout([1, 2], [4]))
    forest.segments[0].cached = 2
    assert [(u.tokens_computed, u.tokens_shared, u.tokens_cached) for u in map(forest.usage, range(2))] == [(1, 0, 2), (1, 2, 0)]


def test_ids_up_to_a_segment_spell_its_chain() -> None:
    forest = build(rollout([1, 2], [3], Continuation(array([4, 5]))))
    assert [forest.ids_up_to(index).tolist() for index in range(3)] == [[1, 2], [1, 2, 3], [1, 2, 3, 4, 5]]


def test_only_what_is_scored_is_read() -> None:
    assert read(build(rollout([1], [2]))) == [[2]]
    assert read(build(rollout([1], [2], scope=Scope.PROMPT))) == [[1]]
    assert read(build(rollout([1], [2], scope=Scope.ALL))) == [[1], [2]]
    assert read(build(rollout([1], [2], Continuation(array([3])), scope=Scope.PROMPT))) == [[1], [3]]


def test_prompt_and_ancestors_are_read_for_probes_that_see_them() -> None:
    assert read(build(rollout([1], [2], probes=("sees@1",)))) == [[1], [2]]
    assert read(build(rollout([1], [2], Continuation(array([3])), scope=Scope.PROMPT, probes=("sees@1",)))) == [[1], [2], [3]]


def test_completion_is_read_for_a_probe_that_sees_it_before_its_own_follow_up() -> None:
    assert read(build(rollout([1], [2], scope=Scope.PROMPT, probes=("asks-sees@1",)))) == [[1], [2], [7, 8]]
    assert read(build(rollout([1], [2], scope=Scope.PROMPT, probes=("asks@1",)))) == [[1], [7, 8]]


def test_probes_own_follow_up_is_appended_to_every_completion_and_shared() -> None:
    forest = build(rollout([1], [2], Continuation(array([3])), probes=("asks@1", "asks-sees@1")))
    assert [segment.token_ids.tolist() for segment in forest.segments] == [[1], [2], [7, 8], [3], [7, 8]]
    completion = forest.placements[0]
    assert completion.appended == {"asks@1": 2, "asks-sees@1": 2}
    assert completion.follow_ups[0].appended == {"asks@1": 4, "asks-sees@1": 4}


token_ids = st.lists(st.integers(0, 2), max_size=3)
continuations: st.SearchStrategy[Continuation] = st.recursive(
    st.builds(Continuation, token_ids.map(array)),
    lambda inner: st.builds(Continuation, token_ids.map(array), follow_ups=st.lists(inner, max_size=2).map(tuple)),
    max_leaves=4,
)
batches = st.lists(
    st.builds(
        CheckedRollout,
        token_ids.map(array),
        continuations,
        st.builds(
            ResolvedOptions, st.lists(st.sampled_from(sorted(PROBES)), unique=True, min_size=1).map(tuple), scope=st.sampled_from(Scope)
        ),
    ),
    max_size=5,
)


def walk(placement: Placement, before: list[int]) -> Iterator[tuple[Placement, list[int]]]:
    """Every continuation with the ids before it."""
    yield placement, before
    for follow_up in placement.follow_ups:
        yield from walk(follow_up, before + placement.continuation.token_ids.tolist())


@given(batches)
def test_any_batch_is_laid_out_so_that_each_chain_spells_its_rollout(batch: list[CheckedRollout]) -> None:
    forest = build(*batch)
    for index, (asked, placement) in enumerate(zip(batch, forest.placements, strict=True)):
        expected = 0
        for place, before in walk(placement, asked.prompt_ids.tolist()):
            expected += len(place.continuation.token_ids) + 2 * len(place.appended)
            assert ids_of(forest, place.context) == before
            assert ids_of(forest, place.chain) == before + place.continuation.token_ids.tolist()
            for segment in [*place.chain, *place.appended.values()]:
                assert index in forest.segments[segment].rollouts
            for segment in place.appended.values():
                assert ids_of(forest, (segment,)) == [7, 8]
                assert forest.segments[segment].read
        usage = forest.usage(index)
        assert usage.tokens_computed + usage.tokens_shared == expected + len(asked.prompt_ids)


@given(batches)
def test_any_forest_has_no_segment_twice_and_parents_first(batch: list[CheckedRollout]) -> None:
    forest = build(*batch)
    seen = {(segment.parent, segment.token_ids.tobytes()) for segment in forest.segments}
    assert len(seen) == len(forest.segments)
    assert sum(len(segment.token_ids) for segment in forest.segments) == sum(
        forest.usage(index).tokens_computed for index in range(len(batch))
    )
    for index, segment in enumerate(forest.segments):
        assert len(segment.token_ids) > 0
        assert segment.parent is None or segment.parent < index
    below = forest.children()
    assert sorted(child for children in below for child in children) == list(range(len(forest.segments)))
