"""Reads stored activations from their directory: files are memory-mapped, and only requested numbers are loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from probescore_server.activation_store.index import INDEX, Shard, StoredRollout, StoreIndex, StoreRefused, pooled_name


@dataclass(frozen=True, eq=False)
class RolloutActivations:
    """The stored activations of one rollout; numbers are loaded from disk when a method asks for them.

    Attributes:
        rollout: the entry of the rollout in the index of the stored activations.
        finite: whether the model gave finite numbers at every tap (place in the model); if not, all activations of the rollout are NaN.
        token_ids: tokens in scope, ``(T,)`` int32.
        mask: which of the tokens count, ``(T,)`` bool.
    """

    rollout: StoredRollout
    finite: bool
    token_ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    _shard: _MappedShard
    _place: int

    def tokens(self, tap: str) -> NDArray[np.float32]:
        """Returns a rollout's stored activations of every token in scope at a tap (place in the model), ``(T, width)`` float32.

        Raises:
            KeyError: activations of single tokens at this tap are not stored.
        """
        first = self._shard.shard.first_tokens
        return self._shard.numbers(tap, first[self._place], first[self._place + 1])

    def pooled(self, tap: str, pool: str) -> NDArray[np.float32]:
        """Returns a rollout's stored pooled activations at a tap (place in the model), ``(1 + spans, width)`` float32: of the whole scope
        under the mask, then of each span.

        A row is NaN if no token counted.

        Raises:
            KeyError: this pooling or tap is not stored.
        """
        first = self._shard.shard.first_rows
        return self._shard.numbers(pooled_name(tap, pool), first[self._place], first[self._place + 1])


class StoredActivations:
    """A directory of activations that the function ``store_activations`` or the command ``probescore activations`` has written. Iteration
    yields the stored activations of each rollout in order.

    Args:
        directory: directory of a run that was completed.

    Attributes:
        index: description of the model and of the stored activations.
        rollouts: completions, each followed by its follow-ups (token ids appended to a completion); row *i* of ``matrix`` belongs to
            rollout *i*.

    Raises:
        StoreRefused: the directory holds no activations, or some of its shards are missing or belong to another index.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        path = self.directory / INDEX
        try:
            content = path.read_bytes()
        except OSError as error:
            raise StoreRefused(f"{self.directory}: no activations here ({error.strerror}: {INDEX})") from None
        self.index = StoreIndex.parse(content, path)
        self.rollouts = tuple(rollout for shard in self.index.shards for rollout in shard.rollouts)
        self._shards = [_MappedShard(self.directory, self.index, shard) for shard in self.index.shards]

    def __len__(self) -> int:
        return len(self.rollouts)

    def __iter__(self) -> Iterator[RolloutActivations]:
        for shard in self._shards:
            first = shard.shard.first_tokens
            for place, rollout in enumerate(shard.shard.rollouts):
                tokens = slice(first[place], first[place + 1])
                ids, mask = shard.tensor("token_ids")[tokens], shard.tensor("mask")[tokens]
                finite = bool(shard.tensor("finite")[place])
                yield RolloutActivations(rollout, finite, ids.astype(np.int32), mask.astype(np.bool_), shard, place)

    def matrix(self, tap: str, pool: str, *, span: str = "") -> NDArray[np.float32]:
        """Returns the pooled activations of every rollout at a tap (place in the model) as one matrix, ``(rollouts, width)`` float32.

        Args:
            tap: name of the tap.
            pool: ``mean``, ``last`` or ``max``.
            span: name of a span to pool over; empty = the whole scope under the mask.

        Returns:
            The matrix; a row is NaN if no token counted, the rollout has no such span, or the model gave NaN or an infinity.

        Raises:
            KeyError: this pooling or tap is not stored.
        """
        name = pooled_name(tap, pool)
        pieces = []
        for shard in self._shards:
            rows = [_row(rollout, span) for rollout in shard.shard.rollouts]
            places = np.array(shard.shard.first_rows[:-1]) + [0 if row is None else row for row in rows]
            numbers = self.index.number_format.decode(shard.tensor(name)[places])
            numbers[[row is None for row in rows]] = np.nan
            pieces.append(numbers)
        return np.concatenate(pieces)


def _row(rollout: StoredRollout, span: str) -> int | None:
    """Returns the row of a named span among the rows of a rollout's pooled activations; ``None`` if the rollout has no such span."""
    if not span:
        return 0
    return next((1 + index for index, own in enumerate(rollout.spans) if own.name == span), None)


class _MappedShard:
    """The memory-mapped file of a shard, which holds the activations of some of the rollouts."""

    def __init__(self, directory: Path, index: StoreIndex, shard: Shard) -> None:
        self.shard = shard
        self._index = index
        self._places = index.layout(shard)
        self._path = directory / shard.name
        if not index.is_whole(directory, shard):
            state = "is not the shard that the index tells of" if self._path.exists() else "is missing"
            raise StoreRefused(f"{self._path}: {state}: the run did not come to its end; started again, it goes on")
        self._bytes = np.memmap(self._path, np.uint8, "r")

    def tensor(self, name: str) -> NDArray[np.generic]:
        """Returns a tensor of a shard (file of stored activations) in its stored number format, memory-mapped; raises ``KeyError`` if the
        shard has no tensor of that name.
        """
        if name not in self._places:
            known = ", ".join(name for name in self._places if name not in ("token_ids", "mask", "finite"))
            raise KeyError(f"{name} is not stored; there are {known}")
        place = self._places[name]
        size = place.shape[0] * place.row_bytes
        return self._bytes[place.start : place.start + size].view(place.item).reshape(place.shape)

    def numbers(self, name: str, first: int, end: int) -> NDArray[np.float32]:
        """Loads rows ``first`` up to, not including, ``end`` of a tensor of stored activations, and returns them as float32."""
        return self._index.number_format.decode(self.tensor(name)[first:end])
