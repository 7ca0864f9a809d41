"""Linear probes that are fitted through a reduction over tokens: the same numbers as the reduction that the engine computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from probescore import reduce_scores
from probescore_audit import auroc
from probescore_probes.fitting.smoothed_kinds import (
    EXPONENTIAL_SMOOTHING,
    SMOOTHED_KINDS,
    SMOOTHING,
    SOFTMAX_POOLING,
    _smoothed,
    fit_smoothed,
    reduction_of,
    score_smoothed,
)

WIDTH = 5


@pytest.mark.parametrize("kind", SMOOTHED_KINDS)
def test_what_is_fitted_through_is_what_is_served(kind):
    random = np.random.default_rng(0)
    rollouts = [random.standard_normal(length).astype(np.float32) * 3 + 1 for length in (1, 2, 9, 40, 700)]
    padded = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(rows) for rows in rollouts], batch_first=True, padding_value=100.0)
    found = _smoothed(kind, padded, torch.tensor([len(rows) for rows in rollouts]))
    expected = [reduce_scores(rows[:, None], reduction_of(kind))[0] for rows in rollouts]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_smoothing_is_the_recurrence_that_it_is_named_after():
    values, average, highest = np.random.default_rng(1).standard_normal(50), None, -np.inf
    for value in values:
        average = value if average is None else SMOOTHING * value + (1 - SMOOTHING) * average
        highest = max(highest, average)
    found = _smoothed(EXPONENTIAL_SMOOTHING, torch.tensor(values[None], dtype=torch.float32), torch.tensor([50]))
    assert found.item() == pytest.approx(highest, abs=1e-5)


@pytest.mark.parametrize("kind", SMOOTHED_KINDS)
def test_a_passage_in_a_long_rollout_is_found_that_its_mean_hides(kind):
    random = np.random.default_rng(0)
    positive = np.arange(200) % 2 == 0
    rows = [random.standard_normal((240, WIDTH)).astype(np.float32) for _ in positive]
    for each, telling in zip(rows, positive, strict=True):
        if telling:
            start = random.integers(230)
            each[start : start + 8, 1] += 2.5
    probe = fit_smoothed(kind, rows[:140], positive[:140], np.ones(140))
    found = auroc(score_smoothed(kind, probe, rows[140:]), positive[140:])
    hidden = auroc([each[:, 1].mean() for each in rows[140:]], positive[140:])
    assert found > max(0.85, hidden + 0.08)
    assert np.argmax(probe.weight) == 1


def test_softmax_pooling_is_between_the_mean_and_the_largest():
    values = np.random.default_rng(2).standard_normal((20, 1)).astype(np.float32)
    pooled = reduce_scores(values, reduction_of(SOFTMAX_POOLING))[0]
    assert values.mean() < pooled < values.max()
