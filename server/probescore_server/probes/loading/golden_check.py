"""Checks golden scores: before the server's engine serves a probe, the engine must reproduce the scores that the probe author's own code
gave for token ids stored in the probe file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from probescore.types import Completion, CompletionScores, CompletionStatus, OutputPer, RolloutGroup
from probescore_server.errors import InvalidRequest, ProbeRefused
from probescore_server.probes.format.manifest import Golden, LeftOut, Manifest, Neighbour, neighbouring_places
from probescore_server.probes.format.probe_file import ProbeFile
from probescore_server.probes.loading.deviations import largest_deviation
from probescore_server.rollouts import CheckedRollout, EngineInfo
from probescore_server.validation.options import resolve_options
from probescore_server.validation.rollouts import resolve_rollouts

NEARER = 2.0
"""States how many times nearer a server's scores must be to a probe's golden scores (those of its author's code) than to the scores that a
neighbouring decoder block or token would give.
"""

SAME_SCORE = 1e-4
"""States by how many standard deviations two scores may differ and still count as equal; plain float32 arithmetic causes such differences.
"""

OUTLYING = 100.0
"""Factor that excludes some golden scores (scores of the author's own code) from the comparison with a neighbouring block or token, so that
a few large differences do not decide.

A golden score is left out if it differs from the neighbour's score by more than this many times the median difference.
"""

BEYOND_SCORES = 1e4
"""Limits how far the scores that a probe gives one decoder block or one token beside the right place may lie from its golden scores (those
of the author's code), in multiples of the size and spread of the golden scores.

Scores farther away are not scores that the probe gives, and so prove nothing about the place where the server reads activations.
"""

TELLS_BY_ITSELF = 1e-3
"""States the largest tolerance of a probe's golden scores (those of the author's code), in standard deviations, that by itself shows
whether a server reads the right decoder block and token.

With a larger tolerance, a manifest must also hold the scores of the neighbouring blocks and tokens.
"""

_OR_FLOAT32 = ", or serve it in float32"


def golden_rollouts(manifest: Manifest, info: EngineInfo, file: str) -> list[CheckedRollout]:
    """Returns the golden cases of a probe (rollouts stored with the scores of the author's own code) as rollouts that the engine can score;
    scores per token are requested unless the probe gives one score per rollout.

    Args:
        manifest: the probe's manifest.
        info: the model, and the probes with this one among them.
        file: the probe's file, for errors.

    Raises:
        ProbeRefused: the model cannot score a case, because a token id is beyond the vocabulary, or because the probe's ``expects_bos``
            contradicts the prompt's first token.
    """
    for token in manifest.follow_up.token_ids if manifest.follow_up else ():
        if token in info.placeholders:
            raise ProbeRefused(file, "follow_up.token_ids", f"{token}, {info.placeholders[token]}", "ids of text")
    groups = [
        RolloutGroup(np.array(case.prompt_ids, np.int64), [Completion(np.array(case.completion_ids, np.int64))])
        for case in manifest.golden.cases
    ]
    per_token = [] if manifest.output.per is OutputPer.ROLLOUT else [manifest.key]
    options = resolve_options(info, probes=[manifest.key], token_scores=per_token)
    try:
        return [rollout for group in resolve_rollouts(groups, info, options) for rollout in group]
    except InvalidRequest as error:
        field = error.field.replace("groups", "golden.cases", 1)
        raise ProbeRefused(file, field, error.problem, "a rollout that this model can score") from None


def check_golden(probe: ProbeFile, found: Sequence[CompletionScores], dtype: str) -> ProbeRefused | None:
    """Compares the scores that the engine computed for a probe's golden rollouts (those stored in its file) with the golden scores (those
    of the author's code), in the unit that the probe's manifest (its metadata) states.

    The largest difference, in standard deviations of each label's golden scores, must not exceed the manifest's ``golden.tolerance``. The
    recomputed scores must also be nearer to the golden scores than to the scores of every neighbouring layer and token, which the manifest
    also holds, since the tolerance of a coarse dtype may not tell neighbours apart.

    Args:
        probe: the probe file with the golden vectors (rollouts with scores of the author's code).
        found: the recomputed scores of ``golden_rollouts``, in the same order.
        dtype: the language model's dtype, such as ``bfloat16``.

    Returns:
        The exception that refuses the probe, or ``None`` if the scores agree.
    """
    golden = probe.manifest.golden
    allowed: float = getattr(golden.tolerance, dtype)
    for index, scores in enumerate(found):
        if scores.status is not CompletionStatus.OK:
            return ProbeRefused(probe.file, f"golden.cases[{index}].scores", scores.status_message, "finite scores")
    expected = golden.score_rows
    recomputed = np.concatenate([_rows(scores, probe.manifest.name) for scores in found]).astype(np.float64)
    difference = largest_deviation(recomputed, expected, expected.std(axis=0))
    if difference <= allowed:
        return _check_place(probe, recomputed, dtype)
    return ProbeRefused(
        probe.file,
        "golden",
        f"scores that differ by up to {difference:.3g} × their standard deviation when recomputed in {dtype}",
        f"at most {allowed:g} ×",
    )


def golden_deviation(manifest: Manifest, found: Sequence[CompletionScores]) -> float:
    """Returns the largest difference between scores of a probe's golden rollouts and the golden scores, in standard deviations of each
    label's golden scores; infinite if a rollout has no scores.

    Args:
        manifest: the probe's manifest, with the golden vectors.
        found: scores of ``golden_rollouts``, in the same order.
    """
    if any(scores.status is not CompletionStatus.OK for scores in found):
        return float("inf")
    expected = manifest.golden.score_rows
    return largest_deviation(np.concatenate([_rows(scores, manifest.name) for scores in found]), expected, expected.std(axis=0))


@dataclass(frozen=True)
class _Distances:
    """Value object with the distances of a probe's recomputed scores from its golden scores (those of the author's code) and from the
    scores that the probe gives at a neighbouring place.

    A neighbouring place is one decoder block or one token beside the right one. Each distance is a root mean square over the scores in
    which the two places differ, in standard deviations of the golden scores.

    Attributes:
        neighbour: the neighbouring place, another layer or token.
        golden: distance of the recomputed scores from the golden scores.
        wrong: distance of the recomputed scores from the neighbour's scores.
        apart: distance of the golden scores from the neighbour's scores.
    """

    neighbour: Neighbour
    golden: float
    wrong: float
    apart: float


def _check_place(probe: ProbeFile, recomputed: NDArray[np.float64], dtype: str) -> ProbeRefused | None:
    """Returns the exception that refuses a probe if its recomputed scores are those of a neighbouring place, or are not clearly those of
    the right place; ``None`` otherwise.

    A neighbouring place is one decoder block or one token beside the place where the probe reads activations.
    """
    golden = probe.manifest.golden
    allowed: float = getattr(golden.tolerance, dtype)
    measured = [_distances(golden, neighbour, recomputed) for neighbour in golden.neighbours]
    doubtful = [each for each in measured if each is not None and not NEARER * each.golden <= each.wrong]
    if not doubtful:
        return _check_neighbours_suffice(probe, measured, dtype) if allowed > TELLS_BY_ITSELF else None
    nearest = min(doubtful, key=lambda each: each.wrong)
    stated = ", ".join(map(str, probe.manifest.taps))
    if NEARER * nearest.wrong <= nearest.golden:
        return ProbeRefused(
            probe.file,
            "golden",
            f"scores recomputed in {dtype} that are those of golden.neighbours at {nearest.neighbour}, to {nearest.wrong:.2g} × their "
            "standard deviation",
            f"those of golden.cases, which differ from them by {nearest.golden:.2g} ×; what was read is {stated}",
        )
    return ProbeRefused(
        probe.file,
        "golden.neighbours",
        f"scores recomputed in {dtype} that are {nearest.golden:.2g} × their standard deviation from the golden ones and "
        f"{nearest.wrong:.2g} × from those at {nearest.neighbour}, which are {nearest.apart:.2g} × apart: {dtype} is too coarse to tell "
        f"whether {stated} is read",
        f"scores at least {NEARER:g} times as near to the golden ones{_OR_FLOAT32 if dtype != 'float32' else ''}",
    )


def _check_neighbours_suffice(probe: ProbeFile, measured: Sequence[_Distances | None], dtype: str) -> ProbeRefused | None:
    """Returns the exception that refuses a probe if the scores of neighbouring places in its manifest (its metadata) cannot reveal that a
    server reads the wrong place; ``None`` otherwise.

    A neighbouring place is one decoder block or one token beside the place where the probe reads activations. The manifest must have
    exactly the neighbouring places of its own taps (points in the model).
    """
    manifest, golden = probe.manifest, probe.manifest.golden
    stated = ", ".join(map(str, manifest.taps))
    said = {entry.place: entry for entry in (*golden.neighbours, *golden.left_out)}
    due = {
        place: LeftOut(inputs=place[0], tokens=place[1], reason="no_such_tap")
        for place in neighbouring_places(manifest.inputs, manifest.model.num_hidden_layers)
    }
    strange = [said[place] for place in said if place not in due]
    missing = [due[place] for place in due if place not in said]
    layers = [distances for neighbour, distances in zip(golden.neighbours, measured, strict=True) if neighbour.tokens == 0]
    if not said:
        found = "none"
    elif strange:
        found = f"scores at {strange[0]}, which is not one block or one token beside {stated}"
    elif missing:
        found = f"no scores at {missing[0]}"
    elif layers and not any(layers):
        found = f"scores one block off that are the golden ones, or farther from them than {BEYOND_SCORES:g} × their own size"
    else:
        return None
    return ProbeRefused(
        probe.file,
        "golden.neighbours",
        found,
        f"scores one block and one token off, as write_probe stores them: the tolerance of {getattr(golden.tolerance, dtype):g} in {dtype} "
        f"does not tell them from right ones. Write the file again{_OR_FLOAT32 if dtype != 'float32' else ''}",
    )


def _distances(golden: Golden, neighbour: Neighbour, recomputed: NDArray[np.float64]) -> _Distances | None:
    """Computes the distances of a probe's recomputed scores from the golden scores (those of the author's code) and from the scores of a
    neighbouring place.

    A neighbouring place is one decoder block or one token beside the place where the probe reads activations. Only rows are compared whose
    scores differ between the two places, by no more than ``BEYOND_SCORES`` times the size and spread of the golden scores: a greater number
    is no score that the probe gives, and proves nothing about the place. Returns ``None`` if no row is left.
    """
    between, expected = neighbour.difference_rows, golden.score_rows
    labels = between.shape[1]
    scale = expected[:, :labels].std(axis=0)
    likely = BEYOND_SCORES * (1 + np.abs(expected[:, :labels]).max(axis=0) / scale)
    between, off = between / scale, (recomputed - expected)[:, :labels] / scale
    differing = (np.abs(between) > SAME_SCORE) & (np.abs(between) <= likely)
    if not differing.any():
        return None
    # a few scores that are much farther apart would outweigh all other scores and hide their differences
    differing &= np.abs(between) <= OUTLYING * np.median(np.abs(between[differing]))
    return _Distances(neighbour, *(_root_mean_square(rows[differing]) for rows in (off, off - between, between)))


def _root_mean_square(numbers: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(np.square(numbers))))


def _rows(scores: CompletionScores, probe: str) -> NDArray[np.float32]:
    """Returns a probe's scores for one completion as rows: one row per token, or a single row for a probe that pools by itself."""
    answer = scores[probe]
    return answer.reduced[0] if answer.tokens is None else answer.tokens
