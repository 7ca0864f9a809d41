"""Implements ``probescore review``, a local application in which people look at a run's rollouts, label them and repair its probes."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from probescore_server.cli.common.failures import one_line_failures, say

if TYPE_CHECKING:
    from probescore_review.repair import RepairableProbe

HELP = """
Look at the rollouts of runs in a browser, label them, and repair their probes. It is answered on this machine alone, and loads nothing
from elsewhere.

RUN is the folder of a run's record, which may still be written, or a file that 'probescore score --json' printed. Give several to see them
side by side. Labels are appended to the record.

[bold]Examples[/bold]

  probescore review runs/sort-7

  probescore review runs/sort-7 runs/sort-8 --port 8500

[bold]Exit codes[/bold]: 0 after Ctrl-C or SIGTERM, 2 for wrong input.
"""

Runs = Annotated[list[Path], typer.Argument(help="Folders of records, or files of scored rollouts.", show_default=False, metavar="RUN…")]


def register(app: typer.Typer) -> None:
    """Adds the command ``review`` to the command line."""
    app.command("review", help=HELP)(_review)


def _review(
    runs: Runs,
    port: Annotated[int, typer.Option("--port", help="The port on this machine; 0 = any free one.", min=0, max=65535)] = 8400,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="A folder for the index; the user's cache by default.", show_default=False, metavar="DIR")
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="The frozen model, to repair probes: a directory, or an id on the hub.", show_default=False)
    ] = "",
    probes: Annotated[
        Path | None, typer.Option("--probes", help="The folder of probe files that the server follows.", show_default=False, metavar="DIR")
    ] = None,
    address: Annotated[
        str,
        typer.Option(
            "--address", "-a", help="The server that is told of a replaced probe.", envvar="PROBESCORE_ADDRESS", show_default=False
        ),
    ] = "",
    anchors: Annotated[
        Path | None,
        typer.Option("--anchors", help="Labelled texts on which an old and a new probe are compared.", show_default=False, metavar="FILE"),
    ] = None,
    threshold: Annotated[
        list[str] | None,
        typer.Option(
            "--threshold",
            help="The score from which on a rollout of a file is flagged; repeat for several probes.",
            metavar="NAME@VERSION=SCORE",
            show_default=False,
        ),
    ] = None,
) -> None:
    with one_line_failures("review"):
        import uvicorn

        from probescore_review.app import create_app
        from probescore_review.jobs import Jobs
        from probescore_review.repair import RepairSettings
        from probescore_review.runs import ReviewedRun
        from probescore_review.scored_file import record_of

        thresholds = dict(_threshold(each) for each in threshold or ())
        if thresholds and not any(run.is_file() for run in runs):
            raise ValueError("--threshold: a record has its thresholds; leave it out")
        folder = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "probescore" / "review"
        if bool(model) != (probes is not None):
            raise ValueError("--model, --probes: give both, to repair probes, or none")
        settings = RepairSettings(
            model=model,
            probes=probes and probes.absolute(),
            address=address,
            anchors=anchors and anchors.absolute(),
            read_files=_probe_files,
        )
        jobs = Jobs()
        opened = []
        for number, run in enumerate(runs):
            say(f"reading {run.name}")
            record = record_of(run, thresholds) if run.is_file() else run
            opened.append(ReviewedRun(str(number), record, folder, jobs=jobs, settings=settings))
        listening = socket.create_server(("127.0.0.1", port))
        say(f"http://127.0.0.1:{listening.getsockname()[1]}")
        # on a signal uvicorn finishes its requests, and then raises the signal again for the handler that was there before
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, lambda *_: sys.exit(0))
        config = uvicorn.Config(create_app(opened), loop="asyncio", log_level="warning", access_log=False, timeout_graceful_shutdown=5)
        uvicorn.Server(config).run(sockets=[listening])


def _probe_files(folder: Path) -> Sequence[RepairableProbe]:
    """Returns the probe files of a folder that can be read, by name and version."""
    from probescore_review.repair import RepairableProbe
    from probescore_server.errors import ProbeRefused
    from probescore_server.probes.format.probe_file import read_probe_file

    found = []
    for path in sorted(folder.glob("*.onnx")):
        try:
            manifest = read_probe_file(path).manifest
        except (ProbeRefused, OSError):
            continue
        thresholds = {str(each.reduction): each.threshold for each in manifest.calibrations}
        found.append(RepairableProbe(manifest.key, path, thresholds))
    return found


def _threshold(given: str) -> tuple[str, float]:
    probe, _, score = given.rpartition("=")
    try:
        return probe, float(score)
    except ValueError:
        raise ValueError(f"--threshold: {given}; give NAME@VERSION=SCORE, such as cheating@1=0.5") from None
