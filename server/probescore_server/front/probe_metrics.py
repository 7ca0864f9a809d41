"""Counts Prometheus metrics of the loaded probes: their identity, how often they are applied, and the distribution of their scores.

Only scores under the reductions that a probe's manifest names, its default and those of its calibrations, are counted. Clients may choose
any others, without bound, and the scores of two reductions do not belong in one distribution.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Metric
from prometheus_client.registry import Collector

from probescore.types import Calibration, OutputPer, ProbeInfo, Scope, ScoredProbe, score_keys
from probescore_server.rollouts import EngineInfo, RolloutResult

PROBE = ("probe", "version")
SCORE = (*PROBE, "reduction", "label")
# These bucket bounds suit probabilities, logits, and values on a scale of the probe's own.
SCORES = (
    *(-256, -64, -32, -16, -8, -4, -3, -2, -1.5, -1, -0.5, 0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5),
    *(0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1, 1.5, 2, 3, 4, 8, 16, 32, 64, 256),
)
BOUNDS = np.array(SCORES)
# A thousand histograms would make a scrape of several megabytes.
MAX_DISTRIBUTIONS = 128


@dataclass(eq=False)
class _ScoreDistribution:
    """Counts the scores of one probe under one reduction and for one label, as a histogram.

    Attributes:
        probe: the probe's key, ``name@version``.
        labels: the values of the metric's labels: probe, version, reduction, label.
        label: the index of the label among the probe's labels.
        threshold: the threshold of the probe's calibration; ``None`` = there is no calibration.
        counts: the number of scores in each bucket, ``(B + 1,)`` int64 for the ``B`` upper bounds of ``SCORES`` and what is above the last.
        sum: the sum of all scores.
    """

    probe: str
    labels: tuple[str, str, str, str]
    label: int
    threshold: float | None
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(SCORES) + 1, np.int64))
    sum: float = 0.0

    def add(self, scores: NDArray[np.float32]) -> None:
        self.counts += np.bincount(BOUNDS.searchsorted(scores), minlength=len(self.counts))
        self.sum += float(scores.sum(dtype=np.float64))


class ProbeMetrics:
    """Holds the Prometheus metrics of every loaded probe, with the score distributions of the first ``MAX_DISTRIBUTIONS`` only."""

    def __init__(self, registry: CollectorRegistry) -> None:
        names = (*PROBE, "graph_sha256", "manifest_sha256", "unit")
        self._info = Gauge("probescore_probe_info", "Is 1 for each loaded probe.", names, registry=registry)
        self._threshold = Gauge("probescore_probe_threshold", "Tells the threshold of a probe's calibration.", SCORE, registry=registry)
        self._calls = Counter("probescore_probe_calls_total", "Counts the calls that a probe was applied in.", PROBE, registry=registry)
        self._flagged = Counter(
            "probescore_probe_flagged_total", "Counts the rollouts at or above a probe's threshold.", SCORE, registry=registry
        )
        self._refused = Counter(
            "probescore_probe_non_finite_total", "Counts the rollouts for which a probe gave no finite score.", PROBE, registry=registry
        )
        self._calls_of: dict[tuple[str, str], Counter] = {}  # Looking up a thousand series takes as long as counting in them.
        self._scores = _ScoreHistogram()
        registry.register(self._scores)

    def show_probes(self, info: EngineInfo) -> None:
        """Creates the series of all loaded probes, so that they exist before the first call. Further calls change nothing."""
        if self._scores.distributions:
            return
        for each in itertools.islice((each for probe in info.probes for each in _distributions(probe)), MAX_DISTRIBUTIONS):
            self._scores.distributions.setdefault(each.probe, []).append(each)
            if each.threshold is not None:
                self._threshold.labels(*each.labels).set(each.threshold)
                self._flagged.labels(*each.labels)
        for probe in info.probes:
            self._info.labels(probe.name, probe.version, probe.graph_sha256, probe.manifest_sha256, probe.unit.value).set(1)
            self._calls_of[probe.name, probe.version] = self._calls.labels(probe.name, probe.version)
            self._refused.labels(probe.name, probe.version)

    def count_call(self, applied: Iterable[ScoredProbe]) -> None:
        """Counts one call for each of the probes that were applied in it."""
        for probe in applied:
            self._calls_of[probe.name, probe.version].inc()

    def count_results(self, applied: Sequence[ScoredProbe], scope: Scope, results: Iterable[RolloutResult]) -> None:
        """Adds the scores of some rollouts of one call to the distributions, and counts those that a probe refused.

        Args:
            applied: the probes that the call applied.
            scope: which tokens the call scored. Scores are added only if it scored completions, since others do not belong in one
                distribution with them.
            results: the results of the rollouts.
        """
        scored = []
        for result in results:
            if result.refused_by:
                self._refused.labels(*result.refused_by.rsplit("@", 1)).inc()
            if result.scores.scores:
                scored.append(result.scores.scores)
        if not scored or scope is not Scope.COMPLETION:
            return
        for probe, key in zip(applied, score_keys(applied), strict=True):
            for distribution, reduction in self._shown(probe):
                numbers = np.array([scores[key].reduced[0, reduction, distribution.label] for scores in scored], np.float32)
                self._add(distribution, numbers[~np.isnan(numbers)])  # An empty selection of tokens has no score.

    def _shown(self, probe: ScoredProbe) -> Iterator[tuple[_ScoreDistribution, int]]:
        """Yields the distributions to which a probe's scores in a call are added, each with its reduction's index among the call's."""
        distributions = self._scores.distributions.get(probe.key)
        if distributions is None:
            return
        reductions = [str(reduction) for reduction in probe.reductions] or [""]
        for distribution in distributions:
            reduction = distribution.labels[2]
            if reduction in reductions:
                yield distribution, reductions.index(reduction)

    def _add(self, distribution: _ScoreDistribution, scores: NDArray[np.float32]) -> None:
        distribution.add(scores)
        if distribution.threshold is not None:
            self._flagged.labels(*distribution.labels).inc(int((scores >= distribution.threshold).sum()))


