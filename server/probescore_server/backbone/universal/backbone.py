"""Runs a forest of segments (runs of tokens arranged in trees) through transformers' public cache API, one segment at a time: the universal
backbone.

Each segment is run once, after the keys and values of its parent. For a segment whose activations no probe needs, the forward pass ends as
soon as its keys and values are computed. This project adds neither padding nor masks, which an architecture could interpret differently, so
every model with which transformers can generate can be scored.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

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
from probescore_server.backbone.taps import TapReader
from probescore_server.backbone.universal.attention import attending

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

    Attributes:
        keeps_key_values: whether the model's state after a sequence consists only of keys and values of each token, so that
            ``KeyValueCache`` can store the state.
    """

    name = "universal"

    def __init__(self, decoder: Decoder, reader: TapReader, attention: str | None = None) -> None:
        self._decoder = decoder
        self._reader = reader
        self._attention = attention
        self._takes_positions = "position_ids" in inspect.signature(decoder.model.forward).parameters
        self.keeps_key_values = _keeps_key_values(decoder)

    @torch.inference_mode()
    def forward(
        self, forest: Forest, taps: Sequence[Tap], *, skip: Callable[[int], bool] = skip_nothing, cache: KeyValueCache | None = None
    ) -> Activations:
        """Runs every segment (run of tokens) of a forest once, with the arguments and the result of ``Backbone.forward``.

        ``skip`` is called again before each ``CHUNK_TOKENS`` tokens of a segment.
        """
        activations = Activations.empty(forest, taps, self._decoder.config.hidden_size, self._decoder.device)
        with attending(self._decoder, self._attention):
            _ForestRun(self, forest, activations, skip, cache if self.keeps_key_values else None).run_all()
        return activations

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
        ids = torch.from_numpy(token_ids.astype(np.int64)).to(self._decoder.device).unsqueeze(0)
        positions = {}
        if self._takes_positions:
            positions = {"position_ids": torch.arange(position, position + ids.shape[1], device=ids.device).unsqueeze(0)}
        state.ends_at = len(self._decoder.blocks) - 1 if self.keeps_key_values and not into else None
        with self._reader.reading(into), suppress(_StopForward):
            output = self._decoder.model(input_ids=ids, past_key_values=state, use_cache=True, **positions)
            self._reader.read_final_norm(output, into)


class _ForestRun:
    """Run of one forest of segments (runs of tokens arranged in trees) through a backbone, depth first."""

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
        for root in self._children[-1]:
            self._run(root, None)

    def _run(self, index: int, state: _SequenceState | None) -> None:
        """Runs a segment (run of tokens) and then the segments that continue the segment.

        ``state`` contains the keys and values of the tokens before the segment, and is extended by those of the segment's own tokens.
        """
        segment = self._forest.segments[index]
        known = self._known(index)
        segment.cached = max(0, length_of(known) - segment.position)
        if segment.cached or state is None:
            state = self._backbone.start(known)
        if not self._compute(index, state):
            return
        following = self._children[index]
        for child in following[:-1]:
            self._run(child, _fork(state))
        if following:
            self._run(following[-1], state)

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
        if self._cache is not None:
            self._cache.put(self._forest.ids_up_to(index), _tail(state, length - segment.cached))
        return True


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


def _tail(state: _SequenceState, count: int) -> KeyValues:
    """Returns the keys and values of the last ``count`` tokens of a sequence. The list is empty if some layer has no keys and values of its
    own.
    """
    layers = [(layer.keys, layer.values) for layer in state.layers if isinstance(layer, DynamicLayer)]
    if any(keys is None or values is None for keys, values in layers):
        return []
    return [(keys[:, :, -count:], values[:, :, -count:]) for keys, values in layers if keys is not None and values is not None]
