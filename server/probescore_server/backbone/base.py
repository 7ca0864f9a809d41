"""Defines the interface of the code that runs the frozen model, and the activations that it returns.

The input is a forest of segments: runs of tokens arranged in trees, so that a prefix that several rollouts share is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from probescore.types import Tap
from probescore_server.backbone.forest import Forest
from probescore_server.backbone.kv_cache import KeyValueCache
from probescore_server.backbone.model_loading import Decoder
from probescore_server.backbone.taps import TapReader


def skip_nothing(_: int) -> bool:
    """Returns false for the index of any segment (a run of tokens), so that no segment is skipped."""
    return False


@dataclass(frozen=True, eq=False)
class Activations:
    """Value object with the activations that were copied while a forest of segments (runs of tokens, arranged in trees) went through the
    model.

    Attributes:
        rows: a dictionary, keyed by tap (place in the model), of activations ``(N, hidden_size)`` float32 on the model's device, with one
            row for each token of the segments whose activations probes need.
        starts: a dictionary, keyed by the index of each such segment, of the segment's first row. The rows of a skipped segment have no
            meaning.
    """

    rows: Mapping[Tap, torch.Tensor]
    starts: Mapping[int, int]

    @classmethod
    def empty(cls, forest: Forest, taps: Sequence[Tap], hidden_size: int, device: torch.device) -> Activations:
        """Allocates uninitialised rows for the tokens of those segments (runs of tokens) of a forest (token segments arranged in trees)
        whose activations probes need.
        """
        starts: dict[int, int] = {}
        total = 0
        for index, segment in enumerate(forest.segments):
            if segment.read:
                starts[index] = total
                total += len(segment.token_ids)
        return cls({tap: torch.empty((total, hidden_size), dtype=torch.float32, device=device) for tap in taps}, starts)


class Backbone(Protocol):
    """Interface (Protocol) of a frozen decoder that computes forests of segments: runs of tokens arranged in trees, so that shared prefixes
    are computed once.
    """

    @property
    def name(self) -> str:
        """Returns the name of this way of running the model, as the server announces it: ``universal`` or ``packed``."""

    def forward(
        self, forest: Forest, taps: Sequence[Tap], *, skip: Callable[[int], bool] = skip_nothing, cache: KeyValueCache | None = None
    ) -> Activations:
        """Runs every segment (run of tokens) of a forest (token segments arranged in trees) once, and returns the activations of the
        segments that are marked as read.

        Args:
            forest: the forest to run; this method sets the field ``cached`` of its segments.
            taps: the taps (places in the model) at which activations are read.
            skip: function that returns true if the segment with a given index can be skipped, called before the segment is run. A skipped
                segment and the segments that continue it are not run.
            cache: a cache of keys and values of earlier forests, to which newly computed keys and values are added.
        """

    def over(self, decoder: Decoder, reader: TapReader) -> Backbone:
        """Returns a backbone that runs a copy of this backbone's decoder, with other weights, in the same way.

        Args:
            decoder: the copy.
            reader: reader of the copy's activations.
        """