class _ScoreHistogram(Collector):
    """Collects the histogram ``probescore_probe_score``, which is counted with numpy since a call may bring ten thousand scores."""

    def __init__(self) -> None:
        self.distributions: dict[str, list[_ScoreDistribution]] = {}

    def collect(self) -> Iterator[Metric]:
        name = "probescore_probe_score"
        family = Metric(name, "Counts the scores of rollouts, in the probe's unit.", "histogram")
        bounds = [*(str(float(bound)) for bound in SCORES), "+Inf"]
        for each in [each for own in self.distributions.values() for each in own]:
            labels = dict(zip(SCORE, each.labels, strict=True))
            cumulative = each.counts.cumsum().tolist()
            for bound, count in zip(bounds, cumulative, strict=True):
                family.add_sample(f"{name}_bucket", {**labels, "le": bound}, count)
            family.add_sample(f"{name}_count", labels, cumulative[-1])
            family.add_sample(f"{name}_sum", labels, each.sum)
        yield family


def _distributions(probe: ProbeInfo) -> Iterator[_ScoreDistribution]:
    """Yields an empty distribution of a probe's scores for each reduction that its manifest names and for each label.

    Of several calibrations for the same reduction and label, the first gives the threshold.
    """
    if probe.output_per is OutputPer.ROLLOUT:
        reductions = [""]
    else:
        own = (probe.default_reduction, *(calibration.reduction for calibration in probe.calibrations))
        reductions = list(dict.fromkeys(str(each) for each in own if each is not None))
    for reduction in reductions:
        for index, label in enumerate(probe.labels):
            calibrations = (each for each in probe.calibrations if _is_for(each, probe, reduction, label))
            threshold = next((each.threshold for each in calibrations), None)
            yield _ScoreDistribution(probe.key, (probe.name, probe.version, reduction, label), index, threshold)


def _is_for(calibration: Calibration, probe: ProbeInfo, reduction: str, label: str) -> bool:
    of_reduction = "" if probe.output_per is OutputPer.ROLLOUT else str(calibration.reduction or probe.default_reduction)
    return of_reduction == reduction and (calibration.label or probe.labels[0]) == label
