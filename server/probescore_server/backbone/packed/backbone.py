"""Runs a forest of segments (runs of tokens arranged in trees) as packed rows, with a variable-length attention kernel: the packed
backbone.

A packed row holds the tokens of several sequences, one after the other. This is for CUDA devices, which many small forward passes would
leave idle. A long forest takes several passes, one per row, parents before children, and a segment may be divided between two rows. No code
in this module makes the host wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.attention.varlen import varlen_attn

from probescore.types import Tap
from probescore_server.backbone.base import Activations, skip_nothing
from probescore_server.backbone.forest import Forest
from probescore_server.backbone.kv_cache import KeyValueCache, KeyValues, length_of
from probescore_server.backbone.model_loading import Decoder
from probescore_server.backbone.packed.attention import PACKED_ATTENTION, Kernel, PackedAttention, PackedPlan
from probescore_server.backbone.taps import RowMap, TapReader
from probescore_server.backbone.universal.attention import attending

MAX_PASS_TOKENS = 16_384
"""Limits the tokens of one packed row, which goes through the model in one pass. The limit bounds the memory of the pass's activations."""

KEYS_PER_TOKEN = 8
"""Limits the keys that are gathered for one packed row, as a multiple of the maximum of tokens of a row.

This bounds the memory of the copies of keys when many segments (runs of tokens) continue one long segment.
"""


class PackedBackbone:
    """Backbone that runs forests of segments (runs of tokens) through a frozen decoder, many segments at once in one packed row.

    Args:
        decoder: the model; ``packed_refusal`` must return ``None`` for it.
        reader: reader of the model's activations at taps (places in the model).
        kernel: variable-length attention kernel.
        max_pass_tokens: the largest number of tokens of one row.
    """

    name = "packed"

    def __init__(
        self, decoder: Decoder, reader: TapReader, kernel: Kernel = varlen_attn, *, max_pass_tokens: int = MAX_PASS_TOKENS
    ) -> None:
        self._decoder = decoder
        self._reader = reader
        self._kernel = kernel
        self._max_pass_tokens = max_pass_tokens

    @torch.inference_mode()
    def forward(
        self, forest: Forest, taps: Sequence[Tap], *, skip: Callable[[int], bool] = skip_nothing, cache: KeyValueCache | None = None
    ) -> Activations:
        """Runs every segment (run of tokens) of a forest (token segments arranged in trees) once, with the arguments and the result of
        ``Backbone.forward``.

        ``skip`` is called for a segment when the row that the segment belongs to is laid out.
        """
        activations = Activations.empty(forest, taps, self._decoder.config.hidden_size, self._decoder.device)
        known = _KnownKeyValues(forest, cache)
        for parts in _passes(forest, skip, known, self._max_pass_tokens):
            plan, earlier = _plan(forest, parts, known, activations, self._decoder.device)
            known.add(parts, self._run(plan, earlier, activations, keep=known.wants(parts)))
        return activations

    def over(self, decoder: Decoder, reader: TapReader) -> PackedBackbone:
        """Returns a backbone that runs a copy of this backbone's decoder in the same way, as ``Backbone.over`` says."""
        return PackedBackbone(decoder, reader, self._kernel, max_pass_tokens=self._max_pass_tokens)

    def _run(self, plan: PackedPlan, earlier: Sequence[KeyValues], activations: Activations, *, keep: bool) -> KeyValues:
        """Runs one packed row through the model. It returns the row's keys and values, one pair for each layer, or an empty list if
        ``keep`` is false.
        """
        attention = PackedAttention(plan, earlier, self._kernel, keep=keep)
        rows = RowMap(plan.read_rows, plan.output_rows)
        with attending(self._decoder, PACKED_ATTENTION), self._reader.reading(activations.rows, rows):
            output = self._decoder.model(
                input_ids=plan.token_ids.unsqueeze(0),
                position_ids=plan.position_ids.unsqueeze(0),
                use_cache=False,
                packed_attention=attention,
            )
        if attention.layers != len(self._decoder.blocks):
            raise RuntimeError(f"{attention.layers} of {len(self._decoder.blocks)} blocks attended through the packed path")
        self._reader.read_final_norm(output, activations.rows, rows)
        return attention.computed


@dataclass(frozen=True, slots=True)
class _SegmentSlice:
    """Value object for the tokens from ``start`` to before ``end`` of a segment (a run of tokens), which form one sequence of a packed
    row.
    """

    segment: int
    start: int
    end: int


