"""Ours, in process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.loads import LoadGroup, Unit
from benchmarks.variants import InProcess, Job, Scored
from probescore import CompletionScores, RolloutGroup
from probescore_server import Engine


class InProcessEngine(InProcess):
    def __init__(self, job: Job) -> None:
        self._engine = Engine.load(job.model, job.probes, dtype=job.dtype, device=job.device)
        if job.loaded:
            self._engine.load_reading("policy", job.loaded)
        self._probes = [probe.name for probe in self._engine.info.probes]

    def warm_up(self, unit: Unit) -> dict[str, Any]:
        self.score(unit)
        return {"execution_path": self._engine.info.execution_path}

    def remember(self, unit: Unit) -> None:
        self._score([(group,) for group in unit.earlier], unit)

    def score(self, unit: Unit) -> Scored:
        return self._score(unit.rounds, unit)

    def _score(self, rounds: Sequence[Sequence[LoadGroup]], unit: Unit) -> Scored:
        probes = self._probes[: unit.probes or None]
        rows, computed, cached = [], 0, 0
        for known in rounds:
            groups = [RolloutGroup(call.prompt, call.completions) for call in known]
            answer = self._engine.score(groups, probes=probes, token_scores="all" if unit.per_token else ())
            rows += [probe_scores(scored, probes, per_token=unit.per_token) for group in answer.groups for scored in group]
            computed += answer.info.usage.tokens_computed
            cached += answer.info.usage.tokens_cached
        return Scored(np.concatenate(rows), {"tokens_computed": computed, "tokens_cached": cached})


def probe_scores(scored: CompletionScores, probes: Sequence[str], *, per_token: bool) -> NDArray[np.float32]:
    """Of one completion, ``(tokens, probes)``, or ``(1, probes)`` with the means."""
    if not per_token:
        return np.array([[scored[probe].reduced[0, 0, 0] for probe in probes]], np.float32)
    columns = [tokens for probe in probes if (tokens := scored[probe].tokens) is not None]
    return np.concatenate(columns, axis=1)


load = InProcessEngine
