"""Runs a forest of segments (runs of tokens arranged in trees) through transformers' cache API, short sequences together: the universal
backbone.

Each segment is run once, after the keys and values of its parent. For a segment whose activations no probe needs, the forward pass ends as
soon as its keys and values are computed. This project adds no masks, which an architecture could interpret differently, and
padding only behind what is read, so every model with which transformers can generate can be scored.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import takewhile

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from probescore.types import Tap
from probescore_server.backbone.base import Activations, skip_nothing
from probescore_server.backbone.forest import Forest
from probescore_server.backbone.kv_cache import KeyValueCache, KeyValues, length_of
from probescore_server.backbone.model_loading import Decoder
from probescore_server.backbone.taps import RowMap, TapReader
from probescore_server.backbone.universal.attention import attending
from probescore_server.backbone.universal.rows import MAX_ROW_TOKENS, Row, shared_beginnings, short_row, together

CHUNK_TOKENS = 2048
"""Limits the tokens of one forward pass. The limit bounds the memory that a long rollout needs at once; a larger limit would not be
faster.
"""


class _StopForward(Exception):
    """Exception that ends a forward pass early, once the keys and values that later tokens need are computed and no further output is
    needed.
    """


class _SequenceState(DynamicCache):
    """Key-value cache of one sequence, which can end a forward pass as soon as the keys and values of a given layer are computed."""

    ends_at: int | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **keywords: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        updated = super().update(key_states, value_states, layer_idx, *args, **keywords)
        if layer_idx == self.ends_at:
            raise _StopForward
        return updated


class UniversalBackbone:
    """Backbone that runs forests of segments (runs of tokens) through a frozen decoder with transformers' public cache API.

    Args:
        decoder: the model.
        reader: reader of the model's activations at taps (places in the model).
        attention: name of an attention function that is registered in transformers; ``None`` = the one that transformers chose.
        runs_together: whether short sequences are run together, as the rows of one forward pass.

    Attributes:
        runs_together: as given.
        device: device that token ids are moved to.
        keeps_key_values: whether the model's state after a sequence consists only of keys and values of each token, so that
            ``KeyValueCache`` can store the state.
    """

    name = "universal"

    def __init__(self, decoder: Decoder, reader: TapReader, attention: str | None = None, *, runs_together: bool = False) -> None:
        self.runs_together = runs_together
        self._decoder = decoder
        self._reader = reader
        self._attention = attention
        self.device = decoder.device
        self._takes_positions = "position_ids" in inspect.signature(decoder.model.forward).parameters
        self.keeps_key_values = _keeps_key_values(decoder)

    @torch.inference_mode()
    def forward(
        self, forest: Forest, taps: Sequence[Tap], *, skip: Callable[[int], bool] = skip_nothing, cache: KeyValueCache | None = None
    ) -> Activations:
        """Runs every segment (run of tokens) of a forest (token segments arranged in trees) once, with the arguments and the result of
        ``Backbone.forward``.

        ``skip`` is called again before each ``CHUNK_TOKENS`` tokens of a segment.
        """
        activations = Activations.empty(forest, taps, self._decoder.config.hidden_size, self._decoder.device)
        with attending(self._decoder, self._attention):
            _ForestRun(self, forest, activations, skip, cache if self.keeps_key_values else None).run_all()
        return activations

    def over(self, decoder: Decoder, reader: TapReader) -> UniversalBackbone:
        """Returns a backbone that runs a copy of this backbone's decoder in the same way, as ``Backbone.over`` says."""
        return UniversalBackbone(decoder, reader, self._attention, runs_together=self.runs_together)

    def start(self, known: KeyValues) -> _SequenceState:
        """Returns the state of a sequence (its key-value cache) after the tokens with the given keys and values."""
        if not self.keeps_key_values:
            state = _SequenceState(config=self._decoder.config)
            state.layers = self._decoder.cache_layers
            return state
        # Without a config the state keeps every token also where a layer sees only a window: all that a longer sequence needs is there.
        state = _SequenceState()
        for layer, (keys, values) in enumerate(known):
            state.update(keys, values, layer)
        return state

    def read_tokens(self, token_ids: NDArray[np.int32], position: int, state: _SequenceState, into: Mapping[Tap, torch.Tensor]) -> None:
        """Runs further tokens of a sequence, extends the sequence's state by these tokens, and copies their activations to buffers.

        Args:
            token_ids: ``(T,)`` int32, the tokens.
            position: position of the first token in its sequence.
            state: state of the sequence before these tokens, which is extended in place.
            into: a dictionary, keyed by tap, of buffers ``(T, hidden_size)`` float32; empty = no activations are copied.
        """
        self.read_rows(token_ids[None], position, state, into)

    def read_rows(
        self,
        token_ids: NDArray[np.int32],
        position: int,
        state: _SequenceState,
        into: Mapping[Tap, torch.Tensor],
        rows: RowMap | None = None,
    ) -> None:
        """Runs further tokens of several sequences in one forward pass, extends the sequences' states by these tokens, and copies their
        activations to buffers.

        Args:
            token_ids: ``(B, T)`` int32, the tokens of each sequence.
            position: position of the first token in every sequence.
            state: states of the ``B`` sequences before these tokens; it is changed.
            into: a dictionary, keyed by tap (place in the model), of buffers ``(N, hidden_size)`` float32; empty = no activations are
                copied.
            rows: which tokens, counted through all sequences, go to which rows of the buffers; ``None`` = all, in order.
        """
        ids = torch.from_numpy(token_ids.astype(np.int64)).to(self._decoder.device)
        positions = {}
        if self._takes_positions:
            numbers = torch.arange(position, position + ids.shape[1], device=ids.device)
            positions = {"position_ids": numbers.expand(ids.shape)}
        state.ends_at = len(self._decoder.blocks) - 1 if self.keeps_key_values and not into else None
        with self._reader.reading(into, rows), suppress(_StopForward):
            output = self._decoder.model(input_ids=ids, past_key_values=state, use_cache=True, **positions)
            self._reader.read_final_norm(output, into, rows)