class _KnownKeyValues:
    """Store of the keys and values that later forward passes over a forest of segments (runs of tokens arranged in trees) attend to. The
    keys and values come from a cache or from earlier passes.
    """

    def __init__(self, forest: Forest, cache: KeyValueCache | None) -> None:
        self._forest = forest
        self._cache = cache
        self._pieces: dict[int, list[KeyValues]] = {}
        # for each segment, this is the last segment that continues it, or itself
        self._last_use = list(range(len(forest.segments)))
        for index in reversed(range(len(forest.segments))):
            parent = forest.segments[index].parent
            if parent is not None:
                self._last_use[parent] = max(self._last_use[parent], self._last_use[index])

    def of(self, segment: int) -> list[KeyValues]:
        """Returns the stored keys and values of the first tokens of a segment (run of tokens), as a list of consecutive pieces."""
        return self._pieces.get(segment, [])

    def look_up(self, index: int) -> None:
        """Takes the keys and values of a segment (run of tokens) from the cache, if the segment's activations are not needed and the cache
        also has the keys and values of all tokens before the segment.
        """
        segment = self._forest.segments[index]
        segment.cached = 0
        parent = None if segment.parent is None else self._forest.segments[segment.parent]
        if self._cache is None or segment.read or (parent is not None and parent.cached < len(parent.token_ids)):
            return
        found = self._cache.longest_prefix(self._forest.ids_up_to(index))
        if length_of(found) > segment.position:
            segment.cached = length_of(found) - segment.position
            self._pieces[index] = [[_tokens(layer, segment.position, length_of(found)) for layer in found]]

    def wants(self, parts: Sequence[_SegmentSlice]) -> bool:
        """Returns whether the keys and values that a pass computes are needed after the pass, by later passes or by the cache."""
        return self._cache is not None or any(self._is_used_after(part.segment, parts) for part in parts)

    def add(self, parts: Sequence[_SegmentSlice], computed: KeyValues) -> None:
        """Adds the keys and values of a pass to the cache, stores those that later passes need, and drops stored ones that are no longer
        needed.
        """
        row = 0
        for part in parts:
            segment = self._forest.segments[part.segment]
            tail = [_tokens(layer, row, row + part.end - part.start) for layer in computed]
            row += part.end - part.start
            if self._cache is not None:
                self._cache.put(self._forest.ids_up_to(part.segment)[: segment.position + part.end], tail)
            if self._is_used_after(part.segment, parts):
                # copied, since a view of a tensor keeps the whole row in memory
                self._pieces.setdefault(part.segment, []).append([(keys.clone(), values.clone()) for keys, values in tail])
        for index in [index for index in self._pieces if not self._is_used_after(index, parts)]:
            del self._pieces[index]

    def _is_used_after(self, segment: int, parts: Sequence[_SegmentSlice]) -> bool:
        last = parts[-1]
        is_finished = last.end == len(self._forest.segments[last.segment].token_ids)
        return self._last_use[segment] >= last.segment + is_finished


def _passes(forest: Forest, skip: Callable[[int], bool], known: _KnownKeyValues, max_tokens: int) -> Iterator[list[_SegmentSlice]]:
    """Yields, for each packed row, the list of slices of segments (runs of tokens) that make up the row. Each row must have run before the
    next one is requested.
    """
    parts: list[_SegmentSlice] = []
    tokens = keys = 0
    skipped: set[int | None] = set()
    for index, segment in enumerate(forest.segments):
        if segment.parent in skipped or skip(index):
            skipped.add(index)
            continue
        known.look_up(index)
        start = segment.cached
        while start < len(segment.token_ids):
            end = min(start + max_tokens - tokens, len(segment.token_ids))
            if parts and (end == start or keys + segment.position + end > KEYS_PER_TOKEN * max_tokens):
                yield parts
                parts, tokens, keys = [], 0, 0
                continue
            parts.append(_SegmentSlice(index, start, end))
            tokens += end - start
            keys += segment.position + end
            start = end
    if parts:
        yield parts


def _plan(
    forest: Forest, parts: Sequence[_SegmentSlice], known: _KnownKeyValues, activations: Activations, device: torch.device
) -> tuple[PackedPlan, list[KeyValues]]:
    """Returns a packed row's layout, and the keys and values of earlier tokens in the order to which the layout's indices refer."""
    chains = [_chain(forest, part.segment) for part in parts]
    earlier: list[KeyValues] = []
    rows: dict[int, list[NDArray[np.int64]]] = {}
    end = 0
    for index in dict.fromkeys(index for chain in chains for index in chain):
        rows[index] = []
        for piece in known.of(index):
            earlier.append(piece)
            rows[index].append(np.arange(end, end := end + length_of(piece)))
    for part in parts:
        rows[part.segment].append(np.arange(end, end := end + part.end - part.start))

    segments = [forest.segments[part.segment] for part in parts]
    starts = np.cumsum([0, *(part.end - part.start for part in parts)])
    keys = [segment.position + part.end for segment, part in zip(segments, parts, strict=True)]
    read = [(row, part) for row, part in zip(starts[:-1], parts, strict=True) if forest.segments[part.segment].read]

    def staged(pieces: Sequence[NDArray[np.integer]], dtype: type[np.integer] = np.int64) -> torch.Tensor:
        return _to_device(np.concatenate([np.zeros(0, dtype), *pieces]).astype(dtype), device)

    plan = PackedPlan(
        token_ids=staged([s.token_ids[part.start : part.end] for s, part in zip(segments, parts, strict=True)]),
        position_ids=staged([np.arange(s.position + part.start, s.position + part.end) for s, part in zip(segments, parts, strict=True)]),
        key_rows=staged([piece for chain in chains for index in chain for piece in rows[index]]),
        cu_seq_q=staged([starts], np.int32),
        cu_seq_k=staged([np.cumsum([0, *keys])], np.int32),
        max_q=int(np.diff(starts).max()),
        max_k=max(keys),
        read_rows=staged([np.arange(row, row + part.end - part.start) for row, part in read]),
        output_rows=staged([activations.starts[part.segment] + np.arange(part.start, part.end) for _, part in read]),
    )
    return plan, earlier


def _chain(forest: Forest, index: int) -> list[int]:
    """Returns the indices of a segment (run of tokens) and of all segments before the segment in its sequence, root first."""
    chain = [index]
    while (parent := forest.segments[chain[-1]].parent) is not None:
        chain.append(parent)
    return chain[::-1]


def _tokens(layer: tuple[torch.Tensor, torch.Tensor], start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns one layer's keys and values of the tokens from index ``start`` to before ``end``."""
    keys, values = layer
    return keys[:, :, start:end], values[:, :, start:end]


def _to_device(array: NDArray[np.integer], device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
