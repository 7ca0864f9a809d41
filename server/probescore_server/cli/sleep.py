"""``probescore sleep`` and ``probescore wake``: a device that is shared with training, by hand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import typer

from probescore import Transfer
from probescore_server.cli.common.connection import DEFAULT_ADDRESS, Address, Wait, connected
from probescore_server.cli.common.console import new_console
from probescore_server.cli.common.failures import one_line_failures
from probescore_server.cli.tables import safe

Timeout = Annotated[float, typer.Option("--timeout", help="Seconds until it must have happened.", min=0.001, metavar="SECONDS")]


def register(app: typer.Typer) -> None:
    """Adds the commands ``sleep`` and ``wake``."""
    app.command("sleep")(_sleep)
    app.command("wake")(_wake)


def _sleep(address: Address = DEFAULT_ADDRESS, wait: Wait = 0, timeout: Timeout = 300) -> None:
    """Make a server give its devices' memory back until it is woken; calls wait meanwhile. It must run with --admin."""
    with one_line_failures(), connected(address, wait) as client:
        print_transfers(client.sleep(timeout=timeout), "asleep", "of weights to host memory", "given back")


def _wake(address: Address = DEFAULT_ADDRESS, wait: Wait = 0, timeout: Timeout = 300) -> None:
    """Wake a server that sleeps; returns when it can score again. It must run with --admin."""
    with one_line_failures(), connected(address, wait) as client:
        print_transfers(client.wake(timeout=timeout), "awake", "of weights from host memory", "taken")


def print_transfers(transfers: Iterable[Transfer], state: str, weights: str, memory: str) -> None:
    """One line a device: what it is now, how long that took, and what moved."""
    console = new_console()
    for transfer in transfers:
        device = f"[bold]{safe(transfer.device)}[/bold]"
        moved = f"{_gibibytes(transfer.weight_bytes)} {weights}, {_gibibytes(transfer.device_bytes)} {memory}"
        console.print(f"{device} is {state} after {transfer.seconds:.2f} s: {moved}", soft_wrap=True)


def _gibibytes(number: int) -> str:
    return f"{number / 2**30:.2f} GiB"
