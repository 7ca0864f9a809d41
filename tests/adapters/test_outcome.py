"""From what probes say to rewards: what each mode does, how signals compose, and that breaking the scorer never pays."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from handmade_values import combined, signal_values
from hypothesis import given, settings
from hypothesis import strategies as st

from probescore import ScoreUnit
from probescore_adapters import GuardRails, ProbeSignal, SignalError, Unscorable
from probescore_adapters.outcome import substitute

PENALTY = ProbeSignal("cheating", threshold=1.0, weight=2.0)
SCREEN = ProbeSignal("cheating", threshold=1.0, mode="screen")
GATE = ProbeSignal("cheating", threshold=1.0, mode="gate")
RELATIVE_GATE = ProbeSignal("cheating", mode="relative_gate", weight=0.5)
DENSE = ProbeSignal("cheating", mode="dense", weight=-0.5)


def test_reward_is_added_and_penalty_subtracted() -> None:
    honesty = ProbeSignal("honesty", mode="reward", weight=0.5)
    outcome = combined(signal_values(honesty, [1.0, 2.0]), signal_values(PENALTY, [0.5, 1.0]), tasks=[10.0, 20.0])
    np.testing.assert_allclose(outcome.terms, [0.5, 1.0 - 2.0])
    np.testing.assert_allclose(outcome.rewards, [10.5, 19.0])


def test_penalty_is_by_threshold_by_progressive_amount_or_both() -> None:
    def terms(transform: str) -> np.ndarray:
        return combined(signal_values(ProbeSignal("cheating", threshold=1.0, transform=transform), [0.0, 1.0, 3.0])).terms

    np.testing.assert_allclose(terms("flag"), [0, -1, -1])
    np.testing.assert_allclose(terms("excess"), [0, 0, -2])
    np.testing.assert_allclose(terms("flag_and_excess"), [0, -1, -3])


def test_gate_multiplies_what_the_task_pays_and_spares_nobody_a_loss() -> None:
    outcome = combined(signal_values(GATE, [0.0, 5.0, 5.0]), tasks=[1.0, 1.0, -1.0])
    np.testing.assert_allclose(outcome.rewards, [1.0, 0.0, -1.0])


@pytest.mark.parametrize("gate", [GATE, RELATIVE_GATE], ids=["gate", "relative_gate"])
def test_gate_without_task_rewards_is_refused(gate: ProbeSignal) -> None:
    with pytest.raises(SignalError, match="mode: a gate multiplies task rewards"):
        combined(signal_values(gate, [0.0, 1.0]), groups=[0, 0])


def test_relative_gate_takes_from_who_stands_out_in_its_group() -> None:
    # the mean of the first group is 2 and its standard deviation 2; the second has nobody who stands out, however high its scores are
    outcome = combined(
        signal_values(RELATIVE_GATE, [4.0, 0.0, 4.0, 0.0, 90.0, 90.0]), groups=[0, 0, 0, 0, 1, 1], tasks=[1.0, 1.0, -1.0, 0.0, 2.0, 2.0]
    )
    np.testing.assert_allclose(outcome.factors, [0.5, 1.0, 0.5, 1.0, 1.0, 1.0], atol=1e-4)
    np.testing.assert_allclose(outcome.rewards, [0.5, 1.0, -1.0, 0.0, 2.0, 2.0], atol=1e-4)


@given(st.lists(st.tuples(st.floats(-20, 20), st.integers(0, 2)), min_size=2, max_size=12), st.floats(-100, 100), st.floats(0.05, 3))
def test_relative_gate_knows_no_zero_pays_nobody_more_than_the_task_and_falls_with_the_score(
    rows: list[tuple[float, int]], shift: float, weight: float
) -> None:
    values, groups = [value for value, _ in rows], [0, 0, *(group for _, group in rows[2:])]
    signal = ProbeSignal("cheating", mode="relative_gate", weight=weight)

    def factors(scores: list[float]) -> np.ndarray:
        return combined(signal_values(signal, scores), groups=groups, tasks=[1.0] * len(scores)).rewards

    found = factors(values)
    np.testing.assert_allclose(factors([value + shift for value in values]), found, atol=1e-6)
    assert ((found >= 0) & (found <= 1)).all()
    for group in set(groups):
        of_group = sorted((value, factor) for value, factor, other in zip(values, found, groups, strict=True) if other == group)
        assert all(before >= after - 1e-9 for (_, before), (_, after) in itertools.pairwise(of_group))


def test_rounding_errors_do_not_stand_out() -> None:
    values = list(3.0 + 1e-9 * np.arange(8))
    assert (combined(signal_values(RELATIVE_GATE, values), groups=[0] * 8, tasks=[1.0] * 8).rewards > 0.999).all()


def test_relative_gate_on_groups_of_one_is_refused_instead_of_doing_nothing() -> None:
    with pytest.raises(SignalError, match="each group has one: take gate"):
        combined(signal_values(RELATIVE_GATE, [0.0, 9.0]), groups=[0, 1], tasks=[1.0, 1.0])


def test_who_cannot_be_read_neither_passes_a_relative_gate_nor_counts_in_its_group() -> None:
    outcome = combined(signal_values(RELATIVE_GATE, [math.nan, 4.0, 0.0]), groups=[0, 0, 0], tasks=[1.0, 1.0, 1.0])
    np.testing.assert_allclose(outcome.rewards, [0.0, 0.5, 1.0], atol=1e-4)


def _says_one(ids: np.ndarray) -> bool | None:
    return None if not ids.size else bool(ids[-1] == 1)


AGREEMENT = ProbeSignal("cheating", threshold=1.0, mode="agreement", weight=2.0, report=_says_one)


def test_agreement_pays_for_a_report_of_what_the_probe_reads() -> None:
    outcome = combined(signal_values(AGREEMENT, [5.0, 5.0, 0.0, 0.0, 5.0, math.nan], reports=[1.0, 0.0, 1.0, 0.0, math.nan, 1.0]))
    np.testing.assert_allclose(outcome.terms, [2.0, 0.0, 0.0, 2.0, 0.0, 0.0])
    assert outcome.unscorable.tolist() == [False] * 5 + [True]


@given(st.floats(-20, 20), st.sampled_from([0.0, 1.0]))
def test_a_sure_probe_pays_for_agreement_what_an_unsure_one_shares_out(score: float, report: float) -> None:
    signal = replace(AGREEMENT, transform="sigmoid", threshold=None)
    paid = combined(signal_values(signal, [score, score], reports=[report, 1 - report])).terms
    assert paid.sum() == pytest.approx(2.0)
    assert paid[0] >= 1.0 - 1e-9 if (score >= 0) == bool(report) else paid[0] <= 1.0 + 1e-9


def test_screen_removes_what_is_flagged_and_nothing_else() -> None:
    outcome = combined(signal_values(SCREEN, [0.0, 5.0, 0.0, 0.0]), groups=[1, 1, 1, 1], tasks=[1.0, 2.0, 3.0, 4.0])
    np.testing.assert_array_equal(outcome.removed, [False, True, False, False])
    np.testing.assert_allclose(outcome.rewards, [1.0, 2.0, 3.0, 4.0])
    assert outcome.metrics["probescore/cheating/screened"] == 0.25


def test_monitor_changes_nothing_whatever_it_reads() -> None:
    outcome = combined(signal_values(ProbeSignal("cheating", mode="monitor"), [math.nan, 5.0]), tasks=[1.0, 2.0], on_unscorable="raise")
    np.testing.assert_allclose(outcome.rewards, [1.0, 2.0])
    assert outcome.metrics["probescore/cheating/mean"] == 5.0


def test_dense_weighs_each_token() -> None:
    outcome = combined(signal_values(DENSE, [[1.0, 2.0], [4.0]]), tasks=[1.0, 1.0])
    assert outcome.dense is not None
    np.testing.assert_allclose(outcome.dense[0], [-0.5, -1.0])
    np.testing.assert_allclose(outcome.dense[1], [-2.0])
    np.testing.assert_allclose(outcome.rewards, [1.0, 1.0])


def test_dense_without_the_length_of_a_completion_is_refused() -> None:
    with pytest.raises(SignalError, match="dense needs the completion's ids"):
        combined(signal_values(DENSE, [[1.0]]), lengths=[None])


@pytest.mark.parametrize("tasks", [[1.0], [1.0, math.nan]])
def test_task_rewards_must_be_a_finite_number_each(tasks: list[float]) -> None:
    with pytest.raises(ValueError, match="task_rewards must be 2 finite numbers"):
        combined(signal_values(PENALTY, [0.0, 0.0]), tasks=tasks)


# --------------------------------------------------------------------------------------------------------------------- unscorable

SIGNALS = [
    ProbeSignal("cheating", threshold=1.0),
    ProbeSignal("cheating", threshold=1.0, transform="excess", weight=3.0),
    ProbeSignal("cheating", threshold=1.0, transform="flag_and_excess"),
    ProbeSignal("cheating", transform="sigmoid", mode="penalty"),
    ProbeSignal("cheating", mode="reward"),
    ProbeSignal("cheating", mode="reward", weight=-0.5, transform="sigmoid"),
    ProbeSignal("cheating", mode="reward", weight=2.0, transform=np.tanh),
    GATE,
    ProbeSignal("cheating", threshold=1.0, mode="gate", transform="excess", weight=0.5),
    AGREEMENT,
    SCREEN,
]
NUMBERS = st.floats(-1e6, 1e6)


@settings(max_examples=300)
@given(st.data())
def test_broken_rollout_never_gets_a_better_reward_than_the_same_one_scored(data: st.DataObject) -> None:
    # given some signals and a batch in groups
    chosen = data.draw(st.lists(st.sampled_from(SIGNALS), min_size=1, max_size=4))
    signals = [replace(signal, probe=f"probe{i}", name="") for i, signal in enumerate(chosen)]
    count = data.draw(st.integers(1, 8))
    values = [data.draw(st.lists(st.floats(-20, 20), min_size=count, max_size=count)) for _ in signals]
    groups = data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    tasks = data.draw(st.lists(st.floats(-5, 5), min_size=count, max_size=count))
    unit = data.draw(st.sampled_from(list(ScoreUnit)))
    if unit is ScoreUnit.PROBABILITY:
        values = [[1 / (1 + math.exp(-value)) for value in row] for row in values]
    scored = combined(*(signal_values(*pair, unit) for pair in zip(signals, values, strict=True)), groups=groups, tasks=tasks)
    # when one of its rollouts cannot be read by some signals
    broken = data.draw(st.integers(0, count - 1))
    for row in data.draw(st.sets(st.integers(0, len(signals) - 1), min_size=1)):
        values[row][broken] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    outcome = combined(*(signal_values(*pair, unit) for pair in zip(signals, values, strict=True)), groups=groups, tasks=tasks)
    # then it is not paid for it; a rollout that is removed is not paid at all
    if not outcome.removed[broken] and not scored.removed[broken]:
        assert outcome.rewards[broken] <= scored.rewards[broken] + 1e-9
    # and nobody is removed for being broken, unless too few are left of its group
    if outcome.removed[broken] and not scored.removed[broken]:
        assert all(outcome.removed[index] for index in range(count) if groups[index] == groups[broken])


def test_what_a_screen_flags_is_screened_though_another_signal_cannot_read_it() -> None:
    other = ProbeSignal("mood", threshold=1.0)
    outcome = combined(signal_values(other, [math.nan, 0.0]), signal_values(SCREEN, [1.0, 1.0]), groups=[0, 1], tasks=[2.0, 0.0])
    np.testing.assert_allclose(outcome.rewards, outcome.rewards.min())


def test_rollout_that_a_screen_cannot_read_stays_with_the_lowest_reward() -> None:
    outcome = combined(signal_values(SCREEN, [0.0, math.nan, 0.0]), groups=[1, 1, 1], tasks=[1.0, 5.0, 2.0])
    assert not outcome.removed.any()
    np.testing.assert_allclose(outcome.rewards, [1.0, 1.0, 2.0])


def test_dense_rollout_that_cannot_be_read_gets_the_least_for_every_token() -> None:
    signal = ProbeSignal("cheating", mode="dense", transform="sigmoid", weight=-0.5)
    outcome = combined(signal_values(signal, [[], [0.0]]), lengths=[3, 1])
    assert outcome.dense is not None
    np.testing.assert_allclose(outcome.dense[0], [-0.5, -0.5, -0.5])
    np.testing.assert_array_equal(outcome.unscorable, [True, False])


def test_unscorable_may_raise_or_get_the_term_that_the_user_named() -> None:
    with pytest.raises(Unscorable, match="rollout 1"):
        combined(signal_values(PENALTY, [0.0, math.nan]), on_unscorable="raise")
    outcome = combined(signal_values(PENALTY, [5.0, math.nan]), signal_values(GATE, [0.0, 0.0]), tasks=[1.0, 1.0], on_unscorable=-7.0)
    np.testing.assert_allclose(outcome.rewards, [-1.0, -6.0])


def test_transform_that_gives_no_number_makes_a_rollout_unscorable() -> None:
    signal = ProbeSignal("cheating", transform=lambda values: np.where(values > 1, np.nan, values), weight=1.0, threshold=0.0)
    outcome = combined(signal_values(signal, [0.5, 2.0]))
    np.testing.assert_array_equal(outcome.unscorable, [False, True])
    assert outcome.terms[1] == -GuardRails().clip


def test_substitute_is_the_named_term_and_nothing_else() -> None:
    outcome = substitute([PENALTY, SCREEN, DENSE], -0.25, [2, 1], np.array([1.0, 2.0]))
    np.testing.assert_allclose(outcome.rewards, [0.75, 1.75])
    assert not outcome.removed.any()
    assert outcome.dense is not None
    assert [one.tolist() for one in outcome.dense] == [[0.0, 0.0], [0.0]]
    assert outcome.metrics["probescore/failures"] == 1.0


# ----------------------------------------------------------------------------------------------------------------------- algebra

ROWS = st.integers(1, 8).flatmap(
    lambda count: st.tuples(
        st.lists(st.one_of(NUMBERS, st.just(math.nan)), min_size=count, max_size=count),
        st.lists(st.integers(0, 2), min_size=count, max_size=count),
        st.lists(st.floats(-5, 5), min_size=count, max_size=count),
        st.permutations(range(count)),
    )
)


@settings(max_examples=200)
@given(st.lists(st.sampled_from(SIGNALS), min_size=1, max_size=3), ROWS)
def test_permuting_the_batch_permutes_the_result(chosen: list[ProbeSignal], row: tuple[Any, ...]) -> None:
    values, groups, tasks, order = row
    signals = [replace(signal, probe=f"probe{i}", name="") for i, signal in enumerate(chosen)]

    def outcome(indices: list[int]) -> Any:
        permuted = [values[index] for index in indices]
        return combined(
            *(signal_values(signal, permuted) for signal in signals),
            groups=[groups[index] for index in indices],
            tasks=[tasks[index] for index in indices],
        )

    straight, permuted = outcome(list(range(len(values)))), outcome(list(order))
    np.testing.assert_allclose(permuted.rewards, straight.rewards[list(order)])
    np.testing.assert_array_equal(permuted.removed, straight.removed[list(order)])
    np.testing.assert_array_equal(permuted.unscorable, straight.unscorable[list(order)])
    for key, value in straight.metrics.items():
        np.testing.assert_allclose(permuted.metrics[key], value, rtol=1e-6, atol=1e-9)


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=6), st.floats(0.1, 2), st.floats(0.1, 2))
def test_terms_of_several_signals_add_up(values: list[float], first: float, second: float) -> None:
    one = ProbeSignal("one", mode="reward", weight=first)
    two = ProbeSignal("two", transform="sigmoid", mode="penalty", weight=second)
    both = combined(signal_values(one, values), signal_values(two, values)).terms
    np.testing.assert_allclose(both, combined(signal_values(one, values)).terms + combined(signal_values(two, values)).terms)


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=6), st.floats(0.1, 2))
def test_terms_grow_with_the_weight(values: list[float], weight: float) -> None:
    single = combined(signal_values(ProbeSignal("one", mode="reward", weight=1.0), values)).terms
    np.testing.assert_allclose(combined(signal_values(ProbeSignal("one", mode="reward", weight=weight), values)).terms, weight * single)


@pytest.mark.parametrize("values", [[], [math.nan], [1.0, 2.0]])
def test_metrics_have_the_same_keys_whatever_happens(values: list[float]) -> None:
    expected = set(substitute([PENALTY, SCREEN_TOO], 0.0, [], None).metrics)
    assert set(combined(signal_values(PENALTY, values), signal_values(SCREEN_TOO, values), groups=[1] * len(values)).metrics) == expected


SCREEN_TOO = ProbeSignal("mood", threshold=1.0, mode="screen")
