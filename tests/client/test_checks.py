"""What a client knows of a server's vocabulary and limits is checked before anything is sent, for all rollouts at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from probescore import Chat, Completion, InvalidRequestError, Limits, ModelInfo, RolloutGroup, ServerInfo, check_groups

VOCABULARY = 100


def server(*, max_rollout_tokens: int = 20, max_position_embeddings: int = 0) -> ServerInfo:
    model = ModelInfo("model", "", "sha256:m", "llama", 8, 2, 2, VOCABULARY, max_position_embeddings)
    return ServerInfo("1", model, "", Limits(10**6, 10**6, max_rollout_tokens, 10**6, 10**6), (), ())


def violations(groups: list[RolloutGroup], where: ServerInfo) -> dict[str, str]:
    try:
        check_groups(groups, where)
    except InvalidRequestError as error:
        return {violation.field: violation.problem for violation in error.violations}
    return {}


@pytest.mark.parametrize(
    ("group", "field", "problem"),
    [
        (RolloutGroup([1, -2], [[3]]), "groups[0].prompt.ids", "id -2 at index 1 is not in the vocabulary, [0, 100)"),
        (RolloutGroup([1], [[3], [3, 100]]), "groups[0].completions[1].ids", "id 100 at index 1 is not in the vocabulary, [0, 100)"),
        (
            RolloutGroup("text", [Completion([3], follow_ups=(Completion([101]),))]),
            "groups[0].completions[0].follow_ups[0].ids",
            "id 101 at",
        ),
        (
            RolloutGroup([1], [np.array([2**63], np.uint64)]),
            "groups[0].completions[0].ids",
            f"id {2**63} at index 0 is not in the vocabulary",
        ),
        (RolloutGroup([1], [[0.5]]), "groups[0].completions[0].ids", "token ids are integers, got float64"),
        (RolloutGroup([1], [[[1]]]), "groups[0].completions[0].ids", "has 2 axes; expected 1"),  # type: ignore[list-item]
        (
            RolloutGroup([1] * 10, [[2] * 11]),
            "groups[0].completions[0]",
            "21 tokens; the limit is 20, the server's max_rollout_tokens: send a shorter one, since nothing is cut",
        ),
        (RolloutGroup(Chat(()), [[2] * 21]), "groups[0].completions[0]", "21 tokens; the limit is 20"),
    ],
)
def test_what_the_server_would_refuse_is_named_with_value_limit_and_remedy(group: RolloutGroup, field: str, problem: str) -> None:
    found = violations([group], server())
    assert list(found) == [field]
    assert found[field].startswith(problem)


def test_every_rollout_at_fault_is_named_at_once() -> None:
    groups = [RolloutGroup([1], [[2]]), RolloutGroup([1], [[2] * 30, [2], [VOCABULARY]])]
    assert list(violations(groups, server())) == ["groups[1].completions[0]", "groups[1].completions[2].ids"]
    with pytest.raises(InvalidRequestError, match=r"groups\[1\]\.completions\[0\]: 31 tokens; .* \(and 1 more\)$"):
        check_groups(groups, server())


def test_a_rollout_is_as_long_as_its_longest_chain_of_follow_ups() -> None:
    def completion(*lengths: int) -> Completion:
        return Completion([2] * 10, follow_ups=tuple(Completion([2] * length) for length in lengths))

    assert not violations([RolloutGroup([1], [completion(9, 9, 9)])], server())
    assert violations([RolloutGroup([1], [completion(3, 10)])], server())["groups[0].completions[0]"].startswith(
        "21 tokens; the limit is 20"
    )


@pytest.mark.parametrize(
    ("limits", "longest"),
    [
        ({"max_rollout_tokens": 20}, (20, "the server's max_rollout_tokens")),
        ({"max_rollout_tokens": 20, "max_position_embeddings": 15}, (15, "the model's max_position_embeddings")),
        ({"max_rollout_tokens": 0, "max_position_embeddings": 15}, (15, "the model's max_position_embeddings")),
        ({"max_rollout_tokens": 0}, None),
    ],
)
def test_the_smallest_limit_that_the_server_says_counts(limits: dict[str, int], longest: tuple[int, str] | None) -> None:
    def problem(tokens: int) -> str:
        return violations([RolloutGroup([1], [[2] * (tokens - 1)])], server(**limits)).get("groups[0].completions[0]", "")

    if longest is None:
        assert not problem(10_000)
    else:
        assert not problem(longest[0])
        assert f"the limit is {longest[0]}, {longest[1]}" in problem(longest[0] + 1)


@pytest.mark.parametrize("tokens", ["any text " * 100, [], np.zeros(0)])
def test_what_only_the_server_knows_is_left_to_it(tokens: Any) -> None:
    assert not violations([RolloutGroup("w " * 100, [tokens])], server())
