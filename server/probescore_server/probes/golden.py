"""Golden vectors: rollouts scored by plain Hugging Face and the author's code; and the check that a graph computes the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from probescore.types import OutputPer, Tap, TokenIds
from probescore_server.errors import ProbeRefused
from probescore_server.probes.exporting import GraphInputs, ProbeFunction
from probescore_server.probes.graph import CU_SEQLENS, POSITIONS
from probescore_server.probes.manifest import Context, FollowUp, GoldenCase, Manifest
from probescore_server.probes.reference import ReferenceModel


@dataclass(frozen=True, eq=False)
class ScoredRollout:
    """One rollout as the author's code was given it and scored it.

    Attributes:
        golden: the part that goes into the manifest.
        inputs: by name, of the ``N`` rows that the code was given: those of the prompt too if the probe sees it.
        scores: ``(N, labels)``, or ``(1, labels)`` for a probe that pools.
    """

    golden: GoldenCase
    inputs: GraphInputs
    scores: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class GoldenScorer:
    """Scores rollouts with the author's code on the reference's activations, in the context that the manifest promises."""

    probe: ProbeFunction
    reference: ReferenceModel
    taps: tuple[Tap, ...]
    context: Context
    positions: bool
    exclude_special_tokens: bool
    follow_up: FollowUp | None

    def score(self, prompt: TokenIds, completion: TokenIds) -> ScoredRollout:
        """Scores one rollout.

        Raises:
            ValueError: the code gives another number of scores than it was given tokens, or nothing is left to pool.
        """
        prompt_ids, completion_ids = (np.asarray(ids, np.int64) for ids in (prompt, completion))
        followed = np.asarray(self.follow_up.token_ids if self.follow_up else (), np.int64)
        ids = np.concatenate([prompt_ids, completion_ids, followed])
        scored_from = len(prompt_ids) + (len(completion_ids) if self.follow_up else 0)
        rows = self._rows(ids, scored_from)
        activations = self.reference.activations(ids, self.taps)
        inputs: dict[str, NDArray[Any]] = {str(tap): activations[tap][rows] for tap in self.taps}
        if self.context.kind != "pointwise":
            inputs[CU_SEQLENS] = np.array([0, len(rows)], np.int64)
        if self.positions:
            inputs[POSITIONS] = rows
        scores = np.asarray(self.probe.score(inputs), np.float64)
        pools = self.context.kind == "rollout"
        if scores.ndim not in (1, 2) or len(scores) != (1 if pools else len(rows)):
            raise ValueError(f"the author's code gave scores {scores.shape} for {len(rows)} tokens")
        scores = scores.reshape(len(scores), -1)
        kept = scores if pools else scores[rows >= scored_from]
        golden = GoldenCase(
            prompt_ids=tuple(prompt_ids.tolist()),
            completion_ids=tuple(completion_ids.tolist()),
            scores=tuple(tuple(row) for row in kept.tolist()),
        )
        return ScoredRollout(golden, inputs, scores)

    def _rows(self, ids: NDArray[np.int64], scored_from: int) -> NDArray[np.int64]:
        """Positions in the rollout whose activations the probe is given."""
        rows = np.arange(0 if self.context.sees_prompt else scored_from, len(ids))
        if self.context.kind == "rollout" and self.exclude_special_tokens:
            special = np.isin(ids[rows], self.reference.special_token_ids)
            rows = rows[(rows < scored_from) | ~special]
        if not (rows >= scored_from).any():
            raise ValueError("a golden rollout has no token to score")
        return rows


def check_graph_computes(model: onnx.ModelProto, manifest: Manifest, rollouts: Sequence[ScoredRollout], file: str) -> None:
    """Checks that a graph gives the author's scores, and depends on no more than its manifest's ``context`` says.

    The graph runs in onnx's own evaluator. Each rollout is scored alone and packed with the others; of a causal probe also the first half
    of a rollout, and its last window.

    Raises:
        ProbeRefused: it does not.
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
        difference = float((np.abs(found - expected) / scale).max())
        if not difference <= tolerance:
            raise ProbeRefused(
                file, "graph", f"scores off by {difference:.2g} of their standard deviation", f"at most {tolerance:g}: {promise}"
            )

    for rollout in rollouts:
        compare(rollout.inputs, rollout.scores, "the scores of the author's code")
    backwards = list(reversed(rollouts))
    packed = _packed([rollout.inputs for rollout in backwards])
    compare(packed, np.concatenate([rollout.scores for rollout in backwards]), "a rollout's scores do not depend on its neighbours")
    if manifest.output.per is OutputPer.TOKEN and manifest.context.kind == "causal":
        for rollout in rollouts:
            _check_causal(rollout, manifest.context.window, compare)


def _check_causal(rollout: ScoredRollout, window: int | None, compare: Callable[..., None]) -> None:
    rows = len(rollout.scores)
    half = (rows + 1) // 2
    compare(_cut(rollout.inputs, slice(0, half)), rollout.scores[:half], "a token's score does not depend on later tokens")
    if window is not None and rows > window:
        promise = f"a token's score depends on context.window = {window} tokens, itself included"
        compare(_cut(rollout.inputs, slice(rows - window, rows)), rollout.scores[-1:], promise, slice(-1, None))


def _cut(inputs: GraphInputs, rows: slice) -> GraphInputs:
    cut = {name: array[rows] for name, array in inputs.items() if name != CU_SEQLENS}
    return {name: cut.get(name, np.array([0, rows.stop - rows.start], np.int64)) for name in inputs}


def _packed(sequences: Sequence[GraphInputs]) -> GraphInputs:
    packed = {name: np.concatenate([inputs[name] for inputs in sequences]) for name in sequences[0]}
    if CU_SEQLENS in packed:
        lengths = [inputs[CU_SEQLENS][-1] for inputs in sequences]
        packed[CU_SEQLENS] = np.cumsum([0, *lengths], dtype=np.int64)
    return packed
