"""Defines the command-line options for a server's address, and opens the connection to a server, for all commands that need a server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.markup import escape

from probescore import DeadlineExceededError, ProbeClient, UnavailableError
from probescore_server.cli.common.console import new_console

ADDRESS_HELP = "The server: host:port, dns:///host:port or unix:/path; several host:port with commas."
"""Help text of the option ``--address``, the same in every command."""

Address = Annotated[
    str,
    typer.Option("--address", "-a", help=ADDRESS_HELP, envvar="PROBESCORE_ADDRESS", metavar="ADDRESS"),
]
Wait = Annotated[float, typer.Option("--wait", help="Seconds to wait for a server that is not ready yet.", min=0, metavar="SECONDS")]

DEFAULT_ADDRESS = "localhost:50051"

_NOT_OF_THE_SERVER = {"READING_INCOMPLETE", "READING_DIFFERS"}
"""Reasons for which a later try may succeed although the server is ready."""


def split_addresses(written: str) -> str | list[str]:
    """Converts the value of ``--address`` to the form that a client takes: one address, or a list of several addresses."""
    addresses = [address.strip() for address in written.split(",") if address.strip()]
    return addresses[0] if len(addresses) == 1 else addresses


@contextmanager
def connected(address: str, wait: float) -> Iterator[ProbeClient]:
    """Context manager that opens a client of a server. The client waits up to ``wait`` seconds for the server to become ready, or to come
    back after a restart; any other failure ends the command.

    Raises:
        UnavailableError: no server is ready in time, or the server is lost later; the error names the address.
    """
    try:
        with ProbeClient(split_addresses(address), restart_budget=wait) as client:
            if wait > 0:
                with new_console(stderr=True).status(f"waiting for {escape(address)}"):
                    client.wait_until_ready(timeout=wait)
            yield client
    except (UnavailableError, DeadlineExceededError) as error:
        if error.reason in _NOT_OF_THE_SERVER:
            raise
        raise UnavailableError(f"no server is ready at {address}: {error}") from None
