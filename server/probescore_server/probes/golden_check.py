"""The golden check: what the author's own code scored, this engine must score alike before it serves the probe."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from probescore.types import Completion, CompletionScores, CompletionStatus, OutputPer, RolloutGroup
from probescore_server.errors import InvalidRequest, ProbeRefused
from probescore_server.probes.probe_file import ProbeFile
from probescore_server.requests import resolve_options, resolve_rollouts
from probescore_server.rollouts import EngineInfo, Rollout


def golden_rollouts(probe: ProbeFile, info: EngineInfo) -> list[Rollout]:
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

    The largest difference, in units of the golden scores' standard deviation (label by label), must not exceed ``golden.tolerance``.

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
    difference = float((np.abs(recomputed - expected) / expected.std(axis=0)).max())
    if difference <= allowed:
        return None
    return ProbeRefused(
        probe.file,
        "golden",
        f"scores that differ by up to {difference:.3g} × their standard deviation when recomputed in {dtype}",
        f"at most {allowed:g} ×",
    )


def _rows(scores: CompletionScores, probe: str) -> NDArray[np.float32]:
    """Per token, or the one row of a probe that pools by itself."""
    answer = scores[probe]
    return answer.reduced[0] if answer.tokens is None else answer.tokens
