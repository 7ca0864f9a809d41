"""What every execution path takes and gives: a forest in, activations at taps out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from probescore.types import Tap
from probescore_server.backbone.forest import Forest
from probescore_server.backbone.kv_cache import KeyValueCache


def skip_nothing(_: int) -> bool:
    """Skips nothing."""
    return False


@dataclass(frozen=True, eq=False)
class Activations:
    """What was read of a forest.

    Attributes:
        rows: by tap ``(N, hidden_size)`` float32 on the model's device: the segments that are read, one after the other.
        starts: by segment, its first row. Rows of a segment that was skipped hold nothing of meaning.
    """

    rows: Mapping[Tap, torch.Tensor]
    starts: Mapping[int, int]

    @classmethod
    def empty(cls, forest: Forest, taps: Sequence[Tap], hidden_size: int, device: torch.device) -> Activations:
        """Room for every segment of the forest that is read."""
        starts: dict[int, int] = {}
        total = 0
        for index, segment in enumerate(forest.segments):
            if segment.read:
                starts[index] = total
                total += len(segment.token_ids)
        return cls({tap: torch.empty((total, hidden_size), dtype=torch.float32, device=device) for tap in taps}, starts)


class Backbone(Protocol):
    """A frozen decoder that runs forests."""

    @property
    def name(self) -> str:
        """The execution path, as servers announce it."""

    def forward(
        self, forest: Forest, taps: Sequence[Tap], *, skip: Callable[[int], bool] = skip_nothing, cache: KeyValueCache | None = None
    ) -> Activations:
        """Runs every segment once.

        Args:
            forest: what to run; ``cached`` of its segments is set.
            taps: where to read.
            skip: asked before a segment is run; a segment that is skipped, and everything after it, is not run.
            cache: keys and values of earlier forests; what is computed is added to it.
        """
