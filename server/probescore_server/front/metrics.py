"""Prometheus metrics on a port of their own: `grpc_server_*`, as gRPC dashboards expect them, and ours.

No label takes a value that a client chooses.
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

from probescore.types import Usage
from probescore_server.errors import (
    DeadlineExpired,
    InternalFault,
    OutOfMemory,
    QueueFull,
    ServerBusy,
    StartupError,
    WorkerLostTwice,
    WorkerUnavailable,
)
from probescore_server.front.probe_metrics import ProbeMetrics
from probescore_server.rollouts import EngineStatistics
from probescore_server.workers.liveness import REASONS_LOST

SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
TOKENS = tuple(4**power for power in range(3, 13))
ROLLOUTS = tuple(2**power for power in range(13))
RPC_LABELS = ("grpc_type", "grpc_service", "grpc_method")
CODE_LABELS = (*RPC_LABELS, "grpc_code")

RpcLabels: TypeAlias = tuple[str, str, str]
"""The values of `RPC_LABELS`."""


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        self._started = Counter("grpc_server_started_total", "RPCs started.", RPC_LABELS, registry=None)
        self._handled = Counter("grpc_server_handled_total", "RPCs completed.", CODE_LABELS, registry=None)
        self._in_flight = Gauge("probescore_rpcs_in_flight", "RPCs started and not yet completed.", registry=None)
        self._rpcs = _ConsistentSnapshot(self._started, self._handled, self._in_flight)
        registry.register(self._rpcs)
        self._received = Counter("grpc_server_msg_received_total", "Request messages received.", RPC_LABELS, registry=registry)
        self._sent = Counter("grpc_server_msg_sent_total", "Response messages sent.", RPC_LABELS, registry=registry)
        self._handling = Histogram(
            "grpc_server_handling_seconds", "Seconds from the start of an RPC to its end.", RPC_LABELS, buckets=SECONDS, registry=registry
        )

        self.queue_tokens = Gauge("probescore_queue_tokens", "Tokens waiting for a worker.", registry=registry)
        self.queue_rollouts = Gauge("probescore_queue_rollouts", "Rollouts waiting for a worker.", registry=registry)
        self._batch_tokens = Histogram("probescore_batch_tokens", "Tokens of a batch.", buckets=TOKENS, registry=registry)
        self._batch_rollouts = Histogram("probescore_batch_rollouts", "Rollouts of a batch.", buckets=ROLLOUTS, registry=registry)
        self.batch_budget = Gauge(
            "probescore_batch_budget_tokens", "Tokens that a worker gets at a time.", ("worker", "device"), registry=registry
        )
        self.out_of_memory = Counter("probescore_out_of_memory_total", "Batches for which memory was short.", registry=registry)
        self._tokens = Counter("probescore_tokens_total", "Tokens scored, by where they came from.", ("source",), registry=registry)
        self._stages = Histogram("probescore_stage_seconds", "Seconds of a call, by stage.", ("stage",), buckets=SECONDS, registry=registry)
        self.refused = Counter("probescore_refused_total", "Calls that ended in an error, by its reason.", ("reason",), registry=registry)
        for kind in (QueueFull, ServerBusy, OutOfMemory, WorkerUnavailable, WorkerLostTwice, DeadlineExpired, InternalFault):
            self.refused.labels(kind.reason)  # a rate is known from the first time on only if there was a 0 before
        self.cancelled = Counter("probescore_cancelled_total", "Calls that their client gave up.", registry=registry)
        self.ready = Gauge("probescore_ready", "Whether some worker can score.", registry=registry)
        self.worker_ready = Gauge("probescore_worker_ready", "Whether a worker can score.", ("worker", "device"), registry=registry)
        self.worker_asleep = Gauge(
            "probescore_worker_asleep", "Whether a worker sleeps until it is woken.", ("worker", "device"), registry=registry
        )
        self.transfers = Histogram(
            "probescore_transfer_seconds",
            "Seconds in which a worker gave its device's memory back (sleep) or took it again (wake).",
            ("kind",),
            buckets=SECONDS,
            registry=registry,
        )
        self.worker_restarts = Gauge(
            "probescore_worker_restarts", "How often a worker was started again.", ("worker", "device"), registry=registry
        )
        self._worker_losses = Counter(
            "probescore_worker_losses_total", "How often a worker was lost, by why.", ("worker", "device", "reason"), registry=registry
        )
        self._workers = _WorkerMetrics()
        registry.register(self._workers)
        self.probes = ProbeMetrics(registry)

    def of_method(self, labels: RpcLabels) -> MethodMetrics:
        """What is counted of one method's RPCs."""
        return MethodMetrics(
            started=self._started.labels(*labels),
            in_flight=self._in_flight,
            ended=functools.partial(self._handled.labels, *labels),
            at_one_moment=self._rpcs.lock,
            handling=self._handling.labels(*labels),
            received=self._received.labels(*labels),
            sent=self._sent.labels(*labels),
        )

    def count_batch(self, tokens: int, rollouts: int) -> None:
        """Counts a batch that a worker gets."""
        self._batch_tokens.observe(tokens)
        self._batch_rollouts.observe(rollouts)

    def watch_queue(self, tokens: Callable[[], int], rollouts: Callable[[], int]) -> None:
        """Reads the length of the queue at each scrape."""
        self.queue_tokens.set_function(tokens)
        self.queue_rollouts.set_function(rollouts)

    def watch_batch_budget(self, worker: str, device: str, tokens: Callable[[], int]) -> None:
        """Reads the budget of one worker at each scrape; `worker` is its number."""
        self.batch_budget.labels(worker, device).set_function(tokens)

    def watch_worker(self, worker: str, device: str, statistics: Callable[[], EngineStatistics]) -> None:
        """Reads what one worker holds at each scrape; `worker` is its number."""
        self._workers.watched[worker, device] = statistics

    def watch_losses(self, worker: str, device: str) -> Callable[[str], None]:
        """What counts, by its reason, that one worker was lost; `worker` is its number."""
        losses = {reason: self._worker_losses.labels(worker, device, reason) for reason in REASONS_LOST}
        return lambda reason: losses[reason].inc()

    def show_worker(self, worker: str, device: str, *, ready: bool, asleep: bool, restarts: int) -> None:
        """The state of one worker; `worker` is its number."""
        self.worker_ready.labels(worker, device).set(ready)
        self.worker_asleep.labels(worker, device).set(asleep)
        self.worker_restarts.labels(worker, device).set(restarts)

    def count_stage(self, stage: str, seconds: float) -> None:
        """Adds how long a call was in one stage: check, queue or compute."""
        self._stages.labels(stage).observe(seconds)

    def count_usage(self, usage: Usage) -> None:
        """Adds the tokens of rollouts that were scored."""
        self._tokens.labels("computed").inc(usage.tokens_computed)
        self._tokens.labels("shared").inc(usage.tokens_shared)
        self._tokens.labels("cached").inc(usage.tokens_cached)

    def serve(self, host: str, port: int) -> int:
        """Answers scrapes from a thread of its own and returns the port, which is a free one if `port` is 0.

        Raises:
            StartupError: the address cannot be listened on.
        """
        try:
            server, _ = start_http_server(port, host, self.registry)
        except OSError as error:
            raise StartupError(f"cannot listen on metrics_host {host}, metrics_port {port}: {error.strerror or error}") from None
        return int(server.server_port)


