"""Finds rollouts whose recorded activations are most alike."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from probescore_audit.record.bfloat16 import from_text
from probescore_review.index import Index

_NEAREST = 8
_MOST_NUMBERS = 2**25  # of activations that are kept in memory: 128 MiB


@dataclass(frozen=True, eq=False)
class _Activations:
    """Value object with the activations of one reading and tap: the rollouts' numbers in the index ``(n,)``, and unit vectors from their
    mean ``(n, d)``.
    """

    rollouts: NDArray[np.int64]
    directions: NDArray[np.float32]


class Neighbours:
    """Finds a rollout's nearest neighbours among those whose activations the record has."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._lock = threading.Lock()
        self._known: tuple[int, _Activations | None] = (-1, None)

    def of(self, step: int, name: str) -> list[tuple[int, float]] | None:
        """Returns the numbers in the index of the rollouts whose activations are most alike, and how alike: the cosine of the angle between
        them, seen from the mean of all. ``None`` if the record has no activation of the rollout.
        """
        own = self._index.row("SELECT id FROM rollouts WHERE step = ? AND name = ?", (step, name))
        if own is None or not self._index.row("SELECT 1 FROM others WHERE kind = 'activation' AND step = ? AND name = ?", (step, name)):
            return None
        with self._lock:
            if self._known[0] != self._index.generation:
                self._known = self._index.generation, self._read()
            found = self._known[1]
        if found is None or not len(place := np.flatnonzero(found.rollouts == own[0])):
            return None
        alike = found.directions @ found.directions[place[0]]
        alike[place[0]] = -np.inf
        nearest = np.argsort(-alike, kind="stable")[: min(_NEAREST, len(alike) - 1)]
        return [(int(found.rollouts[each]), round(float(alike[each]), 4)) for each in nearest]

    def _read(self) -> _Activations | None:
        """Reads the activations of that reading and tap of which there are most, the latest steps first as far as memory allows."""
        by_place: dict[tuple[str, str, int], list[tuple[int, NDArray[np.float32]]]] = {}
        numbers = 0
        rows = self._index.connection().execute(
            "SELECT rollouts.id, line FROM others JOIN rollouts ON rollouts.step = others.step AND rollouts.name = others.name"
            " WHERE kind = 'activation' ORDER BY others.step DESC"
        )
        for rollout, line in rows:
            values = json.loads(line)
            try:
                vector = from_text(values["values"])
                key = str(values["reading"]), str(values.get("tap") or ""), len(vector)
            except (KeyError, TypeError, ValueError):
                continue
            numbers += len(vector)
            if numbers > _MOST_NUMBERS:
                break
            by_place.setdefault(key, []).append((rollout, vector))
        most = max(by_place.values(), key=len, default=[])
        unique = dict(reversed(most))
        if len(unique) < 2:
            return None
        away = np.stack(list(unique.values())).astype(np.float32)
        away -= away.mean(0)
        lengths = np.linalg.norm(away, axis=1, keepdims=True)
        return _Activations(np.array(list(unique), np.int64), away / np.maximum(lengths, 1e-12))
