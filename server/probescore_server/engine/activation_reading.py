"""Extracts the requested activations of each completion from the activations of a batch, as arrays in host memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from probescore.types import CompletionActivations, CompletionScores, CompletionStatus, Pool, Reading, Scope, Tap, Usage
from probescore.wire.number_formats import NUMBER_FORMATS, Overflow
from probescore_server.backbone.base import Activations
from probescore_server.backbone.forest import Forest, Placement
from probescore_server.probes.scoring.selections import SegmentRows, selected_tokens
from probescore_server.rollouts import ActivationArrays, ActivationReads, RolloutResult


@dataclass(frozen=True, eq=False)
class _View:
    """The position in a batch of a completion, or of a follow-up (token ids appended to a finished completion).

    Attributes:
        rows: rows of the tokens in scope among the batch's activations, ``(T,)`` int64.
        selections: which tokens count, ``(1 + spans, T)`` bool: in the whole scope under the mask, then in each span.
        first: index of the first of these selections among all selections of the batch.
        prompt_tokens: how many of the tokens in scope are the prompt's.
        follow_ups: positions of the follow-ups.
    """

    placement: Placement
    token_ids: NDArray[np.int32]
    rows: NDArray[np.int64]
    selections: NDArray[np.bool_]
    first: int
    prompt_tokens: int
    follow_ups: tuple[_View, ...]


class BatchActivations:
    """The requested activations of the completions of one batch, in host memory.

    Args:
        forest: the batch, as token segments arranged in trees, so that shared prefixes are computed once.
        activations: activations of the forest at these taps.
        scope: tokens of every rollout that are read: completion, prompt or all.
        taps: taps (places in the model) whose activations are given.
        reads: activations that the request asks for.
        live: indices of the rollouts whose activations are all present.
    """

    def __init__(
        self,
        forest: Forest,
        activations: Activations,
        scope: Scope,
        taps: Sequence[Tap],
        reads: ActivationReads,
        live: Sequence[int],
    ) -> None:
        self._forest = forest
        self._scope = scope
        self._rows = SegmentRows(forest, dict(activations.starts))
        self._reads = reads
        self._selections = 0
        self._views = {index: self._view(forest.placements[index], is_follow_up=False) for index in live}
        self._finite: dict[str, NDArray[np.bool_]] = {}
        self._pooled: dict[str, NDArray[np.float32]] = {}
        self._tokens: dict[str, NDArray[np.float32]] = {}
        for tap in taps:
            rows = activations.rows[tap]
            # This gives the same as isfinite().all(), in a tenth of the time.
            self._finite[str(tap)] = (rows.amax(dim=1).isfinite() & rows.amin(dim=1).isfinite()).cpu().numpy()
            if reads.pools:
                self._pooled[str(tap)] = self._pool(rows)
            if reads.tokens:
                self._tokens[str(tap)] = rows.cpu().numpy()

    def of(self, rollout: int, group_index: int, completion_index: int) -> CompletionActivations:
        """Returns the activations of a rollout as copies, so that they do not keep the arrays of the batch in memory."""
        return self._of(self._views[rollout], group_index, completion_index)

    def usage(self, rollout: int) -> Usage:
        """Returns the tokens that were computed for a rollout, shared with others of the batch, or found in the key-value cache."""
        return self._forest.usage(rollout)

    def _of(self, view: _View, group_index: int, completion_index: int) -> CompletionActivations:
        continuation = view.placement.continuation
        broken = next((tap for tap, finite in self._finite.items() if not finite[view.rows].all()), None)
        within = slice(view.first, view.first + len(view.selections))
        return CompletionActivations(
            group_index=group_index,
            completion_index=completion_index,
            id=continuation.id,
            status=CompletionStatus.OK if broken is None else CompletionStatus.NON_FINITE,
            token_ids=view.token_ids,
            selections=view.selections,
            spans=tuple(span.name for span in continuation.spans),
            tokens={tap: rows[view.rows] for tap, rows in self._tokens.items()} if broken is None else {},
            pooled={tap: rows[within].copy() for tap, rows in self._pooled.items()} if broken is None else {},
            status_message="" if broken is None else f"the model gives NaN or an infinity at {broken}",
            inexact_ids=continuation.inexact_ids,
            follow_ups=tuple(self._of(follow_up, group_index, completion_index) for follow_up in view.follow_ups),
            prompt_tokens=view.prompt_tokens,
        )

    def _view(self, placement: Placement, *, is_follow_up: bool) -> _View:
        segments, selections = selected_tokens(self._forest, placement, self._scope, is_follow_up=is_follow_up)
        ids = [np.zeros(0, np.int32), *(self._forest.segments[segment].token_ids for segment in segments)]
        first, self._selections = self._selections, self._selections + len(selections)
        follow_ups = tuple(self._view(follow_up, is_follow_up=True) for follow_up in placement.follow_ups)
        token_ids = np.concatenate(ids)
        own = len(placement.continuation.token_ids) if self._scope is not Scope.PROMPT or is_follow_up else 0
        return _View(placement, token_ids, self._rows.of(segments), selections, first, len(token_ids) - own, follow_ups)

    def _pool(self, rows: torch.Tensor) -> NDArray[np.float32]:
        """Computes all pooled activations of the batch at a tap (place in the model), ``(selections of the batch, pools, hidden_size)``."""
        pooled = torch.full((self._selections, len(self._reads.pools), rows.shape[1]), torch.nan, dtype=torch.float32, device=rows.device)
        for view in self._every_view():
            for offset, selection in enumerate(view.selections):
                indices = view.rows[selection]
                if len(indices) == 0:
                    continue
                selected = _rows_at(rows, indices)
                for column, pool in enumerate(self._reads.pools):
                    pooled[view.first + offset, column] = _pooled(selected, pool)
        return pooled.cpu().numpy()

    def _every_view(self) -> Iterator[_View]:
        waiting = [*self._views.values()]
        while waiting:
            view = waiting.pop()
            yield view
            waiting.extend(view.follow_ups)


def joined(parts: Sequence[CompletionActivations]) -> CompletionActivations:
    """Returns the activations of one completion at all taps, given the activations at some taps (places in the model) and those at the
    remaining taps.
    """
    first, *others = parts
    if not others:
        return first
    broken = next((part for part in parts if part.status is not CompletionStatus.OK), first)
    is_whole = broken.status is CompletionStatus.OK
    return replace(
        broken,
        tokens={tap: rows for part in parts for tap, rows in part.tokens.items()} if is_whole else {},
        pooled={tap: rows for part in parts for tap, rows in part.pooled.items()} if is_whole else {},
        follow_ups=tuple(joined(follow_ups) for follow_ups in zip(*(part.follow_ups for part in parts), strict=True)),
    )


def of_reading(found: CompletionActivations, reading: Reading) -> CompletionActivations:
    """Returns the activations of a completion and its follow-ups (token ids appended to a completion), with the reading that they are
    of.
    """
    return replace(found, reading=reading, follow_ups=tuple(of_reading(follow_up, reading) for follow_up in found.follow_ups))


def result_of(found: CompletionActivations, usage: Usage, reads: ActivationReads) -> RolloutResult:
    """Returns the activations of a completion and its follow-ups (token ids appended to a completion) in the format in which they are sent.

    A completion or follow-up with a number that is too large for the format has no activations and the status ``OVERFLOW``.
    """
    arrays: list[ActivationArrays] = []
    return RolloutResult(_encoded(found, reads, arrays), usage, activations=tuple(arrays))


def _encoded(found: CompletionActivations, reads: ActivationReads, arrays: list[ActivationArrays]) -> CompletionScores:
    """Appends the activations of a completion, and then those of its follow-ups (token ids appended to a completion), to ``arrays``;
    returns what is told beside them.
    """
    status, message = found.status, found.status_message
    own: ActivationArrays = {}
    if status is CompletionStatus.OK:
        try:
            own = _in_format(found, reads)
        except _TooLarge as refused:
            status, message = CompletionStatus.OVERFLOW, str(refused)
    arrays.append(own)
    return CompletionScores(
        id=found.id,
        status=status,
        scores={},
        status_message=message,
        prompt_ids=found.token_ids[: found.prompt_tokens],
        completion_ids=found.token_ids[found.prompt_tokens :],
        inexact_ids=found.inexact_ids,
        follow_ups=tuple(_encoded(follow_up, reads, arrays) for follow_up in found.follow_ups),
    )


class _TooLarge(Exception):
    """Exception raised when an activation is too large for the format in which it is sent; its message is for clients."""


def _in_format(found: CompletionActivations, reads: ActivationReads) -> ActivationArrays:
    number_format = NUMBER_FORMATS[reads.dtype]
    arrays: dict[tuple[str, Pool], NDArray[np.generic]] = {}
    for tap in map(str, reads.taps):
        rows = {Pool.TOKENS: found.tokens[tap]} if reads.tokens else {}
        rows |= {pool: found.pooled[tap][:, column] for column, pool in enumerate(reads.pools)}
        for pool, numbers in rows.items():
            try:
                arrays[tap, pool] = number_format.encode(numbers)
            except Overflow as overflow:
                others = "bfloat16 or float32" if number_format.name == "float16" else "float32"
                raise _TooLarge(
                    f"{tap}: {overflow.value:,.6g} in row {overflow.index[0]} of {pool.value} is beyond {number_format.name}, whose "
                    f"largest number is {number_format.largest:,.6g}; ask for {others}"
                ) from None
    return arrays


def _rows_at(rows: torch.Tensor, indices: NDArray[np.int64]) -> torch.Tensor:
    if indices[-1] - indices[0] + 1 == len(indices):
        return rows[int(indices[0]) : int(indices[-1]) + 1]  # a run of rows is not copied
    return rows[torch.from_numpy(indices).to(rows.device)]


def _pooled(selected: torch.Tensor, pool: Pool) -> torch.Tensor:
    """Pools activations ``(tokens, hidden_size)`` to ``(hidden_size,)``; means are summed in float64, so that order does not matter."""
    match pool:
        case Pool.LAST:
            return selected[-1]
        case Pool.MAX:
            return selected.amax(dim=0)
        case _:
            return selected.double().mean(dim=0).float()
