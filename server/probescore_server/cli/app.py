"""The commands of ``probescore``, gathered."""

from __future__ import annotations

import importlib
from importlib.metadata import version as installed_version
from typing import Annotated

import typer

from probescore_server.cli import bench, info, probes, score, sleep
from probescore_server.cli.failures import needs_extra

app = typer.Typer(
    name="probescore",
    help="Scores rollouts with probes on a frozen language model.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)
score.register(app)
info.register(app)
probes.register(app)
sleep.register(app)
bench.register(app)

try:
    importlib.import_module("probescore_server.cli.serve").register(app)
except ModuleNotFoundError as missing:
    # The command line alone is small; a server brings torch.
    needs_extra(app, "serve", "Serve a frozen model and its probes over gRPC.", "server", missing)

try:
    importlib.import_module("probescore_server.cli.gateway").register(app)
except ModuleNotFoundError as missing:
    needs_extra(app, "gateway", "Answer HTTP with probe scores, for OpenRLHF, slime and everybody else.", "http", missing)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"probescore {installed_version('probescore')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)] = False,
) -> None:
    pass
