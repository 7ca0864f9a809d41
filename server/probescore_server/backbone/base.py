"""Defines what every execution path of the frozen model takes and returns.

A path takes a forest of segments (runs of tokens that several rollouts may share) and returns the activations that probes read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from probescore.types import Tap
from probescore_server.backbone.forest import Forest
from probescore_server.backbone.kv_cache import KeyValueCache


def skip_nothing(_: int) -> bool:
    """Returns false for the index of any segment (run of tokens), so that a forward skips none."""
    return False


@dataclass(frozen=True, eq=False)
class Activations:
    """Holds the activations that were read while a forest of segments (runs of tokens) went through the model.

    Attributes:
        rows: by tap, activations ``(N, hidden_size)`` float32 on the model's device, one row per token of each segment that is read.
        starts: by index of a segment that is read, its first row. The rows of a segment that was skipped have no meaning.
    """

    rows: Mapping[Tap, torch.Tensor]
    starts: Mapping[int, int]

    @classmethod
    def empty(cls, forest: Forest, taps: Sequence[Tap], hidden_size: int, device: torch.device) -> Activations:
        """Allocates uninitialised rows for the activations of every segment (run of tokens) of a forest that is read."""
        starts: dict[int, int] = {}
        total = 0
        for index, segment in enumerate(forest.segments):
            if segment.read:
                starts[index] = total
                total += len(segment.token_ids)
        return cls({tap: torch.empty((total, hidden_size), dtype=torch.float32, device=device) for tap in taps}, starts)


class Backbone(Protocol):
    """Describes a frozen decoder that computes forests of segments, runs of tokens that several rollouts may share."""

    @property
    def name(self) -> str:
        """Returns the name of the execution path, as servers announce it: ``universal`` or ``packed``."""

    def forward(
        self, forest: Forest, taps: Sequence[Tap], *, skip: Callable[[int], bool] = skip_nothing, cache: KeyValueCache | None = None
    ) -> Activations:
        """Runs every segment of a forest once and returns the activations of those that are read.

        Args:
            forest: the forest to run; the field ``cached`` of its segments is set.
            taps: the taps to read.
            skip: function that says whether the segment with a given index can be skipped, called before the segment is run. A skipped
                segment and everything after it are not run.
            cache: keys and values of earlier forests; those that are computed are added to it.
        """
