"""Shows the audit of a training run to Prometheus: verdicts, estimates with their intervals, and alarms."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Metric, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from probescore_audit import Estimate, ReadingAudit, RecordAudit

_WHICH = ("run", "probe", "reading")
_NO_VERDICT = "none"
_ESTIMATES = {
    "positive_rate": "Share of rollouts with the behaviour in the last window of steps.",
    "recall": "Share of the rollouts with the behaviour that are flagged, in the last window of steps.",
    "false_positive_rate": "Share of the rollouts without the behaviour that are flagged, in the last window of steps.",
    "missed": "Share of all rollouts that have the behaviour and are not flagged, in the last window of steps.",
    "auroc": "AUROC in the last window of steps, approximate.",
    "honest_share": "Share of a fall of detections that is real.",
}


class AuditMetrics(Collector):
    """Prometheus collector of the last audit of a training run. Estimates that are not known have no sample."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._audit: RecordAudit | None = None
        self._audits = self._failures = 0
        self._audited_at = 0.0

    def update(self, audit: RecordAudit | None) -> None:
        """Takes the newest audit of a training run; ``None`` if the record could not be audited, and the one before stays."""
        with self._lock:
            if audit is None:
                self._failures += 1
                return
            self._audit, self._audits, self._audited_at = audit, self._audits + 1, time.time()

    def collect(self) -> list[Metric]:
        """Returns the metrics of the newest audit of a training run."""
        with self._lock:
            audit, audits, failures, audited_at = self._audit, self._audits, self._failures, self._audited_at
        families: list[Metric] = [
            CounterMetricFamily("probescore_audit_audits", "Audits that were made.", audits),
            CounterMetricFamily("probescore_audit_failures", "Looks at a record that could not be audited.", failures),
        ]
        if audit is None:
            return families
        run = [audit.record.header.run_id]
        for name, meaning, value in (
            ("audited_seconds", "Time of the last audit, in seconds since 1970.", audited_at),
            ("step", "Last training step of the record.", float(audit.last_step)),
            ("planned_steps", "Training steps that the run is planned for.", float(audit.record.header.planned_steps)),
            ("torn_lines", "Lines of the record that could not be read.", float(audit.record.torn_lines)),
        ):
            family = GaugeMetricFamily(f"probescore_audit_{name}", meaning, labels=("run",))
            family.add_metric(run, value)
            families.append(family)
        return [*families, *_of_readings(audit)]


def serve_metrics(port: int, host: str) -> tuple[AuditMetrics, str]:
    """Starts an HTTP server for Prometheus scrapes in a separate thread, and returns the collector of audits, and the server's address. If
    ``port`` is 0, any free port is chosen.

    Raises:
        ValueError: the server cannot listen on the address.
    """
    metrics, registry = AuditMetrics(), CollectorRegistry()
    registry.register(metrics)
    try:
        server, _ = start_http_server(port, host, registry)
    except OSError as error:
        raise ValueError(f"--metrics-port {port}: cannot listen there, on {host}: {error.strerror or error}") from None
    return metrics, f"{host}:{server.server_port}"


def _of_readings(audit: RecordAudit) -> list[Metric]:
    from probescore_audit import Verdict

    verdict = GaugeMetricFamily("probescore_audit_verdict", "1 for the verdict that holds, 0 for all others.", labels=(*_WHICH, "verdict"))
    alarm = GaugeMetricFamily("probescore_audit_alarm", "Whether a monitor has raised an alarm.", labels=(*_WHICH, "monitor"))
    bound = GaugeMetricFamily("probescore_audit_bound", "What a monitor accepts.", labels=(*_WHICH, "monitor"))
    labels = GaugeMetricFamily("probescore_audit_labels", "Labels of rollouts with a score.", labels=_WHICH)
    labelled = GaugeMetricFamily("probescore_audit_labelled_step", "Last training step with a label; -1 if there is none.", labels=_WHICH)
    unlabelled = GaugeMetricFamily("probescore_audit_unlabelled_steps", "Training steps without any label.", labels=_WHICH)
    estimates = {
        name: GaugeMetricFamily(f"probescore_audit_{name}", meaning, labels=(*_WHICH, "bound")) for name, meaning in _ESTIMATES.items()
    }
    refit = GaugeMetricFamily("probescore_audit_refit_auroc", "AUROC of fresh probes on recorded activations.", labels=(*_WHICH, "bound"))
    moved = GaugeMetricFamily(
        "probescore_audit_anchor_move",
        "Largest change of an anchor's score since the first scoring, in standard deviations.",
        labels=_WHICH,
    )
    for each in audit.readings:
        recorded = each.recorded
        which = [audit.record.header.run_id, recorded.probe, recorded.reading]
        said = _NO_VERDICT if each.verdict is None else each.verdict.value
        for word in (_NO_VERDICT, *(known.value for known in Verdict)):
            verdict.add_metric([*which, word], float(word == said))
        for watch in each.audit.watches:
            alarm.add_metric([*which, watch.monitor], float(watch.alarm_step is not None))
            bound.add_metric([*which, watch.monitor], watch.bound)
        known_labels = recorded.labels.rollout
        labels.add_metric(which, float(len(known_labels)))
        labelled.add_metric(which, float(recorded.run.step[known_labels[-1]]) if len(known_labels) else -1.0)
        unlabelled.add_metric(which, float(each.audit.unlabelled_steps))
        _add_estimates(estimates, which, each)
        if each.anchors:
            moved.add_metric(which, max(scoring.largest_move for scoring in each.anchors))
        if each.refit is not None:
            _add_estimate(refit, which, each.refit.auroc)
    return [verdict, alarm, bound, labels, labelled, unlabelled, *estimates.values(), refit, moved]


def _add_estimates(families: dict[str, GaugeMetricFamily], which: list[str], each: ReadingAudit) -> None:
    if each.audit.final is None:
        return
    for name, family in families.items():
        _add_estimate(family, which, getattr(each.audit.final, name))


def _add_estimate(family: GaugeMetricFamily, which: list[str], estimate: Estimate) -> None:
    for bound, value in (("estimate", estimate.value), ("low", estimate.low), ("high", estimate.high)):
        if value == value:
            family.add_metric([*which, bound], value)
