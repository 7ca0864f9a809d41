"""Caches attention keys and values of token sequences, in a radix tree over token ids.

The cache is bounded in bytes and drops the least recently used entries. Since the model is frozen, its entries never become stale. Readings
of other weights have caches of their own, all under one bound: keys and values of one model are wrong for another.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import count

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
    used: int = 0
    continuations: dict[int, _TokenRun] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.key_values)


class CacheBudget:
    """Bound on the bytes that several caches keep together. What was least recently used in any of them goes first.

    A cache may be put under the bound and taken from it while another thread uses the others.

    Args:
        max_bytes: maximum of bytes of keys and values to keep; 0 = nothing is kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._caches: list[KeyValueCache] = []
        self._uses = count()
        self._lock = threading.RLock()
        self._hits_of_removed = self._misses_of_removed = 0

    @property
    def bytes(self) -> int:
        """Returns the bytes of keys and values in all caches now."""
        with self._lock:
            return sum(cache.bytes for cache in self._caches)

    @property
    def hits(self) -> int:
        """Returns the number of look-ups in all caches, also in removed ones, that found keys and values of at least the first token."""
        with self._lock:
            return self._hits_of_removed + sum(cache.hits for cache in self._caches)

    @property
    def misses(self) -> int:
        """Returns the number of look-ups in all caches, also in removed ones, that found nothing."""
        with self._lock:
            return self._misses_of_removed + sum(cache.misses for cache in self._caches)

    def add(self, cache: KeyValueCache) -> None:
        """Puts a cache under the bound."""
        with self._lock:
            self._caches.append(cache)

    def remove(self, cache: KeyValueCache) -> None:
        """Empties a cache that nobody uses any more, and takes it from under the bound."""
        with self._lock:
            cache.clear()
            self._caches.remove(cache)
            self._hits_of_removed += cache.hits
            self._misses_of_removed += cache.misses

    def clear(self) -> None:
        """Empties all caches."""
        with self._lock:
            for cache in self._caches:
                cache.clear()

    def next_use(self) -> int:
        """Returns a number larger than all numbers before it, for a use of an entry."""
        return next(self._uses)

    def enforce(self) -> None:
        """Drops entries until the caches are within the bound."""
        with self._lock:
            while self.bytes > self._max_bytes:
                min((cache for cache in self._caches if cache.bytes), key=lambda cache: cache.oldest_use).forget_oldest()


class KeyValueCache:
    """Cache of keys and values of token sequences, so that they need not be computed again. Threads must not share a cache.

    Args:
        max_bytes: maximum of bytes of keys and values to keep; 0 = nothing is kept. A ``CacheBudget`` bounds several caches together.

    Attributes:
        bytes: bytes of keys and values in the cache now.
        hits: number of look-ups that found keys and values of at least the first token.
        misses: number of look-ups that found nothing.
    """

    def __init__(self, max_bytes: int | CacheBudget) -> None:
        self.bytes = 0
        self.hits = 0
        self.misses = 0
        self._budget = max_bytes if isinstance(max_bytes, CacheBudget) else CacheBudget(max_bytes)
        self._budget.add(self)
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

    @property
    def oldest_use(self) -> int:
        """Returns the number of the last use of the entry that was least recently used; the cache must not be empty."""
        return next(iter(self._recency)).used

    def forget_oldest(self) -> None:
        """Drops the entry that was least recently used; the cache must not be empty."""
        self._forget(next(iter(self._recency)))

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
        self._budget.enforce()

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
        first = _TokenRun(run.token_ids[:at], _copy(_slice(run.key_values, 0, at)), parent, run.used, {int(run.token_ids[at]): run})
        parent.continuations[int(run.token_ids[0])] = first
        run.key_values = _copy(_slice(run.key_values, at, len(run.token_ids)))
        run.token_ids, run.parent = run.token_ids[at:], first
        self._recency[first] = None
        return first

    def _touch(self, run: _TokenRun | None) -> None:
        use = self._budget.next_use()
        while run is not None and run is not self._root:
            self._recency.move_to_end(run)
            run.used = use
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
