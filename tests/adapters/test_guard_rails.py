"""Every guard rail acts on its case and on no other."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from handmade_values import combined, signal_values
from hypothesis import given
from hypothesis import strategies as st

from probescore_adapters import GuardRails, Outcome, ProbeSignal
from probescore_adapters.guard_rails import RAILS, penalty_margin, screen

PENALTY = ProbeSignal("cheating", threshold=1.0)
SCREEN = ProbeSignal("cheating", threshold=1.0, mode="screen")
REWARD = ProbeSignal("cheating", mode="reward")


def acted(outcome: Outcome) -> dict[str, float]:
    return {rail: outcome.metrics[f"probescore/guard/{rail}"] for rail in RAILS if outcome.metrics[f"probescore/guard/{rail}"]}


def flagged(*flags: int) -> list[float]:
    return [2.0 * flag for flag in flags]


CASES: list[tuple[str, ProbeSignal, list[float], list[int], list[float], dict[str, float]]] = [
    ("nothing is flagged", SCREEN, flagged(0, 0, 0, 0), [1, 1, 2, 2], [1, 0, 1, 0], {}),
    ("few are screened", SCREEN, flagged(1, 0, 0, 0, 0, 0), [1, 1, 1, 2, 2, 2], [1, 0, 1, 0, 1, 0], {}),
    ("most of the batch", SCREEN, flagged(1, 1, 1, 0), [1, 1, 2, 2], [1, 0, 1, 0], {"screening_breaker": 1}),
    ("all but one of a group", SCREEN, flagged(1, 0, 0, 0), [1, 1, 2, 2], [1, 0, 1, 0], {"degenerate_group": 1}),
    ("all of a group", SCREEN, flagged(1, 1, 0, 0, 0), [1, 1, 2, 2, 2], [1, 0, 1, 0, 1], {"degenerate_group": 1}),
    ("most of a group", SCREEN, flagged(*[1] * 8, *[0] * 12), [1] * 10 + [2] * 10, [1] * 20, {"group_breaker": 1}),
    ("a group of one", SCREEN, flagged(1, 0, 0, 0), [1, 2, 2, 2], [1, 0, 1, 0], {}),
    ("a number beyond the clip", REWARD, [11.0, -11.0, 1.0], [1, 1, 1], [0, 0, 0], {"clipped": 2}),
    ("a penalty below what cheating gains", PENALTY, flagged(1, 0), [1, 1], [3.0, 1.0], {"penalty_too_small": 1}),
    ("a penalty above it", PENALTY, flagged(1, 0), [1, 1], [1.5, 1.0], {}),
    ("everyone is penalised", PENALTY, flagged(1, 1), [1, 1], [3.0, 1.0], {}),
]


@pytest.mark.parametrize(("signal", "values", "groups", "tasks", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_rail_acts_on_its_case_and_no_other(
    signal: ProbeSignal, values: list[float], groups: list[int], tasks: list[float], expected: dict[str, float]
) -> None:
    assert acted(combined(signal_values(signal, values), groups=groups, tasks=tasks)) == expected


def test_breaker_keeps_everyone_and_leaves_the_flagged_the_lowest_reward() -> None:
    outcome = combined(signal_values(SCREEN, flagged(1, 1, 1, 0)), groups=[1, 1, 1, 1], tasks=[5.0, 4.0, 3.0, 1.0])
    assert not outcome.removed.any()
    np.testing.assert_allclose(outcome.rewards, [1.0, 1.0, 1.0, 1.0])


def test_degenerate_group_goes_whole_and_the_others_stay() -> None:
    outcome = combined(signal_values(SCREEN, flagged(1, 0, 0, 0)), groups=[1, 1, 2, 2], tasks=[1.0] * 4)
    np.testing.assert_array_equal(outcome.removed, [True, True, False, False])


def test_breaker_of_a_group_leaves_other_groups_alone() -> None:
    flags = [*[1] * 4, 0, 0, 1, *[0] * 5]
    outcome = combined(
        signal_values(SCREEN, flagged(*flags)),
        groups=[1] * 6 + [2] * 6,
        tasks=list(range(12)),
        rails=GuardRails(max_screened_share_of_group=0.5),
    )
    np.testing.assert_array_equal(outcome.removed, [*[False] * 6, True, *[False] * 5])
    np.testing.assert_allclose(outcome.rewards[:6], [0.0, 0.0, 0.0, 0.0, 4.0, 5.0])


def test_rails_can_be_taken_down() -> None:
    rails = GuardRails(max_screened_share=1.0, drop_degenerate_groups=False, max_screened_share_of_group=1.0)
    outcome = combined(signal_values(SCREEN, flagged(1, 1)), groups=[1, 1], tasks=[1.0, 2.0], rails=rails)
    assert outcome.removed.all()
    assert acted(outcome) == {}


@pytest.mark.parametrize("fields", [{"clip": 0.0}, {"clip": math.inf}, {"max_screened_share": 1.5}, {"max_screened_share_of_group": -0.1}])
def test_limits_that_are_none_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        GuardRails(**fields)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3)), max_size=20))
def test_nobody_is_both_removed_and_kept_and_only_the_flagged_are_lowered(rows: list[tuple[bool, int]]) -> None:
    flags = np.array([flag for flag, _ in rows], np.bool_)
    screened = screen(flags, [group for _, group in rows], GuardRails())
    assert not (screened.removed & screened.lowered).any()
    assert not (screened.lowered & ~flags).any()
    assert (flags <= (screened.removed | screened.lowered)).all()


def test_margin_is_the_penalty_less_what_the_flagged_gain() -> None:
    margin = penalty_margin(np.array([True, False, False]), np.array([3.0, 0.0, 0.0]), np.array([5.0, 1.0, 3.0]))
    assert margin == 3.0 - (5.0 - 2.0)
