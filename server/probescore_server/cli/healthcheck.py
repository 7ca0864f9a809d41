"""Implements ``probescore healthcheck``, whose exit code tells whether a server is healthy, for containers without curl and grpcurl.

The command runs every few seconds while a container runs, so this module imports as little as possible and can run alone.
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

# Local addresses of a server that listens on all interfaces.
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "localhost", "[::]": "localhost"}  # noqa: S104

Address = Annotated[
    str,
    typer.Option(
        "--address",
        "-a",
        help="The server: host:port, dns:///host:port or unix:/path; several host:port with commas, which must all serve. The default "
        "is where PROBESCORE_UNIX_SOCKET, PROBESCORE_HOST and PROBESCORE_PORT make a server listen, else 127.0.0.1:50051.",
        envvar="PROBESCORE_ADDRESS",
        metavar="ADDRESS",
        show_default=False,
    ),
]
# the address as an argument is an earlier form of --address, which container files may contain
Written = Annotated[str, typer.Argument(hidden=True)]
Service = Annotated[str, typer.Option("--service", help="The gRPC service to check; empty = the server as a whole.", metavar="NAME")]
Timeout = Annotated[float, typer.Option("--timeout", help="Seconds in which the server must answer.", min=0.001, metavar="SECONDS")]


def register(app: typer.Typer) -> None:
    """Adds the command ``healthcheck`` to the command line."""
    app.command("healthcheck")(_healthcheck)


def _healthcheck(written: Written = "", address: Address = "", service: Service = "", timeout: Timeout = 3) -> None:
    """Exit with 0 if a server is SERVING by grpc.health.v1, else with 1 and a line that states its status."""
    asked = [one for one in (written or address or own_address(os.environ)).split(",") if one.strip()]
    problem = next(filter(None, (find_problem(one.strip(), service, timeout) for one in asked)), "")
    if problem:
        typer.echo(one_line(f"probescore: {problem}"), err=True)
        raise typer.Exit(UNHEALTHY)


def own_address(environment: Mapping[str, str]) -> str:
    """Returns the address at which a client reaches a server that runs with the given environment variables; variables that are not set
    have the defaults of the server's settings.
    """
    if path := environment.get("PROBESCORE_UNIX_SOCKET"):
        return f"unix:{path}"
    host = environment.get("PROBESCORE_HOST") or "127.0.0.1"
    host = _LOOPBACK.get(host, host)
    port = environment.get("PROBESCORE_PORT") or "50051"
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def find_problem(address: str, service: str, timeout: float) -> str:
    """Returns one line that tells why the server at an address is not healthy; empty if the server is healthy.

    Args:
        address: address in gRPC's form, such as ``127.0.0.1:50051`` or ``unix:/run/probescore.sock``.
        service: full name of a gRPC service; empty = the server as a whole.
        timeout: seconds in which the server must answer.
    """
    # a proxy that the environment names is for remote addresses
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            check = HealthStub(channel).Check  # type: ignore[attr-defined]  # the stubs of the package leave it out
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
    """Keeps ``healthcheck`` a subcommand when this module runs alone: typer would drop the name of an application's only command."""
