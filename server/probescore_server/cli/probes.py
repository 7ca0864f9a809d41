"""Implements ``probescore probes``: fits, judges and imports probes, lists those of a server or folder, inspects and verifies files, and
makes a server follow its files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from probescore_server.cli import calibrating, comparing, differences, evaluating, fitting, importing, reloading
from probescore_server.cli.common.connection import DEFAULT_ADDRESS, Address, Wait, connected
from probescore_server.cli.common.console import new_console
from probescore_server.cli.common.failures import FAILED, one_line_failures, say
from probescore_server.cli.steps import CheckSteps
from probescore_server.cli.tables import facts_table, manifest_tables, probes_table, safe

ProbeFileArgument = Annotated[Path, typer.Argument(help="The path of a probe file.", show_default=False, metavar="FILE")]


def register(app: typer.Typer) -> None:
    """Adds the commands under ``probes`` to the command line."""
    probes = typer.Typer(
        help="Fit, judge, calibrate, compare, list, inspect, verify, import and reload probes.",
        no_args_is_help=True,
        rich_markup_mode="rich",
    )
    for command in (fitting, evaluating, calibrating, comparing, differences):
        command.register(probes)
    probes.command("list")(_list)
    probes.command("inspect")(_inspect)
    probes.command("verify")(_verify)
    importing.register(probes)
    reloading.register(probes)
    app.add_typer(probes, name="probes")


def _list(
    folder: Annotated[
        Path | None,
        typer.Argument(help="A folder of probe files, which are checked as far as that needs no model.", show_default=False, metavar="DIR"),
    ] = None,
    address: Address = DEFAULT_ADDRESS,
    wait: Wait = 0,
) -> None:
    """List the probes that a server serves, also the retired ones, whose files are gone; or those in a folder."""
    with one_line_failures():
        if folder is not None:
            _list_folder(folder)
            return
        with connected(address, wait) as client:
            loaded = client.list_probes()
        new_console().print(probes_table(loaded))


def _list_folder(folder: Path) -> None:
    """Shows the probe files of a folder by name, and says which are refused; exits with 1 if any is."""
    from probescore_server.errors import ProbeRefused
    from probescore_server.probes.format.probe_file import read_probe_file
    from probescore_server.probes.loading.compatibility import probe_info

    found, refused = [], []
    files = sorted(entry for entry in folder.iterdir() if entry.suffix == ".onnx")
    if not files:
        raise ValueError(f"{folder}: there are no probe files (*.onnx) in it")
    for file in files:
        try:
            found.append(probe_info(read_probe_file(file).manifest, ()))
        except ProbeRefused as error:
            refused.append(error)
    if found:
        new_console().print(probes_table(found))
    for refusal in refused:
        say(refusal)
    if refused:
        raise typer.Exit(FAILED)


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

        with CheckSteps(console) as steps:
            engine = Engine.load(model, [file], revision=revision, dtype=dtype, device=device, report=steps.begin)
        table = facts_table("Agrees with the model")
        table.add_row("fingerprint", engine.info.model.fingerprint)
        table.add_row("tokenizer", engine.info.tokenizer_fingerprint)
        table.add_row("blocks", f"{engine.info.model.num_loaded_layers} of {engine.info.model.num_hidden_layers} needed")
        console.print(table)
        console.print(f"[bold green]{safe(engine.info.probes[0].name)}@{safe(engine.info.probes[0].version)} can be served[/bold green]")
