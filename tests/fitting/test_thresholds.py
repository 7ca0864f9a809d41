"""A fitted probe's threshold holds for fresh negatives as often as its interval says, and is left out where nothing can be said."""

from __future__ import annotations

import numpy as np
import pytest
from drawn_negatives import calibration_data, example, grouped_scores

from probescore_probes.fitting.options import FitOptions
from probescore_probes.fitting.thresholds import recorded, thresholds_of

NEGATIVES = 5_000
SEEDS = 20
FEWEST_THAT_HOLD = 17


def found(data, scores, rate=0.01):
    return thresholds_of(data, scores, FitOptions(name="made", false_positive_rate=rate), "mean")


@pytest.mark.parametrize(("per_prompt", "of_prompt"), [(1, 0.0), (10, 0.3), (10, 0.95), (25, 0.7)])
def test_of_5000_grouped_negatives_the_interval_holds_for_fresh_ones_in_17_of_20_seeds(per_prompt, of_prompt):
    prompts = NEGATIVES // per_prompt
    data = calibration_data(np.repeat(np.arange(prompts), per_prompt))
    held = 0
    for seed in range(SEEDS):
        random = np.random.default_rng(seed)
        threshold = found(data, grouped_scores(random, prompts, per_prompt, of_prompt))[""]
        fresh = grouped_scores(random, prompts, per_prompt, of_prompt)
        held += threshold.false_positive_rate_low <= np.mean(fresh >= threshold.threshold) <= threshold.false_positive_rate_high
    print(f"held in {held} of {SEEDS} seeds")
    assert held >= FEWEST_THAT_HOLD


def test_too_few_negatives_or_groups_give_no_threshold():
    scores = np.random.default_rng(0).standard_normal(100)
    assert set(found(calibration_data(np.arange(100)), scores)) == {""}
    assert found(calibration_data(np.arange(99)), scores[:99]) == {}
    assert found(calibration_data(np.zeros(100, np.int64)), scores) == {}
    # a slice that is one problem has none, and the others keep theirs
    slices = [example(slice="one problem" if index < 50 else "many") for index in range(100)]
    groups = np.where(np.arange(100) < 50, 0, np.arange(100))
    assert set(found(calibration_data(groups, slices), scores, rate=0.1)) == {"", "many"}


def test_the_record_says_what_the_negatives_were_like_and_nothing_of_the_positives():
    longer = np.array([1, 5, 6, 7], np.int32)
    examples = [example(), example(prompt=longer, form="text"), example(positive=True, prompt=np.arange(50, dtype=np.int32), form="chat")]
    data = calibration_data(np.arange(3).repeat(40), [each for each in examples for _ in range(40)])
    threshold = found(data, np.random.default_rng(0).standard_normal(120), rate=0.1)[""]
    record = recorded(threshold, data, "bfloat16")
    assert (record.threshold, record.negatives) == (threshold.threshold, 80)
    conditions = record.conditions
    assert (conditions.groups, conditions.dtype, conditions.prompt_forms) == (2, "bfloat16", ("ids", "text"))
    assert (conditions.shortest_prompt, conditions.longest_prompt) == (2, 4)
    assert (conditions.shortest_completion, conditions.longest_completion) == (3, 3)
    assert conditions.dataset_sha256 == data.digest
