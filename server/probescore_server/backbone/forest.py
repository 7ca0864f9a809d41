"""Lays out a batch of rollouts as a forest of segments (runs of tokens arranged in trees), so that the model computes each shared token
once.

A segment either starts a sequence or continues another segment. A prompt is a root, its completions are its children, and follow-ups (texts
that continue a completion) are children of completions. Equal tokens after equal tokens become one segment, even if they come from
different rollouts. This module is pure data and imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from probescore.types import Scope, Usage
from probescore_server.rollouts import CheckedRollout, Continuation


@dataclass(frozen=True, slots=True)
class ProbeReads:
    """Value object that says which tokens one probe reads in addition to, or instead of, the completion.

    Attributes:
        sees_prompt: whether the probe also receives the activations of the prompt and, for a follow-up, of all tokens before the follow-up.
        follow_up: token ids that are appended to every completion for this probe; the probe then reads their activations instead of the
            completion's; empty = none.
    """

    sees_prompt: bool = False
    follow_up: tuple[int, ...] = ()


@dataclass(slots=True, eq=False)
class Segment:
    """Node of a forest: a run of tokens that starts a sequence or continues another segment.

    Attributes:
        parent: index of the segment that this segment continues; ``None`` = this segment starts a sequence, at position 0.
        token_ids: ``(T,)`` int32, ``T ≥ 1``.
        position: position of the first token in its sequence.
        read: whether probes need the activations of the segment's tokens.
        rollouts: indices of the rollouts that need the segment.
        cached: number of tokens at the segment's beginning whose keys and values came from a cache instead of being computed; 0 if the
            segment is read.
    """

    parent: int | None
    token_ids: NDArray[np.int32]
    position: int
    read: bool = False
    rollouts: set[int] = field(default_factory=set)
    cached: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Node that says which segments (runs of tokens) of a forest of segments, arranged in trees, hold one completion or follow-up, and
    which hold the tokens before it.

    Attributes:
        continuation: the completion or follow-up.
        context: indices of the segments before the completion or follow-up, root first.
        segment: index of the segment with the tokens of the completion or follow-up; ``None`` if there are no tokens.
        appended: a dictionary, keyed by probe, of the index of the segment with the token ids that the probe itself appends.
        follow_ups: placements of the follow-ups that continue this completion or follow-up, in order.
    """

    continuation: Continuation
    context: tuple[int, ...]
    segment: int | None
    appended: Mapping[str, int]
    follow_ups: tuple[Placement, ...]

    @property
    def chain(self) -> tuple[int, ...]:
        """Returns the indices of the segments (runs of tokens) that lead to this completion or follow-up (token ids appended to a
        completion), root first, and of its own segment, last.
        """
        return self.context if self.segment is None else (*self.context, self.segment)


