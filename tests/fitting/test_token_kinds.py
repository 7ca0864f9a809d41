"""Attention and rolling means over many rollouts at once, against a formula of each rollout alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from probescore_probes.fitting.linear_kinds import Scaler
from probescore_probes.fitting.pooling_kinds import means_of
from probescore_probes.fitting.token_kinds import (
    ATTENTION,
    ROLLING_MAX,
    WINDOW,
    AttentionPool,
    RollingMax,
    check_bytes,
    fit_tokens,
    score_tokens,
)

WIDTH = 5


def softmax(x):
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def rollouts(seed=0):
    random = np.random.default_rng(seed)
    return [random.standard_normal((length, WIDTH)).astype(np.float32) * 3 + 1 for length in (3, 25, 1, 11, WINDOW)]


def made(kind):
    torch.manual_seed(0)
    module = kind(Scaler(np.full(WIDTH, 0.7), np.linspace(0.5, 2, WIDTH)))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module.eval()


def attention_and_values(module, rows):
    scaled = (rows - 0.7) / np.linspace(0.5, 2, WIDTH)
    return (scaled @ layer.weight.detach().numpy()[0] + layer.bias.item() for layer in (module.attend, module.value))


def test_attention_is_a_softmax_over_each_rollouts_own_tokens():
    module = made(AttentionPool)
    expected = []
    for rows in rollouts():
        attention, values = attention_and_values(module, rows)
        expected.append(softmax(attention) @ values)
    np.testing.assert_allclose(score_tokens(module, rollouts()), expected, rtol=1e-4, atol=1e-5)


def test_a_rolling_maximum_is_that_of_windows_within_each_rollout():
    module = made(RollingMax)
    expected = []
    for rows in rollouts():
        attention, values = attention_and_values(module, rows)
        windows = [slice(max(0, end - WINDOW), end) for end in range(1, len(rows) + 1)]
        expected.append(max(softmax(attention[window]) @ values[window] for window in windows))
    np.testing.assert_allclose(score_tokens(module, rollouts()), expected, rtol=1e-4, atol=1e-5)


def test_means_are_those_of_each_rollout():
    rows = rollouts()
    found = means_of(torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.cumsum([0, *map(len, rows)])))
    np.testing.assert_allclose(found.numpy(), [each.mean(axis=0) for each in rows], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [ATTENTION, ROLLING_MAX])
def test_one_telling_token_among_many_is_found(kind):
    random = np.random.default_rng(0)
    positive = np.arange(200) % 2 == 0
    rows = [random.standard_normal((30, WIDTH)).astype(np.float32) for _ in positive]
    for each, telling in zip(rows, positive, strict=True):
        if telling:
            each[random.integers(30)] += 6 * np.eye(WIDTH, dtype=np.float32)[1]
    module = fit_tokens(kind, rows[:150], positive[:150], np.ones(150))
    scores = score_tokens(module, rows[150:])
    assert scores[positive[150:]].mean() > scores[~positive[150:]].mean() + 1


def test_more_tokens_than_fit_are_refused_before_they_are_read():
    check_bytes(1_000_000, 1, 576)
    with pytest.raises(ValueError, match=r"kind: 1,000,000 tokens × 4096 numbers take 16.4 GB, .* a kind that is fitted on means"):
        check_bytes(1_000_000, 1, 4096)
    with pytest.raises(ValueError, match=r"kind: 1,000,000 tokens × 6 taps × 576 numbers take 13.8 GB, .* fewer taps"):
        check_bytes(1_000_000, 6, 576)
