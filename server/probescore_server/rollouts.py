"""What the scheduler, the worker and the engine pass to one another: checked requests as ids, and what is loaded.

Plain frozen data, free of torch and grpc: the front process has neither the model nor its libraries.
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
    """A completion, or a follow-up to one.

    Attributes:
        token_ids: ``(T,)`` int32, each in ``[0, vocab_size)``.
        mask: ``(T,)`` bool, or ``None`` = all True.
        spans: within ``[0, T]``.
        follow_ups: forks that continue this one.
        id: echoed.
        inexact_ids: the ids, or those before them, came from text.
    """

    token_ids: NDArray[np.int32]
    mask: NDArray[np.bool_] | None = None
    spans: tuple[Span, ...] = ()
    follow_ups: tuple[Continuation, ...] = ()
    id: str = ""
    inexact_ids: bool = False

    @property
    def tree_tokens(self) -> int:
        """Tokens of this continuation and of everything that follows it."""
        return len(self.token_ids) + sum(follow_up.tree_tokens for follow_up in self.follow_ups)

    @property
    def tree_size(self) -> int:
        """This continuation and all that follow it, counted."""
        return 1 + sum(follow_up.tree_size for follow_up in self.follow_ups)

    @property
    def tree_spans(self) -> int:
        """Spans of this continuation and of all that follow it."""
        return len(self.spans) + sum(follow_up.tree_spans for follow_up in self.follow_ups)

    @property
    def chain_tokens(self) -> int:
        """Tokens of this continuation and of its longest chain of follow-ups."""
        return len(self.token_ids) + max((follow_up.chain_tokens for follow_up in self.follow_ups), default=0)


@dataclass(frozen=True, eq=False)
class ResolvedOptions:
    """How the rollouts of one request are scored.

    Attributes:
        probes: ``name@version`` of loaded probes, without duplicates.
        reductions: empty = each probe's default.
        token_scores: those of ``probes`` whose per-token scores are wanted.
    """

    probes: tuple[str, ...]
    reductions: tuple[Reduction, ...] = ()
    token_scores: frozenset[str] = frozenset()
    scope: Scope = Scope.COMPLETION
    return_token_ids: bool = False
    return_token_texts: bool = False

    @cached_property
    def key(self) -> str:
        """Equal for two that ask for the same."""
        values = [getattr(self, option.name) for option in fields(self)]
        return repr([sorted(value) if isinstance(value, frozenset) else value for value in values])


@dataclass(frozen=True, eq=False)
class CheckedRollout:
    """One prompt with one completion, checked and ready to score.

    Attributes:
        prompt_ids: ``(P,)`` int32; rollouts of one group hold the same array.
        appended_tokens: at most so many do the requested probes append by themselves, to the completion and to each of its follow-ups.
        reread_tokens: so many do its spans read beyond one reading of each token.
    """

    prompt_ids: NDArray[np.int32]
    completion: Continuation
    options: ResolvedOptions
    appended_tokens: int = 0
    reread_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of the prompt, the completion, all its follow-ups, what is appended to them and what spans read again: the most that it
        can cost.
        """
        appended = self.appended_tokens * self.completion.tree_size
        return len(self.prompt_ids) + self.completion.tree_tokens + appended + self.reread_tokens


@dataclass(frozen=True, eq=False)
class RolloutResult:
    """The scores of one rollout, and the work that it took in its batch.

    Attributes:
        refused_by: the probe, ``name@version``, for which the rollout or a follow-up of it has no scores (``NON_FINITE``); mostly empty.
    """

    scores: CompletionScores
    usage: Usage
    refused_by: str = ""


@dataclass(frozen=True, eq=False)
class ScoredBatch:
    """What a worker returns for a batch.

    Attributes:
        results: one per rollout, in order; ``None`` where it was cancelled.
        compute_seconds: how long the batch computed.
    """

    results: tuple[RolloutResult | None, ...]
    compute_seconds: float


@dataclass(frozen=True)
class EngineStatistics:
    """What an engine holds of its device, and what its key-value cache has been good for since it was loaded.

    Attributes:
        device_bytes: of a CUDA device, what torch's allocator has taken; on a CPU, the resident memory of the process.
        kv_cache_bytes: part of it.
        kv_cache_hits, kv_cache_misses: sequences of which some, or no, beginning was in the cache.
    """

    device_bytes: int = 0
    kv_cache_bytes: int = 0
    kv_cache_hits: int = 0
    kv_cache_misses: int = 0


@dataclass(frozen=True, eq=False)
class EngineInfo:
    """What an engine has loaded: all that the front process must know to check a request.

    Attributes:
        tokenizer_fingerprint: empty if there is no tokenizer.
        bos_token_id: ``None`` if the tokenizer has none.
        probes: sorted by name, then version.
        expects_bos: by ``name@version``: the first id must be BOS (True), must not be (False), or is not checked (None).
        max_unchanged_positions: tokens of a rollout up to which the model's rotary embedding stays the same; ``None`` = always.
        max_follow_up_tokens: by ``name@version``: length of the follow-up that the probe itself appends.
        excluding_special_tokens: the probes, ``name@version``, for which the tokenizer's special tokens do not count.
        content: digest of the weights that are loaded and of what the model's other files hold.
        pools_with_prompt: those probes, ``name@version``, that pool by themselves and see the prompt.
        taps: every one that can be read.
        placeholders: by id that stands for a picture, audio or video: what the model calls it.
        device, dtype, execution_path: as in ``WorkerInfo``.
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
        """How the probes of a request are named in its answer, in the request's order."""
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
