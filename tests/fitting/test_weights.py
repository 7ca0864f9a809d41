"""A weight is how many times a rollout counts, in every kind of probe and in everything that judges one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from made_tables import TAPS, table_of

from probescore_audit import auroc
from probescore_probes.fitting import pooling_kinds, smoothed_kinds, token_kinds
from probescore_probes.fitting.baselines import bag_of_words, oriented, random_directions
from probescore_probes.fitting.cross_validation import Candidate, Labels, select
from probescore_probes.fitting.kinds import KINDS, fit_kind
from probescore_probes.fitting.labelled_rollouts import Example
from probescore_probes.fitting.linear_kinds import LINEAR_KINDS
from probescore_probes.fitting.robustness import measure

WIDTH = 6
AT = Candidate(TAPS[1], "mean")


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    for module in (token_kinds, smoothed_kinds, pooling_kinds):
        monkeypatch.setattr(module, "_STEPS", 60)


def rollouts(count: int):
    random = np.random.default_rng(0)
    signs = np.where(np.arange(count) % 2 == 0, 1.0, -1.0)
    shift = np.eye(WIDTH)[0] * 1.5
    return signs > 0, {tap: [(random.standard_normal((5, WIDTH)) + sign * shift).astype(np.float32) for sign in signs] for tap in TAPS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_probe_sides_with_the_labels_that_weigh_more(kind):
    # each rollout has both labels: what a probe learns is the heavier one
    side, tokens = rollouts(80)
    twice = {tap: [*rows, *rows] for tap, rows in tokens.items()}
    table = table_of(twice, WIDTH)
    table = replace(table, features={pool: np.concatenate([rows, -rows], axis=1) for pool, rows in table.features.items()})
    positive = np.concatenate([side, ~side])
    for heavy, low, high in ((0, 0.9, 1.0), (1, 0.0, 0.1)):
        weights = np.where(np.arange(160) // 80 == heavy, 9.0, 1.0)
        labels = Labels(positive, np.arange(160) % 80, weights)
        scores = fit_kind(kind, table, labels, np.arange(160), AT).score(np.arange(80))
        assert low <= auroc(scores, side) <= high


@pytest.mark.parametrize("kind", [*LINEAR_KINDS, "mlp", "mean-of-sigmoids", "sae-feature"])
def test_a_weight_of_two_is_the_rollout_twice(kind):
    random = np.random.default_rng(1)
    side, tokens = rollouts(60)
    positive = side ^ (random.random(60) < 0.2)
    table, labels = table_of(tokens, WIDTH), Labels(positive, np.arange(60), 1.0 + (np.arange(60) % 3 == 0))
    again = np.repeat(np.arange(60), labels.weights.astype(int))
    weighed = fit_kind(kind, table, labels, np.arange(60), AT).score(np.arange(60))
    repeated = fit_kind(kind, table, replace(labels, weights=np.ones(60)), again, AT).score(np.arange(60))
    np.testing.assert_allclose(weighed, repeated, atol=1e-4 * repeated.std())
    alike = fit_kind(kind, table, replace(labels, weights=np.ones(60)), np.arange(60), AT).score(np.arange(60))
    assert kind == "sae-feature" or np.abs(weighed - alike).max() > 1e-2 * alike.std()


def test_every_judge_counts_a_rollout_as_often_as_it_weighs():
    # half of the rollouts are told by the number, the others by its opposite
    side = np.arange(80) % 2 == 0
    numbers = np.where(side, 1.0, -1.0) * np.where(np.arange(80) < 40, 1, -1) + np.random.default_rng(0).standard_normal(80) * 0.01
    every = np.arange(80)
    told, groups = np.where(every < 40, 9.0, 1.0), every % 40
    for weights, high in ((told, True), (10 - told, False)):
        labels = Labels(side, groups, weights)
        rows = np.tile(numbers[:, None], 3).astype(np.float32)
        ids = [np.array([5 if number > 0 else 6], np.int32) for number in numbers]
        # the sign is found on all, so that the heavier half is told rightly
        assert oriented(numbers, labels, every, every).value == pytest.approx(0.9, abs=0.02)
        assert oriented(numbers, labels, every, every[:40]).value == (1.0 if high else 0.0)
        assert random_directions(rows, labels, every, every[:40]).value == (1.0 if high else 0.0)
        assert bag_of_words(ids, labels).value > 0.8
        curve = select({("t", "mean"): rows}, labels).curve
        assert curve[0].mean > 0.8
        examples = [_example(*each) for each in zip(side, weights, strict=True)]
        found = measure("as they are", numbers, examples, groups, 0.0, numbers)
        assert found.auroc.value == pytest.approx(0.9 if high else 0.1, abs=0.02)
        assert found.false_positives.value == pytest.approx(0.5)  # rates count each rollout once


def _example(positive: bool, weight: float) -> Example:
    ids = np.array([5], np.int32)
    return Example(ids, ids, None, None, bool(positive), "line", None, None, "", float(weight), "ids")
