"""Counts Prometheus metrics of the loaded probes: their identity, how often they are applied, and the distribution of their scores.

Scores are counted only if their reduction (such as ``mean``) is named in the probe's manifest, as the default or in a calibration. Clients
may choose any number of other reductions, and the scores of two reductions must not be mixed in one distribution.
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
    """Histogram of the scores of one probe under one reduction (such as ``mean``) and for one of the probe's labels.

    Attributes:
        probe: the probe's key, ``name@version``.
        labels: the values of the metric's labels: probe, version, reduction, label.
        label: the index of the label among the probe's labels.
        threshold: the threshold of the probe's calibration; ``None`` = there is no calibration.
        counts: the number of scores in each bucket, ``(B + 1,)`` int64: one bucket for each of the ``B`` upper bounds in ``SCORES``, and
            one for scores above the last bound.
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
    """Collection of the Prometheus metrics of every loaded probe. Only the first ``MAX_DISTRIBUTIONS`` score distributions are kept."""

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
        self._probes = Gauge("probescore_probes", "Counts the probes that are served, by state.", ("state",), registry=registry)
        self._shown: dict[str, ProbeInfo] = {}
        self._calls_of: dict[str, Counter] = {}  # Looking up a thousand series takes as long as counting in them.
        self._scores = _ScoreHistogram()
        registry.register(self._scores)

    def show_probes(self, info: EngineInfo) -> None:
        """Creates the time series of the probes that are served, so that they exist before the first RPC, and removes those of probes that
        are not served any more, so that their number does not grow with every new version.
        """
        self._probes.labels("current").set(len(info.probes) - len(info.retired))
        self._probes.labels("retired").set(len(info.retired))
        served = {probe.key: probe for probe in info.probes}
        for key in self._shown.keys() - served.keys():
            self._remove(self._shown.pop(key))
        new = [probe for key, probe in served.items() if key not in self._shown]
        room = MAX_DISTRIBUTIONS - sum(map(len, self._scores.distributions.values()))
        for each in itertools.islice((each for probe in new for each in _distributions(probe)), room):
            self._scores.distributions.setdefault(each.probe, []).append(each)
            if each.threshold is not None:
                self._threshold.labels(*each.labels).set(each.threshold)
                self._flagged.labels(*each.labels)
        for probe in new:
            self._shown[probe.key] = probe
            self._info.labels(*_identity(probe)).set(1)
            self._calls_of[probe.key] = self._calls.labels(probe.name, probe.version)
            self._refused.labels(probe.name, probe.version)

    def _remove(self, probe: ProbeInfo) -> None:
        for distribution in self._scores.distributions.pop(probe.key, []):
            if distribution.threshold is not None:
                self._threshold.remove(*distribution.labels)
                self._flagged.remove(*distribution.labels)
        self._info.remove(*_identity(probe))
        for counter in (self._calls, self._refused):
            counter.remove(probe.name, probe.version)
        del self._calls_of[probe.key]

    def count_call(self, applied: Iterable[ScoredProbe]) -> None:
        """Counts one RPC for each probe that was applied in the RPC and is still served."""
        for probe in applied:
            if probe.key in self._calls_of:
                self._calls_of[probe.key].inc()

    def count_results(self, applied: Sequence[ScoredProbe], scope: Scope, results: Iterable[RolloutResult]) -> None:
        """Adds the scores of some rollouts of one RPC to the histograms of the probes' scores, and counts the rollouts for which a probe
        computed NaN or an infinity.

        Args:
            applied: the probes that were applied in the RPC.
            scope: the tokens that were scored. Scores are added only if completions alone were scored, since scores over prompts must not
                be mixed with them in one distribution.
            results: the results of the rollouts.
        """
        scored = []
        for result in results:
            if result.refused_by in self._calls_of:
                self._refused.labels(*result.refused_by.rsplit("@", 1)).inc()
            if result.scores.scores:
                scored.append(result.scores.scores)
        if not scored or scope is not Scope.COMPLETION:
            return
        for probe, key in zip(applied, score_keys(applied), strict=True):
            for distribution, reduction in self._distributions_of(probe):
                numbers = np.array([scores[key].reduced[0, reduction, distribution.label] for scores in scored], np.float32)
                self._add(distribution, numbers[~np.isnan(numbers)])  # An empty selection of tokens has no score.

    def _distributions_of(self, probe: ScoredProbe) -> Iterator[tuple[_ScoreDistribution, int]]:
        """Yields the distributions (histograms) to which a probe's scores of an RPC are added. Each is for one reduction, such as ``mean``,
        and is yielded with the index of that reduction among those of the RPC.
        """
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
    """Prometheus collector of the histogram ``probescore_probe_score``. Its scores are counted with numpy, since one RPC may bring ten
    thousand scores.
    """

    def __init__(self) -> None:
        self.distributions: dict[str, list[_ScoreDistribution]] = {}

    def collect(self) -> Iterator[Metric]:
        name = "probescore_probe_score"
        family = Metric(name, "Counts the scores of rollouts, in the probe's unit.", "histogram")
        bounds = [*(str(float(bound)) for bound in SCORES), "+Inf"]
        for each in [each for own in list(self.distributions.values()) for each in own]:
            labels = dict(zip(SCORE, each.labels, strict=True))
            cumulative = each.counts.cumsum().tolist()
            for bound, count in zip(bounds, cumulative, strict=True):
                family.add_sample(f"{name}_bucket", {**labels, "le": bound}, count)
            family.add_sample(f"{name}_count", labels, cumulative[-1])
            family.add_sample(f"{name}_sum", labels, each.sum)
        yield family


def _identity(probe: ProbeInfo) -> tuple[str, ...]:
    return probe.name, probe.version, probe.graph_sha256, probe.manifest_sha256, probe.unit.value


def _distributions(probe: ProbeInfo) -> Iterator[_ScoreDistribution]:
    """Yields an empty histogram of a probe's scores for each label and each reduction (such as ``mean``) that the probe's manifest names.

    Of several thresholds that the manifest states for one reduction and label, the first counts.
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
