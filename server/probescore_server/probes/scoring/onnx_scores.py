"""Scores completions with probes that run as onnxruntime sessions; each graph runs on every different sequence once per batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from probescore.reductions import Reduction, reduce_scores
from probescore.types import ProbeScores, Tap
from probescore_server.backbone.forest import Forest
from probescore_server.probes.format.graph import GraphFailed
from probescore_server.probes.loading.context_check import LARGEST_CALL, LONGEST_SHARE, SEQUENCES
from probescore_server.probes.loading.loader import LoadedProbe
from probescore_server.probes.loading.onnx_session import ProbeSession
from probescore_server.probes.scoring.cancellation import ComputationCancelled, GraphCanceller, WantedRollouts
from probescore_server.probes.scoring.selections import ProbeInput, ProbeInputs, ScoredSegment, ScoreTarget, SegmentRows

MAX_ROWS_PER_CALL = LARGEST_CALL
"""Limits the rows of one run of a graph, which may need memory for rows × features or for rows × rows.

A longer sequence is cut into pieces if the probe's window limits how many earlier tokens a score depends on. Otherwise the sequence is
given whole, in one run.
"""

MAX_SEQUENCES_PER_CALL = SEQUENCES
"""Limits how many sequences a probe's graph is given in one run: as many as every graph was tested with."""


@dataclass(frozen=True, slots=True, eq=False)
class _SequencePiece:
    """Piece of a sequence of activation rows, which a probe's graph is given in one run because the whole sequence would be too long.

    The first ``known`` rows are given to the graph only as context, since an earlier piece has their scores.
    """

    rows: NDArray[np.int64]
    known: int


@dataclass(slots=True, eq=False)
class _ProbeSequences:
    """The different sequences of rows that one probe must score in a batch and, after its graph has run, their scores or failures."""

    numbers: dict[object, int] = field(default_factory=dict)
    sequences: list[NDArray[np.int64]] = field(default_factory=list)
    scores: list[NDArray[np.float32] | GraphFailed] = field(default_factory=list)


