"""How well a probe does, all together and by slice, against counting by hand and against draws whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from probescore_audit import evaluate, evaluate_auroc, grouped_auroc, grouped_rate


def test_all_rollouts_first_then_each_slice_with_its_counts():
    scores, positive = np.array([0, 1, 2, 3, 4, 5.0]), np.array([0, 0, 1, 0, 1, 1], bool)
    slices = ["b", "b", "b", "a", "a", ""]

    pooled, a, b = evaluate(scores, positive, np.arange(6), slices=slices, thresholds=[2.0, 4.5])

    assert (pooled.slice, pooled.positives, pooled.negatives, pooled.groups) == ("", 3, 3, 6)
    assert [(each.slice, each.positives, each.negatives) for each in (a, b)] == [("a", 1, 1), ("b", 1, 2)]
    assert pooled.auroc.value == pytest.approx(8 / 9)
    assert [(each.recall.value, each.false_positives.value) for each in pooled.thresholds] == [(1.0, 1 / 3), (1 / 3, 0.0)]
    assert a.thresholds[0].false_positives.value == 1


def test_rollouts_that_stand_alone_have_the_intervals_of_newcombe_and_of_clopper_and_pearson():
    random = np.random.default_rng(0)
    scores, positive = random.standard_normal(100), np.arange(100) < 50
    (found,) = evaluate(scores, positive, np.arange(100), thresholds=[np.sort(scores[50:])[-5]])
    newcombe = evaluate_auroc(scores[positive], scores[~positive], dataset="made")
    assert (found.auroc.value, found.auroc.low, found.auroc.high) == (newcombe.value, newcombe.low, newcombe.high)
    # five of fifty, as tabulated
    flagged = found.thresholds[0].false_positives
    assert (flagged.value, flagged.low, flagged.high) == pytest.approx((0.1, 0.0333, 0.2181), abs=5e-5)


def test_rollouts_in_groups_have_the_intervals_that_draw_groups():
    random = np.random.default_rng(0)
    scores, positive, groups = random.standard_normal(100), np.arange(100) % 2 == 0, np.arange(100) // 10
    (found,) = evaluate(scores, positive, groups, thresholds=[1.0])
    assert found.auroc == grouped_auroc(scores, positive, groups)
    assert found.thresholds[0].recall == grouped_rate(scores[positive] >= 1, groups[positive])


def test_a_slice_without_a_class_is_unknown_and_not_zero():
    (_, only) = evaluate([1.0, 2.0, 3.0], [True, True, False], [0, 1, 2], slices=["x", "x", ""], thresholds=[0.0])
    assert np.isnan(only.auroc.value)
    assert np.isnan(only.thresholds[0].false_positives.value)
    assert only.thresholds[0].recall.value == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": [1.0, np.nan]}, "scores: 1 of 2 are not finite"),
        ({"groups": [1]}, "groups: 1 for 2 scores"),
        ({"positive": [True]}, "positive: 1 for 2 scores"),
        ({"slices": ["a"]}, "slices: 1 for 2 scores"),
        ({"scores": [], "positive": [], "groups": []}, "no rollouts to judge by"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, message):
    given = {"scores": [1.0, 2.0], "positive": [True, False], "groups": [0, 1]} | change
    with pytest.raises(ValueError, match=message):
        evaluate(**given)
