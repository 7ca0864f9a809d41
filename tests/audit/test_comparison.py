"""Two probes on the same rollouts: what is paired is narrower, and holds for draws whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from probescore_audit import compare


def made(random, count, per_group, noise):
    """Two probes of equal worth that read one signal, each with noise of its own."""
    positive = np.arange(count * per_group) % 2 == 0
    signal = positive + np.repeat(random.standard_normal(count), per_group) + random.standard_normal(count * per_group)
    first, second = (signal + noise * random.standard_normal(len(signal)) for _ in range(2))
    return first, second, positive, np.repeat(np.arange(count), per_group)


@pytest.mark.parametrize(("count", "per_group"), [(200, 1), (60, 5)])
def test_the_interval_holds_where_both_are_worth_the_same(count, per_group):
    found = [compare(*made(np.random.default_rng(1000 + seed), count, per_group, 0.5)).difference for seed in range(60)]
    assert sum(each.contains(0) for each in found) >= 54


def test_a_better_probe_is_told_by_pairing_where_the_two_intervals_overlap():
    positive, shared = np.arange(300) % 2 == 0, np.random.default_rng(1).standard_normal(300)
    found = compare(positive + shared, 0.7 * positive + shared, positive, np.arange(300))
    assert found.first.overlaps(found.second)
    assert found.difference.low > 0


def test_a_probe_beside_itself_differs_by_nothing():
    first, _, positive, groups = made(np.random.default_rng(0), 50, 2, 0.5)
    found = compare(first, 3 * first - 1, positive, groups, thresholds=(1.0, 2.0))
    assert (found.difference.value, found.difference.low, found.difference.high) == (0, 0, 0)
    assert (found.pearson, found.spearman) == (pytest.approx(1), pytest.approx(1))
    assert found.positives.agreed == found.negatives.agreed == 1
    assert not found.rank_gaps.any()


def test_two_that_separate_the_classes_may_still_differ():
    positive = np.arange(40) >= 20
    random = np.random.default_rng(0)
    first, second = (positive * 10 + random.random(40) for _ in range(2))
    found = compare(first, second, positive, np.arange(40))
    assert found.difference.value == 0
    assert found.difference.low < -0.02
    assert found.difference.high > 0.02


def test_flags_and_gaps_are_counted_by_class():
    first, second = np.array([0, 1, 2, 3.0]), np.array([3, 1, 2, 0.0])
    found = compare(first, second, [False, False, True, True], [0, 1, 2, 3], thresholds=(2.0, 2.0))
    assert (found.positives.both, found.positives.only_first, found.positives.only_second, found.positives.neither) == (1, 1, 0, 0)
    assert (found.negatives.both, found.negatives.only_first, found.negatives.only_second, found.negatives.neither) == (0, 0, 1, 1)
    assert found.rank_gaps.tolist() == [-0.75, 0, 0, 0.75]
    assert found.positives.agreed == 0.5


def test_a_constant_probe_correlates_with_nothing():
    found = compare([1.0, 2, 3, 4], [5.0, 5, 5, 5], [False, True, False, True], [0, 1, 2, 3])
    assert np.isnan(found.pearson)
    assert found.second.value == 0.5
    assert found.positives is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"second": [1.0]}, "second: 1 for 2 rollouts"),
        ({"first": [np.inf, 1.0]}, "first: 1 of 2 scores are not finite"),
        ({"positive": [True, True]}, "positive: 2 of 2 rollouts"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, message):
    given = {"first": [1.0, 2.0], "second": [1.0, 2.0], "positive": [True, False], "groups": [0, 1]} | change
    with pytest.raises(ValueError, match=message):
        compare(**given)
