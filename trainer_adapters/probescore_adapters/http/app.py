"""Makes the ASGI application of the HTTP gateway to a probescore server, with three routes that score rollouts, a health check, metrics and
a documentation page.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST

from probescore_adapters.http import problems
from probescore_adapters.http.bodies import BodyLimitMiddleware
from probescore_adapters.http.messages import Health, OpenRlhfAnswer, OpenRlhfRequest, ScoreAnswer, ScoreRequest, SlimeRequest
from probescore_adapters.http.metrics import CountingMiddleware, GatewayMetrics
from probescore_adapters.http.page import CONTENT_SECURITY_POLICY, documentation_page
from probescore_adapters.outcome import Outcome
from probescore_adapters.rollouts import Rollout
from probescore_adapters.scorer import ProbeScorer
from probescore_adapters.signals import Mode

MAX_BODY_BYTES = 16 * 2**20
DESCRIPTION = """
Probe scores over HTTP. Which probes are read, and what they do to the reward, is configured where the gateway is started.

A transport failure answers 503 unless the gateway was given a number to answer instead (``on_failure``); then it answers 200 with that
number, and counts it. A rollout that cannot be scored gets what ``on_unscorable`` says, by default the worst reward there is.
"""


def create_app(scorer: ProbeScorer, *, max_body_bytes: int = MAX_BODY_BYTES) -> FastAPI:
    """Returns the HTTP gateway of a ``ProbeScorer``, which turns probe scores into rewards, as an application for any ASGI server.

    Args:
        scorer: the scorer; its signals (rules from probe scores to rewards) must have the modes ``reward``, ``penalty`` or ``monitor``.
        max_body_bytes: maximum size of a request's body in bytes; larger bodies are refused.

    Raises:
        SignalError: a signal has another mode.
    """
    scorer.refuse_modes(
        Mode.SCREEN,
        Mode.GATE,
        Mode.RELATIVE_GATE,
        Mode.DENSE,
        because="a gateway answers a number for a rollout; take penalty, or monitor and act on `flagged`",
    )
    gateway_metrics = GatewayMetrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        del app
        yield
        await scorer.close_async()

    # FastAPI's own pages load their scripts from elsewhere
    app = FastAPI(
        title="probescore gateway", version=version("probescore"), description=DESCRIPTION, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    problems.register(app)
    app.add_middleware(BodyLimitMiddleware, max_bytes=max_body_bytes)
    app.add_middleware(CountingMiddleware, metrics=gateway_metrics)

    async def score(rollouts: Sequence[Rollout], step: int | None = None) -> Outcome:
        outcome = await scorer.score_async(rollouts, step=step)
        gateway_metrics.count(outcome)
        return outcome

    @app.post("/openrlhf", responses=problems.RESPONSES, response_model=OpenRlhfAnswer, tags=["trainers"])
    async def openrlhf(request: OpenRlhfRequest) -> Response:
        """Scores the samples that the trainer OpenRLHF sends to its ``--reward.remote_url``."""
        outcomes = await asyncio.gather(*(score([rollout]) for rollout in request.rollouts()))
        rewards = [float(outcome.rewards[0]) for outcome in outcomes]
        logs = {key: [outcome.rollout_metrics[key] for outcome in outcomes] for key in outcomes[0].rollout_metrics}
        # Python's NaN: OpenRLHF makes a tensor of what it reads, which null breaks
        body = json.dumps({"rewards": rewards, "scores": rewards, "extra_logs": logs})
        return Response(body, media_type="application/json")

    @app.post("/slime", responses=problems.RESPONSES, tags=["trainers"])
    async def slime(request: SlimeRequest) -> float:
        """Scores the sample that the trainer slime sends with ``--rm-type remote_rm --rm-url``, and returns the reward as a bare number."""
        return float((await score([request.rollout()])).rewards[0])

    @app.post("/v1/score", responses=problems.RESPONSES, tags=["everybody else"])
    async def v1_score(request: ScoreRequest) -> ScoreAnswer:
        """Scores rollouts that a program sends as token ids, text or chats."""
        outcome = await score([rollout.rollout() for rollout in request.rollouts], request.step)
        return ScoreAnswer(
            rewards=outcome.rewards.tolist(),
            values={name: [_or_null(value) for value in values.tolist()] for name, values in outcome.values.items()},
            flagged={name: flags.tolist() for name, flags in outcome.flagged.items()},
            unscorable=outcome.unscorable.tolist(),
            metrics={key: _or_null(value) for key, value in outcome.metrics.items()},
        )

    @app.get("/healthz", tags=["operation"])
    async def healthz() -> Health:
        """Responds that the HTTP gateway is running; this says nothing about the probescore server behind the gateway."""
        return Health()

    @app.get("/metrics", tags=["operation"], response_class=Response)
    async def metrics() -> Response:
        """Returns the HTTP gateway's metrics in Prometheus' text format."""
        return Response(gateway_metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        headers = {"Content-Security-Policy": CONTENT_SECURITY_POLICY}
        return Response(documentation_page(app.openapi()), media_type="text/html", headers=headers)

    return app


def _or_null(value: float) -> float | None:
    return value if math.isfinite(value) else None
