"""Probes as authors write them in torch, of every kind that a probe file holds."""

from __future__ import annotations

import torch
from models import HIDDEN_SIZE
from torch import Tensor, nn


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(HIDDEN_SIZE, 16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class JumpReluFeatures(nn.Module):
    """Some features of a sparse autoencoder; JumpReLU as in arXiv:2407.14435."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(HIDDEN_SIZE, 64)
        self.register_buffer("threshold", torch.full((64,), 0.1))
        self.register_buffer("features", torch.tensor([1, 5]))

    def forward(self, x: Tensor) -> Tensor:
        before = self.encoder(x)
        return (before * (before > self.threshold))[:, self.features]


class TopKFeature(nn.Module):
    """One feature of a top-k sparse autoencoder, without a label axis."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(HIDDEN_SIZE, 64)

    def forward(self, x: Tensor) -> Tensor:
        before = self.encoder(x)
        values, indices = before.topk(32, dim=-1)
        return torch.zeros_like(before).scatter(-1, indices, values.relu())[:, 3]


def sequence_of(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Which sequence each row belongs to."""
    return (rows[:, None] >= cu_seqlens[None, 1:]).sum(1)


class WindowedAttention(nn.Module):
    """Causal attention over the last rows of the same sequence."""

    def __init__(self, window: int = 5) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(HIDDEN_SIZE, 8), nn.Linear(HIDDEN_SIZE, 8), nn.Linear(HIDDEN_SIZE, 1)
        self.window = window

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        row = torch.arange(x.shape[0])
        sequence = sequence_of(row, cu_seqlens)
        back = row[:, None] - row[None]
        seen = (sequence[:, None] == sequence[None]) & (back >= 0) & (back < self.window)
        logits = (self.query(x) @ self.key(x).T).masked_fill(~seen, float("-inf"))
        return logits.softmax(-1) @ self.value(x)


class Smoothed(nn.Module):
    """Exponential moving average of a linear probe, started at each sequence's first score."""

    def __init__(self, alpha: float = 0.3) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN_SIZE, 1)
        self.alpha = alpha

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        row = torch.arange(x.shape[0])
        start = cu_seqlens[sequence_of(row, cu_seqlens)]
        back = row[:, None] - row[None]
        seen = (back >= 0) & (row[None] >= start[:, None])
        first = row[None] == start[:, None]
        weight = torch.where(first, 1.0, self.alpha) * (1 - self.alpha) ** back.clamp(min=0) * seen
        return weight @ self.linear(x)


class AttentionPooling(nn.Module):
    """One score per sequence: softmax attention of two heads over its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(HIDDEN_SIZE, 2), nn.Linear(HIDDEN_SIZE, 2)

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        row = torch.arange(x.shape[0])
        member = (row >= cu_seqlens[:-1, None]) & (row < cu_seqlens[1:, None])
        weight = self.query(x).T[None].masked_fill(~member[:, None], float("-inf")).softmax(-1)
        return torch.einsum("shn,nh->s", weight, self.value(x))


class Decaying(nn.Module):
    """Uses each token's position in its rollout, and not ``cu_seqlens``."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN_SIZE, 1)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.linear(x) * torch.exp(-0.05 * positions[:, None])


class TwoTaps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.early, self.late = nn.Linear(HIDDEN_SIZE, 1), nn.Linear(HIDDEN_SIZE, 1)

    def forward(self, early: Tensor, late: Tensor) -> Tensor:
        return torch.sigmoid(self.early(early) * self.late(late))
