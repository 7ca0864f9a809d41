"""Determines which rows of a batch's activations each probe reads for each completion.

This module and ``batch_scorer`` define the meaning of a score: they apply scopes, masks, spans, follow-ups, the exclusion of special
tokens, and the choice whether a probe sees the prompt. A follow-up is a list of token ids appended to a finished completion and scored as a
fork of the completion.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from probescore.types import Scope
from probescore_server.backbone.forest import Forest, Placement
from probescore_server.probes.format.manifest import Manifest
from probescore_server.rollouts import ResolvedOptions


@dataclass(frozen=True, slots=True, eq=False)
class ScoredSegment:
    """Token segment to score, with the segments before it.

    A token segment is a run of tokens that several rollouts may share. A probe that sees the prompt is also given the segments before.
    """

    before: tuple[int, ...]
    segment: int


@dataclass(frozen=True, slots=True, eq=False)
class ProbeInput:
    """Value object with the tokens that one probe reads of one completion.

    Attributes:
        segments: the token segments in scope, in order, with T tokens in total.
        selections: true for the tokens whose scores are reduced, for the whole scope and for each span, ``(1 + spans, T)`` bool.
    """

    segments: tuple[ScoredSegment, ...]
    selections: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class ScoreTarget:
    """Completion to be scored, or a follow-up: token ids appended to a finished completion and scored as a fork of the completion.

    ``rollout`` is the index in the batch of the rollout to which the completion belongs.
    """

    placement: Placement
    options: ResolvedOptions
    is_follow_up: bool
    rollout: int


def read_completion(
    forest: Forest, placement: Placement, manifest: Manifest, scope: Scope, *, is_follow_up: bool, special_ids: NDArray[np.int32]
) -> ProbeInput:
    """Determines which tokens of a completion a probe reads and scores.

    Args:
        forest: the batch's token segments, runs of tokens arranged in trees so that shared prefixes are computed once.
        placement: place of the completion, or of a follow-up (token ids appended to a finished completion), among the segments; of a
            follow-up always its own tokens are scored, whatever the scope.
        manifest: the probe's manifest.
        scope: the part of the rollout that the request asks to score.
        is_follow_up: whether the placement is that of a follow-up in a request.
        special_ids: special-token ids that ``exclude_special_tokens`` leaves out if the manifest does not list such ids, int32.
    """
    continuation = placement.continuation
    appended = placement.appended.get(manifest.key)
    segments: list[ScoredSegment] = []
    if appended is not None:
        # the request's mask and spans are about tokens that this probe does not score
        segments = [ScoredSegment(placement.chain, appended)]
        counted = np.ones(len(forest.segments[appended].token_ids), np.bool_)
        selections = [counted, *(np.zeros_like(counted) for _ in continuation.spans)]
    else:
        chosen, selected = selected_tokens(forest, placement, scope, is_follow_up=is_follow_up)
        segments = [ScoredSegment(placement.context if segment == placement.segment else (), segment) for segment in chosen]
        selections = [*selected]
    stacked = np.stack(selections)
    if manifest.exclude_special_tokens and segments:
        token_ids = np.concatenate([forest.segments[scored.segment].token_ids for scored in segments])
        left_out = special_ids if manifest.special_token_ids is None else np.array(manifest.special_token_ids, np.int32)
        stacked &= ~np.isin(token_ids, left_out)
    return ProbeInput(tuple(segments), stacked)


def selected_tokens(forest: Forest, placement: Placement, scope: Scope, *, is_follow_up: bool) -> tuple[tuple[int, ...], NDArray[np.bool_]]:
    """Returns the tokens of a completion that a scope, a mask and spans select. Of a follow-up (token ids appended to a finished
    completion), always its own tokens are selected, whatever the scope.

    Returns:
        The segments in scope, in order, ``T`` tokens in all; and ``(1 + spans, T)`` bool, the tokens that count, for the whole scope and
        for each span.
    """
    continuation = placement.continuation
    segments: tuple[int, ...] = ()
    prompt_tokens = 0
    if scope is not Scope.COMPLETION and not is_follow_up:
        segments = placement.context
        prompt_tokens = sum(len(forest.segments[segment].token_ids) for segment in segments)
    own = np.zeros(0, np.bool_)
    if scope is not Scope.PROMPT or is_follow_up:
        segments += placement.chain[len(placement.context) :]
        own = np.ones(len(continuation.token_ids), np.bool_) if continuation.mask is None else continuation.mask
    selections = [np.concatenate([np.ones(prompt_tokens, np.bool_), own])]
    for span in continuation.spans:
        within = np.zeros_like(selections[0])
        within[prompt_tokens + span.start : prompt_tokens + span.end] = True
        selections.append(within & selections[0])
    return segments, np.stack(selections)


class ProbeInputs:
    """Source of the tokens that each probe reads of each completion of a batch, determined once for all probes that read the same tokens.

    Args:
        forest: the batch's token segments, runs of tokens arranged in trees so that shared prefixes are computed once.
        special_ids: ids of BOS, EOS and UNK, int32.
    """

    def __init__(self, forest: Forest, special_ids: NDArray[np.int32]) -> None:
        self._forest = forest
        self._special_ids = special_ids
        self._known: dict[tuple[object, ...], ProbeInput] = {}

    def of(self, asked: ScoreTarget, manifest: Manifest) -> ProbeInput:
        """Returns the tokens that a probe, given by its manifest, reads of a completion or of a follow-up.

        A follow-up is a list of token ids appended to a finished completion and scored as a fork of the completion.
        """
        left_out = (manifest.exclude_special_tokens, manifest.special_token_ids)
        key = (asked.placement, asked.placement.appended.get(manifest.key), *left_out)
        probe_input = self._known.get(key)
        if probe_input is None:
            probe_input = self._known[key] = read_completion(
                self._forest,
                asked.placement,
                manifest,
                asked.options.scope,
                is_follow_up=asked.is_follow_up,
                special_ids=self._special_ids,
            )
        return probe_input


class SegmentRows:
    """Map from token segments to the rows of a batch's activations.

    Args:
        forest: the batch's token segments, runs of tokens arranged in trees so that shared prefixes are computed once.
        starts: dictionary keyed by segment index: the segment's first row among the activations.
    """

    def __init__(self, forest: Forest, starts: dict[int, int]) -> None:
        self._forest = forest
        self._starts = starts
        count = sum(len(forest.segments[index].token_ids) for index in starts)
        self._by_start = sorted(starts, key=starts.__getitem__)
        self._sorted_starts = [starts[index] for index in self._by_start]
        self.positions = np.zeros(count, np.int64)
        for index, start in starts.items():
            segment = forest.segments[index]
            self.positions[start : start + len(segment.token_ids)] = segment.position + np.arange(len(segment.token_ids))

    def of(self, segments: Sequence[int]) -> NDArray[np.int64]:
        """Returns the indices of the activation rows of the given token segments, in order, ``(rows,)`` int64."""
        ranges = [np.arange(self._starts[index], self._starts[index] + len(self._forest.segments[index].token_ids)) for index in segments]
        return np.concatenate([np.zeros(0, np.int64), *ranges])

    def range_of(self, segment: int) -> range:
        """Returns the range of activation rows that belong to one token segment (run of tokens)."""
        return range(self._starts[segment], self._starts[segment] + len(self._forest.segments[segment].token_ids))

    def rollouts_at(self, row: int) -> set[int]:
        """Returns the rollouts, by index in the batch, that need the token segment to which an activation row belongs."""
        return self._forest.segments[self._by_start[bisect.bisect_right(self._sorted_starts, row) - 1]].rollouts
