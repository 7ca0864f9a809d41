"""Ours, through a server: a front and a worker process, a real socket, and clients that are not counted.

The completions that are known together are dealt out as the ranks of a trainer hold them: consecutive, in equal parts, each with its
prompt. Every client sends its part at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from benchmarks.loads import LoadGroup, Unit
from benchmarks.serving import Serving
from benchmarks.variants import Job, Scored
from benchmarks.variants.engine import probe_scores
from probescore import ProbeClient, RolloutGroup, ScoreResult


class ServerVariant:
    def __init__(self, job: Job) -> None:
        device = "cuda:0" if job.device == "cuda" else job.device
        self._serving = Serving(
            job.model, job.probes, devices=device, dtype=job.dtype, threads_per_worker=job.threads, max_message_bytes=2**28
        )
        self._clients = [ProbeClient(self._serving.address) for _ in range(job.concurrency)]
        self._threads = ThreadPoolExecutor(job.concurrency)
        self._info = self._clients[0].wait_until_ready()
        self._probes = [name.partition("@")[0] for name in self._info.probes]

    def warm_up(self, unit: Unit) -> dict[str, Any]:
        self.score(unit)
        return {"execution_path": self._info.workers[0].execution_path}

    def remember(self, unit: Unit) -> None:
        self._score([(group,) for group in unit.earlier], unit)

    def score(self, unit: Unit) -> Scored:
        return self._score(unit.rounds, unit)

    def _score(self, rounds: Sequence[Sequence[LoadGroup]], unit: Unit) -> Scored:
        probes = self._probes[: unit.probes or None]
        token_scores = probes if unit.per_token else []

        def ask(client: ProbeClient, part: list[RolloutGroup]) -> ScoreResult:
            return client.score(part, probes=probes, token_scores=token_scores, timeout=3600)

        rows, computed, cached = [], 0, 0
        for known in rounds:
            for answer in self._threads.map(ask, self._clients, deal_out(known, len(self._clients))):
                rows += [probe_scores(scored, probes, per_token=unit.per_token) for group in answer.groups for scored in group]
                computed += answer.info.usage.tokens_computed
                cached += answer.info.usage.tokens_cached
        return Scored(np.concatenate(rows), {"tokens_computed": computed, "tokens_cached": cached})

    def cpu_seconds(self) -> float:
        return self._serving.cpu_seconds()

    def pids(self) -> list[int]:
        return self._serving.pids()

    def close(self) -> None:
        for client in self._clients:
            client.close()
        self._threads.shutdown()
        self._serving.close()


def deal_out(groups: Sequence[LoadGroup], clients: int) -> list[list[RolloutGroup]]:
    """At most ``clients`` parts, equal but for one completion."""
    held = [(number, completion) for number, group in enumerate(groups) for completion in group.completions]
    bounds = [len(held) * client // clients for client in range(clients + 1)]
    parts = [held[start:end] for start, end in itertools.pairwise(bounds) if start < end]
    return [
        [
            RolloutGroup(groups[number].prompt, [completion for _, completion in completions])
            for number, completions in itertools.groupby(part, key=lambda each: each[0])
        ]
        for part in parts
    ]


load = ServerVariant
