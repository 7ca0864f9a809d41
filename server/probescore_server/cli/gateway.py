"""Implements ``probescore gateway``, an HTTP server that scores rollouts for RL trainers and other programs."""

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
"""Default time limit in seconds for scoring one request to the gateway; it is shorter than the time after which slime (120 s) and OpenRLHF
(180 s) send the request again.
"""
HEAD_SECONDS = 20.0
"""Seconds in which the head of an HTTP request must arrive after the connection is opened or the last response is sent."""
CHECK_SECONDS = 5.0
DRAIN_SECONDS = 30

logger = logging.getLogger(__name__)

HELP = f"""
Answer remote-reward requests of OpenRLHF and slime, and JSON requests, with probe scores.

OpenRLHF: --reward.remote_url http://HOST:PORT/openrlhf. slime: --rm-type remote_rm --rm-url http://HOST:PORT/slime. All others: POST
/v1/score, which /docs describes. Also GET /healthz, and /metrics for Prometheus.

A signal makes a probe's score a reward or a penalty, or monitors it. An environment variable, named below, can replace each option.

[bold]Examples[/bold]

  probescore gateway --address scorer:50051 --signals '[{{"probe": "cheating", "mode": "penalty"}}]' --on-failure -1

  {SIGNALS}=signals.json probescore gateway --host 0.0.0.0 --port 8080

[bold]Exit codes[/bold]: 0 after SIGTERM or Ctrl-C, 1 if the server refuses the signals, 2 for a wrong setting, 3 if it cannot listen.
"""


def _option(flags: str, variable: str, text: str, metavar: str) -> typer.models.OptionInfo:
    info: typer.models.OptionInfo = typer.Option(*flags.split(), help=f"{text} [dim]{variable}[/dim]", metavar=metavar, show_default=False)
    return info


Word = str | None


def register(app: typer.Typer) -> None:
    """Adds the command ``gateway`` to the command line."""
    app.command("gateway", help=HELP)(_gateway)


def _gateway(
    address: Annotated[Word, _option("--address -a", ADDRESS, ADDRESS_HELP, "ADDRESS")] = None,
    signals: Annotated[Word, _option("--signals", SIGNALS, "A JSON list of signals, or the path of a file with one.", "JSON|FILE")] = None,
    on_failure: Annotated[
        Word,
        _option(
            "--on-failure", POLICY_ENV["on_failure"], "What to answer when there are no scores: raise (503), wait, or a number.", "POLICY"
        ),
    ] = None,
    on_unscorable: Annotated[
        Word,
        _option(
            "--on-unscorable",
            POLICY_ENV["on_unscorable"],
            "What a rollout that cannot be scored gets: worst, raise (422) or a number.",
            "POLICY",
        ),
    ] = None,
    timeout: Annotated[
        Word, _option("--timeout", POLICY_ENV["timeout"], f"Seconds that a request may take; {DEFAULT_TIMEOUT} by default.", "SECONDS")
    ] = None,
    wait_seconds: Annotated[
        Word, _option("--wait-seconds", POLICY_ENV["wait_seconds"], "Seconds that --on-failure wait waits.", "SECONDS")
    ] = None,
    rails: Annotated[
        Word, _option("--rails", RAILS, "A JSON object with guard rails, or the path of a file with one.", "JSON|FILE")
    ] = None,
    run_id: Annotated[Word, _option("--run-id", RUN_ID, "The name of the run in the server's logs.", "NAME")] = None,
    host: Annotated[str, typer.Option(help="The address to listen on.", envvar="PROBESCORE_GATEWAY_HOST")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="The TCP port to listen on; 0 = any free one.", min=0, max=65535, envvar="PROBESCORE_GATEWAY_PORT")
    ] = 8080,
    max_body_bytes: Annotated[
        int, typer.Option(help="The most bytes of a request's body.", min=1, envvar="PROBESCORE_GATEWAY_MAX_BODY_BYTES")
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
    # on a signal uvicorn finishes its requests, and then raises the signal again for the handler that was there before
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: sys.exit(0))
    # the same event loop everywhere, whatever else is installed
    config = uvicorn.Config(
        app, host=host, port=port, loop="asyncio", http=HeadTimeoutProtocol, access_log=False, timeout_graceful_shutdown=DRAIN_SECONDS
    )
    uvicorn.Server(config).run()


class HeadTimeoutProtocol(H11Protocol):
    """HTTP protocol of uvicorn that closes a connection if the head of its next request does not arrive in time; uvicorn itself would wait
    for the rest of the head for ever.
    """

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the time limit for the head of the first HTTP request on a new connection."""
        super().connection_made(transport)
        self._wait_for_head()

    def handle_events(self) -> None:
        """Handles data that has arrived on a connection, and ends the time limit for a request's head if a request begins with the data.

        The application itself waits for the request's body.
        """
        before = self.cycle
        super().handle_events()
        if self.cycle is not before and self._late is not None:
            self._late.cancel()

    def on_response_complete(self) -> None:
        """Starts the time limit for the head of the next HTTP request after a response has been sent."""
        self._wait_for_head()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends the time limit for the head of the next HTTP request when the connection is closed."""
        if self._late is not None:
            self._late.cancel()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        if self._late is not None:
            self._late.cancel()
        self._late = self.loop.call_later(HEAD_SECONDS, self.transport.close)


class _OneLineFormatter(logging.Formatter):
    """Log formatter that makes control characters harmless for the terminal. Records with a traceback keep their line breaks."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns a log record as text, with control characters replaced by their code points, such as ``⟨1B⟩``."""
        return spelt_out(super().format(record)) if record.exc_info else one_line(super().format(record))


async def _check(scorer: ProbeScorer) -> None:
    """Checks that the configured signals (rules from a probe's scores to rewards) fit the server's probes, if a server responds already.

    Raises:
        SignalError: a signal does not fit the probes of the server.
        ProbescoreError: the server refuses the request.
    """
    try:
        await asyncio.wait_for(scorer.score_async([]), CHECK_SECONDS)
    except (TransientError, DeadlineExceededError, asyncio.TimeoutError):
        logger.warning("no server answers yet: the gateway starts without having checked its signals")
    finally:
        await scorer.close_async()
