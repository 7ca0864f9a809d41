"""Implements attention and pooling within sequences that are concatenated along one axis, in a form that exports to ONNX.

The exported graph accepts any number of sequences.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probescore_probes.importing.imported import Array


def sequence_of(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Returns the index of the sequence to which each of ``N`` concatenated tokens belongs, ``(N,)``."""
    return (rows[:, None] >= cu_seqlens[None, 1:]).sum(1)


def members(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Returns which of ``N`` concatenated tokens belong to each of ``S`` sequences, ``(S, N)`` bool."""
    row = torch.arange(x.shape[0])
    return (row >= cu_seqlens[:-1, None]) & (row < cu_seqlens[1:, None])


def seen(x: Tensor, cu_seqlens: Tensor, window: int | None) -> Tensor:
    """Returns which of ``N`` concatenated tokens each token attends to, ``(N, N)`` bool: the last ``window`` tokens of its sequence up to
    itself, or all of them if there is no window.
    """
    row = torch.arange(x.shape[0])
    sequence = sequence_of(row, cu_seqlens)
    back = row[:, None] - row[None]
    inside = (sequence[:, None] == sequence[None]) & (back >= 0)
    return inside if window is None else inside & (back < window)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Computes softmax attention in torch, under a mask, from queries, keys and values ``(N, heads, d)`` each, to ``(N, heads × d)``."""
    logits = torch.einsum("nhd,mhd->hnm", query, key) / query.shape[-1] ** 0.5
    weight = logits.masked_fill(~mask[None], float("-inf")).softmax(-1)
    return torch.einsum("hnm,mhd->nhd", weight, value).flatten(1)


def causal(length: int, window: int | None) -> NDArray[np.bool_]:
    """Returns which tokens of one sequence each token attends to, ``(T, T)`` bool: the last ``window`` tokens up to itself, or all of them
    if there is no window.
    """
    back = np.arange(length)[:, None] - np.arange(length)[None]
    return np.asarray(back >= 0 if window is None else (back >= 0) & (back < window))


def attended(query: Array, key: Array, value: Array, mask: NDArray[np.bool_]) -> Array:
    """Computes softmax attention in numpy, under a mask, from queries, keys and values ``(T, heads, d)`` each, to ``(T, heads × d)``."""
    logits = np.einsum("nhd,mhd->hnm", query, key) / np.sqrt(query.shape[-1])
    weight = softmax(np.where(mask[None], logits, -np.inf))
    mixed: Array = np.einsum("hnm,mhd->nhd", weight, value)
    return mixed.reshape(len(query), -1)


def softmax(logits: Array, axis: int = -1) -> Array:
    """Computes the softmax of an array along an axis on which at least one number is finite."""
    powers = np.exp(logits - logits.max(axis, keepdims=True))
    shares: Array = powers / powers.sum(axis, keepdims=True)
    return shares
