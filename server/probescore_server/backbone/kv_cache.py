"""Caches attention keys and values of token sequences, in a radix tree over token ids.

The cache is bounded in bytes and drops the least recently used entries. Since the model is frozen, its entries never become stale.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

KeyValues = list[tuple[torch.Tensor, torch.Tensor]]
"""Type of a list with, for each layer, keys and values of T tokens after rotary embedding, each ``(1, num_key_value_heads, T,
head_dim)``.
"""


@dataclass(slots=True, eq=False)
class _TokenRun:
    """Node of the cache's tree: some tokens that follow the tokens of the parent node, with their keys and values.

    The children of a node all begin with different tokens.
    """

    token_ids: NDArray[np.int32]
    key_values: KeyValues
    parent: _TokenRun | None
    continuations: dict[int, _TokenRun] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.key_values)


class KeyValueCache:
    """Cache of keys and values of token sequences, so that they need not be computed again. Threads must not share a cache.

    Args:
        max_bytes: maximum of bytes of keys and values to keep; 0 = nothing is kept.

    Attributes:
        bytes: bytes of keys and values in the cache now.
        hits: number of look-ups that found keys and values of at least the first token.
        misses: number of look-ups that found nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self.bytes = 0
        self.hits = 0
        self.misses = 0
        self._max_bytes = max_bytes
        self._root = _TokenRun(np.zeros(0, np.int32), [], None)
        # A run's ancestors are moved to the end after the run itself, so the first is always a leaf.
        self._recency: OrderedDict[_TokenRun, None] = OrderedDict()

    def clear(self) -> None:
        """Removes all keys and values from the cache."""
        for run in self._recency:
            run.key_values, run.parent = [], None  # runs refer to one another: without this the memory would wait for a garbage collection
        self._recency.clear()
        self._root.continuations.clear()
        self.bytes = 0

    def longest_prefix(self, token_ids: NDArray[np.int32]) -> KeyValues:
        """Returns the cached keys and values of the longest cached beginning of a token sequence.

        Args:
            token_ids: ``(T,)`` int32, the sequence.

        Returns:
            Keys and values of the first n tokens, 0 < n ≤ T, which must not be changed; an empty list if not even the first token is known.
        """
        pieces: list[KeyValues] = []
        run, done = self._root, 0
        while done < len(token_ids) and (following := run.continuations.get(int(token_ids[done]))) is not None:
            run = following
            same = common_beginning(run.token_ids, token_ids[done:])
            pieces.append(_slice(run.key_values, 0, same))
            done += same
            if same < len(run.token_ids):
                break
        self._touch(run)
        if pieces:
            self.hits += 1
        else:
            self.misses += 1
        return _concatenate(pieces)

    def known_tokens(self, token_ids: NDArray[np.int32]) -> int:
        """Returns how many tokens at the beginning of a sequence have keys and values in the cache. Unlike a look-up, this neither counts
        as a hit nor makes an entry count as recently used.
        """
        run, done = self._root, 0
        while done < len(token_ids) and (following := run.continuations.get(int(token_ids[done]))) is not None:
            same = common_beginning(following.token_ids, token_ids[done:])
            done += same
            if same < len(following.token_ids):
                break
            run = following
        return done

    def put(self, token_ids: NDArray[np.int32], tail: KeyValues) -> None:
        """Adds keys and values of the last tokens of a sequence to the cache. Nothing is added if the keys and values of the tokens before
        these are not, or no longer, in the cache.

        Args:
            token_ids: ``(T,)`` int32, the whole sequence.
            tail: keys and values of the sequence's last tokens; the cache stores copies.
        """
        start = len(token_ids) - length_of(tail)
        run, done = self._descend(token_ids)
        if start <= done < len(token_ids):
            run = self._add(run, token_ids[done:], _copy(_slice(tail, done - start, len(token_ids) - start)))
        self._touch(run)
        while self.bytes > self._max_bytes:
            self._forget(next(iter(self._recency)))

    def _descend(self, token_ids: NDArray[np.int32]) -> tuple[_TokenRun, int]:
        """Returns the tree's node at the end of the longest cached beginning of a sequence, and the number of tokens of that beginning.

        If the beginning ends inside a node, the node is split there.
        """
        run, done = self._root, 0
        while done < len(token_ids) and (following := run.continuations.get(int(token_ids[done]))) is not None:
            same = common_beginning(following.token_ids, token_ids[done:])
            run = following if same == len(following.token_ids) else self._split(following, same)
            done += same
        return run, done

    def _add(self, parent: _TokenRun, token_ids: NDArray[np.int32], key_values: KeyValues) -> _TokenRun:
        run = parent.continuations[int(token_ids[0])] = _TokenRun(token_ids.copy(), key_values, parent)
        self._recency[run] = None
        self.bytes += run.bytes
        return run

    def _split(self, run: _TokenRun, at: int) -> _TokenRun:
        """Splits a node of the tree in two after ``at`` tokens and returns the first. Keys and values are copied, since a view would keep
        the whole original tensor in memory.
        """
        parent = run.parent or self._root
        first = _TokenRun(run.token_ids[:at], _copy(_slice(run.key_values, 0, at)), parent, {int(run.token_ids[at]): run})
        parent.continuations[int(run.token_ids[0])] = first
        run.key_values = _copy(_slice(run.key_values, at, len(run.token_ids)))
        run.token_ids, run.parent = run.token_ids[at:], first
        self._recency[first] = None
        return first

    def _touch(self, run: _TokenRun | None) -> None:
        while run is not None and run is not self._root:
            self._recency.move_to_end(run)
            run = run.parent

    def _forget(self, leaf: _TokenRun) -> None:
        del self._recency[leaf]
        self.bytes -= leaf.bytes
        if leaf.parent is not None:
            del leaf.parent.continuations[int(leaf.token_ids[0])]


def length_of(key_values: KeyValues) -> int:
    """Returns the number of tokens that the given attention keys and values are of."""
    return key_values[0][0].shape[2] if key_values else 0


def common_beginning(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    """Returns the number of tokens that two sequences have in common at their beginning."""
    shorter = min(len(a), len(b))
    different = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(different[0]) if len(different) else shorter


def _slice(key_values: KeyValues, start: int, end: int) -> KeyValues:
    return [(keys[:, :, start:end], values[:, :, start:end]) for keys, values in key_values]


def _copy(key_values: KeyValues) -> KeyValues:
    return [(_compact(keys), _compact(values)) for keys, values in key_values]


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _concatenate(pieces: list[KeyValues]) -> KeyValues:
    if len(pieces) == 1:
        return pieces[0]
    layers = zip(*pieces, strict=True)
    return [(torch.cat([keys for keys, _ in layer], dim=2), torch.cat([values for _, values in layer], dim=2)) for layer in layers]
