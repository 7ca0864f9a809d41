"""Every check of a request, each with the field that it names."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probescore import Reduction
from probescore.types import Chat, ChatMessage, Completion, ModelInfo, OutputPer, ProbeInfo, RolloutGroup, Scope, ScoreUnit, Span, Text
from probescore_server.errors import InvalidRequest
from probescore_server.rollouts import CheckedRollout, EngineInfo, ResolvedOptions
from probescore_server.validation.options import resolve_options, version_order
from probescore_server.validation.rollouts import resolve_rollouts
from probescore_server.validation.texts import PendingText, pending_texts

VOCAB, BOS, POSITIONS = 100, 1, 40


def probe(name: str, version: str = "1", *, per: OutputPer = OutputPer.TOKEN) -> ProbeInfo:
    return ProbeInfo(
        name=name,
        version=version,
        description="",
        graph_sha256="",
        manifest_sha256="",
        taps=(),
        unit=ScoreUnit.LOGIT,
        output_per=per,
        labels=("score",),
        default_reduction=Reduction.parse("mean") if per is OutputPer.TOKEN else None,
        calibrations=(),
        accepted_mismatches=(),
        manifest_json="",
    )


INFO = EngineInfo(
    model=ModelInfo("m", "", "", "llama", 8, 4, 2, VOCAB, POSITIONS),
    tokenizer_fingerprint="",
    bos_token_id=BOS,
    probes=(probe("a"), probe("b"), probe("b", "2"), probe("pools", per=OutputPer.ROLLOUT)),
    device="cpu",
    dtype="float32",
    execution_path="universal",
)


def options(info: EngineInfo = INFO, **asked: Any) -> ResolvedOptions:
    return resolve_options(info, **asked)


def rollouts(
    *groups: RolloutGroup, info: EngineInfo = INFO, asked: ResolvedOptions | None = None, **limits: Any
) -> list[list[CheckedRollout]]:
    return resolve_rollouts(groups, info, asked or options(), **limits)


def refused(field: str, saying: str, *groups: RolloutGroup, **given: Any) -> None:
    with pytest.raises(InvalidRequest, match=saying) as caught:
        rollouts(*groups, **given)
    assert caught.value.field == field


def group(completion: Any = (5, 6), prompt: Any = (1, 2, 3)) -> RolloutGroup:
    return RolloutGroup(prompt, [completion])


# ---------------------------------------------------------------------------------------------------------------------- options


def test_no_names_mean_the_highest_version_of_every_probe() -> None:
    assert options().probes == ("a@1", "b@2", "pools@1")


@pytest.mark.parametrize(
    "ascending",
    [
        ["1", "2", "10"],
        ["1.9", "1.10", "2.0"],
        ["v1", "v2", "v10"],
        ["1", "1-rc1", "1-rc2", "1-rc10", "1.1", "2"],
        ["2024-9-30", "2024-10-1"],
        ["a", "b", "1"],
        ["01", "1", "2"],
        ["1.0.0", "1a", "1b"],
    ],
)
def test_versions_have_the_order_that_people_read(ascending: list[str]) -> None:
    for order in (ascending, ascending[::-1], ascending[1:] + ascending[:1]):
        assert sorted(order, key=version_order) == ascending
        info = replace(INFO, probes=tuple(probe("x", version) for version in order))
        assert options(info, probes=["x"]).probes == options(info).probes == (f"x@{ascending[-1]}",)


def test_a_retired_version_is_what_its_full_name_alone_means() -> None:
    info = replace(INFO, retired=frozenset({"b@2"}))
    assert options(info).probes == ("a@1", "b@1", "pools@1")
    assert options(info, probes=["b"]).probes == ("b@1",)
    assert options(info, probes=["b@2", "b"]).probes == ("b@2", "b@1")
    gone = replace(INFO, retired=frozenset({"b@1", "b@2"}))
    with pytest.raises(InvalidRequest, match=r"'b' has no current version; its retired ones are served for a while as b@1, b@2"):
        options(gone, probes=["b"])
    with pytest.raises(InvalidRequest, match="no probe is current; retired ones are served for a while as b@1, b@2"):
        options(replace(gone, probes=tuple(one for one in INFO.probes if one.name == "b")))


def test_token_scores_by_bare_name_are_those_of_the_version_that_is_applied() -> None:
    assert options(probes=["b@1"], token_scores=["b"]).token_scores == {"b@1"}
    assert options(probes=["b@1", "b@2"], token_scores=["b"]).token_scores == {"b@2"}


def test_names_resolve_with_or_without_version_in_the_order_asked() -> None:
    assert options(probes=["b@2", "a", "pools@1"]).probes == ("b@2", "a@1", "pools@1")


def test_all_token_scores_are_those_of_probes_that_score_tokens() -> None:
    assert options(probes=["a", "pools"], token_scores="all").token_scores == {"a@1"}
    assert options(probes=["a", "b@1"], token_scores=["b@1"]).token_scores == {"b@1"}


@pytest.mark.parametrize(
    ("asked", "field", "saying"),
    [
        ({"probes": ["a", "nope"]}, "probes[1]", "unknown probe 'nope'; loaded: a@1, b@1"),
        ({"probes": ["a@2"]}, "probes[0]", "unknown probe"),
        ({"probes": ["a", "a@1"]}, "probes[1]", "a@1 appears twice"),
        ({"probes": ["b", "b@2"]}, "probes[1]", "b@2 appears twice"),
        ({"reductions": ["mean", "median"]}, "reductions[1]", "unknown reduction 'median'"),
        ({"reductions": ["topk_mean"]}, "reductions[0]", "needs its parameter"),
        ({"token_scores": "a"}, "token_scores", "neither 'all' nor a list"),
        ({"token_scores": ["nope"]}, "token_scores.probes[0]", "unknown probe"),
        ({"probes": ["a"], "token_scores": ["b@1"]}, "token_scores.probes[0]", "not among the probes of this request"),
        ({"token_scores": ["a", "pools"]}, "token_scores.probes[1]", "no scores per token"),
        ({"scope": "everything"}, "scope", "none of completion, prompt, all"),
    ],
)
def test_options_are_refused_by_field(asked: dict[str, Any], field: str, saying: str) -> None:
    with pytest.raises(InvalidRequest, match=saying) as caught:
        options(**asked)
    assert caught.value.field == field


def test_no_probe_loaded_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no probe is loaded"):
        resolve_options(replace(INFO, probes=()))


# -------------------------------------------------------------------------------------------------------------------------- ids


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32, np.uint8])
def test_ids_are_taken_verbatim(dtype: type) -> None:
    ((rollout,),) = rollouts(group(np.array([7, 99, 0], dtype), np.array([1, 2], dtype)))
    assert rollout.prompt_ids.tolist() == [1, 2]
    assert rollout.completion.token_ids.tolist() == [7, 99, 0]
    assert rollout.completion.token_ids.dtype == rollout.prompt_ids.dtype == np.int32


def test_rollouts_of_a_group_hold_the_same_prompt() -> None:
    (two,) = rollouts(RolloutGroup([1, 2], [[3], [4]]))
    assert two[0].prompt_ids is two[1].prompt_ids


@pytest.mark.parametrize(
    ("ids", "saying"),
    [
        ([5, VOCAB], "id 100 at index 1 is not in the vocabulary"),
        ([-1], "id -1 at index 0"),
        (np.array([2**63], np.uint64), "id 9223372036854775808 at index 0"),
        ([2**70], "must be integers"),
        ([1.0, 2.0], "must be integers"),
        ([True], "must be integers"),
        ([[1, 2]], "one axis, got shape"),
        ([[1, 2], [3]], "flat list"),
        (["5"], "must be integers"),
    ],
)
def test_ids_outside_the_vocabulary_or_of_another_kind_are_refused(ids: Any, saying: str) -> None:
    refused("groups[0].completions[0].ids", saying, group(ids))
    refused("groups[1].prompt.ids", saying, group(), group(prompt=ids))
    refused("groups[0].completions[0].follow_ups[1].ids", saying, group(Completion([5], follow_ups=(Completion([6]), Completion(ids)))))


def test_empty_ids_are_fine() -> None:
    ((rollout,),) = rollouts(group([], []))
    assert rollout.tokens == 0


def test_no_groups_and_no_completions_are_refused() -> None:
    refused("groups", "at least one group")
    refused("groups[0].completions", "at least one completion", RolloutGroup([1], []))


# --------------------------------------------------------------------------------------------------------------- masks and spans


@pytest.mark.parametrize(
    ("mask", "saying"),
    [
        ([1], r"shape \(1,\) for 2 tokens"),
        ([[1, 0]], r"shape \(1, 2\)"),
        ([0, 2], "only 0 and 1"),
        ([[1], [1, 0]], "flat list"),
        ([0.5, 1], "only 0"),
    ],
)
def test_masks_are_checked(mask: Any, saying: str) -> None:
    refused("groups[0].completions[0].mask", saying, group(Completion([5, 6], mask=mask)))


@pytest.mark.parametrize("mask", [[0, 1], [False, True], np.array([0, 1], np.int64), (0.0, 1.0)])
def test_masks_of_0_and_1_are_read(mask: Any) -> None:
    ((rollout,),) = rollouts(group(Completion([5, 6], mask=mask)))
    assert rollout.completion.mask is not None
    assert rollout.completion.mask.tolist() == [False, True]


@pytest.mark.parametrize(
    ("spans", "field", "saying"),
    [
        ([Span("a", 0, 3)], "spans[0].end", "3 is beyond the completion's 2 tokens"),
        ([Span("a", 0, 1), Span("b", 2, 1)], "spans[1].start", r"2 is not in \[0, end\], end is 1"),
        ([Span("a", -1, 1)], "spans[0].start", "-1"),
        ([Span("", 0, 1)], "spans[0].name", "0 bytes"),
        ([Span("é" * 33, 0, 1)], "spans[0].name", "66 bytes; a name has 1 to 64"),
        ([Span("a", 0, 1), Span("a", 1, 2)], "spans[1].name", "'a' appears twice"),
    ],
)
def test_spans_are_checked(spans: list[Span], field: str, saying: str) -> None:
    refused(f"groups[0].completions[0].{field}", saying, group(Completion([5, 6], spans=tuple(spans))))


def test_spans_may_touch_the_end_and_overlap() -> None:
    rollouts(group(Completion([5, 6], spans=(Span("all", 0, 2), Span("none", 2, 2), Span("x" * 64, 1, 2)))))


def test_masks_and_spans_of_a_completion_mean_nothing_where_the_prompt_is_scored() -> None:
    asked = options(scope=Scope.PROMPT)
    refused("groups[0].completions[0].mask", "scope", group(Completion([5], mask=[1])), asked=asked)
    refused("groups[0].completions[0].spans", "scope", group(Completion([5], spans=(Span("a", 0, 1),))), asked=asked)
    rollouts(group(Completion([5], follow_ups=(Completion([6], mask=[1]),))), asked=asked)


# -------------------------------------------------------------------------------------------------------------------- follow-ups


def nested(depth: int) -> Completion:
    return Completion([5], follow_ups=(nested(depth - 1),) if depth else ())


def test_follow_ups_nest_8_deep_and_no_deeper() -> None:
    rollouts(group(nested(8)))
    refused("groups[0].completions[0]" + ".follow_ups[0]" * 8 + ".follow_ups", "more than 8 deep", group(nested(9)))


# ------------------------------------------------------------------------------------------------------------------------- length


def test_longest_chain_counts_against_the_limit_of_a_rollout() -> None:
    forked = Completion([5, 6], follow_ups=(Completion([7]), Completion([7, 8], follow_ups=(Completion([9]),))))
    rollouts(group(forked), max_rollout_tokens=8)
    refused("groups[0].completions[0]", "8 tokens .* the limit max_rollout_tokens is 7", group(forked), max_rollout_tokens=7)


def test_follow_up_that_a_probe_appends_counts_too() -> None:
    info = replace(INFO, max_follow_up_tokens={"a@1": 10, "b@1": 2})
    refused("groups[0].completions[0]", "15 tokens", group(), info=info, max_rollout_tokens=14)
    rollouts(group(), info=info, asked=options(probes=["b@1"]), max_rollout_tokens=7)


def test_a_rollout_costs_what_all_its_probes_append_to_it_and_to_each_of_its_follow_ups() -> None:
    info = replace(INFO, max_follow_up_tokens={"a@1": 10, "b@1": 2})
    ((plain,),) = rollouts(group(), info=info, asked=options(probes=["a@1", "b@1"]))
    ((followed,),) = rollouts(group(Completion([5, 6], follow_ups=(Completion([7]),))), info=info, asked=options(probes=["b@1"]))
    assert plain.tokens == len(plain.prompt_ids) + len(plain.completion.token_ids) + 12
    assert followed.tokens == len(followed.prompt_ids) + 2 + 2 + 1 + 2


def test_positions_of_the_model_are_a_limit_too() -> None:
    rollouts(group([5] * 37))
    refused("groups[0].completions[0]", "41 tokens .* max_position_embeddings of the model is 40", group([5] * 38))
    unknown = replace(INFO, model=replace(INFO.model, max_position_embeddings=0))
    rollouts(group([5] * 1000), info=unknown)


def test_prompt_counts_once_per_group_against_the_limit_of_a_request() -> None:
    two = RolloutGroup([1, 2, 3], [[4, 5], [6]])
    rollouts(two, two, max_request_tokens=12)
    refused("groups", "12 tokens; the limit max_request_tokens is 11", two, two, max_request_tokens=11)


# ---------------------------------------------------------------------------------------------------------------------------- BOS


@pytest.mark.parametrize(
    ("expects", "prompt", "completion", "fine"),
    [
        (True, [BOS, 2], [3], True),
        (True, [2, BOS], [3], False),
        (True, [], [BOS, 3], True),
        (True, [], [3], False),
        (True, [], [], False),
        (False, [2], [BOS], True),
        (False, [BOS, 2], [3], False),
        (False, [], [BOS], False),
        (False, [], [], True),
        (None, [BOS, BOS], [3], True),
    ],
)
def test_expected_bos_is_checked_on_the_first_id(expects: bool | None, prompt: list[int], completion: list[int], fine: bool) -> None:
    info = replace(INFO, expects_bos={"a@1": expects})
    if fine:
        rollouts(group(completion, prompt), info=info)
    else:
        refused("groups[0].prompt", r"for probe a@1 the rollout must (not )?start with BOS \(1\)", group(completion, prompt), info=info)
        rollouts(group(completion, prompt), info=info, asked=options(probes=["b@1"]))


def test_bos_is_not_checked_where_the_tokenizer_has_none() -> None:
    rollouts(group(prompt=[2]), info=replace(INFO, bos_token_id=None, expects_bos={"a@1": True}))


# -------------------------------------------------------------------------------------------------------------------------- texts

TEXTS = [
    RolloutGroup("hello", ["there", Completion([5], follow_ups=(Completion("why"),))]),
    RolloutGroup(Chat((ChatMessage("user", "hi"),)), [[6]]),
    RolloutGroup(Text("x", add_special_tokens=True), ["y"]),
    RolloutGroup([1], [[2]]),
]


def test_texts_are_listed_with_their_fields() -> None:
    assert pending_texts(TEXTS) == [
        PendingText("groups[0].prompt", Text("hello")),
        PendingText("groups[0].completions[0]", "there"),
        PendingText("groups[0].completions[1].follow_ups[0]", "why"),
        PendingText("groups[1].prompt", Chat((ChatMessage("user", "hi"),))),
        PendingText("groups[2].prompt", Text("x", add_special_tokens=True)),
        PendingText("groups[2].completions[0]", "y"),
    ]


def test_encoded_ids_take_the_place_of_texts_and_are_flagged() -> None:
    encoded = {text.field: np.array([10 + i, 20], np.int32) for i, text in enumerate(pending_texts(TEXTS))}
    (first, second), (chat,), (text,), (ids,) = rollouts(*TEXTS, encoded=encoded)
    assert first.prompt_ids.tolist() == [10, 20]
    assert first.completion.token_ids.tolist() == [11, 20]
    assert second.completion.follow_ups[0].token_ids.tolist() == [12, 20]
    assert chat.prompt_ids.tolist() == [13, 20]
    assert text.completion.token_ids.tolist() == [15, 20]
    assert [r.completion.inexact_ids for r in (first, second, chat, text, ids)] == [True, True, True, True, False]


def test_ids_after_text_are_inexact_and_those_before_it_are_not() -> None:
    asked = RolloutGroup([1], [Completion([5], follow_ups=(Completion("why", follow_ups=(Completion([6]),)),))])
    ((rollout,),) = rollouts(asked, encoded={"groups[0].completions[0].follow_ups[0]": np.array([3], np.int32)})
    outer = rollout.completion.follow_ups[0]
    assert (rollout.completion.inexact_ids, outer.inexact_ids, outer.follow_ups[0].inexact_ids) == (False, True, True)


# ------------------------------------------------------------------------------------------------------------------- anything at all

anything = st.recursive(
    st.none() | st.integers() | st.floats() | st.text(max_size=3) | st.booleans(), lambda inner: st.lists(inner, max_size=3), max_leaves=5
)


@given(ids=st.lists(anything), mask=anything)
def test_whatever_comes_is_read_or_refused_by_field(ids: Any, mask: Any) -> None:
    try:
        ((rollout,),) = rollouts(group(Completion(ids, mask=mask)))
    except InvalidRequest as refusal:
        field = refusal.field
    else:
        field = "groups[0].completions[0].ids"
        assert rollout.completion.token_ids.tolist() == ids
        assert rollout.completion.mask is None or rollout.completion.mask.tolist() == mask
    assert field in ("groups[0].completions[0]", "groups[0].completions[0].ids", "groups[0].completions[0].mask")


def test_the_front_process_can_use_it_without_torch() -> None:
    program = (
        "import sys, probescore_server, probescore_server.validation.rollouts, probescore_server.validation.options\n"
        "assert not {'torch', 'transformers', 'onnxruntime', 'onnx'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
