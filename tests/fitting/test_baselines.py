"""Baselines find what gives a label away without a probe, and nothing where nothing does."""

from __future__ import annotations

import numpy as np
import pytest

from probescore_probes.fitting.baselines import bag_of_words, oriented, paired_accuracy, random_directions, shuffled_labels
from probescore_probes.fitting.cross_validation import Candidate, Labels
from probescore_probes.fitting.judgement import LEAK, SHUFFLED

SUBJECTS = 240


def told(answers, positive, groups):
    ids = [np.array([5, 100 + answer], np.int32) for answer in answers]
    return bag_of_words(ids, Labels(np.array(positive), np.array(groups), np.ones(len(ids))))


def test_false_answers_drawn_at_random_leak_the_label():
    random = np.random.default_rng(0)
    chances = 1 / np.arange(1, 41)
    true = random.choice(40, SUBJECTS, p=chances / chances.sum())  # common answers are mostly true
    false = random.integers(0, 40, SUBJECTS)
    found = told([*true, *false], [False] * SUBJECTS + [True] * SUBJECTS, [*range(SUBJECTS)] * 2)
    assert found.value > 0.5 + LEAK


def test_a_derangement_grouped_by_subject_leaks_the_label_inverted():
    values = np.arange(SUBJECTS)
    found = told([*values, *np.roll(values, 1)], [False] * SUBJECTS + [True] * SUBJECTS, [*range(SUBJECTS)] * 2)
    assert found.value < 0.5 - LEAK
    assert found.value < 0.15


def test_pairs_that_swap_answers_and_are_one_group_leak_nothing():
    values = np.arange(SUBJECTS)
    pairs = [*(values // 2)] * 2
    found = told([*values, *(values ^ 1)], [False] * SUBJECTS + [True] * SUBJECTS, pairs)
    assert abs(found.value - 0.5) <= 0.02


def test_a_number_is_turned_the_way_that_is_better_on_what_is_fitted():
    positive = np.arange(80) % 2 == 0
    labels = Labels(positive, np.arange(80), np.ones(80))
    numbers = -1.0 * positive + np.random.default_rng(0).standard_normal(80) * 0.1
    numbers[3] = np.nan
    assert oriented(numbers, labels, np.arange(40), np.arange(40, 80)).value == 1


def test_a_random_direction_finds_a_difference_that_is_everywhere_and_none_in_noise():
    random = np.random.default_rng(0)
    positive = np.arange(400) % 2 == 0
    labels = Labels(positive, np.arange(400), np.ones(400))
    noise = random.standard_normal((400, 16)).astype(np.float32)
    fitted, tested = np.arange(200), np.arange(200, 400)
    assert random_directions(noise + 2 * positive[:, None], labels, fitted, tested).value > 0.9
    assert random_directions(noise, labels, fitted, tested).contains(0.5)


def test_shuffled_labels_are_at_chance_though_the_true_ones_are_not():
    random = np.random.default_rng(0)
    positive = np.arange(200) % 2 == 0
    rows = (random.standard_normal((200, 8)) + 3 * positive[:, None]).astype(np.float32)
    labels = Labels(positive, np.arange(200), np.ones(200))
    found = shuffled_labels(rows, labels, Candidate("t", "mean"), "logistic")
    assert abs(found.value - 0.5) <= SHUFFLED  # a little below: what is held out lacks what was fitted on


@pytest.mark.parametrize(("right", "expected"), [(40, 1.0), (20, 0.5), (0, 1.0)])
def test_the_models_own_accuracy_is_over_pairs_of_one_prompt(right, expected):
    class Rollout:
        def __init__(self, prompt, positive):
            self.prompt_ids, self.positive = np.array([prompt]), positive

    examples = [Rollout(prompt, positive) for prompt in range(40) for positive in (False, True)]
    surprise = np.array([float((prompt < right) == positive) for prompt in range(40) for positive in (False, True)])
    assert paired_accuracy(surprise, examples) == (expected, 40)
