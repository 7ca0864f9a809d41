"""Implements ``probescore readings``, whose commands list, load and unload readings: adapters and checkpoints that the probes of a running
server read beside the frozen model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from probescore import LoadedReading, Reading
from probescore_server.cli.common.connection import DEFAULT_ADDRESS, Address, Wait, connected
from probescore_server.cli.common.console import new_console
from probescore_server.cli.common.failures import one_line_failures
from probescore_server.cli.common.visible import visible_json
from probescore_server.cli.tables import facts_table, reading_changes, readings_table, safe

Name = Annotated[str, typer.Argument(help="The name by which scores are asked for on the reading, such as policy.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object for each reading, and nothing else.")]
Timeout = Annotated[float, typer.Option("--timeout", help="Seconds in which all servers must finish.", min=0.001, metavar="SECONDS")]


def register(app: typer.Typer) -> None:
    """Adds the commands under ``readings`` to the command line."""
    readings = typer.Typer(
        help="List, load and unload readings: whose activations the probes read beside those of the frozen model.",
        no_args_is_help=True,
        rich_markup_mode="rich",
    )
    readings.command("list")(_list)
    readings.command("load")(_load)
    readings.command("unload")(_unload)
    app.add_typer(readings, name="readings")


def _list(address: Address = DEFAULT_ADDRESS, as_json: AsJson = False, wait: Wait = 0) -> None:
    """List the readings that scores can be asked for. Fails if the servers at an address do not have the same ones."""
    with one_line_failures():
        with connected(address, wait) as client:
            readings = client.readings()
        _print(readings, as_json)


def _load(
    name: Name,
    path: Annotated[
        str,
        typer.Argument(
            help="The directory that the adapter or checkpoint was saved to, as the server sees it: absolute, or below its readings_root.",
            show_default=False,
        ),
    ],
    address: Address = DEFAULT_ADDRESS,
    step: Annotated[int | None, typer.Option("--step", help="A label, such as the training step.", min=0, metavar="N")] = None,
    expected_id: Annotated[
        str, typer.Option("--expected-id", help="Refuse any other version of the files.", show_default=False, metavar="ID")
    ] = "",
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Free what the name means first, so that there is never room needed for both.")
    ] = False,
    as_json: AsJson = False,
    timeout: Timeout = 300,
    wait: Wait = 0,
) -> None:
    """Load a LoRA adapter or a checkpoint beside the frozen model, on every server at an address or on none. The servers must run with
    --admin and --readings-root. Files that are still being written are waited for.
    """
    with one_line_failures():
        with connected(address, wait) as client:
            loaded = client.load_reading(name, path, step, expected_id or None, in_place, timeout=timeout)
        if as_json:
            _echo(loaded)
        else:
            new_console().print(loaded_table(loaded))


def _unload(name: Name, address: Address = DEFAULT_ADDRESS, as_json: AsJson = False, timeout: Timeout = 300, wait: Wait = 0) -> None:
    """Let a name mean no reading any more, on every server at an address, and show what it meant."""
    with one_line_failures():
        with connected(address, wait) as client:
            removed = client.unload_reading(name, timeout=timeout)
        _print([removed], as_json)


def _print(readings: Sequence[Reading], as_json: bool) -> None:
    if not as_json:
        new_console().print(readings_table(readings))
        return
    for reading in readings:
        _echo(reading)


def _echo(described: Reading | LoadedReading) -> None:
    typer.echo(visible_json(json.dumps(asdict(described), ensure_ascii=False)))


def loaded_table(loaded: LoadedReading) -> Table:
    """Returns a table of a reading that was just loaded: what it is, what it replaced, and how far it moves each probe's golden scores."""
    reading, replaced = loaded.reading, loaded.replaced
    table = facts_table(f"{safe(reading.name)} is loaded")
    table.add_row("id", safe(reading.id))
    table.add_row("kind", reading.kind.value)
    table.add_row("step", "none" if reading.step is None else str(reading.step))
    table.add_row("changes", reading_changes(reading))
    table.add_row("replaced", "nothing" if replaced is None else safe(replaced.id))
    table.add_row("memory", f"{loaded.device_bytes:,} bytes on a device")
    for probe, drift in sorted(loaded.golden_drift.items()):
        table.add_row(f"golden drift of {safe(probe)}", f"{drift:.3g} standard deviations")
    return table
