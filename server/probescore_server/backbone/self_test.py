"""Tests a loaded model: activations must be the same whether rollouts share computed tokens or each rollout has a plain forward pass of its
own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from probescore.types import Hook, Scope, Tap
from probescore_server.backbone.base import Activations, Backbone
from probescore_server.backbone.forest import Forest
from probescore_server.backbone.kv_cache import KeyValueCache
from probescore_server.backbone.model_loading import Decoder
from probescore_server.backbone.rotary import max_unchanged_positions
from probescore_server.backbone.taps import TapReader
from probescore_server.errors import ModelRefused
from probescore_server.rollouts import CheckedRollout, Continuation, ResolvedOptions

MAX_TEST_TOKENS = 1536
"""Limits the number of tokens of the longest rollout in the test of a loaded model. A longer sliding window is therefore not crossed by the
test, which on a CPU would then take longer than the loading itself.
"""

ROW_ERROR_BOUND = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""Dictionary, keyed by dtype, of the bound on the relative error of a token's activations in the test of a loaded model. Nine in ten tokens
must stay below the bound; the rest may differ more, for example because the router of a mixture of experts chose other experts for them.
"""

_TEST_CACHE_BYTES = 1 << 30
_OTHER_FAMILIES = "; so its scores would not be the model's, and it cannot be served: docs/reference/parity.md lists the families that can"
_COMPLETION, _SHORT, _FOLLOW_UP = 24, 7, 9


class SelfTest:
    """Test that compares the activations of a backbone (code that runs the model) with plain forward passes, on a few short rollouts that
    share tokens.

    The rollouts are longer than any sliding window of up to ``MAX_TEST_TOKENS`` tokens. The output of the deepest loaded block is compared.

    Args:
        decoder: the model as loaded, before anything in it is changed for speed.
        reader: reader of the model's activations at the taps (places in the model).

    Raises:
        ModelRefused: the model cannot be run.
    """

    def __init__(self, decoder: Decoder, reader: TapReader) -> None:
        self._decoder = decoder
        self._tap = Tap(Hook.RESID_POST, len(decoder.blocks) - 1)
        self._kind = decoder.config.model_type
        forests = (small_forest(decoder), short_forest(decoder))
        try:
            self._expected, self._expected_of_short = (
                [
                    _plain(decoder, reader, self._tap, forest.ids_up_to(index))[-len(segment.token_ids) :]
                    for index, segment in enumerate(forest.segments)
                ]
                for forest in forests
            )
        except Exception as error:  # an architecture may raise anything
            raise ModelRefused(f"a {self._kind} model cannot be run: {type(error).__name__}: {error}") from error

    def row_errors(self, activations: Activations) -> torch.Tensor:
        """Returns the relative error of the activations of each token that the test reads, ``(N,)`` float32."""
        return self._row_errors(activations, self._expected)

    def _row_errors(self, activations: Activations, expected: Sequence[torch.Tensor]) -> torch.Tensor:
        rows = activations.rows[self._tap]
        errors = []
        for index, start in activations.starts.items():
            own = expected[index]
            errors.append((rows[start : start + len(own)] - own).norm(dim=1) / own.norm(dim=1))
        return torch.cat(errors)

    def check_short(self, backbone: Backbone) -> None:
        """Tests that a backbone gives the same activations for short sequences of equal and of different lengths, which it may run together
        in one forward pass, as for each sequence alone.

        Raises:
            ModelRefused: 90 in 100 tokens are not within ``ROW_ERROR_BOUND``, or the model cannot be run so.
        """
        try:
            errors = [
                self._row_errors(backbone.forward(short_forest(self._decoder, scope), [self._tap], cache=cache), self._expected_of_short)
                for scope, cache in ((Scope.ALL, None), (Scope.COMPLETION, KeyValueCache(_TEST_CACHE_BYTES)))
            ]
            worst = float(torch.stack([own.quantile(0.9) for own in errors]).max())
        except Exception as error:  # whatever an architecture raises that takes one sequence at a time only
            raise ModelRefused(f"a {self._kind} model cannot be run on several sequences: {type(error).__name__}: {error}") from error
        if not worst <= ROW_ERROR_BOUND[self._decoder.dtype]:
            raise ModelRefused(f"self-test: short sequences run together are other than alone: relative error {worst:.2g}")

    def check(self, backbone: Backbone) -> float:
        """Runs the test's rollouts through a backbone three times: with all activations, then without those of the prompt, then with the
        prompt's keys and values from a cache.

        Returns:
            The 90th percentile over tokens of the relative error, the largest of the three runs.

        Raises:
            ModelRefused: the error exceeds ``ROW_ERROR_BOUND``, or the model cannot be run with a cache at all.
        """
        filling = KeyValueCache(_TEST_CACHE_BYTES)
        try:
            runs = [
                backbone.forward(small_forest(self._decoder, scope), [self._tap], cache=cache)
                for scope, cache in ((Scope.ALL, None), (Scope.COMPLETION, filling), (Scope.COMPLETION, filling))
            ]
            worst = float(torch.stack([self.row_errors(run).quantile(0.9) for run in runs]).max())  # the maximum is NaN if one value is
        except Exception as error:  # an architecture whose cache is not the public one may raise anything
            problem = f"a {self._kind} model cannot be run with a cache: {type(error).__name__}: {error}"
            raise ModelRefused(problem + _OTHER_FAMILIES) from error
        if not worst <= ROW_ERROR_BOUND[self._decoder.dtype]:
            raise ModelRefused(
                f"self-test: with shared prompts this {self._kind} model gives other activations than alone: relative error {worst:.2g}, "
                f"allowed {ROW_ERROR_BOUND[self._decoder.dtype]:g}{_OTHER_FAMILIES}"
            )
        return worst


