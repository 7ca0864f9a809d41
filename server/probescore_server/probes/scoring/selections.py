"""Determines which rows of a batch belong to which completion, as one probe reads it.

Everything that defines what a score means is here and in ``batch_scorer``: scopes, masks, spans, follow-ups, special tokens, and whether
the prompt is seen.
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
    """Names a token segment to score, and the segments before it that a probe is given too if it sees the prompt."""

    before: tuple[int, ...]
    segment: int


@dataclass(frozen=True, slots=True, eq=False)
class ProbeInput:
    """Describes what one probe reads of one completion.

    Attributes:
        segments: the segments whose tokens are in scope, in order; they have T tokens in all.
        selections: the tokens that count, for the whole scope and for each span, ``(1 + spans, T)`` bool.
    """

    segments: tuple[ScoredSegment, ...]
    selections: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class ScoreTarget:
    """Describes a completion, or a follow-up to one, that is to be scored; ``rollout`` is its rollout's index in the batch."""

    placement: Placement
    options: ResolvedOptions
    is_follow_up: bool
    rollout: int


def read_completion(
    forest: Forest, placement: Placement, manifest: Manifest, scope: Scope, *, is_follow_up: bool, special_ids: NDArray[np.int32]
) -> ProbeInput:
    """Determines which tokens of a completion a probe reads and scores.

    Args:
        forest: the token segments of the batch.
        placement: the completion, or a follow-up, which scores its own tokens whatever the scope.
        manifest: the probe's manifest.
        scope: the part of the rollout that the request asks to score.
        is_follow_up: whether the placement is a follow-up of a request.
        special_ids: ids that ``exclude_special_tokens`` leaves out where the manifest does not name the ids, int32.
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
    """What a scope, a mask and spans select of a completion, or of a follow-up, which is about its own tokens whatever the scope.

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
    """Determines what each probe reads of each completion of a batch, once for all probes that read the same tokens.

    Args:
        forest: the token segments of the batch.
        special_ids: ids of BOS, EOS and UNK, int32.
    """

    def __init__(self, forest: Forest, special_ids: NDArray[np.int32]) -> None:
        self._forest = forest
        self._special_ids = special_ids
        self._known: dict[tuple[object, ...], ProbeInput] = {}

    def of(self, asked: ScoreTarget, manifest: Manifest) -> ProbeInput:
        """Returns what a probe, given by its manifest, reads of a completion or of a follow-up."""
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
    """Maps token segments to the rows of a batch's activations.

    Args:
        forest: the token segments of the batch.
        starts: the first row of each segment that the model read, by the segment's index.
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
        """Returns the indices of the activation rows of these segments, in order, ``(rows,)`` int64."""
        ranges = [np.arange(self._starts[index], self._starts[index] + len(self._forest.segments[index].token_ids)) for index in segments]
        return np.concatenate([np.zeros(0, np.int64), *ranges])

    def range_of(self, segment: int) -> range:
        """Returns the range of activation rows of one segment."""
        return range(self._starts[segment], self._starts[segment] + len(self._forest.segments[segment].token_ids))

    def rollouts_at(self, row: int) -> set[int]:
        """Returns the rollouts, by index in the batch, that need the segment to which an activation row belongs."""
        return self._forest.segments[self._by_start[bisect.bisect_right(self._sorted_starts, row) - 1]].rollouts
