"""Fits probes over all tokens of a rollout: attention pooling, and the maximum of attention-weighted rolling means.

Each probe is fitted on the activations of every token at one tap (place in the model), and pools them inside its ONNX graph.
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
"""Number of tokens of a rolling mean; the windows at the beginning of a rollout are shorter."""
MAX_BYTES = 4 << 30
"""Limits the bytes of activations that fitting holds in memory, as float32."""
_STEPS = 300
_BATCH = 64
_DECAY = 0.1

Rows = Sequence[NDArray[np.float32]]


class AttentionPool(nn.Module):
    """Torch module that scores a rollout by the mean of its tokens' values, weighted by a softmax over the tokens."""

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
        """Computes the attention logits and the values of tokens, ``(tokens,)`` each."""
        scaled = (x - self.get_buffer("mean")) / self.get_buffer("deviation")
        return self.attend(scaled)[:, 0], self.value(scaled)[:, 0]

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Computes logits ``(rollouts,)`` from the activations ``(tokens, width)`` of concatenated rollouts."""
        attention, values = self.read(x)
        row = torch.arange(x.shape[0])
        member = (row >= cu_seqlens[:-1, None]) & (row < cu_seqlens[1:, None])
        weights = attention[None].masked_fill(~member, float("-inf")).softmax(-1)
        return (weights * values[None]).sum(-1)


class RollingMax(AttentionPool):
    """Torch module that scores a rollout by its largest rolling mean over ``WINDOW`` tokens, weighted by attention within each window."""

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Computes logits ``(rollouts,)`` from the activations ``(tokens, width)`` of concatenated rollouts."""
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
    """Fits a probe of a kind that reads tokens, on the activations ``(tokens, width)`` of each rollout, in batches of rollouts."""
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    module = (RollingMax if kind == ROLLING_MAX else AttentionPool)(Scaler.of_tokens(rows, weights))
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
    """Computes logits ``(n,)`` of ``n`` rollouts from the activations ``(tokens, width)`` of each."""
    with torch.inference_mode():
        parts = [module(*_packed(rows[start : start + _BATCH])).double().numpy() for start in range(0, len(rows), _BATCH)]
    return np.concatenate(parts) if parts else np.zeros(0)


def tokens_function(module: AttentionPool) -> ProbeFunction:
    """Returns a fitted probe that reads all tokens of a rollout in the form in which it is written into a probe file."""
    return torch_probe(module, unit=ScoreUnit.LOGIT)


def check_bytes(tokens: int, taps: int, width: int) -> None:
    """Checks that the activations of all tokens at some taps (places in the model) fit in memory, before they are computed.

    Raises:
        ValueError: they take more than ``MAX_BYTES``; the message says how much they take, and what to do.
    """
    if (needed := 4 * tokens * taps * width) > MAX_BYTES:
        times = f"{taps} taps × " if taps > 1 else ""
        raise ValueError(
            f"kind: {tokens:,} tokens × {times}{width} numbers take {needed / 1e9:.1f} GB, and fitting on tokens holds at most "
            f"{MAX_BYTES / 1e9:.1f} GB; give fewer or shorter rollouts, fewer taps, or a kind that is fitted on means"
        )


def _packed(rows: Rows) -> tuple[Tensor, Tensor]:
    ends = np.cumsum([0, *map(len, rows)])
    return torch.from_numpy(np.concatenate(rows)), torch.from_numpy(ends.astype(np.int64))
