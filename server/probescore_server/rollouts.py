"""Defines what the scheduler, the worker and the engine pass to one another: checked rollouts as token ids, and what is loaded.

The classes are plain frozen data, free of torch and grpc: the front process has neither the model nor its libraries.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from probescore.reductions import Reduction
from probescore.types import CompletionScores, ModelInfo, ProbeInfo, Scope, ScoredProbe, Span, Tap, Usage


@dataclass(frozen=True, eq=False)
class Continuation:
    """Holds a completion, or a follow-up that continues one, as checked token ids.

    Attributes:
        token_ids: the token ids, ``(T,)`` int32, each in ``[0, vocab_size)``.
        mask: which tokens count in reductions, ``(T,)`` bool, or ``None`` = all.
        spans: named ranges of tokens to reduce separately, within ``[0, T]``.
        follow_ups: texts that each continue this one, independently of each other.
        id: the client's own name, returned in the answer.
        inexact_ids: whether these ids, or any before them, were tokenised by the server from text.
    """

    token_ids: NDArray[np.int32]
    mask: NDArray[np.bool_] | None = None
    spans: tuple[Span, ...] = ()
    follow_ups: tuple[Continuation, ...] = ()
    id: str = ""
    inexact_ids: bool = False

    @property
    def tree_tokens(self) -> int:
        """Counts the tokens of this completion or follow-up and of all nested follow-ups."""
        return len(self.token_ids) + sum(follow_up.tree_tokens for follow_up in self.follow_ups)

    @property
    def tree_size(self) -> int:
        """Returns the number of nested follow-ups plus one, for this completion or follow-up itself."""
        return 1 + sum(follow_up.tree_size for follow_up in self.follow_ups)

    @property
    def tree_spans(self) -> int:
        """Counts the spans of this completion or follow-up and of all nested follow-ups."""
        return len(self.spans) + sum(follow_up.tree_spans for follow_up in self.follow_ups)

    @property
    def chain_tokens(self) -> int:
        """Counts the tokens of this completion or follow-up together with its longest chain of follow-ups."""
        return len(self.token_ids) + max((follow_up.chain_tokens for follow_up in self.follow_ups), default=0)


@dataclass(frozen=True, eq=False)
class ResolvedOptions:
    """Holds how the rollouts of one request are scored, checked against the loaded probes.

    Attributes:
        probes: keys ``name@version`` of the loaded probes to apply, without duplicates.
        reductions: how scores per token become one score; empty = each probe's default.
        token_scores: the keys among ``probes`` whose scores per token are wanted.
        scope: which tokens are scored: the prompt's, the completion's or both.
        return_token_ids: whether the answer holds the token ids.
        return_token_texts: whether the answer holds the text of each token.
    """

    probes: tuple[str, ...]
    reductions: tuple[Reduction, ...] = ()
    token_scores: frozenset[str] = frozenset()
    scope: Scope = Scope.COMPLETION
    return_token_ids: bool = False
    return_token_texts: bool = False

    @cached_property
    def key(self) -> str:
        """Returns a string that is equal for two objects if and only if they ask for the same scoring."""
        values = [getattr(self, option.name) for option in fields(self)]
        return repr([sorted(value) if isinstance(value, frozenset) else value for value in values])


@dataclass(frozen=True, eq=False)
class CheckedRollout:
    """Holds one prompt with one completion, checked and ready to be scored.

    Attributes:
        prompt_ids: the prompt's token ids, ``(P,)`` int32; rollouts of one group hold the same array.
        completion: the completion with its follow-ups.
        options: how the rollout is scored.
        appended_tokens: the most tokens that the requested probes append by themselves to the completion, and to each of its follow-ups.
        reread_tokens: the number of tokens that the rollout's spans read beyond reading each token once.
    """

    prompt_ids: NDArray[np.int32]
    completion: Continuation
    options: ResolvedOptions
    appended_tokens: int = 0
    reread_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Counts the most tokens that this rollout can cost.

        These are the tokens of its prompt, its completion and all follow-ups, those that probes append and those that spans read again.
        """
        appended = self.appended_tokens * self.completion.tree_size
        return len(self.prompt_ids) + self.completion.tree_tokens + appended + self.reread_tokens


