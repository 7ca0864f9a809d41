"""Collects the commands of the command line ``probescore`` in one typer application."""

from __future__ import annotations

import importlib
from importlib.metadata import version as installed_version
from typing import Annotated

import typer

from probescore_server.cli import (
    activations,
    anchors,
    auditing,
    bench,
    info,
    labelling,
    probes,
    readings,
    recording,
    reviewing,
    score,
    sleep,
)
from probescore_server.cli.common.failures import needs_extra

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
readings.register(app)
activations.register(app)
sleep.register(app)
bench.register(app)
auditing.register(app)
labelling.register(app)
anchors.register(app)
recording.register(app)
reviewing.register(app)

# These commands need packages that the command line alone does not: a server brings torch.
for command, extra, summary in (
    ("serve", "server", "Serve a frozen model and its probes over gRPC."),
    ("healthcheck", "server", "Exit with 0 if a server is SERVING by grpc.health.v1."),
    ("gateway", "http", "Answer HTTP requests with probe scores, for OpenRLHF, slime and others."),
):
    try:
        importlib.import_module(f"probescore_server.cli.{command}").register(app)
    except ModuleNotFoundError as missing:
        needs_extra(app, command, summary, extra, missing)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"probescore {installed_version('probescore')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)] = False,
) -> None:
    pass
