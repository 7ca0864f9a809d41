"""Implements ``probescore sleep`` and ``probescore wake``, which free and reload the memory of a server's devices (such as GPUs), so that
training can use the devices in turn.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import typer

from probescore import Transfer
from probescore_server.cli.common.connection import DEFAULT_ADDRESS, Address, Wait, connected
from probescore_server.cli.common.console import new_console
from probescore_server.cli.common.failures import one_line_failures
from probescore_server.cli.tables import safe

Timeout = Annotated[float, typer.Option("--timeout", help="Seconds in which the server must finish.", min=0.001, metavar="SECONDS")]


def register(app: typer.Typer) -> None:
    """Adds the commands ``sleep`` and ``wake`` to the command line."""
    app.command("sleep")(_sleep)
    app.command("wake")(_wake)


def _sleep(address: Address = DEFAULT_ADDRESS, wait: Wait = 0, timeout: Timeout = 300) -> None:
    """Make a server give back its devices' memory until it is woken. Calls wait meanwhile. The server must run with --admin."""
    with one_line_failures(), connected(address, wait) as client:
        print_transfers(client.sleep(timeout=timeout), "asleep", "of weights to host memory", "given back")


def _wake(address: Address = DEFAULT_ADDRESS, wait: Wait = 0, timeout: Timeout = 300) -> None:
    """Wake a server that sleeps, and return when it can score again. The server must run with --admin."""
    with one_line_failures(), connected(address, wait) as client:
        print_transfers(client.wake(timeout=timeout), "awake", "of weights from host memory", "taken")


def print_transfers(transfers: Iterable[Transfer], state: str, weights: str, memory: str) -> None:
    """Prints one line for each device of a server that was put to sleep or woken: the device's state, the seconds until the state was
    reached, and the amount of memory moved and freed or taken.
    """
    console = new_console()
    for transfer in transfers:
        device = f"[bold]{safe(transfer.device)}[/bold]"
        moved = f"{_gibibytes(transfer.weight_bytes)} {weights}, {_gibibytes(transfer.device_bytes)} {memory}"
        console.print(f"{device} is {state} after {transfer.seconds:.2f} s: {moved}", soft_wrap=True)


def _gibibytes(number: int) -> str:
    return f"{number / 2**30:.2f} GiB"
