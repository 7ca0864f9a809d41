"""The golden check: what the author's own code scored, this engine must score alike before it serves the probe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from probescore.types import Completion, CompletionScores, CompletionStatus, OutputPer, RolloutGroup
from probescore_server.errors import InvalidRequest, ProbeRefused
from probescore_server.probes.format.manifest import Golden, LeftOut, Neighbour, neighbouring_places
from probescore_server.probes.format.probe_file import ProbeFile
from probescore_server.probes.loading.deviations import largest_deviation
from probescore_server.rollouts import CheckedRollout, EngineInfo
from probescore_server.validation.options import resolve_options
from probescore_server.validation.rollouts import resolve_rollouts

NEARER = 2.0
"""So many times as near must recomputed scores be to the golden ones as to those of any neighbouring place."""

SAME_SCORE = 1e-4
"""Scores that differ by less, in standard deviations, are equal: what plain float32 may differ by."""

OUTLYING = 100.0
"""Scores that are more than so many times as far apart as at the median are left out of the comparison of two places."""

BEYOND_SCORES = 1e4
"""Differences of more than so many times what golden scores are, and spread, are of no scores that this probe gives: they tell nothing."""

TELLS_BY_ITSELF = 1e-3
"""A tolerance up to which it tells a layer or a token from its neighbour, without their scores."""

_OR_FLOAT32 = ", or serve it in float32"


def golden_rollouts(probe: ProbeFile, info: EngineInfo) -> list[CheckedRollout]:
    """The golden cases of a probe as rollouts whose scores per token are wanted.

    Raises:
        ProbeRefused: a case could not be requested of this model: an id beyond its vocabulary, a BOS that ``expects_bos`` contradicts.
    """
    manifest = probe.manifest
    for token in manifest.follow_up.token_ids if manifest.follow_up else ():
        if token in info.placeholders:
            raise ProbeRefused(probe.file, "follow_up.token_ids", f"{token}, {info.placeholders[token]}", "ids of text")
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
        raise ProbeRefused(probe.file, field, error.problem, "a rollout that this model can score") from None


def check_golden(probe: ProbeFile, found: Sequence[CompletionScores], dtype: str) -> ProbeRefused | None:
    """Compares recomputed scores, in ``output.unit``, with the golden ones.

    The largest difference, in units of the golden scores' standard deviation (label by label), must not exceed ``golden.tolerance``; and
    the golden scores must be nearer than those of every neighbouring place, which a dtype's tolerance may not tell from them.

    Args:
        probe: whose golden vectors.
        found: the scores of ``golden_rollouts``, in order.
        dtype: of the model.

    Returns:
        What is wrong, or ``None``.
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


@dataclass(frozen=True)
class _Distances:
    """Of recomputed scores, where a neighbour's differ from the golden ones: root mean squares, in standard deviations.

    Attributes:
        golden: from the golden scores.
        wrong: from the neighbour's.
        apart: between those two.
    """

    neighbour: Neighbour
    golden: float
    wrong: float
    apart: float


def _check_place(probe: ProbeFile, recomputed: NDArray[np.float64], dtype: str) -> ProbeRefused | None:
    """Whether the scores are those of a neighbouring place, or not clearly those of the right one."""
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
    """Whether the neighbours are those of the manifest's taps, all of them, and a wrong layer would have shown."""
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
    """``None`` where no score differs between the two places, and to read in the wrong one gives no wrong score; or where all differ by
    more than any scores of this probe would.
    """
    between, expected = neighbour.difference_rows, golden.score_rows
    labels = between.shape[1]
    scale = expected[:, :labels].std(axis=0)
    likely = BEYOND_SCORES * (1 + np.abs(expected[:, :labels]).max(axis=0) / scale)
    between, off = between / scale, (recomputed - expected)[:, :labels] / scale
    differing = (np.abs(between) > SAME_SCORE) & (np.abs(between) <= likely)
    if not differing.any():
        return None
    # a few scores that are much farther apart would outweigh all others, and hide what those say
    differing &= np.abs(between) <= OUTLYING * np.median(np.abs(between[differing]))
    return _Distances(neighbour, *(_root_mean_square(rows[differing]) for rows in (off, off - between, between)))


def _root_mean_square(numbers: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(np.square(numbers))))


def _rows(scores: CompletionScores, probe: str) -> NDArray[np.float32]:
    """Per token, or the one row of a probe that pools by itself."""
    answer = scores[probe]
    return answer.reduced[0] if answer.tokens is None else answer.tokens
