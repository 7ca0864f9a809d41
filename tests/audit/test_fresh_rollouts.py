"""A threshold's prediction interval holds for fresh rollouts, also where those of one prompt resemble each other."""

from __future__ import annotations

import numpy as np
import pytest

from probescore_audit import calibrate, calibrate_for_fresh
from probescore_audit.fresh_rollouts import design_effect

NEGATIVES = 5_000
SEEDS = 20
FEWEST_THAT_HOLD = 17


def made(random, per_prompt, of_prompt, heavy):
    """Scores of 5,000 honest rollouts; ``of_prompt`` is the share of their variance that all rollouts of a prompt have in common."""
    prompts = NEGATIVES // per_prompt
    effect = random.standard_t(3, prompts) if heavy else random.standard_normal(prompts)
    own = random.standard_normal(prompts * per_prompt)
    return np.sqrt(of_prompt) * np.repeat(effect, per_prompt) + np.sqrt(1 - of_prompt) * own, np.repeat(np.arange(prompts), per_prompt)


def held(found, fresh):
    flagged = np.mean(fresh >= found.threshold)
    return found.false_positive_rate_low <= flagged <= found.false_positive_rate_high


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize(("per_prompt", "of_prompt"), [(1, 0.0), (4, 0.5), (10, 0.3), (10, 0.95), (25, 0.7)])
def test_the_interval_holds_for_fresh_rollouts_of_other_prompts(per_prompt, of_prompt, heavy):
    grouped = independent = 0
    for seed in range(SEEDS):
        random = np.random.default_rng(seed)
        negatives, prompts = made(random, per_prompt, of_prompt, heavy)
        fresh, _ = made(random, per_prompt, of_prompt, heavy)
        found = calibrate_for_fresh(negatives, prompts, false_positive_rate=0.01, dataset="made")
        assert found.threshold == calibrate(negatives, false_positive_rate=0.01, dataset="made").threshold
        grouped += held(found, fresh)
        independent += held(calibrate(negatives, false_positive_rate=0.01, dataset="made"), fresh)
    assert grouped >= FEWEST_THAT_HOLD
    if per_prompt >= 10:
        assert independent < FEWEST_THAT_HOLD  # the case is one that an interval without groups gets wrong


def test_the_design_effect_is_that_of_what_comes_in_groups():
    flags = np.repeat(np.arange(400) % 4 == 0, 5)
    assert design_effect(flags, np.repeat(np.arange(400), 5)) == pytest.approx(5, rel=0.01)
    assert design_effect(flags, np.arange(2000)) == pytest.approx(1, rel=0.01)
    assert design_effect(np.zeros(10, bool), np.arange(10)) == 1


@pytest.mark.parametrize(
    ("negatives", "groups", "message"),
    [
        (np.arange(99), np.arange(99), "99 negatives cannot support a false-positive rate of 0.01; it takes at least 100"),
        (np.arange(200), np.arange(199), "groups: 199 for 200 negatives"),
        (np.arange(200), np.zeros(200), "groups: all 200 negatives are of one group"),
    ],
)
def test_what_cannot_be_said_is_refused(negatives, groups, message):
    with pytest.raises(ValueError, match=message):
        calibrate_for_fresh(negatives, groups, false_positive_rate=0.01, dataset="made")


def test_negatives_that_all_score_the_same_keep_an_interval():
    found = calibrate_for_fresh([2.0] * 50, np.arange(50) // 5, false_positive_rate=0.1, dataset="made")
    assert found.false_positive_rate_low == found.false_positive_rate == 0
    assert 0 < found.false_positive_rate_high < 0.3
