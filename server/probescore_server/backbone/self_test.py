"""At load: does running a forest give what one plain forward of each rollout gives, on these weights?"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from probescore.types import Scope, Tap
from probescore_server.backbone.forest import Forest
from probescore_server.backbone.loading import Decoder
from probescore_server.backbone.taps import TapReader
from probescore_server.backbone.universal import UniversalBackbone
from probescore_server.errors import ModelRefused
from probescore_server.rollouts import Continuation, Rollout, ScoreOptions

MAX_TEST_TOKENS = 1536
"""Longest rollout of the test. A window beyond it is not crossed: on a CPU the test would take longer than the load."""

ROW_ERROR_BOUND = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""Relative error of a token's activations that nine in ten must stay below; the rest may be tokens that a router sends elsewhere."""

_COMPLETION, _SHORT, _FOLLOW_UP = 24, 7, 9


def self_test(decoder: Decoder, reader: TapReader, backbone: UniversalBackbone) -> float:
    """Runs a small forest, longer than any sliding window, both ways.

    Returns:
        The 90th percentile over tokens of the relative error, at the output of the deepest block.

    Raises:
        ModelRefused: it exceeds ``ROW_ERROR_BOUND``, or the model cannot be run through the cache at all.
    """
    tap = Tap("resid_post", len(decoder.blocks) - 1)
    forest = _small_forest(decoder)
    kind = decoder.config.model_type
    try:
        read = backbone.forward(forest, [tap])
        errors = []
        for index, start in read.starts.items():
            expected = _plain(decoder, reader, tap, _ids_up_to(forest, index))[-len(forest.segments[index].token_ids) :]
            found = read.rows[tap][start : start + len(expected)]
            errors.append((found - expected).norm(dim=1) / expected.norm(dim=1))
    except Exception as error:  # whatever an architecture raises whose cache is not the public one
        raise ModelRefused(f"a {kind} model cannot be run with a cache: {type(error).__name__}: {error}") from error
    worst = float(torch.cat(errors).quantile(0.9))
    if not worst <= ROW_ERROR_BOUND[decoder.dtype]:
        raise ModelRefused(
            f"self-test: with shared prompts this {kind} model gives other activations than alone: relative error {worst:.2g}, "
            f"allowed {ROW_ERROR_BOUND[decoder.dtype]:g}"
        )
    return worst


def _small_forest(decoder: Decoder) -> Forest:
    """A prompt just short of the window, a completion that crosses it, a follow-up beyond it, and a second completion beside."""
    longest = min(MAX_TEST_TOKENS, getattr(decoder.config, "max_position_embeddings", None) or MAX_TEST_TOKENS)
    prompt = min(max(_windows(decoder), default=32), longest - _COMPLETION - _FOLLOW_UP) - 8
    random = np.random.default_rng(0)

    def ids(count: int) -> NDArray[np.int32]:
        return random.integers(0, decoder.config.vocab_size, max(count, 1), np.int32)

    shared = ids(prompt)
    options = ScoreOptions(probes=(), scope=Scope.ALL)
    crossing = Continuation(ids(_COMPLETION), follow_ups=(Continuation(ids(_FOLLOW_UP)), Continuation(ids(1))))
    return Forest.build([Rollout(shared, crossing, options), Rollout(shared, Continuation(ids(_SHORT)), options)], {})


def _windows(decoder: Decoder) -> list[int]:
    found = (getattr(decoder.config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return [window for window in found if isinstance(window, int) and window > 0]


def _ids_up_to(forest: Forest, index: int) -> NDArray[np.int32]:
    segment = forest.segments[index]
    if segment.parent is None:
        return segment.token_ids
    return np.concatenate([_ids_up_to(forest, segment.parent), segment.token_ids])


@torch.inference_mode()
def _plain(decoder: Decoder, reader: TapReader, tap: Tap, token_ids: NDArray[np.int32]) -> torch.Tensor:
    """One sequence, without a cache; ``(T, hidden_size)`` float32."""
    ids = torch.from_numpy(token_ids).long().unsqueeze(0).to(decoder.device)
    buffer = torch.empty((len(token_ids), decoder.config.hidden_size), dtype=torch.float32, device=decoder.device)
    with reader.reading({tap: buffer}):
        decoder.model(input_ids=ids, use_cache=False)
    return buffer