def small_forest(decoder: Decoder, scope: Scope = Scope.ALL) -> Forest:
    """Returns a forest (token segments arranged in trees) of two rollouts with one prompt, for tests of a model.

    The prompt is just shorter than the model's sliding window. The first completion crosses the window's length, a follow-up that continues
    this completion lies beyond it, and the second completion is short.
    """
    limits = (MAX_TEST_TOKENS, getattr(decoder.config, "max_position_embeddings", None), max_unchanged_positions(decoder.config))
    longest = min(limit for limit in limits if limit)
    prompt = min(max(_windows(decoder), default=32), longest - _COMPLETION - _FOLLOW_UP) - 8
    random = np.random.default_rng(0)

    def ids(count: int) -> NDArray[np.int32]:
        return random.integers(0, decoder.config.vocab_size, max(count, 1), np.int32)

    shared = ids(prompt)
    options = ResolvedOptions(probes=(), scope=scope)
    crossing = Continuation(ids(_COMPLETION), follow_ups=(Continuation(ids(_FOLLOW_UP)), Continuation(ids(1))))
    return Forest.build([CheckedRollout(shared, crossing, options), CheckedRollout(shared, Continuation(ids(_SHORT)), options)], {})


def short_forest(decoder: Decoder, scope: Scope = Scope.ALL) -> Forest:
    """Returns a forest (token segments arranged in trees) of short rollouts of random tokens with different lengths, some of them with the
    same prompt, and two prompts with completions of their own that are equally long, for tests of a model.
    """
    random = np.random.default_rng(1)
    shared, *prompts = (random.integers(0, decoder.config.vocab_size, length, np.int32) for length in (5, 1, 0, 4, 9, 5))
    completions = [random.integers(0, decoder.config.vocab_size, length, np.int32) for length in (3, 12, 5, 4, 7, 6, 2, 4, 6)]
    options = ResolvedOptions(probes=(), scope=scope)
    together = zip([shared, shared, shared, *prompts, prompts[-1]], completions, strict=True)
    return Forest.build([CheckedRollout(prompt, Continuation(completion), options) for prompt, completion in together], {})


def _windows(decoder: Decoder) -> list[int]:
    found = (getattr(decoder.config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return [window for window in found if isinstance(window, int) and window > 0]


@torch.inference_mode()
def _plain(decoder: Decoder, reader: TapReader, tap: Tap, token_ids: NDArray[np.int32]) -> torch.Tensor:
    """Runs one sequence through the model without a cache, and returns the activations ``(T, hidden_size)`` float32 at a tap (a place in
    the model).
    """
    ids = torch.from_numpy(token_ids).long().unsqueeze(0).to(decoder.device)
    buffer = torch.empty((len(token_ids), decoder.config.hidden_size), dtype=torch.float32, device=decoder.device)
    with reader.reading({tap: buffer}):
        decoder.model(input_ids=ids, use_cache=False)
    return buffer
