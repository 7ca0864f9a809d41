"""Numbers on rollouts that come in groups, against counting by hand and against draws whose truth is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from probescore_audit import auroc, calibration_error, grouped_auroc, grouped_rate, roc_curve


def by_hand(scores, positive, weights):
    pairs = [
        (weights[i] * weights[j], 1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0)
        for i, j in itertools.product(np.flatnonzero(positive), np.flatnonzero(~positive))
    ]
    return sum(weight * wins for weight, wins in pairs) / sum(weight for weight, _ in pairs)


@pytest.mark.parametrize("seed", range(20))
def test_auroc_is_that_of_all_pairs(seed):
    random = np.random.default_rng(seed)
    scores = random.integers(0, 6, 30) * 0.5  # with ties
    positive, weights = random.random(30) < 0.4, random.integers(1, 4, 30).astype(float)
    positive[:2] = True, False
    assert auroc(scores, positive, weights) == pytest.approx(by_hand(scores, positive, weights))
    assert auroc(np.repeat(scores, weights.astype(int)), np.repeat(positive, weights.astype(int))) == pytest.approx(
        auroc(scores, positive, weights)
    )


def test_auroc_without_a_class_is_unknown():
    assert np.isnan(auroc([1.0, 2.0], [True, True]))
    assert np.isnan(grouped_auroc([1.0, 2.0], [True, True], [0, 1]).low)


def test_separated_classes_have_an_interval_with_a_width():
    found = grouped_auroc(np.arange(20.0), np.arange(20) >= 10, np.arange(20))
    assert found.value == 1
    assert 0.7 < found.low < 0.95


def test_rollouts_of_few_groups_say_less_than_as_many_independent_ones():
    random = np.random.default_rng(0)
    group = np.repeat(np.arange(20), 30)
    positive = np.repeat(np.arange(20) % 2 == 0, 30)
    scores = positive + np.repeat(random.standard_normal(20), 30) + 0.1 * random.standard_normal(600)
    grouped, alone = grouped_auroc(scores, positive, group), grouped_auroc(scores, positive, np.arange(600))
    assert grouped.high - grouped.low > 2.5 * (alone.high - alone.low)


def test_the_interval_of_a_rate_of_grouped_rollouts_covers_the_truth():
    covered = 0
    for seed in range(60):
        random = np.random.default_rng(seed)
        chance = random.beta(1, 9, 40)  # of each group; .1 on average
        flagged = random.random((40, 8)) < chance[:, None]
        covered += grouped_rate(flagged.ravel(), np.repeat(np.arange(40), 8)).contains(0.1)
    assert covered >= 55


def test_a_roc_curve_begins_with_none_flagged_and_ends_with_all():
    false, true = roc_curve([3.0, 1.0, 2.0, 2.0], [True, False, True, False])
    assert false.tolist() == [0, 0, 0.5, 1]
    assert true.tolist() == [0, 0.5, 1, 1]


def test_calibration_error_is_the_weighted_gap():
    error, bins = calibration_error([0.15, 0.15, 0.95, 0.95], [False, True, True, True])
    assert error == pytest.approx(0.5 * 0.35 + 0.5 * 0.05)
    assert [each.rollouts for each in bins] == [2, 2]