@dataclass(slots=True, eq=False)
class Forest:
    """Data structure with the segments (runs of tokens arranged in trees) of a batch of rollouts. Parents come before children.

    Attributes:
        segments: the segments.
        placements: for each rollout, the placement of its completion and follow-ups (texts that continue the completion).
        steps: for each rollout, pairs in order: the index of a segment that the rollout needs, and whether the rollout is the first that
            needs the segment.
    """

    segments: list[Segment] = field(default_factory=list)
    placements: list[Placement] = field(default_factory=list)
    steps: list[list[tuple[int, bool]]] = field(default_factory=list)

    @classmethod
    def build(cls, rollouts: Sequence[CheckedRollout], probes: Mapping[str, ProbeReads]) -> Forest:
        """Lays out a batch of rollouts as segments (runs of tokens), and marks the segments whose activations probes need.

        Args:
            rollouts: checked rollouts.
            probes: a dictionary, keyed by ``name@version``, with at least the probes that the rollouts' options name.
        """
        builder = _Builder(cls(), probes)
        for rollout in rollouts:
            builder.add(rollout)
        return builder.forest

    def usage(self, rollout: int) -> Usage:
        """Returns how many tokens of the rollout with a given index were computed, taken from the key-value cache, or shared with other
        rollouts in the forest (the batch's token segments).

        A token counts as computed or cached for the first rollout that needs the token, and as shared for all other rollouts. The model
        must have run the forest (token segments arranged in trees) before.
        """
        computed = shared = cached = 0
        for index, is_first in self.steps[rollout]:
            segment = self.segments[index]
            if is_first:
                cached += segment.cached
                computed += len(segment.token_ids) - segment.cached
            else:
                shared += len(segment.token_ids)
        return Usage(tokens_computed=computed, tokens_shared=shared, tokens_cached=cached)

    def ids_up_to(self, index: int) -> NDArray[np.int32]:
        """Returns the token ids of a sequence from its start to the end of the segment (run of tokens) with the given index: ``(position +
        T,)`` int32.
        """
        pieces = []
        following: int | None = index
        while following is not None:
            pieces.append(self.segments[following].token_ids)
            following = self.segments[following].parent
        return np.concatenate(pieces[::-1])

    def children(self) -> list[list[int]]:
        """Returns, for each segment (run of tokens), the list of the indices of the segments that continue the segment. A last list (index
        -1) contains the roots.
        """
        children: list[list[int]] = [[] for _ in range(len(self.segments) + 1)]
        for index, segment in enumerate(self.segments):
            children[-1 if segment.parent is None else segment.parent].append(index)
        return children


class _Builder:
    """Builder of a forest (segments of tokens arranged in trees), to which rollouts are added one after the other."""

    def __init__(self, forest: Forest, probes: Mapping[str, ProbeReads]) -> None:
        self.forest = forest
        self._probes = probes
        self._known: dict[tuple[int | None, bytes], int] = {}
        self._steps: list[tuple[int, bool]] = []

    def add(self, rollout: CheckedRollout) -> None:
        index = len(self.forest.placements)
        scope = rollout.options.scope
        self._steps = []
        context = self._extend((), rollout.prompt_ids, index)
        if scope is not Scope.COMPLETION:
            self._read(context)
        placement = self._place(rollout.completion, context, rollout, index, read=scope is not Scope.PROMPT)
        self.forest.placements.append(placement)
        self.forest.steps.append(self._steps)

    def _place(self, continuation: Continuation, context: tuple[int, ...], rollout: CheckedRollout, index: int, *, read: bool) -> Placement:
        chain = self._extend(context, continuation.token_ids, index)
        own = chain[len(context) :]
        if read:
            self._read(own)
        appended = {}
        for key in rollout.options.probes:
            probe = self._probes[key]
            if probe.sees_prompt:
                self._read(chain if probe.follow_up else context)
            if probe.follow_up:
                appended[key] = self._extend(chain, np.array(probe.follow_up, np.int32), index)[-1]
                self._read((appended[key],))
        return Placement(
            continuation=continuation,
            context=context,
            segment=own[0] if own else None,
            appended=appended,
            follow_ups=tuple(self._place(follow_up, chain, rollout, index, read=True) for follow_up in continuation.follow_ups),
        )

    def _extend(self, context: tuple[int, ...], token_ids: NDArray[np.int32], rollout: int) -> tuple[int, ...]:
        """Returns a chain of indices of segments (runs of tokens), extended by a segment with the given tokens. Without tokens, the chain
        is returned unchanged.
        """
        if len(token_ids) == 0:
            return context
        segments = self.forest.segments
        parent = context[-1] if context else None
        key = (parent, token_ids.tobytes())
        index = self._known.get(key)
        if index is None:
            index = self._known[key] = len(segments)
            position = 0 if parent is None else segments[parent].position + len(segments[parent].token_ids)
            segments.append(Segment(parent, token_ids, position))
        self._steps.append((index, not segments[index].rollouts))
        segments[index].rollouts.add(rollout)
        return (*context, index)

    def _read(self, indices: tuple[int, ...]) -> None:
        for index in indices:
            self.forest.segments[index].read = True