@dataclass(frozen=True, eq=False)
class RolloutResult:
    """Holds the scores of one rollout, and the work that the rollout took in its batch.

    Attributes:
        scores: the scores of the completion and its follow-ups.
        usage: the tokens that were computed, shared with other rollouts or found in the cache.
        refused_by: the probe, ``name@version``, that gave NaN or an infinity, for which the rollout or a follow-up has no scores; empty
            if no probe did.
    """

    scores: CompletionScores
    usage: Usage
    refused_by: str = ""


@dataclass(frozen=True, eq=False)
class ScoredBatch:
    """Holds the results that a worker process returns for a batch of rollouts.

    Attributes:
        results: one result per rollout, in order; ``None`` for a rollout that was cancelled.
        compute_seconds: the seconds that the batch took to compute.
    """

    results: tuple[RolloutResult | None, ...]
    compute_seconds: float


@dataclass(frozen=True)
class EngineStatistics:
    """Holds how much memory a loaded engine uses, and how often its key-value cache was hit since the engine was loaded.

    Attributes:
        device_bytes: on a CUDA device, the bytes that torch's allocator has taken; on a CPU, the resident memory of the process.
        kv_cache_bytes: the part of ``device_bytes`` that holds cached keys and values.
        kv_cache_hits: number of sequences of which at least a beginning was in the cache.
        kv_cache_misses: number of sequences of which nothing was in the cache.
    """

    device_bytes: int = 0
    kv_cache_bytes: int = 0
    kv_cache_hits: int = 0
    kv_cache_misses: int = 0


@dataclass(frozen=True, eq=False)
class EngineInfo:
    """Describes the model, the tokenizer and the probes that an engine has loaded: all that is needed to check a request.

    Attributes:
        model: the model's identity, fingerprint and sizes.
        tokenizer_fingerprint: the tokenizer's fingerprint; empty if there is no tokenizer.
        bos_token_id: the id of the token that begins a sequence (BOS); ``None`` if the tokenizer has none.
        probes: the loaded probes, sorted by name, then version.
        device: the device that computes, such as ``cpu`` or ``cuda:0``.
        dtype: the element type of the model's weights, such as ``float32``.
        execution_path: how the model is run, such as ``packed`` or ``universal``.
        max_unchanged_positions: tokens of a rollout up to which the model's rotary embedding stays the same; ``None`` = always.
        expects_bos: by probe ``name@version``: the first id must be BOS (True), must not be BOS (False), or is not checked (None).
        max_follow_up_tokens: by probe ``name@version``: number of tokens of the follow-up that the probe itself appends.
        excluding_special_tokens: the probes ``name@version`` for which the tokenizer's special tokens do not count.
        content: a digest of the loaded weights and of the content of the model's other files.
        pools_with_prompt: the probes ``name@version`` that reduce a rollout to one score by themselves and see the prompt.
        taps: every tap that can be read.
        placeholders: by token id that stands for a picture, audio or video: the model's name for that token.
    """

    model: ModelInfo
    tokenizer_fingerprint: str
    bos_token_id: int | None
    probes: tuple[ProbeInfo, ...]
    device: str
    dtype: str
    execution_path: str
    max_unchanged_positions: int | None = None
    expects_bos: dict[str, bool | None] = field(default_factory=dict)
    max_follow_up_tokens: dict[str, int] = field(default_factory=dict)
    excluding_special_tokens: frozenset[str] = frozenset()
    content: str = ""
    pools_with_prompt: frozenset[str] = frozenset()
    placeholders: dict[int, str] = field(default_factory=dict)
    taps: tuple[Tap, ...] = ()

    def scored_probes(self, options: ResolvedOptions) -> tuple[ScoredProbe, ...]:
        """Returns the description of each probe of a request that its answer holds, in the request's order."""
        by_key = {probe.key: probe for probe in self.probes}
        scored = []
        for key in options.probes:
            probe = by_key[key]
            default = () if probe.default_reduction is None else (probe.default_reduction,)
            scored.append(
                ScoredProbe(
                    name=probe.name,
                    version=probe.version,
                    graph_sha256=probe.graph_sha256,
                    manifest_sha256=probe.manifest_sha256,
                    unit=probe.unit,
                    output_per=probe.output_per,
                    labels=probe.labels,
                    reductions=(options.reductions or default) if default else (),
                    accepted_mismatches=probe.accepted_mismatches,
                    follow_up_tokens=self.max_follow_up_tokens.get(key, 0),
                    exclude_special_tokens=key in self.excluding_special_tokens,
                )
            )
        return tuple(scored)
