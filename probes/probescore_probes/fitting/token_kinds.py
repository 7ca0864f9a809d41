"""Probes over the tokens of a rollout: attention pooling, and the maximum of attention-weighted rolling means.

Each is fitted on every token's activations at one tap and pools in its graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from probescore.types import ScoreUnit
from probescore_probes.exporting import ProbeFunction, torch_probe
from probescore_probes.fitting.linear_kinds import Scaler

ATTENTION, ROLLING_MAX = TOKEN_KINDS = ("attention", "rolling-max")
WINDOW = 10
"""Tokens of a rolling mean; fewer at the beginning of a rollout."""
MAX_BYTES = 4 << 30
"""Of activations that fitting may hold, one float32 for each token and feature."""
_STEPS = 300
_BATCH = 64
_DECAY = 0.1

Rows = Sequence[NDArray[np.float32]]


class AttentionPool(nn.Module):
    """The values of a rollout's tokens, weighted by a softmax over them."""

    def __init__(self, scaler: Scaler) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(scaler.mean, dtype=torch.float32))
        self.register_buffer("deviation", torch.tensor(scaler.deviation, dtype=torch.float32))
        self.attend = nn.Linear(len(scaler.mean), 1)
        self.value = nn.Linear(len(scaler.mean), 1)
        for layer in (self.attend, self.value):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Attention logits and values ``(tokens,)`` each."""
        scaled = (x - self.get_buffer("mean")) / self.get_buffer("deviation")
        return self.attend(scaled)[:, 0], self.value(scaled)[:, 0]

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """``(rollouts,)`` logits of the rows ``(tokens, width)``."""
        attention, values = self.read(x)
        row = torch.arange(x.shape[0])
        member = (row >= cu_seqlens[:-1, None]) & (row < cu_seqlens[1:, None])
        weights = attention[None].masked_fill(~member, float("-inf")).softmax(-1)
        return (weights * values[None]).sum(-1)


class RollingMax(AttentionPool):
    """The largest of the means over the last ``WINDOW`` tokens, weighted by attention within each window."""

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """``(rollouts,)`` logits of the rows ``(tokens, width)``."""
        attention, values = self.read(x)
        count = x.shape[0]
        row = torch.arange(count)
        member = (row >= cu_seqlens[:-1, None]) & (row < cu_seqlens[1:, None])
        start = (member.to(torch.int64) * cu_seqlens[:-1, None]).sum(0)  # of each row's rollout
        back = torch.arange(WINDOW)
        within = row[:, None] - back[None] >= start[:, None]  # (tokens, WINDOW)
        place = (row[:, None] - back[None]).clamp(min=0)
        weights = attention[place].masked_fill(~within, float("-inf")).softmax(-1)
        means = (weights * values[place]).sum(-1)
        return means[None].masked_fill(~member, float("-inf")).amax(-1)


def fit_tokens(kind: str, rows: Rows, positive: NDArray[np.bool_], weights: NDArray[np.float64], seed: int = 0) -> AttentionPool:
    """Fits on the tokens of each rollout ``(tokens, width)``, in batches of rollouts."""
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    every = np.concatenate(rows)
    module = (RollingMax if kind == ROLLING_MAX else AttentionPool)(Scaler.of(every, np.ones(len(every))))
    labels, counted = torch.from_numpy(positive.astype(np.float32)), torch.from_numpy((weights / weights.mean()).astype(np.float32))
    optimiser = torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=_DECAY)
    for _ in range(_STEPS):
        batch = random.permutation(len(rows))[:_BATCH]
        optimiser.zero_grad()
        scores = module(*_packed([rows[index] for index in batch]))
        loss: Tensor = nn.functional.binary_cross_entropy_with_logits(scores, labels[batch], weight=counted[batch])
        torch.autograd.backward(loss)
        optimiser.step()
    return module.eval()


def score_tokens(module: AttentionPool, rows: Rows) -> NDArray[np.float64]:
    """Logits ``(n,)`` of rollouts ``(tokens, width)`` each."""
    with torch.inference_mode():
        parts = [module(*_packed(rows[start : start + _BATCH])).double().numpy() for start in range(0, len(rows), _BATCH)]
    return np.concatenate(parts) if parts else np.zeros(0)


def tokens_function(module: AttentionPool) -> ProbeFunction:
    """As it is written into a file."""
    return torch_probe(module, unit=ScoreUnit.LOGIT)


def check_bytes(tokens: int, width: int) -> None:
    """Refuses data whose activations would not fit, before they are read.

    Raises:
        ValueError: says how much they take, and what to do.
    """
    if (needed := 4 * tokens * width) > MAX_BYTES:
        raise ValueError(
            f"kind: {tokens:,} tokens × {width} features take {needed / 1e9:.1f} GB, and fitting on tokens holds at most "
            f"{MAX_BYTES / 1e9:.1f} GB; give fewer or shorter rollouts, or a kind that is fitted on means"
        )


def _packed(rows: Rows) -> tuple[Tensor, Tensor]:
    ends = np.cumsum([0, *map(len, rows)])
    return torch.from_numpy(np.concatenate(rows)), torch.from_numpy(ends.astype(np.int64))
