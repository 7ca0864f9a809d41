"""``probescore healthcheck``: whether a server serves, as an exit code, for containers without curl and without grpcurl.

It is asked every few seconds for as long as a container lives, so that this module imports as little as it can, and can run alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated

import grpc
import typer
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from probescore_server.cli.common.visible import one_line

UNHEALTHY = 1

# Where a server listens that listens everywhere.
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "localhost", "[::]": "localhost"}  # noqa: S104

Address = Annotated[
    str,
    typer.Option(
        "--address",
        "-a",
        help="The server: host:port, dns:///host:port or unix:/path; several host:port with commas, which must all serve. Default: where "
        "PROBESCORE_UNIX_SOCKET, PROBESCORE_HOST and PROBESCORE_PORT say that it listens, else 127.0.0.1:50051.",
        envvar="PROBESCORE_ADDRESS",
        metavar="ADDRESS",
        show_default=False,
    ),
]
# as it was given before there was one way in all commands; container files have it
Written = Annotated[str, typer.Argument(hidden=True)]
Service = Annotated[str, typer.Option("--service", help="A service of the server; empty = the server as a whole.", metavar="NAME")]
Timeout = Annotated[float, typer.Option("--timeout", help="Seconds until it must have answered.", min=0.001, metavar="SECONDS")]


def register(app: typer.Typer) -> None:
    """Adds the command ``healthcheck``."""
    app.command("healthcheck")(_healthcheck)


def _healthcheck(written: Written = "", address: Address = "", service: Service = "", timeout: Timeout = 3) -> None:
    """Exit with 0 if a server is SERVING by grpc.health.v1, else with 1 and a line that says what it is."""
    asked = [one for one in (written or address or own_address(os.environ)).split(",") if one.strip()]
    problem = next(filter(None, (find_problem(one.strip(), service, timeout) for one in asked)), "")
    if problem:
        typer.echo(one_line(f"probescore: {problem}"), err=True)
        raise typer.Exit(UNHEALTHY)


def own_address(environment: Mapping[str, str]) -> str:
    """What a client connects to that shares the environment of a server; the defaults are those of `ServerSettings`."""
    if path := environment.get("PROBESCORE_UNIX_SOCKET"):
        return f"unix:{path}"
    host = environment.get("PROBESCORE_HOST") or "127.0.0.1"
    host = _LOOPBACK.get(host, host)
    port = environment.get("PROBESCORE_PORT") or "50051"
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def find_problem(address: str, service: str, timeout: float) -> str:
    """Why the server at an address is not healthy, in one line; empty if it is.

    Args:
        address: as gRPC takes it: ``127.0.0.1:50051``, ``unix:/run/probescore.sock``.
        service: full name; empty = the server as a whole.
        timeout: seconds.
    """
    # a proxy that the environment names is for what is far away
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            check = HealthStub(channel).Check  # type: ignore[attr-defined]  # its stubs leave it out
            answer = check(HealthCheckRequest(service=service), timeout=timeout)
        except grpc.RpcError as error:
            return " ".join(f"{address}: {error.code().name} {error.details() or ''}".split())
    if answer.status == HealthCheckResponse.SERVING:
        return ""
    return f"{address}: {HealthCheckResponse.ServingStatus.Name(answer.status)}"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
register(app)


@app.callback()
def _alone() -> None:
    """Keeps the command's name a part of the command line, as where it is one of many."""
