"""The options and the client that all commands share which talk to a server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from probescore import DeadlineExceededError, ProbeClient, UnavailableError

Address = Annotated[
    str,
    typer.Option("--address", "-a", help="The server: host:port or unix:/path.", envvar="PROBESCORE_ADDRESS", metavar="ADDRESS"),
]
Wait = Annotated[float, typer.Option("--wait", help="Seconds to wait for a server that is not ready yet.", min=0, metavar="SECONDS")]

DEFAULT_ADDRESS = "localhost:50051"


@contextmanager
def connected(address: str, wait: float) -> Iterator[ProbeClient]:
    """A client of a server that has ``wait`` seconds to become ready; after that every failure is final.

    Raises:
        UnavailableError: naming the address.
    """
    try:
        with ProbeClient(address, restart_budget=wait) as client:
            if wait > 0:
                with Console(stderr=True).status(f"waiting for {escape(address)}"):
                    client.wait_until_ready(timeout=wait)
            yield client
    except (UnavailableError, DeadlineExceededError) as error:
        raise UnavailableError(f"no server is ready at {address}: {error}") from None