class _ForestRun:
    """Computation of one forest of segments (runs of tokens arranged in trees) by a backbone, the code that runs the model; depth first."""

    def __init__(
        self,
        backbone: UniversalBackbone,
        forest: Forest,
        activations: Activations,
        skip: Callable[[int], bool],
        cache: KeyValueCache | None,
    ) -> None:
        self._backbone = backbone
        self._forest = forest
        self._activations = activations
        self._skip = skip
        self._cache = cache
        self._children = forest.children()

    def run_all(self) -> None:
        self._run_siblings(self._children[-1], None)

    def _run_siblings(self, siblings: Sequence[int], state: _SequenceState | None) -> None:
        """Runs all segments (runs of tokens) that continue the same segment, and the segments that continue these. The given state, with
        the keys and values of the tokens before the segments, is changed and must not be used afterwards.
        """
        alone = [*siblings]
        for rows in self._together(alone, state):
            self._run_rows(rows, state)
            alone = _without(alone, rows)
        for trunks in self._trunks(alone, state):
            self._run_trunks(trunks, state)
            alone = _without(alone, trunks)
        for child in alone[:-1]:
            self._run(child, None if state is None else _fork(state))
        if alone:
            self._run(alone[-1], state)

    def _run(self, index: int, state: _SequenceState | None) -> None:
        """Runs a segment (run of tokens) and then the segments that continue the segment.

        ``state`` contains the keys and values of the tokens before the segment, and is extended by those of the segment's own tokens.
        """
        segment = self._forest.segments[index]
        known = self._known(index)
        segment.cached = max(0, length_of(known) - segment.position)
        if segment.cached or state is None:
            state = self._backbone.start(known)
        if self._compute(index, state):
            self._run_siblings(self._children[index], state)

    def _together(self, siblings: Sequence[int], state: _SequenceState | None) -> Iterator[list[Row]]:
        """Yields, for each forward pass that several short sequences share, the list of these sequences; each becomes a row of the pass."""
        if not self._backbone.runs_together or (state is not None and not self._backbone.keeps_key_values):
            return  # a state that is more than keys and values cannot be told to be several
        rows = [row for index in siblings if (row := short_row(self._forest, self._children, index)) is not None]
        for batch in together(self._not_in_cache(rows)):
            if len(batch) > 1:
                yield batch

    def _trunks(self, siblings: Sequence[int], state: _SequenceState | None) -> Iterator[list[Row]]:
        """Yields, for each forward pass that several short segments (runs of tokens) share before their sequences branch, the list of these
        segments, each a row of the pass.

        All rows of a pass have the same length: what continues them then stands at the same position in each.
        """
        if not self._backbone.runs_together or not self._backbone.keeps_key_values:
            return
        by_length: dict[int, list[Row]] = {}
        for index in siblings:
            length = len(self._forest.segments[index].token_ids)
            if length <= MAX_ROW_TOKENS and self._children[index]:
                by_length.setdefault(length, []).append(Row((index,), length))
        for rows in by_length.values():
            for batch in together(self._not_in_cache(rows)):
                if len(batch) > 1:
                    yield batch

    def _run_trunks(self, trunks: Sequence[Row], state: _SequenceState | None) -> None:
        """Runs several segments (runs of tokens) of one length, which continue the same segment, in one forward pass, and then the segments
        that continue them.
        """
        states, wanted = self._run_rows(trunks, state)
        if states is None:
            return
        row_of = {index: number for number, (index,) in enumerate(wanted)}
        continuing = [child for index in row_of for child in self._children[index]]
        rows = [row for index in continuing if (row := short_row(self._forest, self._children, index)) is not None]
        for batch in together(self._not_in_cache(rows)):
            self._run_rows(batch, states, row_of)
            continuing = _without(continuing, batch)
        for index in continuing:
            parent = self._forest.segments[index].parent
            self._run(index, None if parent is None else _rows_of(states, [row_of[parent]]))

    def _not_in_cache(self, rows: Sequence[Row]) -> list[Row]:
        """Returns those of several sequences that are not better run alone because of what is in the cache."""
        if self._cache is None:
            return [*rows]
        return [row for row, shared in zip(rows, shared_beginnings(self._forest, rows), strict=True) if not self._is_in_cache(row, shared)]

    def _run_rows(
        self, rows: Sequence[Row], state: _SequenceState | None, row_of: Mapping[int, int] | None = None
    ) -> tuple[_SequenceState | None, list[list[int]]]:
        """Runs several sequences in one forward pass. A sequence is run only up to the first of its segments (runs of tokens) for which no
        client waits any more.

        Args:
            rows: the sequences.
            state: state of what the sequences continue; ``None`` = they continue nothing.
            row_of: a dictionary from the index of the segment that a sequence continues to its row in the state; ``None`` = the state has
                one row, which all continue.

        Returns:
            The state of the sequences that were run, and their segments, row by row; ``None`` and no rows if none was wanted.
        """
        segments = self._forest.segments
        wanted = [list(takewhile(lambda index: not self._skip(index), row.segments)) for row in rows]
        wanted = [row for row in wanted if row]
        if not wanted:
            return None, []
        sequences = [np.concatenate([segments[index].token_ids for index in row]) for row in wanted]
        width = max(map(len, sequences))
        # padded with a token of its own: any other might stand for something else than text
        token_ids = np.stack([np.pad(ids, (0, width - len(ids)), mode="edge") for ids in sequences])
        source, target = [], []
        for number, row in enumerate(wanted):
            place = number * width
            for index in row:
                length = len(segments[index].token_ids)
                segments[index].cached = 0
                if index in self._activations.starts:
                    source.append(np.arange(place, place + length))
                    target.append(self._activations.starts[index] + np.arange(length))
                place += length
        into: Mapping[Tap, torch.Tensor] = {}
        row_map = None
        if source:
            into = self._activations.rows
            row_map = RowMap(*(torch.from_numpy(np.concatenate(places)).to(self._backbone.device) for places in (source, target)))
        continued = [0 if row_of is None else row_of[segments[row[0]].parent or 0] for row in wanted]
        states = self._backbone.start([]) if state is None else _rows_of(state, continued)
        self._backbone.read_rows(token_ids, segments[wanted[0][0]].position, states, into, row_map)
        for number, (row, ids) in enumerate(zip(wanted, sequences, strict=True)):
            own, length = slice(number, number + 1), len(ids)
            self._remember(row[-1], [(keys[own, :, :length], values[own, :, :length]) for keys, values in _tail(states, width)])
        return states, wanted

    def _is_in_cache(self, row: Row, shared: int) -> bool:
        """Returns whether a sequence is better run alone than together with others, because keys and values of most of its tokens are in
        the cache, or will be once another sequence that begins with the same ``shared`` tokens has run.
        """
        first = self._forest.segments[row.segments[0]]
        if self._cache is None or first.read:
            return False
        found = self._cache.known_tokens(self._forest.ids_up_to(row.segments[0])) - first.position
        return found == len(first.token_ids) or min(max(found, shared), len(first.token_ids)) > row.tokens / 2

    def _known(self, index: int) -> KeyValues:
        """Returns the cached keys and values of a sequence up to the end of the segment (run of tokens) with the given index.

        The list is empty for a segment whose activations probes need, since keys and values do not determine activations.
        """
        if self._cache is None or self._forest.segments[index].read:
            return []
        return self._cache.longest_prefix(self._forest.ids_up_to(index))

    def _compute(self, index: int, state: _SequenceState) -> bool:
        """Runs, in chunks, those tokens of a segment (run of tokens) that are not cached. It returns false if the segment was skipped on
        the way.
        """
        segment = self._forest.segments[index]
        length = len(segment.token_ids)
        for start in range(segment.cached, length, CHUNK_TOKENS):
            if self._skip(index):
                return False
            chunk = segment.token_ids[start : start + CHUNK_TOKENS]
            into: dict[Tap, torch.Tensor] = {}
            if index in self._activations.starts:
                first = self._activations.starts[index] + start
                into = {tap: rows[first : first + len(chunk)] for tap, rows in self._activations.rows.items()}
            self._backbone.read_tokens(chunk, segment.position + start, state, into)
        if segment.cached == length:
            return not self._skip(index)
        self._remember(index, _tail(state, length - segment.cached))
        return True

    def _remember(self, index: int, tail: KeyValues) -> None:
        """Stores in the cache the keys and values that were computed up to the end of a segment (run of tokens), unless they contain NaN or
        an infinity: such numbers would reach every later rollout that begins with the same tokens. A number that is not finite at some
        layer leaves none finite at the last layer, so only the last layer is looked at.
        """
        if self._cache is not None and tail and bool(torch.isfinite(tail[-1][0]).all()):
            self._cache.put(self._forest.ids_up_to(index), tail)


