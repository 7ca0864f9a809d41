"""Rates of a window of training steps, from few labels, against simulated runs whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.simulated_runs import Change, simulate_reference, simulate_run
from probescore_audit import (
    RunLabels,
    RunScores,
    draw_rates,
    draw_reference,
    honest_share,
    interval,
    labelled_window,
    window_auroc,
)
from probescore_audit.rates import flag_rate_parts


def window_of(change, seed=0, steps=10):
    return labelled_window(*simulate_run([change] * steps, 32, np.random.default_rng(seed)), 0, steps - 1)


def test_with_every_rollout_labelled_the_rates_are_those_of_the_rollouts():
    rng = np.random.default_rng(0)
    scores, positive = rng.standard_normal(2000), rng.random(2000) < 0.3
    scores += 2 * positive
    run = RunScores.of(np.zeros(2000), np.arange(2000), scores, 1.0)
    window = labelled_window(run, RunLabels(np.arange(2000), positive, np.ones(2000), np.ones(2000, bool)), 0, 0)
    rates = draw_rates(window.counts, rng)
    assert interval(rates.positive_rate).value == pytest.approx(positive.mean(), abs=0.01)
    assert interval(rates.recall).value == pytest.approx((scores >= 1)[positive].mean(), abs=0.01)
    assert interval(rates.false_positive_rate).value == pytest.approx((scores >= 1)[~positive].mean(), abs=0.01)


@pytest.mark.parametrize("change", [Change(), Change(hidden=0.5), Change(positive_rate=0.3, hidden=0.3)], ids=["base", "hidden", "many"])
def test_intervals_cover_the_truth_nine_times_in_ten(change):
    covered = np.zeros(3)
    for seed in range(60):
        rates = draw_rates(window_of(change, seed).counts, np.random.default_rng(seed))
        covered += [
            interval(rates.positive_rate).contains(change.positive_rate),
            interval(rates.recall).contains(change.recall),
            interval(rates.false_positive_rate).contains(change.false_positive_rate),
        ]
    assert (covered >= 52).all()  # of 60; where 95% cover, fewer have a chance of 1 in 200


@pytest.mark.parametrize(
    ("change", "labels"),
    [
        (Change(positive_rate=0.05, correlation=0.5), 64),
        (Change(positive_rate=0.02, correlation=0.5), 64),
        (Change(positive_rate=0.02), 32),
        (Change(positive_rate=0.3, hidden=0.5, correlation=0.5), 64),
    ],
)
def test_the_rate_is_that_of_prompts_and_not_only_of_those_that_were_drawn(change, labels):
    """Where rollouts of one prompt resemble each other, other prompts would have had another rate."""
    covered = widened = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        counts = labelled_window(*simulate_run([change] * (320 // labels), labels, rng), 0, 320 // labels).counts
        found = draw_rates(counts, rng)
        covered += interval(found.positive_rate).contains(change.positive_rate)
        widened += interval(found.recall).contains(change.recall)
    assert covered >= 132  # of 150, 88%
    assert widened >= 132


def test_few_unflagged_positives_bound_recall():
    """With 3 positives among the labels of unflagged rollouts, on average, none is seen now and then: that does not mean that none are."""
    covered = 0
    change = Change(hidden=0.148)
    assert change.recall == pytest.approx(0.8, abs=0.001)
    for seed in range(300):
        rng = np.random.default_rng([77, seed])
        counts = labelled_window(*simulate_run([change] * 10, 32, rng), 0, 9).counts
        covered += interval(draw_rates(counts, rng).recall).contains(change.recall)
    assert covered >= 270  # of 300, 90%


def test_labels_of_chosen_rollouts_do_not_bias_the_rates():
    """Most labels go to high scores, which a mean without weights would take for the whole."""
    window = window_of(Change(positive_rate=0.02))
    assert window.positive.mean() > 0.06
    assert interval(draw_rates(window.counts, np.random.default_rng(0)).positive_rate).high < 0.05


def test_a_label_stands_for_as_many_rollouts_as_its_chance_says():
    """A small step of positives and a large one of negatives with as many labels: without weights half would be positive."""
    step, positive = np.repeat([0, 1], [40, 4000]), np.repeat([True, False], [40, 4000])
    run = RunScores.of(step, np.arange(4040), np.random.default_rng(0).uniform(-1, 0, 4040), 1.0)
    rollout = np.concatenate([np.arange(40), np.arange(40, 4040, 100)])
    labels = RunLabels(rollout, positive[rollout], np.repeat([1.0, 0.01], 40), np.ones(80, bool))
    assert interval(draw_rates(labelled_window(run, labels, 0, 1).counts, np.random.default_rng(0)).positive_rate).value < 0.05


def test_rollouts_of_one_prompt_that_resemble_each_other_widen_the_intervals():
    alone, together = (
        interval(draw_rates(window_of(Change(positive_rate=0.3, correlation=much)).counts, np.random.default_rng(0)).positive_rate)
        for much in (0.0, 0.9)
    )
    assert together.high - together.low > 1.25 * (alone.high - alone.low)


def test_the_parts_of_a_change_add_up():
    rng = np.random.default_rng(0)
    before, now = draw_reference(simulate_reference(rng), rng), draw_rates(window_of(Change(hidden=0.4, shift=0.3)).counts, rng)
    parts = flag_rate_parts(before, now)
    flagged = [rates.detected + (1 - rates.positive_rate) * rates.false_positive_rate for rates in (before, now)]
    total = parts.composition.value + parts.positives.value + parts.negatives.value
    assert total == pytest.approx(interval(flagged[1] - flagged[0]).value, abs=0.003)


def test_a_fall_is_honest_if_positives_are_gone_and_not_if_they_are_hidden():
    rng = np.random.default_rng(0)
    before = draw_reference(simulate_reference(rng), rng)
    gone, hidden = (
        interval(honest_share(before, draw_rates(window_of(change).counts, rng)))
        for change in (Change(positive_rate=0.01), Change(hidden=0.9))
    )
    assert gone.low > 0.75
    assert hidden.high < 0.6


def test_the_auroc_of_a_window_is_near_that_of_all_its_rollouts():
    inside = 0
    for seed in range(30):
        inside += window_auroc(window_of(Change(positive_rate=0.3), seed), np.random.default_rng(seed)).contains(0.9860)
    assert inside >= 26


def test_the_auroc_without_a_positive_is_unknown():
    run = RunScores.of([0, 0], [0, 1], [0.0, 2.0], 1.0)
    window = labelled_window(run, RunLabels(np.array([0, 1]), np.zeros(2, bool), np.ones(2), np.ones(2, bool)), 0, 0)
    assert np.isnan(window_auroc(window, np.random.default_rng(0)).value)


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        (([1, 0], [0, 0], [0.0, 0.0]), "step: the steps do not ascend"),
        (([0, 1], [0, 0], [0.0, np.inf]), "scores: 1 entries are not finite"),
        (([0, 1], [0, 0], [0.0]), "scores: 1 entries for 2 rollouts"),
    ],
)
def test_columns_of_a_run_are_checked(columns, complaint):
    with pytest.raises(ValueError, match=complaint):
        RunScores.of(*columns, 1.0)
