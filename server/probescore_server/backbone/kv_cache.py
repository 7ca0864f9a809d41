"""Keys and values of token runs that were computed before: a radix tree over token ids, bounded in bytes, least recently used first out.

The backbone is frozen, so nothing in here ever goes stale.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

KeyValues = list[tuple[torch.Tensor, torch.Tensor]]
"""By layer: keys and values ``(1, num_key_value_heads, T, head_dim)`` each, after rotary embedding."""


@dataclass(slots=True, eq=False)
class _TokenRun:
    """Some tokens after those of its ancestors; no two continuations of a run begin with the same token."""

    token_ids: NDArray[np.int32]
    key_values: KeyValues
    parent: _TokenRun | None
    continuations: dict[int, _TokenRun] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.key_values)


class KeyValueCache:
    """What is known of token sequences, so that it need not be computed again. Not safe to share between threads.

    Args:
        max_bytes: of keys and values; 0 keeps nothing.

    Attributes:
        bytes: of keys and values that are held.
        hits, misses: sequences that were looked up of which some, or no, beginning was known.
    """

    def __init__(self, max_bytes: int) -> None:
        self.bytes = 0
        self.hits = 0
        self.misses = 0
        self._max_bytes = max_bytes
        self._root = _TokenRun(np.zeros(0, np.int32), [], None)
        # Whoever touches a run touches its ancestors after it, so the first is always a leaf.
        self._recency: OrderedDict[_TokenRun, None] = OrderedDict()

    def clear(self) -> None:
        """Forgets everything."""
        for run in self._recency:
            run.key_values, run.parent = [], None  # runs refer to one another: else the memory would wait for a garbage collection
        self._recency.clear()
        self._root.continuations.clear()
        self.bytes = 0

    def longest_prefix(self, token_ids: NDArray[np.int32]) -> KeyValues:
        """Keys and values of the longest known beginning of a sequence.

        Args:
            token_ids: ``(T,)`` int32.

        Returns:
            Of the first n tokens, 0 < n ≤ T; empty if not even the first token is known. To be read only.
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
        """How many tokens of a sequence's beginning are known; nothing is counted and nothing becomes more recent."""
        run, done = self._root, 0
        while done < len(token_ids) and (following := run.continuations.get(int(token_ids[done]))) is not None:
            same = common_beginning(following.token_ids, token_ids[done:])
            done += same
            if same < len(following.token_ids):
                break
            run = following
        return done

    def put(self, token_ids: NDArray[np.int32], tail: KeyValues) -> None:
        """Remembers the end of a sequence. Nothing happens if what comes before it is not known, or has been forgotten.

        Args:
            token_ids: ``(T,)`` int32, the whole sequence.
            tail: keys and values of its last tokens; what is kept is copied.
        """
        start = len(token_ids) - length_of(tail)
        run, done = self._descend(token_ids)
        if start <= done < len(token_ids):
            run = self._add(run, token_ids[done:], _copy(_slice(tail, done - start, len(token_ids) - start)))
        self._touch(run)
        while self.bytes > self._max_bytes:
            self._forget(next(iter(self._recency)))

    def _descend(self, token_ids: NDArray[np.int32]) -> tuple[_TokenRun, int]:
        """The run at whose end a sequence leaves what is known, split there if need be, and how many tokens that is."""
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
        """Makes two runs of one and returns the first; copies, since a part of a tensor keeps the whole alive."""
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
    """How many tokens these are of."""
    return key_values[0][0].shape[2] if key_values else 0


def common_beginning(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    """How many tokens two sequences begin with alike."""
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