@dataclass(frozen=True, eq=False)
class MethodMetrics:
    """The metrics of one method. They are looked up once: that takes longer than counting does.

    Attributes:
        started, in_flight: counted at once, under the lock `at_one_moment`.
        ended: the counter of those that ended with a code, by its name.
        handling: seconds.
        received, sent: messages.
    """

    started: Counter
    in_flight: Gauge
    ended: Callable[[str], Counter]
    at_one_moment: threading.Lock
    handling: Histogram
    received: Counter
    sent: Counter

    def count_start(self) -> None:
        """Counts an RPC that begins."""
        with self.at_one_moment:
            self.started.inc()
            self.in_flight.inc()

    def count_end(self, code: str, seconds: float) -> None:
        """Counts its end."""
        with self.at_one_moment:
            self.ended(code).inc()
            self.in_flight.dec()
        self.handling.observe(seconds)


class _ConsistentSnapshot(Collector):
    """Some metrics, read together while nobody changes them, so that they add up."""

    def __init__(self, *metrics: Counter | Gauge) -> None:
        self.lock = threading.Lock()
        self._metrics = metrics

    def collect(self) -> list[Metric]:
        with self.lock:
            return [family for metric in self._metrics for family in metric.collect()]


class _WorkerMetrics(Collector):
    """What workers hold. A worker that is started again counts from 0, as Prometheus expects of what restarts."""

    def __init__(self) -> None:
        self.watched: dict[tuple[str, str], Callable[[], EngineStatistics]] = {}

    def collect(self) -> list[Metric]:
        labels = ("worker", "device")
        device = GaugeMetricFamily("probescore_device_memory_bytes", "Bytes that a worker has taken of its device.", labels=labels)
        cache = GaugeMetricFamily("probescore_kv_cache_bytes", "Bytes of keys and values that a worker keeps.", labels=labels)
        lookups = CounterMetricFamily(
            "probescore_kv_cache_lookups_total",
            "Sequences looked up in the cache; hit: a beginning of it was there.",
            labels=(*labels, "result"),
        )
        for worker, statistics in list(self.watched.items()):
            found = statistics()
            device.add_metric(worker, found.device_bytes)
            cache.add_metric(worker, found.kv_cache_bytes)
            lookups.add_metric((*worker, "hit"), found.kv_cache_hits)
            lookups.add_metric((*worker, "miss"), found.kv_cache_misses)
        return [device, cache, lookups]
