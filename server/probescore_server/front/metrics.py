"""Counts the server's Prometheus metrics, and serves them over HTTP on a separate port.

The metrics are named ``grpc_server_*``, as gRPC dashboards expect, and ``probescore_*``. No label has a value that a client chooses.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from probescore.types import ReloadedProbes, Usage
from probescore_server.errors import (
    CoreError,
    DeadlineExpired,
    InternalFault,
    OutOfMemory,
    QueueFull,
    ServerBusy,
    StartupError,
    WorkerLostTwice,
    WorkerUnavailable,
)
from probescore_server.front.calibration_metrics import CalibrationMetrics
from probescore_server.front.probe_metrics import ProbeMetrics
from probescore_server.front.reading_metrics import ReadingMetrics
from probescore_server.rollouts import EngineStatistics
from probescore_server.workers.liveness import REASONS_LOST

SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
TOKENS = tuple(4**power for power in range(3, 13))
ROLLOUTS = tuple(2**power for power in range(13))
RPC_LABELS = ("grpc_type", "grpc_service", "grpc_method")
CODE_LABELS = (*RPC_LABELS, "grpc_code")

RpcLabels: TypeAlias = tuple[str, str, str]
"""Type of the values of ``RPC_LABELS`` for one RPC: its kind (such as ``unary``), service and method."""


class Metrics:
    """Collection of the Prometheus metrics of one server, with a Prometheus registry for this server alone."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        self._started = Counter("grpc_server_started_total", "Counts the RPCs that started.", RPC_LABELS, registry=None)
        self._handled = Counter("grpc_server_handled_total", "Counts the RPCs that ended, by status code.", CODE_LABELS, registry=None)
        self._in_flight = Gauge("probescore_rpcs_in_flight", "Counts the RPCs that started and have not ended.", registry=None)
        self._rpcs = _ConsistentSnapshot(self._started, self._handled, self._in_flight)
        registry.register(self._rpcs)
        self._received = Counter("grpc_server_msg_received_total", "Counts the request messages received.", RPC_LABELS, registry=registry)
        self._sent = Counter("grpc_server_msg_sent_total", "Counts the response messages sent.", RPC_LABELS, registry=registry)
        self._handling = Histogram(
            "grpc_server_handling_seconds",
            "Measures the seconds from the start of an RPC to its end.",
            RPC_LABELS,
            buckets=SECONDS,
            registry=registry,
        )

        self.queue_tokens = Gauge("probescore_queue_tokens", "Counts the tokens that wait for a worker.", registry=registry)
        self.queue_rollouts = Gauge("probescore_queue_rollouts", "Counts the rollouts that wait for a worker.", registry=registry)
        self._batch_tokens = Histogram("probescore_batch_tokens", "Counts the tokens of each batch.", buckets=TOKENS, registry=registry)
        self._batch_rollouts = Histogram(
            "probescore_batch_rollouts", "Counts the rollouts of each batch.", buckets=ROLLOUTS, registry=registry
        )
        self.batch_budget = Gauge(
            "probescore_batch_budget_tokens", "Tells the most tokens of a worker's next batch.", ("worker", "device"), registry=registry
        )
        self.out_of_memory = Counter("probescore_out_of_memory_total", "Counts the batches for which memory was short.", registry=registry)
        self._tokens = Counter(
            "probescore_tokens_total", "Counts the tokens scored: computed, shared or cached.", ("source",), registry=registry
        )
        self.activation_bytes = Counter(
            "probescore_activation_bytes_total", "Counts the bytes of activations sent by ActivationService.", registry=registry
        )
        self._stages = Histogram(
            "probescore_stage_seconds", "Measures the seconds of a call, by stage.", ("stage",), buckets=SECONDS, registry=registry
        )
        self.refused = Counter(
            "probescore_refused_total", "Counts the calls that ended in an error, by its reason.", ("reason",), registry=registry
        )
        for kind in (QueueFull, ServerBusy, OutOfMemory, WorkerUnavailable, WorkerLostTwice, DeadlineExpired, InternalFault):
            self.refused.labels(kind.reason)  # Prometheus sees the first increase only if there was a 0 before.
        self.cancelled = Counter("probescore_cancelled_total", "Counts the calls that their client gave up.", registry=registry)
        self.ready = Gauge("probescore_ready", "Is 1 if some worker can score.", registry=registry)
        self.worker_ready = Gauge("probescore_worker_ready", "Is 1 if a worker can score.", ("worker", "device"), registry=registry)
        self.worker_asleep = Gauge(
            "probescore_worker_asleep", "Is 1 if a worker sleeps until it is woken.", ("worker", "device"), registry=registry
        )
        self.transfers = Histogram(
            "probescore_transfer_seconds",
            "Measures the seconds in which a worker gave its device's memory back (sleep) or took it again (wake).",
            ("kind",),
            buckets=SECONDS,
            registry=registry,
        )
        self.worker_restarts = Gauge(
            "probescore_worker_restarts", "Counts how often a worker was started again.", ("worker", "device"), registry=registry
        )
        self._worker_losses = Counter(
            "probescore_worker_losses_total",
            "Counts how often a worker was lost, by reason.",
            ("worker", "device", "reason"),
            registry=registry,
        )
        self._reloads = Counter(
            "probescore_reloads_total",
            "Counts the times that the probes were to follow their files, by outcome.",
            ("outcome",),
            registry=registry,
        )
        for outcome in ("changed", "unchanged", "refused", "failed"):
            self._reloads.labels(outcome)
        self._reload_seconds = Histogram(
            "probescore_reload_seconds", "Measures the seconds of a reload of probes.", buckets=SECONDS, registry=registry
        )
        self._refused_files = Gauge(
            "probescore_refused_probe_files", "Counts the probe files that the last reload refused.", registry=registry
        )
        self._workers = _WorkerMetrics()
        registry.register(self._workers)
        self.probes = ProbeMetrics(registry)
        self.calibrations = CalibrationMetrics(registry)
        self.readings = ReadingMetrics(registry)

    def of_method(self, labels: RpcLabels) -> MethodMetrics:
        """Returns the metrics of one gRPC method, given the values of the metrics' labels for the method."""
        return MethodMetrics(
            started=self._started.labels(*labels),
            in_flight=self._in_flight,
            ended=functools.partial(self._handled.labels, *labels),
            at_one_moment=self._rpcs.lock,
            handling=self._handling.labels(*labels),
            received=self._received.labels(*labels),
            sent=self._sent.labels(*labels),
        )

    def count_reload(self, outcome: ReloadedProbes | CoreError) -> None:
        """Counts one reload of probes, which has ended with a description of what has changed, or with an error."""
        if isinstance(outcome, CoreError):
            self._reloads.labels("failed").inc()
            return
        changed = outcome.added or outcome.retired or outcome.dropped
        self._reloads.labels("refused" if outcome.refused else "changed" if changed else "unchanged").inc()
        self._reload_seconds.observe(outcome.seconds)
        self._refused_files.set(len(outcome.refused))

    def count_batch(self, tokens: int, rollouts: int) -> None:
        """Counts a batch that is sent to a worker process, together with the batch's number of tokens and number of rollouts."""
        self._batch_tokens.observe(tokens)
        self._batch_rollouts.observe(rollouts)

    def watch_queue(self, tokens: Callable[[], int], rollouts: Callable[[], int]) -> None:
        """Registers functions that each scrape of the metrics calls for the numbers of tokens and of rollouts in the queue."""
        self.queue_tokens.set_function(tokens)
        self.queue_rollouts.set_function(rollouts)

    def watch_batch_budget(self, worker: str, device: str, tokens: Callable[[], int]) -> None:
        """Registers a function that each scrape calls for the largest number of tokens that one worker's next batch may have; ``worker`` is
        the worker's number.
        """
        self.batch_budget.labels(worker, device).set_function(tokens)

    def watch_worker(self, worker: str, device: str, statistics: Callable[[], EngineStatistics]) -> None:
        """Registers a function that each scrape calls for the memory use and cache hits of one worker; ``worker`` is the worker's
        number.
        """
        self._workers.watched[worker, device] = statistics

    def watch_losses(self, worker: str, device: str) -> Callable[[str], None]:
        """Returns a function that counts one crash or other death of a worker process, given the reason; ``worker`` is the worker's
        number.
        """
        losses = {reason: self._worker_losses.labels(worker, device, reason) for reason in REASONS_LOST}
        return lambda reason: losses[reason].inc()

    def show_worker(self, worker: str, device: str, *, ready: bool, asleep: bool, restarts: int) -> None:
        """Sets the metrics of one worker: whether it is ready, whether it is asleep, and how often it was restarted; ``worker`` is the
        worker's number.
        """
        self.worker_ready.labels(worker, device).set(ready)
        self.worker_asleep.labels(worker, device).set(asleep)
        self.worker_restarts.labels(worker, device).set(restarts)

    def count_stage(self, stage: str, seconds: float) -> None:
        """Adds the seconds that an RPC spent in one stage (``check``, ``queue`` or ``compute``) to the metric of that stage."""
        self._stages.labels(stage).observe(seconds)

    def count_usage(self, usage: Usage) -> None:
        """Adds the numbers of tokens of some finished rollouts to the metrics, separately for tokens that were computed, shared with other
        rollouts, or found in the key-value cache.
        """
        self._tokens.labels("computed").inc(usage.tokens_computed)
        self._tokens.labels("shared").inc(usage.tokens_shared)
        self._tokens.labels("cached").inc(usage.tokens_cached)

    def serve(self, host: str, port: int) -> int:
        """Starts an HTTP server for Prometheus scrapes in a separate thread, and returns its port. If ``port`` is 0, any free port is
        chosen.

        Raises:
            StartupError: the server cannot listen on the address.
        """
        try:
            server, _ = start_http_server(port, host, self.registry)
        except OSError as error:
            raise StartupError(f"cannot listen on metrics_host {host}, metrics_port {port}: {error.strerror or error}") from None
        return int(server.server_port)


