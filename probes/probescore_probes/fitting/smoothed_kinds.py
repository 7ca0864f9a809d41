"""Fits linear probes of every token at several taps (places in the model), whose token scores the file's reduction turns into one score of
a rollout.

The direction is fitted through the reduction: for ``exponential-smoothing`` through the largest exponential moving average over the tokens,
for ``softmax-pooling`` through their softmax-weighted mean. The file names that reduction, and the engine computes it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from probescore import Reduction, ReductionKind, reduce_scores
from probescore.types import ScoreUnit
from probescore_probes.fitting.linear_kinds import Linear, Scaler

EXPONENTIAL_SMOOTHING, SOFTMAX_POOLING = SMOOTHED_KINDS = ("exponential-smoothing", "softmax-pooling")
SMOOTHING = 0.1
"""Weight of the newest token in the exponential moving average of token scores, which therefore covers about the last ten tokens."""
TEMPERATURE = 1.0
"""Temperature of the softmax that weighs the tokens' logits."""
_STEPS = 300
_BATCH = 64
_DECAY = 0.1
_FORGOTTEN = 1e-9
"""Weight in the moving average below which fitting leaves an old token out."""

Rows = Sequence[NDArray[np.float32]]


def reduction_of(kind: str) -> Reduction:
    """Returns the reduction (from token scores to one score of a rollout) through which a kind of probe is fitted and served."""
    if kind == EXPONENTIAL_SMOOTHING:
        return Reduction(ReductionKind.EMA_MAX, SMOOTHING)
    return Reduction(ReductionKind.SOFTMAX_MEAN, TEMPERATURE)


def fit_smoothed(kind: str, rows: Rows, positive: NDArray[np.bool_], weights: NDArray[np.float64], seed: int = 0) -> Linear:
    """Fits the direction of one of ``SMOOTHED_KINDS``, in batches of rollouts.

    Args:
        kind: the kind of probe.
        rows: activations of each rollout, ``(tokens, taps (places in the model) × width)``, with those of several taps side by side.
        positive: labels, ``(n,)`` bool, of both classes.
        weights: how many times each rollout counts, ``(n,)``.
        seed: seed of the batches.
    """
    random = np.random.default_rng(seed)
    scaler = Scaler.of_tokens(rows, weights)
    labels, counted = torch.from_numpy(positive.astype(np.float32)), torch.from_numpy((weights / weights.mean()).astype(np.float32))
    layer = nn.Linear(len(scaler.mean), 1)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    optimiser = torch.optim.AdamW(layer.parameters(), lr=3e-3, weight_decay=_DECAY)
    for _ in range(_STEPS):
        batch = random.permutation(len(rows))[:_BATCH]
        optimiser.zero_grad()
        lengths = [len(rows[index]) for index in batch]
        scaled = scaler.scaled(np.concatenate([rows[index] for index in batch])).astype(np.float32)
        values = layer(torch.from_numpy(scaled))[:, 0]
        scores = _smoothed(kind, nn.utils.rnn.pad_sequence(list(values.split(lengths)), batch_first=True), torch.tensor(lengths))
        loss: Tensor = nn.functional.binary_cross_entropy_with_logits(scores, labels[batch], weight=counted[batch])
        torch.autograd.backward(loss)
        optimiser.step()
    weight = layer.weight.detach().double().numpy()[0]
    return scaler.folded(weight, float(layer.bias.item()), ScoreUnit.LOGIT)


def score_smoothed(kind: str, probe: Linear, rows: Rows) -> NDArray[np.float64]:
    """Computes scores ``(n,)`` of ``n`` rollouts from the activations ``(tokens, taps (places in the model) × width)`` of each, by the
    served reduction.
    """
    reduction = reduction_of(kind)
    return np.array([reduce_scores(probe.score(each)[:, None].astype(np.float32), reduction)[0] for each in rows], np.float64)


def _smoothed(kind: str, values: Tensor, lengths: Tensor) -> Tensor:
    """Computes the reduction of token logits ``(rollouts, longest)`` with gradients; what is beyond a length is padding."""
    beyond = torch.arange(values.shape[1])[None] >= lengths[:, None]
    if kind == SOFTMAX_POOLING:
        weights = (values / TEMPERATURE).masked_fill(beyond, float("-inf")).softmax(-1)
        return (weights * values).sum(-1)
    length = min(values.shape[1], int(np.ceil(np.log(_FORGOTTEN) / np.log(1 - SMOOTHING))))
    kernel = SMOOTHING * (1 - SMOOTHING) ** torch.arange(length)
    kernel[-1] = 1 - kernel[:-1].sum()  # the average starts at the first token, as if that had always been there
    before = values[:, :1].expand(-1, length - 1)
    averages = nn.functional.conv1d(torch.cat([before, values], dim=1)[:, None], kernel.flip(0)[None, None])[:, 0]
    return averages.masked_fill(beyond, float("-inf")).amax(-1)
