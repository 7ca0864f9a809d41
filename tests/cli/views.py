"""Answers made by hand, for tests that need no server."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from probescore import (
    Calibration,
    Completion,
    CompletionScores,
    CompletionStatus,
    OutputPer,
    ProbeInfo,
    ProbeScores,
    Reduction,
    ScoredProbe,
    ScoreUnit,
    ScoringInfo,
)

INFO = ScoringInfo("sha256:" + "0" * 64, "", ())


def scored_probe(
    name: str = "cheating", labels: Sequence[str] = ("score",), reductions: Sequence[str] = ("mean",), **changes
) -> ScoredProbe:
    fields = {"version": "1", "graph_sha256": "", "manifest_sha256": "", "unit": ScoreUnit.LOGIT, "output_per": OutputPer.TOKEN} | changes
    return ScoredProbe(name=name, labels=tuple(labels), reductions=tuple(map(Reduction.parse, reductions)), **fields)


def loaded_probe(scored: ScoredProbe, *calibrations: Calibration) -> ProbeInfo:
    return ProbeInfo(
        scored.name, scored.version, "", "", "", (), scored.unit, scored.output_per, scored.labels, None, calibrations, (), "{}"
    )


def threshold(value: float, reduction: str | None = "mean", label: str = "") -> Calibration:
    return Calibration(value, 0.05, 0.03, 0.08, 400, "honest rollouts", None if reduction is None else Reduction.parse(reduction), label)


def answer(completion: Completion, texts: Sequence[str] | None = None, **scores: ProbeScores) -> CompletionScores:
    """What a server answers for a completion of ids, whose prompt is ids 1, 2."""
    return CompletionScores(
        id=completion.id,
        status=CompletionStatus.OK,
        scores=scores,
        prompt_ids=np.array([1, 2], np.int32),
        completion_ids=np.asarray(completion.tokens, np.int32),
        prompt_texts=None if texts is None else ("<p>", " q"),
        completion_texts=None if texts is None else tuple(texts),
        follow_ups=tuple(answer(follow_up, None, **scores) for follow_up in completion.follow_ups),
    )


def probe_scores(reduced: Sequence[float | None], tokens: Sequence[float] | None) -> ProbeScores:
    """One label, one reduction: a number for the whole and for each span, and those of the tokens."""
    numbers = [np.nan if number is None else number for number in reduced]
    return ProbeScores(
        np.array(numbers, np.float32).reshape(-1, 1, 1), None if tokens is None else np.array(tokens, np.float32).reshape(-1, 1)
    )
