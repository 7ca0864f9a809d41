"""Counts the HTTP gateway's requests and rollouts, for Prometheus. No label takes a value that a client chooses, so that the number of
series is bounded.
"""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from probescore_adapters.outcome import PREFIX, Outcome

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class GatewayMetrics:
    """Prometheus metrics of one HTTP gateway, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter("probescore_gateway_requests_total", "Requests answered.", ("route", "status"), registry=self._registry)
        self.seconds = Histogram(
            "probescore_gateway_seconds", "Seconds from request to answer.", ("route",), buckets=SECONDS, registry=self._registry
        )
        self._rollouts = Counter(
            "probescore_gateway_rollouts_total",
            "Rollouts answered: scored, unscorable (on_unscorable says how), or substituted (no scores, and on_failure is a number).",
            ("outcome",),
            registry=self._registry,
        )

    def count(self, outcome: Outcome) -> None:
        """Counts the rollouts of one batch as scored, unscorable (without a score) or substituted (a configured number replaced the scores
        after a failure).
        """
        total, unscorable = len(outcome.unscorable), int(outcome.unscorable.sum())
        if outcome.metrics[f"{PREFIX}/failures"] > 0:
            self._rollouts.labels("substituted").inc(total)
        else:
            self._rollouts.labels("scored").inc(total - unscorable)
            self._rollouts.labels("unscorable").inc(unscorable)

    def exposition(self) -> bytes:
        """Returns all metrics of the HTTP gateway in Prometheus' text format."""
        return generate_latest(self._registry)


class CountingMiddleware:
    """ASGI middleware that counts every HTTP response of an application, and measures the time until the response is complete."""

    def __init__(self, app: ASGIApp, metrics: GatewayMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one ASGI connection; if it is an HTTP request, counts the response and measures how long it took."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, statuses = time.perf_counter(), []

        async def send_counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, send_counted)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            if statuses:
                self._metrics.requests.labels(route, str(statuses[0])).inc()
                self._metrics.seconds.labels(route).observe(time.perf_counter() - started)