@dataclass(frozen=True, eq=False)
class MethodMetrics:
    """Value object with the metrics of one gRPC method. They are looked up by their labels only once, since a lookup takes longer than
    counting.

    Attributes:
        started: counter of the RPCs of this method that began.
        in_flight: gauge of the RPCs of all methods that began and have not ended.
        ended: function that returns the counter of the RPCs that ended with a status code, given the code's name.
        at_one_moment: the lock under which ``started``, ``in_flight`` and ``ended`` are changed together.
        handling: the histogram of the seconds from an RPC's start to its end.
        received: counter of the method's request messages.
        sent: counter of the method's response messages.
    """

    started: Counter
    in_flight: Gauge
    ended: Callable[[str], Counter]
    at_one_moment: threading.Lock
    handling: Histogram
    received: Counter
    sent: Counter

    def count_start(self) -> None:
        """Counts an RPC that begins: the number of started RPCs and the number of RPCs in flight grow by one."""
        with self.at_one_moment:
            self.started.inc()
            self.in_flight.inc()

    def count_end(self, code: str, seconds: float) -> None:
        """Counts an RPC that ends with the status code of the given name, after the given number of seconds."""
        with self.at_one_moment:
            self.ended(code).inc()
            self.in_flight.dec()
        self.handling.observe(seconds)


