"""Makes golden vectors, rollouts scored by plain Hugging Face and the author's code, and checks that a graph computes the same scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from probescore.types import OutputPer, Tap, TokenIds
from probescore_probes.exporting import ProbeFunction
from probescore_probes.float64 import float64_activations
from probescore_probes.reference import ReferenceModel
from probescore_server.errors import ProbeRefused, StartupError
from probescore_server.probes.format.graph import CU_SEQLENS, POSITIONS, GraphFailed, GraphInputs, GraphSignature, checked_scores
from probescore_server.probes.format.manifest import (
    MAX_FLOAT32,
    MAX_NEIGHBOUR_LABELS,
    Context,
    FollowUp,
    GoldenCase,
    LeftOut,
    Manifest,
    Neighbour,
    Place,
    TapInput,
    neighbouring_places,
)
from probescore_server.probes.loading.context_check import check_author_agrees, far_lengths, rows_tried
from probescore_server.probes.loading.deviations import largest_deviation
from probescore_server.probes.loading.random_sequences import RandomSequences, cut_sequence, pack_sequences
from probescore_server.probes.loading.row_by_row import is_row_by_row


@dataclass(frozen=True, eq=False)
class GoldenRollout:
    """Value object with one golden rollout, and the inputs and scores of the author's code for it.

    Attributes:
        golden: the part of the rollout that the manifest stores.
        inputs: the inputs of the author's code, a dictionary keyed by input name, for N rows; these include the prompt's rows if the probe
            sees the prompt.
        scores: ``(N, labels)``, or ``(1, labels)`` for a probe that pools.
        differences: dictionary keyed by neighbouring place (one decoder block or one token beside the right one): the change of the scores
            if activations are read there; NaN if the author's code refuses these activations, and ``None`` if the model has no such place.
    """

    golden: GoldenCase
    inputs: GraphInputs
    scores: NDArray[np.float64]
    differences: Mapping[Place, NDArray[np.float64] | None]


@dataclass(frozen=True, eq=False)
class GoldenScorer:
    """Scorer that applies the author's code to the reference model's activations, in the context that the manifest states."""

    probe: ProbeFunction
    reference: ReferenceModel
    inputs: tuple[TapInput, ...]
    context: Context
    positions: bool
    exclude_special_tokens: bool
    follow_up: FollowUp | None

    def score(self, prompt: TokenIds, completion: TokenIds) -> GoldenRollout:
        """Scores one rollout with activations of the right place, and of every place one decoder block or one token beside it.

        Raises:
            ValueError: the author's code gives scores that are not finite, or another number of scores than tokens, or no token is left to
                score.
        """
        prompt_ids, completion_ids = (np.asarray(ids, np.int64) for ids in (prompt, completion))
        ids, scored_from = self._ids(prompt_ids, completion_ids)
        rows = self._rows(ids, scored_from)
        places = neighbouring_places(self.inputs, self.reference.reference.num_hidden_layers)
        activations = self._activations(ids, places)
        inputs = self._graph_inputs(activations, rows, (self.inputs, 0))
        scores = self._scores(inputs, rows)
        kept = slice(None) if self.context.kind == "rollout" else rows >= scored_from
        if unfit := int((~(np.abs(scores[kept]) <= MAX_FLOAT32)).sum()):
            problem = "NaN or infinite scores, or scores beyond float32"
            raise ValueError(f"probe: its code gave {unfit} {problem} on a golden rollout; fit it again")
        golden = GoldenCase(
            prompt_ids=tuple(prompt_ids.tolist()),
            completion_ids=tuple(completion_ids.tolist()),
            scores=tuple(tuple(row) for row in scores[kept].tolist()),
        )
        differences: dict[Place, NDArray[np.float64] | None] = dict.fromkeys(places)
        with np.errstate(all="ignore"):  # the code was not made for these activations
            for place in places:
                if all(entry.tap in activations for entry in place[0]):
                    elsewhere = np.full_like(scores, np.nan)
                    with suppress(ValueError):
                        elsewhere = self._scores(self._graph_inputs(activations, rows, place), rows)
                    differences[place] = (elsewhere - scores)[kept]
        return GoldenRollout(golden, inputs, scores, differences)

    def scores_at(self, prompt: TokenIds, completion: TokenIds, places: Sequence[Place]) -> list[NDArray[np.float64] | None]:
        """Scores one rollout where the probe reads it at each of several places, in one pass of the model.

        Returns:
            For each place scores of the shape of ``golden.scores``; ``None`` where the model has no such tap, or the code refuses it.
        """
        ids, scored_from = self._ids(np.asarray(prompt, np.int64), np.asarray(completion, np.int64))
        rows = self._rows(ids, scored_from)
        activations = self._activations(ids, places)
        found: list[NDArray[np.float64] | None] = []
        with np.errstate(all="ignore"):  # the code was not made for what it is given elsewhere
            for place in places:
                scores = None
                if all(entry.tap in activations for entry in place[0]):
                    with suppress(ValueError):
                        scores = self._scores(self._graph_inputs(activations, rows, place), rows)
                kept = scores if scores is None or self.context.kind == "rollout" else scores[rows >= scored_from]
                found.append(kept)
        return found

    def exact_scores(self, golden: GoldenCase) -> NDArray[np.float64]:
        """Computes the scores that the author's code gives for a golden rollout (one stored in the probe file), on activations that were
        computed in float64 and rounded once to float32.

        Returns:
            Scores of the same shape as ``golden.scores``.

        Raises:
            Exception: any error of a model or device that does not support float64.
        """
        ids, scored_from = self._ids(np.asarray(golden.prompt_ids, np.int64), np.asarray(golden.completion_ids, np.int64))
        rows = self._rows(ids, scored_from)
        exact = float64_activations(self.reference, ids, [entry.tap for entry in self.inputs])
        activations = {tap: values.astype(np.float32) for tap, values in exact.items()}
        scores = self._scores(self._graph_inputs(activations, rows, (self.inputs, 0)), rows)
        return scores if self.context.kind == "rollout" else scores[rows >= scored_from]

    def _ids(self, prompt: NDArray[np.int64], completion: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
        """Returns all token ids of a rollout, and the index of the first token that is scored.

        The ids end with those of the probe's follow-up, if the manifest has one: tokens that are appended to the completion and scored
        instead of it.
        """
        followed = np.asarray(self.follow_up.token_ids if self.follow_up else (), np.int64)
        return np.concatenate([prompt, completion, followed]), len(prompt) + (len(completion) if self.follow_up else 0)

    def _activations(self, ids: NDArray[np.int64], places: Sequence[Place]) -> dict[Tap, NDArray[np.float32]]:
        """Computes the activations of a rollout at every tap of the probe, and at the taps one decoder block beside.

        A tap is a point in the language model; neighbouring taps that do not exist in the model are left out.
        """
        stated = [entry.tap for entry in self.inputs]
        others = {entry.tap for taps, _ in places for entry in taps} - {*stated}
        try:
            return self.reference.activations(ids, [*stated, *others])
        except (ValueError, StartupError):
            activations = self.reference.activations(ids, stated)
        for tap in others:  # a block may have no attention or MLP of its own
            with suppress(ValueError, StartupError):
                activations |= self.reference.activations(ids, [tap])
        return activations

    def _graph_inputs(self, activations: Mapping[Tap, NDArray[np.float32]], rows: NDArray[np.int64], place: Place) -> GraphInputs:
        taps, tokens = place
        last = len(activations[taps[0].tap]) - 1
        read = (rows + tokens).clip(0, last)
        inputs: dict[str, NDArray[Any]] = {
            str(stated.tap): activations[entry.tap][read] for stated, entry in zip(self.inputs, taps, strict=True)
        }
        if self.context.kind != "pointwise":
            inputs[CU_SEQLENS] = np.array([0, len(rows)], np.int64)
        if self.positions:
            inputs[POSITIONS] = rows
        return inputs

    def _scores(self, inputs: GraphInputs, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        scores = np.asarray(self.probe.score(inputs), np.float64)
        if scores.ndim not in (1, 2) or len(scores) != (1 if self.context.kind == "rollout" else len(rows)):
            raise ValueError(f"the author's code gave scores {scores.shape} for {len(rows)} tokens")
        return scores.reshape(len(scores), -1)

    def _rows(self, ids: NDArray[np.int64], scored_from: int) -> NDArray[np.int64]:
        """Returns the positions of those tokens of a rollout whose activations are given to the probe."""
        rows = np.arange(0 if self.context.sees_prompt else scored_from, len(ids))
        if self.context.kind == "rollout" and self.exclude_special_tokens:
            special = np.isin(ids[rows], self.reference.special_token_ids)
            rows = rows[(rows < scored_from) | ~special]
        if not (rows >= scored_from).any():
            raise ValueError("a golden rollout has no token to score")
        return rows


def neighbours(rollouts: Sequence[GoldenRollout]) -> tuple[tuple[Neighbour, ...], tuple[LeftOut, ...]]:
    """Returns, for the manifest, the golden scores (those of the author's code) at each place that is one decoder block or one token beside
    the right place.

    The first list holds the places where every rollout has finite scores. The second list holds the other places, with the reason.
    """
    found, left_out = [], []
    for place in rollouts[0].differences if rollouts else ():
        taps, tokens = place
        read = [rows[:, :MAX_NEIGHBOUR_LABELS] for rollout in rollouts if (rows := rollout.differences[place]) is not None]
        if len(read) < len(rollouts):
            left_out.append(LeftOut(inputs=taps, tokens=tokens, reason="no_such_tap"))
        elif not all((np.abs(rows) <= MAX_FLOAT32).all() for rows in read):
            left_out.append(LeftOut(inputs=taps, tokens=tokens, reason="not_finite"))
        else:
            differences = tuple(tuple(tuple(float(f"{number:.4g}") for number in row) for row in rows.tolist()) for rows in read)
            found.append(Neighbour(inputs=taps, tokens=tokens, differences=differences))
    return tuple(found), tuple(left_out)


def check_graph_computes(
    model: onnx.ModelProto, manifest: Manifest, probe: ProbeFunction, rollouts: Sequence[GoldenRollout], file: str
) -> None:
    """Checks that a graph gives the scores of the author's code, which depend on no more than the manifest's ``context`` states.

    The graph runs in onnx's own evaluator. Each rollout is scored alone and packed with the others. For a causal probe, the first half of a
    rollout and its last window are also scored. Then, unless the graph certainly computes row by row,
    ``probescore_server.probes.loading.context_check`` tests the graph on sequences of random rows, far from the rollouts.

    Raises:
        ProbeRefused: the graph gives other scores, or its scores depend on more than the context states.
    """
    scale = manifest.golden.score_rows.std(axis=0)
    tolerance = manifest.golden.tolerance.float32
    evaluator = ReferenceEvaluator(model)

    def compare(inputs: GraphInputs, expected: NDArray[np.float64], promise: str, select: slice = slice(None)) -> None:
        try:
            (found,) = map(np.asarray, evaluator.run(None, dict(inputs)))
        except Exception as error:  # whatever numpy raises inside the operators
            raise ProbeRefused(file, "graph", f"an error on the golden rollouts: {error}", promise) from None
        found = found[select]
        if found.shape != expected.shape:
            raise ProbeRefused(file, "graph", f"scores of shape {found.shape}", f"{expected.shape}: {promise}")
        difference = largest_deviation(found, expected, scale)
        if not difference <= tolerance:
            raise ProbeRefused(
                file, "graph", f"scores off by {difference:.2g} of their standard deviation", f"at most {tolerance:g}: {promise}"
            )

    for rollout in rollouts:
        compare(rollout.inputs, rollout.scores, "the scores of the author's code")
    backwards = list(reversed(rollouts))
    together = pack_sequences([rollout.inputs for rollout in backwards])
    compare(together, np.concatenate([rollout.scores for rollout in backwards]), "a rollout's scores do not depend on its neighbours")
    if manifest.output.per is OutputPer.TOKEN and manifest.context.kind == "causal":
        for rollout in rollouts:
            _check_causal(rollout, manifest.context.window, compare)
    _check_beyond(model, manifest, probe, rollouts, evaluator, file)


def _check_beyond(
    model: onnx.ModelProto,
    manifest: Manifest,
    probe: ProbeFunction,
    rollouts: Sequence[GoldenRollout],
    evaluator: ReferenceEvaluator,
    file: str,
) -> None:
    labels, pools = len(manifest.output.labels), manifest.output.per is OutputPer.ROLLOUT

    def run(inputs: GraphInputs) -> NDArray[np.float32]:
        try:
            with np.errstate(all="ignore"):  # random rows may overflow in an operator; the result is compared in any case
                (scores,) = map(np.asarray, evaluator.run(None, dict(inputs)))
        except Exception as error:  # whatever numpy raises inside the operators
            raise GraphFailed(str(error)) from error
        return checked_scores(scores, len(inputs[CU_SEQLENS]) - 1 if pools else len(inputs[str(manifest.taps[0])]), labels)

    golden = {tap: np.concatenate([rollout.inputs[str(tap)] for rollout in rollouts]) for tap in manifest.taps}
    around = RandomSequences(manifest, golden, np.random.default_rng(0))
    proven = is_row_by_row(model, GraphSignature.of(manifest))
    if not proven:
        rows_tried(run, model, around, file)
    longest = max(len(rollout.inputs[str(manifest.taps[0])]) for rollout in rollouts)
    lengths = () if proven else far_lengths(model)
    check_author_agrees(run, probe.score, around, longest, manifest.golden.tolerance.float32, file, lengths)


def _check_causal(rollout: GoldenRollout, window: int | None, compare: Callable[..., None]) -> None:
    rows = len(rollout.scores)
    half = (rows + 1) // 2
    compare(cut_sequence(rollout.inputs, slice(0, half)), rollout.scores[:half], "a token's score does not depend on later tokens")
    if window is not None and rows > window:
        promise = f"a token's score depends on context.window = {window} tokens, itself included"
        compare(cut_sequence(rollout.inputs, slice(rows - window, rows)), rollout.scores[-1:], promise, slice(-1, None))
