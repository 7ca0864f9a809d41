"""``probescore gateway``: HTTP for trainers that post their rollouts, and for everybody else."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from typing import Annotated

import typer
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from probescore import DeadlineExceededError, TransientError
from probescore_adapters.environment import ADDRESS, POLICY_ENV, RAILS, RUN_ID, SIGNALS, scorer_from_environment
from probescore_adapters.http import create_app
from probescore_adapters.http.app import MAX_BODY_BYTES
from probescore_adapters.scorer import ProbeScorer
from probescore_server.cli.common.connection import ADDRESS_HELP
from probescore_server.cli.common.failures import one_line_failures
from probescore_server.cli.common.visible import one_line, spelt_out

DEFAULT_TIMEOUT = "100"
"""Seconds: less than slime (120) and OpenRLHF (180) wait before they ask again."""
HEAD_SECONDS = 20.0
"""For the head of a request, from the connection or the answer before."""
CHECK_SECONDS = 5.0
DRAIN_SECONDS = 30

logger = logging.getLogger(__name__)

HELP = f"""
Answer OpenRLHF's and slime's remote-reward requests, and JSON, with probe scores.

OpenRLHF: --reward.remote_url http://HOST:PORT/openrlhf. slime: --rm-type remote_rm --rm-url http://HOST:PORT/slime. Everybody else: POST
/v1/score; /docs describes it. Also GET /healthz, and /metrics for Prometheus.

Signals are rewards, penalties and monitors. Options can also be environment variables, which their help names.

[bold]Examples[/bold]

  probescore gateway --address scorer:50051 --signals '[{{"probe": "cheating", "mode": "penalty"}}]' --on-failure -1

  {SIGNALS}=signals.json probescore gateway --host 0.0.0.0 --port 8080

[bold]Exit codes[/bold]: 0 after SIGTERM or Ctrl-C, 1 if the server refuses it, 2 for a wrong setting, 3 if it cannot listen.
"""


def _option(flags: str, variable: str, text: str, metavar: str) -> typer.models.OptionInfo:
    info: typer.models.OptionInfo = typer.Option(*flags.split(), help=f"{text} [dim]{variable}[/dim]", metavar=metavar, show_default=False)
    return info


Word = str | None


def register(app: typer.Typer) -> None:
    """Adds the command ``gateway``."""
    app.command("gateway", help=HELP)(_gateway)


def _gateway(
    address: Annotated[Word, _option("--address -a", ADDRESS, ADDRESS_HELP, "ADDRESS")] = None,
    signals: Annotated[Word, _option("--signals", SIGNALS, "JSON list of signals, or the path of a file with one.", "JSON|FILE")] = None,
    on_failure: Annotated[
        Word, _option("--on-failure", POLICY_ENV["on_failure"], "Without scores: raise (503), wait, or the number to answer.", "POLICY")
    ] = None,
    on_unscorable: Annotated[
        Word,
        _option("--on-unscorable", POLICY_ENV["on_unscorable"], "A rollout nobody can score: worst, raise (422), a number.", "POLICY"),
    ] = None,
    timeout: Annotated[
        Word, _option("--timeout", POLICY_ENV["timeout"], f"Seconds for a request; {DEFAULT_TIMEOUT} unless given.", "SECONDS")
    ] = None,
    wait_seconds: Annotated[
        Word, _option("--wait-seconds", POLICY_ENV["wait_seconds"], "How long --on-failure wait waits.", "SECONDS")
    ] = None,
    rails: Annotated[Word, _option("--rails", RAILS, "JSON object with guard rails.", "JSON|FILE")] = None,
    run_id: Annotated[Word, _option("--run-id", RUN_ID, "Names the run in the server's logs.", "NAME")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.", envvar="PROBESCORE_GATEWAY_HOST")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="TCP port; 0 = any free one.", min=0, max=65535, envvar="PROBESCORE_GATEWAY_PORT")] = 8080,
    max_body_bytes: Annotated[
        int, typer.Option(help="Bytes of a request's body.", min=1, envvar="PROBESCORE_GATEWAY_MAX_BODY_BYTES")
    ] = MAX_BODY_BYTES,
) -> None:
    given = {
        ADDRESS: address,
        SIGNALS: signals,
        RAILS: rails,
        RUN_ID: run_id,
        POLICY_ENV["on_failure"]: on_failure,
        POLICY_ENV["on_unscorable"]: on_unscorable,
        POLICY_ENV["timeout"]: timeout,
        POLICY_ENV["wait_seconds"]: wait_seconds,
    }
    flags = {variable: value for variable, value in given.items() if value is not None}
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLineFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    with one_line_failures():
        settings = {POLICY_ENV["timeout"]: DEFAULT_TIMEOUT, **os.environ, **flags}
        app = create_app(scorer_from_environment(settings), max_body_bytes=max_body_bytes)
        asyncio.run(_check(scorer_from_environment(settings)))
    # uvicorn drains on a signal, and then raises it again for whoever was there before
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: sys.exit(0))
    # one loop everywhere, whatever else is installed
    config = uvicorn.Config(
        app, host=host, port=port, loop="asyncio", http=HeadTimeoutProtocol, access_log=False, timeout_graceful_shutdown=DRAIN_SECONDS
    )
    uvicorn.Server(config).run()


class HeadTimeoutProtocol(H11Protocol):
    """Ends connections whose next request does not begin: uvicorn itself waits for the rest of a head for ever."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A connection is there; its request should be, soon."""
        super().connection_made(transport)
        self._wait_for_head()

    def handle_events(self) -> None:
        """Something came; if a request began with it, its body is for the application to wait for."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before and self._late is not None:
            self._late.cancel()

    def on_response_complete(self) -> None:
        """An answer is out; another request may follow."""
        self._wait_for_head()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more will come."""
        if self._late is not None:
            self._late.cancel()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        if self._late is not None:
            self._late.cancel()
        self._late = self.loop.call_later(HEAD_SECONDS, self.transport.close)


class _OneLineFormatter(logging.Formatter):
    """Messages in which nothing is obeyed by a terminal; tracebacks keep their lines."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        return spelt_out(super().format(record)) if record.exc_info else one_line(super().format(record))


async def _check(scorer: ProbeScorer) -> None:
    """Whether the signals go with the server, if it is there already.

    Raises:
        SignalError, ProbescoreError: they do not.
    """
    try:
        await asyncio.wait_for(scorer.score_async([]), CHECK_SECONDS)
    except (TransientError, DeadlineExceededError, asyncio.TimeoutError):
        logger.warning("no server answers yet: the gateway starts without having checked its signals")
    finally:
        await scorer.close_async()
