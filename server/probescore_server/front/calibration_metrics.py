"""Counts, in Prometheus metrics, the scored rollouts that are unlike the rollouts on which the thresholds of their probes were found, for
example because their prompts are longer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter

from probescore.types import CalibrationCondition, ScoredProbe
from probescore_server.rollouts import EngineInfo
from probescore_server.validation.calibrated_rollouts import OutsideRollouts

PROBE = ("probe", "version")


class CalibrationMetrics:
    """Prometheus counters of the scored rollouts that are compared with the rollouts on which a probe's thresholds were found, and of those
    that are unlike them. A probe whose manifest (the description in its file) describes these rollouts has counters from its first scored
    rollout on, as long as the probe is served.

    A rollout counts once for each condition that it does not meet, such as a range of prompt lengths, however many thresholds the probe
    has.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._compared = Counter(
            "probescore_probe_compared_total",
            "Counts the rollouts that were compared with those on which a probe's thresholds were found.",
            PROBE,
            registry=registry,
        )
        self._outside = Counter(
            "probescore_probe_outside_calibration_total",
            "Counts the rollouts that do not meet a condition under which a probe's thresholds were found.",
            (*PROBE, "condition"),
            registry=registry,
        )
        self._served: frozenset[str] = frozenset()
        self._shown: dict[str, ScoredProbe] = {}

    def show_probes(self, info: EngineInfo) -> None:
        """Removes the Prometheus time series of probes that are not served any more, so that their number does not grow with every new
        version.
        """
        self._served = frozenset(probe.key for probe in info.probes)
        for key in self._shown.keys() - self._served:
            probe = self._shown.pop(key)
            self._compared.remove(probe.name, probe.version)
            for condition in CalibrationCondition:
                self._outside.remove(probe.name, probe.version, condition.value)

    def count(self, probes: Sequence[ScoredProbe], outside: OutsideRollouts, places: NDArray[np.int64]) -> None:
        """Counts some scored rollouts of a request, and those among them that are unlike the rollouts on which the probes' thresholds were
        found.

        Args:
            probes: the probes of the request.
            outside: the rollouts of the request that do not meet the conditions under which a probe's thresholds were found.
            places: places of the rollouts that are counted, among the rollouts of the request; -1 for a rollout without scores.
        """
        places = places[places >= 0]
        compared = int(np.count_nonzero(outside.compared[places]))
        for probe, unmet, has_conditions in zip(probes, outside.unmet, outside.has_conditions, strict=True):
            if not has_conditions or probe.key not in self._served:
                continue
            self._show(probe)
            self._compared.labels(probe.name, probe.version).inc(compared)
            for condition in {entry.condition for entry in unmet}:
                unlike = np.any([of_rollouts[places] for entry, of_rollouts in unmet.items() if entry.condition == condition], axis=0)
                self._outside.labels(probe.name, probe.version, condition).inc(int(np.count_nonzero(unlike)))

    def _show(self, probe: ScoredProbe) -> None:
        """Creates the time series of a probe's Prometheus counters with the value 0, so that Prometheus sees the first increase of each."""
        if probe.key not in self._shown:
            self._shown[probe.key] = probe
            for condition in CalibrationCondition:
                self._outside.labels(probe.name, probe.version, condition.value)
