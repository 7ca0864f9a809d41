"""Defines the value objects that the scheduler, the worker and the engine exchange: checked rollouts, results, and a description of the
loaded model.

The module imports neither torch nor grpc, since the front process, which owns the port and starts the workers, has neither the model nor
its libraries.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from probescore.reductions import Reduction
from probescore.types import (
    FROZEN,
    CompletionScores,
    ModelInfo,
    Pool,
    ProbeInfo,
    Reading,
    ReadingKind,
    Scope,
    ScoredProbe,
    Span,
    Tap,
    Usage,
)


@dataclass(frozen=True, eq=False)
class Continuation:
    """Value object with the checked token ids of a completion, or of a follow-up (a text that continues a completion or another follow-up).

    Attributes:
        token_ids: the token ids, ``(T,)`` int32, each in ``[0, vocab_size)``.
        mask: true for each token that counts in reductions, ``(T,)`` bool; ``None`` = all tokens count.
        spans: named ranges of tokens to reduce separately, within ``[0, T]``.
        follow_ups: the follow-ups that continue this completion or follow-up, independently of each other.
        id: the client's own name for the completion or follow-up, returned in the response.
        inexact_ids: whether the server tokenised ``token_ids``, or any ids before them in the sequence, from text.
    """

    token_ids: NDArray[np.int32]
    mask: NDArray[np.bool_] | None = None
    spans: tuple[Span, ...] = ()
    follow_ups: tuple[Continuation, ...] = ()
    id: str = ""
    inexact_ids: bool = False

    @property
    def tree_tokens(self) -> int:
        """Counts the tokens of this completion or follow-up and of all follow-ups that continue it, at any depth."""
        return len(self.token_ids) + sum(follow_up.tree_tokens for follow_up in self.follow_ups)

    @property
    def tree_size(self) -> int:
        """Returns one, for this completion or follow-up itself, plus the number of all follow-ups that continue it, at any depth."""
        return 1 + sum(follow_up.tree_size for follow_up in self.follow_ups)

    @property
    def tree_spans(self) -> int:
        """Counts the spans (named token ranges) of this completion or follow-up and of all follow-ups that continue it, at any depth."""
        return len(self.spans) + sum(follow_up.tree_spans for follow_up in self.follow_ups)

    @property
    def chain_tokens(self) -> int:
        """Counts the tokens of this completion or follow-up and of the longest chain of follow-ups, each continuing the one before."""
        return len(self.token_ids) + max((follow_up.chain_tokens for follow_up in self.follow_ups), default=0)


@dataclass(frozen=True)
class PinnedReading:
    """Value object with a reading (whose activations are read) that a request named, as the name was resolved once, when the request came.

    Attributes:
        name: the name in the request and in the answer.
        id: the version that the name meant then; empty for ``frozen``.
    """

    name: str
    id: str = ""


@dataclass(frozen=True)
class ActivationReads:
    """Value object with the kinds of activations that a request asks for, the same for every completion.

    Attributes:
        taps: taps (places in the model) without duplicates, in the order of the request.
        pools: poolings over a completion's tokens, such as the mean, without ``tokens`` (no pooling).
        tokens: whether the request asks for every token's activations.
        dtype: format in which a server sends the numbers: ``float32``, ``bfloat16`` or ``float16``.
    """

    taps: tuple[Tap, ...]
    pools: tuple[Pool, ...]
    tokens: bool
    dtype: str = "float32"

    @property
    def all_pools(self) -> tuple[Pool, ...]:
        """Returns the poolings of activations that a request asks for, with ``tokens`` first if it also asks for every token's
        activations.
        """
        return ((Pool.TOKENS,) if self.tokens else ()) + self.pools


@dataclass(frozen=True, eq=False)
class ResolvedOptions:
    """Value object with the scoring options of one request, checked against the loaded probes.

    Attributes:
        probes: keys ``name@version`` of the loaded probes to apply, without duplicates.
        reductions: the reductions from the scores of the tokens to one score; empty = each probe's default.
        token_scores: those keys of ``probes`` whose scores per token the client requested.
        scope: the tokens to score: the prompt's, the completion's or both.
        return_token_ids: whether the response contains the token ids.
        return_token_texts: whether the response contains the text of each token.
        activations: the activations that are read, instead of scores; ``None`` = the request asks for scores.
        readings: the readings that the request names, each with the version that is read; empty = none are named, and the frozen model is
            read.
        adapters: the digests of the adapters with which the frozen model is read for probes that bring one, and the empty string if it is
            also read as it is, for probes that bring none; empty = it is read as it is alone.
    """

    probes: tuple[str, ...]
    reductions: tuple[Reduction, ...] = ()
    token_scores: frozenset[str] = frozenset()
    scope: Scope = Scope.COMPLETION
    return_token_ids: bool = False
    return_token_texts: bool = False
    activations: ActivationReads | None = None
    readings: tuple[PinnedReading, ...] = ()
    adapters: frozenset[str] = frozenset()

    @cached_property
    def key(self) -> str:
        """Returns a string that is equal for two ``ResolvedOptions`` if and only if both request the same scoring."""
        values = [getattr(self, option.name) for option in fields(self)]
        return repr([sorted(value) if isinstance(value, frozenset) else value for value in values])

    @property
    def passes(self) -> int:
        """Returns how often the model reads each rollout at most: for each reading that the request names, and for each adapter that probes
        bring.
        """
        others = sum(reading.name != FROZEN for reading in self.readings)
        frozen_is_read = not self.readings or others < len(self.readings)
        return others + frozen_is_read * max(1, len(self.adapters))

    @property
    def weights(self) -> Hashable:
        """Returns a value that is equal for two ``ResolvedOptions`` if their rollouts are read with the same weights, so that requests for
        both can share what is computed of a prompt.
        """
        return self.readings, self.adapters

    @property
    def answers(self) -> int:
        """Returns how many answers each probe gives for a rollout at most: one for each reading that the request names."""
        return max(1, len(self.readings))


@dataclass(frozen=True, eq=False)
class CheckedRollout:
    """Value object with one prompt and one completion, checked and ready to be scored.

    Attributes:
        prompt_ids: the prompt's token ids, ``(P,)`` int32; the rollouts of one group (a prompt with several completions) share one array.
        completion: the completion with its follow-ups (texts that continue the completion).
        options: how the rollout is scored.
        appended_tokens: the largest number of tokens that the requested probes themselves append to the completion, and to each of its
            follow-ups.
        reread_tokens: the number of extra token reads that the rollout's spans (token ranges) cause, beyond one read of each token.
        activation_bytes: the number of bytes of activations in the response for this rollout; known only to the front process, which owns
            the port.
    """

    prompt_ids: NDArray[np.int32]
    completion: Continuation
    options: ResolvedOptions
    appended_tokens: int = 0
    reread_tokens: int = 0
    activation_bytes: int = 0

    @property
    def tokens(self) -> int:
        """Returns the largest number of tokens that this rollout can cost.

        The number includes the tokens of the prompt, of the completion and of all follow-ups (texts that continue the completion), the
        tokens that probes append, and the tokens that spans (token ranges) read again; all of them as often as the model reads them.
        """
        appended = self.appended_tokens * self.completion.tree_size
        own = self.completion.tree_tokens + appended + self.reread_tokens
        return self.prompt_tokens + self.options.passes * own

    @property
    def prompt_tokens(self) -> int:
        """Returns the part of ``tokens`` that rollouts of the same prompt, readings and adapters have in common: the prompt's, as often as
        the model reads it.
        """
        return self.options.passes * len(self.prompt_ids)


ActivationArrays: TypeAlias = Mapping[tuple[str, Pool], NDArray[np.generic]]
"""Type of the activations of a completion or follow-up (token ids appended to a completion) as they are sent: a dictionary, keyed by tap
(place in the model) name and pool, of rows ``(rows, hidden_size)`` in the format that the request asks for (bfloat16 as its bits, uint16).
"""


@dataclass(frozen=True, eq=False)
class RolloutResult:
    """Value object with the scores or the activations of one rollout, and the number of tokens that were computed for the rollout.

    Attributes:
        scores: the scores of the completion and of its follow-ups (texts that continue the completion). If activations were read, these
            have no scores, but say whether there are activations, and have the token ids in scope.
        usage: the numbers of tokens that were computed, shared with other rollouts, and found in the key-value cache.
        refused_by: the key ``name@version`` of a probe that computed NaN or an infinity, so that the rollout or a follow-up has no scores;
            empty if there is no such probe.
        activations: the activations of the completion, then of each of its follow-ups, each followed by its own; empty if scores were
            computed.
    """

    scores: CompletionScores
    usage: Usage
    refused_by: str = ""
    activations: tuple[ActivationArrays, ...] = ()


@dataclass(frozen=True, eq=False)
class ScoredBatch:
    """Value object with the results that a worker process returns for a batch of rollouts.

    Attributes:
        results: one result per rollout, in order; ``None`` for a rollout that was cancelled.
        compute_seconds: the seconds that computing the batch took.
    """

    results: tuple[RolloutResult | None, ...]
    compute_seconds: float


@dataclass(frozen=True)
class EngineStatistics:
    """Value object with the memory use of a loaded engine, and the hits and misses of its key-value cache since the engine was loaded.

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
    """Value object that describes the model, the tokenizer and the probes that a scoring engine has loaded. It is all that is needed to
    check a request.

    Attributes:
        model: the model's identity, fingerprint and sizes.
        tokenizer_fingerprint: the tokenizer's fingerprint; empty if there is no tokenizer.
        bos_token_id: the id of the token that begins a sequence (BOS); ``None`` if the tokenizer has none.
        probes: the loaded probes, sorted by name, then version.
        device: the device that computes, such as ``cpu`` or ``cuda:0``.
        dtype: the element type of the model's weights, such as ``float32``.
        execution_path: the name of the code that runs the model: ``packed`` (many sequences in one row) or ``universal`` (one sequence at a
            time).
        max_unchanged_positions: the rollout length in tokens up to which the model's rotary embedding does not change; ``None`` = it never
            changes.
        expects_bos: a dictionary keyed by probe ``name@version``: the first token id must be BOS (True), must not be BOS (False), or is not
            checked (None).
        max_follow_up_tokens: a dictionary keyed by probe ``name@version``: the number of token ids that the probe itself appends to a
            completion.
        adapters: a dictionary keyed by probe ``name@version``: a digest of the adapter (tensors and settings) that the probe brings, with
            which the frozen model is read for it; probes that bring none are not in it.
        excluding_special_tokens: the keys ``name@version`` of the probes whose reductions leave out the tokenizer's special tokens.
        content: a digest of the loaded weights and of the content of the model's other files.
        pools_with_prompt: the keys ``name@version`` of the probes that reduce a rollout to one score by themselves and read the prompt's
            activations.
        taps: every tap (place in the model) at which activations can be read.
        placeholders: a dictionary keyed by each token id that stands for a picture, audio or video: the model's name for that token.
        retired: the keys ``name@version`` of the probes whose files are gone, and which are served only to requests that name the version.
        shallower: a dictionary keyed by a number of blocks: the digest ``content`` of a worker process that has loaded only that many of
            the model's decoder blocks.
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
    adapters: dict[str, str] = field(default_factory=dict)
    content: str = ""
    pools_with_prompt: frozenset[str] = frozenset()
    placeholders: dict[int, str] = field(default_factory=dict)
    taps: tuple[Tap, ...] = ()
    retired: frozenset[str] = frozenset()
    shallower: dict[int, str] = field(default_factory=dict)

    @property
    def frozen_reading(self) -> Reading:
        """Returns the description of the frozen model's own activations, as those of other weights are described beside them."""
        fingerprint = self.model.fingerprint
        return Reading(FROZEN, fingerprint, ReadingKind.FROZEN, None, fingerprint, golden_verified=True)

    def of_probes(self, keys: Collection[str], retired: Collection[str] = ()) -> EngineInfo:
        """Returns a copy of this description of an engine with only some of its probes, of which some are marked as retired (their files
        are gone); both are given by keys ``name@version``.
        """
        return replace(
            self,
            probes=tuple(probe for probe in self.probes if probe.key in keys),
            expects_bos={key: expected for key, expected in self.expects_bos.items() if key in keys},
            max_follow_up_tokens={key: tokens for key, tokens in self.max_follow_up_tokens.items() if key in keys},
            excluding_special_tokens=self.excluding_special_tokens.intersection(keys),
            adapters={key: digest for key, digest in self.adapters.items() if key in keys},
            pools_with_prompt=self.pools_with_prompt.intersection(keys),
            retired=frozenset(retired),
        )

    def scored_probes(self, options: ResolvedOptions) -> tuple[ScoredProbe, ...]:
        """Returns a description of each probe of a request, in the request's order, as the response contains it."""
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
