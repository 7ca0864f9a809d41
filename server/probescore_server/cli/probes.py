"""Implements ``probescore probes``, which lists the probes of a server, and inspects and verifies probe files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from probescore_server.cli.common.connection import DEFAULT_ADDRESS, Address, Wait, connected
from probescore_server.cli.common.console import new_console
from probescore_server.cli.common.failures import one_line_failures
from probescore_server.cli.tables import facts_table, manifest_tables, probes_table, safe

ProbeFileArgument = Annotated[Path, typer.Argument(help="The path of a probe file.", show_default=False, metavar="FILE")]


def register(app: typer.Typer) -> None:
    """Adds the commands ``probes list``, ``probes inspect`` and ``probes verify`` to the command line."""
    probes = typer.Typer(help="List, inspect and verify probes.", no_args_is_help=True)
    probes.command("list")(_list)
    probes.command("inspect")(_inspect)
    probes.command("verify")(_verify)
    app.add_typer(probes, name="probes")


def _list(address: Address = DEFAULT_ADDRESS, wait: Wait = 0) -> None:
    """List the probes that a server has loaded."""
    with one_line_failures():
        with connected(address, wait) as client:
            loaded = client.list_probes()
        new_console().print(probes_table(loaded))


def _inspect(file: ProbeFileArgument) -> None:
    """Show the manifest of a probe file, after every check that needs no model."""
    with one_line_failures():
        from probescore_server.probes.format.probe_file import read_probe_file

        probe = read_probe_file(file)
        console = new_console()
        for table in manifest_tables(probe.manifest):
            console.print(table, "")
        console.print(
            f"[green]✓[/green] {len(probe.graph):,} bytes of graph: standard operators, no external data, finite weights, digests match"
        )
        console.print("[dim]Not checked without the model: its fingerprint, and the golden scores. See: probescore probes verify[/dim]")


def _verify(
    file: ProbeFileArgument,
    model: Annotated[
        str, typer.Option("--model", "-m", help="The model: a directory, or an id on the Hugging Face hub.", show_default=False)
    ],
    revision: Annotated[str, typer.Option("--revision", help="The branch, tag or commit of a model on the hub.", show_default=False)] = "",
    dtype: Annotated[
        str, typer.Option("--dtype", help="The dtype: float32, bfloat16 or float16. Golden scores have a tolerance for each.")
    ] = "float32",
    device: Annotated[str, typer.Option("--device", help="The device, such as cpu or cuda:0.")] = "cpu",
) -> None:
    """Check a probe file against its model, as a server does before it serves the probe."""
    console = new_console()
    with one_line_failures():
        from probescore_server.engine.engine import Engine

        with _CheckSteps(console) as steps:
            engine = Engine.load(model, [file], revision=revision, dtype=dtype, device=device, report=steps.begin)
        table = facts_table("Agrees with the model")
        table.add_row("fingerprint", engine.info.model.fingerprint)
        table.add_row("tokenizer", engine.info.tokenizer_fingerprint)
        table.add_row("blocks", f"{engine.info.model.num_loaded_layers} of {engine.info.model.num_hidden_layers} needed")
        console.print(table)
        console.print(f"[bold green]{safe(engine.info.probes[0].name)}@{safe(engine.info.probes[0].version)} can be served[/bold green]")


class _CheckSteps:
    """Progress display of a probe's check: shows a spinner while a step runs, and prints the step once the step has passed or failed."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status = console.status("")
        self._step = ""

    def begin(self, step: str) -> None:
        self._end("[green]✓[/green]")
        self._step = step
        self._status.update(safe(step))

    def _end(self, mark: str) -> None:
        if self._step:
            self._console.print(f"{mark} {safe(self._step)}")

    def __enter__(self) -> _CheckSteps:
        self._status.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._status.stop()
        self._end("[green]✓[/green]" if kind is None else "[red]✗[/red]")
