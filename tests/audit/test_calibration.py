"""Thresholds and AUROC: what they claim holds, and what the data cannot support is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from probescore_audit import calibrate, evaluate_auroc

scores = st.lists(st.floats(-100, 100, width=32), min_size=20, max_size=60)


@given(scores, st.sampled_from([0.05, 0.1, 0.25, 0.5]))
def test_no_more_negatives_are_flagged_than_the_rate_allows(negatives, rate):
    record = calibrate(negatives, false_positive_rate=rate, dataset="negatives")

    flagged = np.mean(np.array(negatives) >= record.threshold)
    assert flagged == record.false_positive_rate <= rate
    assert record.false_positive_rate_low <= record.false_positive_rate <= record.false_positive_rate_high
    assert record.negatives == len(negatives)


def test_the_threshold_is_the_lowest_that_keeps_the_rate():
    record = calibrate(np.arange(100), false_positive_rate=0.05, dataset="negatives")

    assert record.threshold == 94.5
    assert record.false_positive_rate == 0.05


def test_the_interval_is_that_of_clopper_and_pearson():
    # Five of a hundred: tabulated in many places as (1.64%, 11.28%).
    record = calibrate(np.arange(100), false_positive_rate=0.05, dataset="negatives")

    assert record.false_positive_rate_low == pytest.approx(0.0164, abs=5e-5)
    assert record.false_positive_rate_high == pytest.approx(0.1128, abs=5e-5)


def test_negatives_that_all_score_the_same_are_not_flagged():
    record = calibrate([2.0] * 50, false_positive_rate=0.1, dataset="negatives")

    assert record.threshold > 2.0
    assert record.false_positive_rate == 0


def test_too_few_negatives_cannot_support_a_rate():
    with pytest.raises(ValueError, match=r"99 negatives cannot support a false-positive rate of 0\.01; it takes at least 100"):
        calibrate(np.arange(99), false_positive_rate=0.01, dataset="negatives")
    assert calibrate(np.arange(100), false_positive_rate=0.01, dataset="negatives").false_positive_rate == 0.01


@pytest.mark.parametrize("rate", [0, 1, -0.1, float("nan")])
def test_a_rate_outside_its_range_is_an_error(rate):
    with pytest.raises(ValueError, match="false_positive_rate must be in"):
        calibrate(np.arange(100), false_positive_rate=rate, dataset="negatives")


def test_a_score_that_is_absent_is_not_taken_for_a_number():
    with pytest.raises(ValueError, match="negatives: 1 of 3 scores are not finite"):
        calibrate([1.0, np.nan, 2.0], false_positive_rate=0.5, dataset="negatives")
    with pytest.raises(ValueError, match="positives: no scores"):
        evaluate_auroc([], [1.0], dataset="held out")


@given(scores, scores)
def test_auroc_is_scikit_learns_and_lies_in_its_interval(positives, negatives):
    evaluation = evaluate_auroc(positives, negatives, dataset="held out")

    expected = roc_auc_score([1] * len(positives) + [0] * len(negatives), positives + negatives)
    assert evaluation.value == pytest.approx(expected, abs=1e-12)
    assert 0 <= evaluation.low <= evaluation.value <= evaluation.high <= 1
    assert evaluation.low < evaluation.high


def test_a_perfect_auroc_is_not_taken_for_certain():
    few = evaluate_auroc([2.0] * 5, [1.0] * 5, dataset="held out")
    many = evaluate_auroc([2.0] * 500, [1.0] * 500, dataset="held out")

    assert (few.value, few.high) == (1, 1)
    assert few.low < 0.8
    assert 0.98 < many.low < 1


def test_swapping_the_classes_mirrors_the_interval():
    random = np.random.default_rng(0)
    a, b = random.normal(1, 1, 40), random.normal(0, 1, 70)

    one, other = evaluate_auroc(a, b, dataset="x"), evaluate_auroc(b, a, dataset="x")

    assert one.low == pytest.approx(1 - other.high)
    assert one.high == pytest.approx(1 - other.low)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    # Two normal classes one standard deviation apart: the true value is Φ(1/√2).
    random, truth, covered = np.random.default_rng(1), 0.7602, 0
    for _ in range(400):
        evaluation = evaluate_auroc(random.normal(1, 1, 30), random.normal(0, 1, 60), dataset="x")
        covered += evaluation.low <= truth <= evaluation.high
    assert 0.92 <= covered / 400 <= 0.98
