"""The choice of a layer is judged by what it did not see."""

from __future__ import annotations

import numpy as np
import pytest
from drawn_activations import Source, estimate_and_truth

from probescore_audit import auroc
from probescore_probes.fitting import cross_validation
from probescore_probes.fitting.cross_validation import Features, Labels, learning_curve, nested, select
from probescore_probes.fitting.linear_kinds import DIFFERENCE_OF_MEANS, LDA, LOGISTIC, fit_linear, fit_logistic

WIDTH = 6


def drawn(count, seed, *, layers=(0.6, 1.3), noise_between=0.5):
    """Layers that share much of their noise, as residual streams do; a plateau after a rise."""
    random = np.random.default_rng(seed)
    positive = np.arange(count) % 2 == 0
    shared = random.standard_normal((count, WIDTH))
    features = {}
    for layer, signal in enumerate(layers):
        rows = np.sqrt(1 - noise_between) * shared + np.sqrt(noise_between) * random.standard_normal((count, WIDTH))
        rows[:, 0] += signal * positive
        features[f"resid_post.{layer}", "mean"] = rows.astype(np.float32)
    return features, Labels(positive, np.arange(count), np.ones(count))


def truth(features, labels, seed):
    chosen = select(features, labels, seed=seed).chosen
    probe = fit_linear(LOGISTIC, features[chosen.tap, chosen.pool], labels.positive, labels.weights, chosen.strength)
    fresh, of_fresh = drawn(4000, 10_000 + seed)
    return auroc(probe.score(fresh[chosen.tap, chosen.pool]), of_fresh.positive)


def test_of_40_examples_the_nested_estimate_covers_the_truth_in_90_of_100_draws():
    covered = 0
    for seed in range(100):
        features, labels = drawn(40, seed)
        covered += nested(features, labels, seed=seed, inner=2).estimate.contains(truth(features, labels, seed))
    print(f"covered in {covered} of 100 draws")
    assert covered >= 90


SOURCES = {
    "labels that nothing tells": Source(0.0),
    "a weak signal": Source(1.3),
    "a strong signal": Source(2.5),
    "labels that nothing tells, in groups": Source(0.0, per_group=4),
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_the_nested_estimate_among_twelve_layers_covers_the_truth_in_90_of_100_draws(source, monkeypatch):
    monkeypatch.setattr(cross_validation, "REPEATS", 1)  # the harder case: a mean of several varies less
    covered = 0
    for seed in range(100):
        found, truth = estimate_and_truth(source, 40, seed, DIFFERENCE_OF_MEANS)
        covered += found.estimate.contains(truth)
    print(f"covered in {covered} of 100 draws")
    assert covered >= 90


def test_more_groups_of_noise_do_not_make_the_interval_too_narrow():
    # One run of cross-validation, whose variance here is twice that of independent examples
    covered = sum(estimate_and_truth(Source(0.0), 120, seed, DIFFERENCE_OF_MEANS)[0].estimate.contains(0.5) for seed in range(100))
    assert covered >= 90


def test_among_many_layers_of_noise_the_nested_estimate_stays_at_chance():
    random = np.random.default_rng(0)
    labels = Labels(np.arange(40) % 2 == 0, np.arange(40), np.ones(40))
    features = {(f"resid_post.{layer}", "mean"): random.standard_normal((40, WIDTH)).astype(np.float32) for layer in range(20)}
    best = max(point.mean for point in select(features, labels).curve)
    found = nested(features, labels, inner=3).estimate
    assert best > 0.65  # what choosing by it would report
    assert found.contains(0.5)
    assert found.value < best - 0.05


def test_the_earliest_layer_within_one_standard_error_is_chosen():
    features, labels = drawn(400, 0, layers=(0.2, 1.5, 1.55, 1.5))
    found = select(features, labels)
    assert found.chosen.tap == "resid_post.1"
    assert [point.tap for point in found.curve] == [tap for tap, _ in features]


def test_rollouts_of_one_group_are_never_on_both_sides():
    # Each group has a noise of its own, which tells its label only to who has seen the group.
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(30), 8)
    labels = Labels(groups % 2 == 0, groups, np.ones(len(groups)))
    features = {
        ("resid_post.0", "mean"): (random.standard_normal((30, 64))[groups] + 0.05 * random.standard_normal((240, 64))).astype(np.float32)
    }
    assert nested(features, labels).estimate.contains(0.5)
    alone = Labels(labels.positive, np.arange(len(groups)), labels.weights)
    assert nested(features, alone).estimate.low > 0.9


@pytest.mark.parametrize("kind", [LOGISTIC, DIFFERENCE_OF_MEANS, LDA])
def test_every_linear_kind_finds_a_difference_on_unscaled_activations(kind):
    random = np.random.default_rng(0)
    positive = np.arange(600) % 2 == 0
    rows = random.standard_normal((600, WIDTH)) + 1.5 * positive[:, None] * np.eye(WIDTH)[2]
    rows = (rows + 7) * 30
    probe = fit_linear(kind, rows[:300], positive[:300], np.ones(300), 1e-1)
    assert auroc(probe.score(rows[300:]), positive[300:]) > 0.8
    # the scaler is folded in: the score of a mean of rows is the mean of their scores
    assert probe.score(rows[:4].mean(axis=0, keepdims=True))[0] == pytest.approx(probe.score(rows[:4]).mean())


def test_a_discriminant_keeps_up_with_logistic_regression_on_activations_of_few_large_directions():
    # as a language model's are: most of the variance is in a few directions, and what tells the classes apart is in the many others
    width, random = 192, np.random.default_rng(0)
    directions = np.linalg.qr(random.standard_normal((width, width)))[0]
    scales = np.where(np.arange(width) < 4, 8.0, 1.0)
    apart = 3.0 * directions[10:40].sum(axis=0) / np.sqrt(30)

    def draw(count: int) -> tuple[Features, Labels]:
        positive = np.arange(count) % 2 == 0
        rows = (random.standard_normal((count, width)) * scales) @ directions + np.where(positive[:, None], apart, -apart) / 2
        return {("resid_post.0", "mean"): rows.astype(np.float32)}, Labels(positive, np.arange(count), np.ones(count))

    features, labels = draw(300)
    fresh, of_fresh = draw(4000)
    found = {}
    for kind in (LOGISTIC, LDA):
        chosen = select(features, labels, kind=kind).chosen
        probe = fit_linear(kind, features["resid_post.0", "mean"], labels.positive, labels.weights, chosen.strength)
        found[kind] = auroc(probe.score(fresh["resid_post.0", "mean"]), of_fresh.positive)
    assert found[LDA] > found[LOGISTIC] - 0.01, found


def test_a_weight_counts_as_so_many_copies():
    features, labels = drawn(60, 0)
    rows, weights = features["resid_post.1", "mean"], np.tile([1.0, 1.0, 3.0], 20)
    times = weights.astype(int)
    weighted = fit_logistic(rows, labels.positive, weights, (0.1,), tolerance=1e-8)[0]
    copied = fit_logistic(np.repeat(rows, times, axis=0), np.repeat(labels.positive, times), np.ones(times.sum()), (0.1,), tolerance=1e-8)[
        0
    ]
    np.testing.assert_allclose(weighted.weight, copied.weight, atol=1e-5)


def test_a_learning_curve_rises():
    features, labels = drawn(400, 0)
    points = learning_curve(features["resid_post.1", "mean"], labels, select(features, labels).chosen, LOGISTIC)
    assert [groups for groups, _ in points] == sorted(groups for groups, _ in points)
    assert points[-1][1].value > points[0][1].value
