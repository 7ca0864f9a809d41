"""Which rollouts are labelled, and with which probability."""

from __future__ import annotations

import numpy as np
import pytest

from probescore_audit import Stratum, plan_labels, strata

PROMPTS = np.repeat(np.arange(8), [4, 4, 4, 4, 8, 8, 2, 6])
SCORES = np.random.default_rng(0).standard_normal(len(PROMPTS))
THRESHOLD = 1.0


def test_strata_are_the_flagged_the_highest_tenth_of_the_rest_and_the_rest():
    found = strata([3.0, 0.5, 0.9, *np.linspace(-2, 0, 19)], 1.0)
    assert found.tolist() == [Stratum.FLAGGED, Stratum.NEAR, Stratum.NEAR] + [Stratum.REST] * 18 + [Stratum.NEAR]


def test_each_rollout_is_chosen_as_often_as_is_said():
    draws = 4000
    chosen, said = np.zeros(len(SCORES)), np.full(len(SCORES), np.nan)
    for seed in range(draws):
        plan = plan_labels(SCORES, PROMPTS, THRESHOLD, 8, rng=np.random.default_rng(seed))
        chosen[plan.rollouts] += 1
        said[plan.rollouts] = plan.inclusion
    assert not np.isnan(said).any()  # every rollout can be chosen
    assert np.abs(chosen / draws - said).max() < 4 * 0.5 / np.sqrt(draws)


def test_floor_labels_are_of_different_prompts():
    for seed in range(50):
        plan = plan_labels(SCORES, PROMPTS, THRESHOLD, 12, rng=np.random.default_rng(seed))
        floor = PROMPTS[plan.rollouts[plan.floor]]
        assert len(np.unique(floor)) == len(floor) == 6


def test_a_step_with_fewer_prompts_or_flagged_rollouts_gets_fewer_labels():
    plan = plan_labels([0.0, 0.1, 0.2, 0.3], [7, 7, 7, 7], THRESHOLD, 100, rng=np.random.default_rng(0))
    assert plan.floor.sum() == 1
    assert not (plan.stratum == Stratum.FLAGGED).any()


@pytest.mark.parametrize(
    ("scores", "prompts", "labels", "complaint"),
    [
        ([np.nan, 1.0], [0, 1], 8, "scores: .* finite"),
        ([], [], 8, "scores"),
        ([1.0, 2.0], [0], 8, "prompts: 1 for 2 scores"),
        ([1.0, 2.0], [0, 1], 3, "labels: 3 a step; give at least 4"),
    ],
)
def test_bad_arguments_are_named(scores, prompts, labels, complaint):
    with pytest.raises(ValueError, match=complaint):
        plan_labels(scores, prompts, THRESHOLD, labels, rng=np.random.default_rng(0))