class _ConsistentSnapshot(Collector):
    """Prometheus collector that reads some metrics together, under a lock, so that their values are of the same moment."""

    def __init__(self, *metrics: Counter | Gauge) -> None:
        self.lock = threading.Lock()
        self._metrics = metrics

    def collect(self) -> list[Metric]:
        with self.lock:
            return [family for metric in self._metrics for family in metric.collect()]


class _WorkerMetrics(Collector):
    """Prometheus collector of the worker processes' memory use and cache lookups. A restarted worker counts from 0 again, which Prometheus
    treats as a counter reset.
    """

    def __init__(self) -> None:
        self.watched: dict[tuple[str, str], Callable[[], EngineStatistics]] = {}

    def collect(self) -> list[Metric]:
        labels = ("worker", "device")
        device = GaugeMetricFamily(
            "probescore_device_memory_bytes", "Counts the bytes that a worker has taken of its device.", labels=labels
        )
        cache = GaugeMetricFamily("probescore_kv_cache_bytes", "Counts the bytes of cached keys and values of a worker.", labels=labels)
        lookups = CounterMetricFamily(
            "probescore_kv_cache_lookups_total",
            "Counts the sequences looked up in a worker's cache of keys and values; a hit found at least a beginning of the sequence.",
            labels=(*labels, "result"),
        )
        for worker, statistics in list(self.watched.items()):
            found = statistics()
            device.add_metric(worker, found.device_bytes)
            cache.add_metric(worker, found.kv_cache_bytes)
            lookups.add_metric((*worker, "hit"), found.kv_cache_hits)
            lookups.add_metric((*worker, "miss"), found.kv_cache_misses)
        return [device, cache, lookups]
