"""The universal path: a forest through transformers' public cache API, one segment at a time.

Each segment is run once, after a copy of its parent's cache. No padding and no mask of ours, which an architecture could read another way:
whatever transformers can generate with, this can score.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from probescore.types import Tap
from probescore_server.backbone.forest import Forest
from probescore_server.backbone.loading import Decoder
from probescore_server.backbone.taps import TapReader


@dataclass(frozen=True, eq=False)
class Activations:
    """What was read of a forest.

    Attributes:
        rows: by tap ``(N, hidden_size)`` float32 on the model's device: the segments that are read, one after the other.
        starts: by segment, its first row. Rows of a segment that was skipped hold nothing of meaning.
    """

    rows: Mapping[Tap, torch.Tensor]
    starts: Mapping[int, int]


class UniversalBackbone:
    """A frozen decoder that runs forests."""

    name = "universal"

    def __init__(self, decoder: Decoder, reader: TapReader) -> None:
        self._decoder = decoder
        self._reader = reader
        self._takes_positions = "position_ids" in inspect.signature(decoder.model.forward).parameters

    @torch.inference_mode()
    def forward(self, forest: Forest, taps: Sequence[Tap], *, skip: Callable[[int], bool] = lambda _: False) -> Activations:
        """Runs every segment once.

        Args:
            forest: what to run.
            taps: where to read.
            skip: asked before each segment; a segment that is skipped, and everything after it, is not run.
        """
        starts: dict[int, int] = {}
        total = 0
        for index, segment in enumerate(forest.segments):
            if segment.read:
                starts[index] = total
                total += len(segment.token_ids)
        hidden_size = self._decoder.config.hidden_size
        rows = {tap: torch.empty((total, hidden_size), dtype=torch.float32, device=self._decoder.device) for tap in taps}
        children = forest.children()

        def run(index: int, cache: DynamicCache) -> None:
            if skip(index):
                return
            segment = forest.segments[index]
            into = {}
            if index in starts:
                into = {tap: tensor[starts[index] : starts[index] + len(segment.token_ids)] for tap, tensor in rows.items()}
            self._run_segment(segment.token_ids, segment.position, cache, into)
            run_all(children[index], cache)

        def run_all(indices: list[int], cache: DynamicCache) -> None:
            for index in indices[:-1]:
                # recurrent layers update their state in place, so that only a deep copy is safe for every architecture
                run(index, copy.deepcopy(cache))
            if indices:
                run(indices[-1], cache)

        for root in children[-1]:
            run(root, DynamicCache(config=self._decoder.config))
        return Activations(rows, starts)

    def _run_segment(self, token_ids: object, position: int, cache: DynamicCache, into: Mapping[Tap, torch.Tensor]) -> None:
        ids = torch.as_tensor(token_ids, dtype=torch.long, device=self._decoder.device).unsqueeze(0)
        positions = {}
        if self._takes_positions:
            positions = {"position_ids": torch.arange(position, position + ids.shape[1], device=ids.device).unsqueeze(0)}
        with self._reader.reading(into):
            output = self._decoder.model(input_ids=ids, past_key_values=cache, use_cache=True, **positions)
        self._reader.read_final_norm(output, into)
