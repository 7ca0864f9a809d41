"""Implements ``probescore probes reload``, which makes a server follow its probe files while it scores."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from probescore import ReloadedProbes
from probescore_server.cli.common.connection import DEFAULT_ADDRESS, Address, Wait, connected
from probescore_server.cli.common.console import new_console
from probescore_server.cli.common.failures import FAILED, one_line_failures, say
from probescore_server.cli.tables import safe

Timeout = Annotated[float, typer.Option("--timeout", help="Seconds in which the server must finish.", min=0.001, metavar="SECONDS")]


def register(probes: typer.Typer) -> None:
    """Adds the command ``reload`` to the commands under ``probes``."""
    probes.command("reload")(_reload)


def _reload(address: Address = DEFAULT_ADDRESS, wait: Wait = 0, timeout: Timeout = 300) -> None:
    """Make a server follow its probe files, and show what has changed. Exits with 1 if a file was refused. The server must run with
    --admin.
    """
    with one_line_failures():
        with connected(address, wait) as client:
            reloaded = client.reload_probes(timeout=timeout)
        new_console().print(reload_table(reloaded))
        for refused in reloaded.refused:
            say(refused)
        if reloaded.refused:
            raise typer.Exit(FAILED)


def reload_table(reloaded: ReloadedProbes) -> Table:
    """Returns a table with one row for each probe that is served or was dropped, its state, and what has changed."""
    title = f"Probes after {reloaded.seconds:.2f} s"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("probe", "state", "changed"):
        table.add_column(column, overflow="fold")
    for key in reloaded.current_probes:
        table.add_row(safe(key), "current", "added" if key in reloaded.added else "")
    for key in reloaded.retired_probes:
        table.add_row(safe(key), "retired", "its file is gone" if key in reloaded.retired else "")
    for key in reloaded.dropped:
        table.add_row(safe(key), "not served", "dropped")
    if not table.row_count:
        table.add_row("none: the server has no probe files", "", "")
    return table