def _keeps_key_values(decoder: Decoder) -> bool:
    """Returns whether every layer of the cache that transformers makes for a model stores keys and values of full or windowed attention."""
    layers = decoder.cache_layers
    is_chunked = getattr(decoder.config, "attention_chunk_size", None) is not None
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    return plain and not is_chunked and len(layers) == len(decoder.blocks)


def _fork(state: _SequenceState) -> _SequenceState:
    """Returns a copy of a sequence's state (its keys and values) that can be extended independently.

    Plain layers replace their tensors by longer ones, so that both copies may begin with the same tensor. Recurrent layers change their
    tensors in place: only a deep copy is safe for every architecture.
    """
    forked = copy.copy(state)
    forked.layers = [
        copy.copy(layer) if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) else copy.deepcopy(layer) for layer in state.layers
    ]
    return forked


def _rows_of(state: _SequenceState, continued: Sequence[int]) -> _SequenceState:
    """Returns the states (key-value caches) of sequences that continue other sequences, whose own states remain usable.

    Args:
        state: the states of the other sequences, row by row.
        continued: for each sequence, the row of the one that it continues.
    """
    rows = _fork(state)
    for layer in rows.layers:
        if isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None:
            held = (layer.keys, layer.values)
            if len(layer.keys) == 1:
                layer.keys, layer.values = (each.expand(len(continued), -1, -1, -1) for each in held)
            else:
                numbers = torch.tensor(continued, device=layer.keys.device)
                layer.keys, layer.values = (each.index_select(0, numbers) for each in held)
    return rows


def _without(segments: Sequence[int], rows: Sequence[Row]) -> list[int]:
    """Returns the segments (runs of tokens) with which none of several sequences begins."""
    first = {row.segments[0] for row in rows}
    return [index for index in segments if index not in first]


def _tail(state: _SequenceState, count: int) -> KeyValues:
    """Returns the keys and values of the last ``count`` tokens of a sequence. The list is empty if some layer has no keys and values of its
    own.
    """
    layers = [(layer.keys, layer.values) for layer in state.layers if isinstance(layer, DynamicLayer)]
    if any(keys is None or values is None for keys, values in layers):
        return []
    return [(keys[:, :, -count:], values[:, :, -count:]) for keys, values in layers if keys is not None and values is not None]