class SessionScores:
    """Scorer that computes the scores of one probe for a batch with the probe's onnxruntime session.

    Args:
        probe: the loaded probe.
        session: the onnxruntime session of the probe's graph.
        forest: the batch's token segments, runs of tokens arranged in trees so that shared prefixes are computed once.
        probe_inputs: source of the tokens that the probe reads of each completion.
        rows: map from token segments to rows of the activations.
        activations: dictionary keyed by tap (point in the language model): activations, ``(N, hidden_size)`` float32 on the session's
            device, without NaN and infinities.
        finite: dictionary keyed by tap: ``(N,)`` bool, true for rows of activations that had neither NaN nor infinity before such rows were
            set to zero.
        wanted: record of the rollouts for which a client still waits.
        watch: context manager that ends a run of the graph once no client waits for its scores.
    """

    def __init__(
        self,
        probe: LoadedProbe,
        session: ProbeSession,
        forest: Forest,
        probe_inputs: ProbeInputs,
        rows: SegmentRows,
        activations: Mapping[Tap, torch.Tensor],
        finite: Mapping[Tap, NDArray[np.bool_]],
        wanted: WantedRollouts,
        watch: GraphCanceller,
    ) -> None:
        self._wanted = wanted
        self._watch = watch
        self._probe = probe
        self._session = session
        self._forest = forest
        self._probe_inputs = probe_inputs
        self._rows = rows
        self._activations = activations
        self._finite = finite
        self._calls = _ProbeSequences()

    def run(self, asked: Sequence[ScoreTarget]) -> None:
        """Runs a probe's ONNX graph on every sequence of activation rows that the scores of the given completions need."""
        calls = self._calls
        for each in asked:
            for name, rows in self._sequences(self._probe_inputs.of(each, self._probe.manifest)):
                if name not in calls.numbers:
                    calls.numbers[name] = len(calls.sequences)
                    calls.sequences.append(rows)
        calls.scores = list(self._run(calls.sequences))

    def of(self, asked: ScoreTarget, reductions: Sequence[Reduction]) -> ProbeScores | str:
        """Returns the probe's scores of a completion, or an error message if the completion could not be scored.

        Raises:
            ComputationCancelled: no client waits for the completion any more.
        """
        self._wanted.check(asked.rollout)
        probe_input = self._probe_inputs.of(asked, self._probe.manifest)
        key = self._probe.manifest.key
        if problem := self._problem(key, probe_input):
            return problem
        scores = self._probe_scores(asked, probe_input, reductions)
        return overflowing_reduction(key) if np.isinf(scores.reduced).any() else scores

    # ------------------------------------------------------------------------------------------------------------ before the graph

    def _sequences(self, probe_input: ProbeInput) -> Iterator[tuple[object, NDArray[np.int64]]]:
        """Yields the sequences that the graph must be given for one completion, each as a name and the indices of its activation rows.

        Sequences of the same rows have the same name.
        """
        if not self._probe.pools:
            for scored in probe_input.segments:
                chain = _chain(self._probe, scored)
                yield chain, self._rows.of(chain)
            return
        for selection in probe_input.selections:
            if selection.any():
                yield self._pooled_name(probe_input, selection), self._pooled_rows(probe_input, selection)

    def _pooled_rows(self, probe_input: ProbeInput, selection: NDArray[np.bool_]) -> NDArray[np.int64]:
        seen = probe_input.segments[0].before if self._probe.manifest.context.sees_prompt else ()
        return np.concatenate([self._rows.of(seen), self._rows.of([scored.segment for scored in probe_input.segments])[selection]])

    def _pooled_name(self, probe_input: ProbeInput, selection: NDArray[np.bool_]) -> object:
        return self._pooled_rows(probe_input, selection).tobytes()

    # ------------------------------------------------------------------------------------------------------------------- the graph

    def _run(self, sequences: Sequence[NDArray[np.int64]]) -> Iterator[NDArray[np.float32] | GraphFailed]:
        """Yields for each sequence its scores, ``(rows, labels)``, or ``(1, labels)`` for a probe that pools, or the graph's failure."""
        pieces = [self._pieces(sequence) for sequence in sequences]
        found = iter(self._together([piece.rows for of_sequence in pieces for piece in of_sequence]))
        for of_sequence in pieces:
            scores = [each if isinstance(each, GraphFailed) else each[piece.known :] for piece in of_sequence for each in [next(found)]]
            failed = next((each for each in scores if isinstance(each, GraphFailed)), None)
            yield failed or self._as_sent(np.concatenate([each for each in scores if not isinstance(each, GraphFailed)]))

    def _as_sent(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        return _sigmoid(scores) if self._probe.as_probability else scores

    def _pieces(self, sequence: NDArray[np.int64]) -> list[_SequencePiece]:
        """Cuts a sequence of activation rows into the pieces that the graph is given; a sequence that fits into one run stays whole."""
        context, most = self._probe.manifest.context, self._most_rows
        seen_before = {"pointwise": 0, "causal": context.window and context.window - 1, "rollout": None}[context.kind]
        if len(sequence) <= most or seen_before is None or 2 * seen_before >= most:
            return [_SequencePiece(sequence, 0)]
        starts = range(0, len(sequence) - seen_before, most - seen_before)
        return [_SequencePiece(sequence[start : start + most], seen_before if start else 0) for start in starts]

    @property
    def _most_rows(self) -> int:
        return min(MAX_ROWS_PER_CALL, self._probe.rows_per_call)

    def _together(self, sequences: Sequence[NDArray[np.int64]]) -> list[NDArray[np.float32] | GraphFailed]:
        """Computes a probe's scores of sequences of rows in few runs; a sequence that fails together with others is scored alone."""
        scores: list[NDArray[np.float32] | GraphFailed] = []
        for batch in _batches(sequences, self._most_rows):
            scores += self._batch(batch)
        return scores

    def _batch(self, batch: Sequence[NDArray[np.int64]]) -> list[NDArray[np.float32] | GraphFailed]:
        try:
            scores = self._call(batch)
        except ComputationCancelled:
            # no client sees this failure, since no client waits for these rollouts any more
            return [GraphFailed("it was given up")] * len(batch)
        except GraphFailed as failed:
            if len(batch) == 1:
                return [failed]
        else:
            # A graph may tell sequences apart by arithmetic, where NaN × 0 is NaN. Alone, no sequence can spoil another's scores.
            if len(batch) == 1 or all(np.isfinite(each).all() for each in scores):
                return [*scores]
        half = len(batch) // 2
        return self._batch(batch[:half]) + self._batch(batch[half:])

    def _call(self, batch: Sequence[NDArray[np.int64]]) -> list[NDArray[np.float32]]:
        rows = np.concatenate(batch)
        ends = np.cumsum([len(sequence) for sequence in batch], dtype=np.int64)
        # a sequence ends in the segment that it is scored for
        needed_by = set[int]().union(*(self._rows.rollouts_at(int(sequence[-1])) for sequence in batch))
        pointwise = self._probe.manifest.context.kind == "pointwise"
        cu_seqlens = None if pointwise else np.concatenate([np.zeros(1, np.int64), ends])
        scores = self._run_graph(rows, cu_seqlens, needed_by)
        return np.split(scores, np.arange(1, len(batch)) if self._probe.pools else ends[:-1])

    def _run_graph(self, rows: NDArray[np.int64], cu_seqlens: NDArray[np.int64] | None, needed_by: set[int]) -> NDArray[np.float32]:
        with self._watch.over(needed_by) as options:
            return self._session.run(self._gather(rows), cu_seqlens, self._rows.positions[rows], options)

    def _gather(self, rows: NDArray[np.int64]) -> dict[Tap, torch.Tensor]:
        first, last = int(rows[0]), int(rows[-1])
        taps = self._probe.manifest.taps
        if last - first + 1 == len(rows) and (np.diff(rows) == 1).all():
            return {tap: self._activations[tap][first : last + 1] for tap in taps}
        indices = torch.from_numpy(rows)
        return {tap: self._activations[tap].index_select(0, indices.to(self._activations[tap].device)) for tap in taps}

    # ------------------------------------------------------------------------------------------------------------- after the graph

    def _problem(self, key: str, probe_input: ProbeInput) -> str:
        """Returns the reason why a completion cannot be scored, as a message for clients; empty if the completion can be scored."""
        for name, rows in self._sequences(probe_input):
            for tap in self._probe.manifest.taps:
                if not self._finite[tap][rows].all():
                    return non_finite_tap(tap, key)
            scores = self._calls.scores[self._calls.numbers[name]]
            if isinstance(scores, GraphFailed):
                return f"probe {key} cannot score this: {scores}"
            if not np.isfinite(scores).all():
                return non_finite_scores(key)
        return ""

    def _probe_scores(self, asked: ScoreTarget, probe_input: ProbeInput, reductions: Sequence[Reduction]) -> ProbeScores:
        labels = len(self._probe.manifest.output.labels)
        if self._probe.pools:
            absent = np.full((1, labels), np.nan, np.float32)
            pooled = [
                self._scores_of(self._pooled_name(probe_input, selection)) if selection.any() else absent
                for selection in probe_input.selections
            ]
            return ProbeScores(reduced=np.stack(pooled))
        tokens = np.concatenate([np.zeros((0, labels), np.float32), *(self._segment_scores(scored) for scored in probe_input.segments)])
        reduced = reduce_selections(tokens, probe_input.selections, reductions, lambda: self._wanted.check(asked.rollout))
        return ProbeScores(reduced, tokens if self._probe.manifest.key in asked.options.token_scores else None)

    def _scores_of(self, name: object) -> NDArray[np.float32]:
        scores = self._calls.scores[self._calls.numbers[name]]
        if isinstance(scores, GraphFailed):
            raise scores
        return scores

    def _segment_scores(self, scored: ScoredSegment) -> NDArray[np.float32]:
        scores = self._scores_of(_chain(self._probe, scored))
        return scores[len(scores) - len(self._forest.segments[scored.segment].token_ids) :]


def reduce_selections(
    tokens: NDArray[np.float32],
    selections: NDArray[np.bool_],
    reductions: Sequence[Reduction],
    check: Callable[[], None] = lambda: None,
) -> NDArray[np.float32]:
    """Reduces the token scores of each selection of tokens with each reduction, such as their mean.

    Args:
        tokens: scores of T tokens, ``(T, labels)`` float32.
        selections: S selections, true for the tokens that a selection contains, ``(S, T)`` bool.
        reductions: the R reductions to compute.
        check: function called before each reduction; an exception that the function raises ends the work.

    Returns:
        Reduced scores, ``(S, R, labels)`` float32.
    """
    reduced = np.empty((len(selections), len(reductions), tokens.shape[1]), np.float32)
    for row, selection in enumerate(selections):
        selected = tokens if selection.all() else tokens[selection]
        for column, reduction in enumerate(reductions):
            check()
            reduced[row, column] = reduce_scores(selected, reduction)
    return reduced


def non_finite_tap(tap: Tap, key: str) -> str:
    """Returns the message for a completion that has no scores because the language model gave NaN or an infinity."""
    return f"the model gives NaN or an infinity at {tap}, which probe {key} reads"


def non_finite_scores(key: str) -> str:
    """Returns the message for a completion that has no scores because a probe gave NaN or an infinity."""
    return f"probe {key} gives NaN or an infinity"


def overflowing_reduction(key: str) -> str:
    """Returns the message for a completion that has no scores because a reduction of finite scores exceeds float32."""
    return f"a reduction of the scores of probe {key} is beyond float32"


def _chain(probe: LoadedProbe, scored: ScoredSegment) -> tuple[int, ...]:
    """Returns the token segments (runs of tokens) that a probe must be given, in order, so that it can score the last of these segments."""
    return (*scored.before, scored.segment) if probe.manifest.context.sees_prompt else (scored.segment,)


def _batches(sequences: Sequence[NDArray[np.int64]], most_rows: int) -> Iterator[list[NDArray[np.int64]]]:
    """Groups whole sequences for runs of at most ``most_rows`` rows; a longer sequence is run by itself."""
    batch: list[NDArray[np.int64]] = []
    rows = 0
    for sequence in sequences:
        is_long = len(sequence) > most_rows // LONGEST_SHARE
        if batch and (is_long or rows + len(sequence) > most_rows or len(batch) == MAX_SEQUENCES_PER_CALL):
            yield batch
            batch, rows = [], 0
        if is_long:
            yield [sequence]
            continue
        batch.append(sequence)
        rows += len(sequence)
    if batch:
        yield batch


def _sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    # exp is taken of minus the magnitude, so that it cannot overflow
    small = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1 / (1 + small), small / (1 + small)).astype(np.float32)
