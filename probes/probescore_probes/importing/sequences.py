"""Attention and pooling within sequences that stand one after another in one row, written so that they export to any number of them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probescore_probes.importing.imported import Array


def sequence_of(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Finds which sequence each row ``(N,)`` belongs to."""
    return (rows[:, None] >= cu_seqlens[None, 1:]).sum(1)


def members(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Tells which rows belong to each sequence, ``(S, N)``."""
    row = torch.arange(x.shape[0])
    return (row >= cu_seqlens[:-1, None]) & (row < cu_seqlens[1:, None])


def seen(x: Tensor, cu_seqlens: Tensor, window: int | None) -> Tensor:
    """Tells which rows each row attends to, ``(N, N)``: its own sequence's up to itself, the last ``window`` of them."""
    row = torch.arange(x.shape[0])
    sequence = sequence_of(row, cu_seqlens)
    back = row[:, None] - row[None]
    inside = (sequence[:, None] == sequence[None]) & (back >= 0)
    return inside if window is None else inside & (back < window)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Computes softmax attention of heads: ``(N, H, d)`` each to ``(N, H × d)``."""
    logits = torch.einsum("nhd,mhd->hnm", query, key) / query.shape[-1] ** 0.5
    weight = logits.masked_fill(~mask[None], float("-inf")).softmax(-1)
    return torch.einsum("hnm,mhd->nhd", weight, value).flatten(1)


def causal(length: int, window: int | None) -> NDArray[np.bool_]:
    """Tells which rows of one sequence each of its rows attends to, ``(T, T)``, as ``seen`` does."""
    back = np.arange(length)[:, None] - np.arange(length)[None]
    return np.asarray(back >= 0 if window is None else (back >= 0) & (back < window))


def attended(query: Array, key: Array, value: Array, mask: NDArray[np.bool_]) -> Array:
    """Computes attention in numpy: ``(T, H, d)`` each to ``(T, H × d)``."""
    logits = np.einsum("nhd,mhd->hnm", query, key) / np.sqrt(query.shape[-1])
    weight = softmax(np.where(mask[None], logits, -np.inf))
    mixed: Array = np.einsum("hnm,mhd->nhd", weight, value)
    return mixed.reshape(len(query), -1)


def softmax(logits: Array, axis: int = -1) -> Array:
    """Computes the softmax of numbers of which at least one along the axis is finite."""
    powers = np.exp(logits - logits.max(axis, keepdims=True))
    shares: Array = powers / powers.sum(axis, keepdims=True)
    return shares
