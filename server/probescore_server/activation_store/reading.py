"""A directory of activations, read where it lies: files are mapped, and only what is asked for is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from probescore_server.activation_store.index import INDEX, Shard, StoredRollout, StoreIndex, StoreRefused, pooled_name


@dataclass(frozen=True, eq=False)
class RolloutActivations:
    """One rollout of a directory; numbers are loaded when they are asked for.

    Attributes:
        rollout: which one.
        finite: whether the model gave numbers at every tap; else all that is here is NaN.
        token_ids: ``(T,)`` int32, the tokens in scope.
        mask: ``(T,)`` bool, which of them count.
    """

    rollout: StoredRollout
    finite: bool
    token_ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    _shard: _MappedShard
    _place: int

    def tokens(self, tap: str) -> NDArray[np.float32]:
        """Every token's activations ``(T, width)`` float32.

        Raises:
            KeyError: they are not stored.
        """
        first = self._shard.shard.first_tokens
        return self._shard.numbers(tap, first[self._place], first[self._place + 1])

    def pooled(self, tap: str, pool: str) -> NDArray[np.float32]:
        """A pool of the whole scope under the mask, then of each span, ``(1 + spans, width)`` float32; NaN where nothing counted.

        Raises:
            KeyError: it is not stored.
        """
        first = self._shard.shard.first_rows
        return self._shard.numbers(pooled_name(tap, pool), first[self._place], first[self._place + 1])


class StoredActivations:
    """Activations that ``store_activations`` or ``probescore activations`` has written. Iterating gives each rollout in order.

    Args:
        directory: of a run that came to its end.

    Attributes:
        index: what was asked of which model.
        rollouts: completions, each followed by its follow-ups; row *i* of ``matrix`` is of rollout *i*.

    Raises:
        StoreRefused: it is no such directory, or some of its shards are missing or of another index.
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
        """One row per rollout, ``(n, width)`` float32.

        Args:
            tap: its name.
            pool: ``mean``, ``last`` or ``max``.
            span: of the span of this name; empty = of the whole scope under the mask.

        Returns:
            NaN where nothing counted, where there is no such span, and where the model gave no numbers.

        Raises:
            KeyError: it is not stored.
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
    """Which of a rollout's rows is of a span; ``None`` if it has no span of this name."""
    if not span:
        return 0
    return next((1 + index for index, own in enumerate(rollout.spans) if own.name == span), None)


class _MappedShard:
    """A shard's file, mapped."""

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
        """As it is stored, mapped; raises ``KeyError`` if there is none."""
        if name not in self._places:
            known = ", ".join(name for name in self._places if name not in ("token_ids", "mask", "finite"))
            raise KeyError(f"{name} is not stored; there are {known}")
        place = self._places[name]
        size = place.shape[0] * place.row_bytes
        return self._bytes[place.start : place.start + size].view(place.item).reshape(place.shape)

    def numbers(self, name: str, first: int, end: int) -> NDArray[np.float32]:
        """Some rows of activations, loaded."""
        return self._index.number_format.decode(self.tensor(name)[first:end])
