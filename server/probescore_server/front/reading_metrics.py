"""Counts Prometheus metrics of readings, the weights beside the frozen model that probes read: their loads, and what is scored on them.

Names of readings are chosen by whoever loads them, so that no metric has them as a label.
"""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from probescore.types import Reading, ReadingKind
from probescore_server.errors import CoreError, ReadingIncomplete, ReadingRefused

LOAD_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class ReadingMetrics:
    """Collection of the Prometheus metrics of one server's readings.

    Attributes:
        loaded: gauge of the readings that a request can name beside the frozen one.
        lost: counter of the readings that were dropped because a worker process could not read them again.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.loaded = Gauge("probescore_readings", "Counts the readings that are loaded beside the frozen model.", registry=registry)
        self.lost = Counter(
            "probescore_readings_lost_total",
            "Counts the readings dropped since a worker, started again, found other files.",
            registry=registry,
        )
        self._loads = Counter(
            "probescore_reading_loads_total", "Counts the readings that were to be loaded, by outcome.", ("outcome",), registry=registry
        )
        for outcome in ("loaded", "refused", "incomplete", "failed"):
            self._loads.labels(outcome)
        self._load_seconds = Histogram(
            "probescore_reading_load_seconds", "Measures the seconds of loading a reading.", buckets=LOAD_SECONDS, registry=registry
        )
        self._rollouts = Counter(
            "probescore_reading_rollouts_total",
            "Counts the rollouts scored, once for each reading, by the kind of the reading's weights.",
            ("kind",),
            registry=registry,
        )
        for kind in ReadingKind:
            self._rollouts.labels(kind.value)

    def count_load(self, outcome: float | CoreError) -> None:
        """Counts one load of a reading, which has taken some seconds, or has ended with an error."""
        if isinstance(outcome, CoreError):
            kinds = {ReadingRefused: "refused", ReadingIncomplete: "incomplete"}
            self._loads.labels(kinds.get(type(outcome), "failed")).inc()
            return
        self._loads.labels("loaded").inc()
        self._load_seconds.observe(outcome)

    def count_rollouts(self, readings: Sequence[Reading], rollouts: int) -> None:
        """Counts some scored rollouts of a request once for each reading that the request names; none = the frozen one."""
        for kind in [reading.kind for reading in readings] or [ReadingKind.FROZEN]:
            self._rollouts.labels(kind.value).inc(rollouts)
