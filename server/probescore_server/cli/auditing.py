"""Implements ``probescore audit``, which says from the record of a training run whether its probes still work."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from probescore_server.cli.audit_view import print_audit
from probescore_server.cli.common.console import new_console
from probescore_server.cli.common.failures import one_line_failures, say
from probescore_server.cli.common.interruption import interruptible
from probescore_server.cli.common.visible import visible_json
from probescore_server.files import write_atomically

if TYPE_CHECKING:
    from probescore_audit import RecordAudit

HELP = """
Say whether the probes of a training run still work: one verdict for each probe and reading, and what to do.

RUN is the folder of the run's record. What is compared is the model before training, which the record has, with the last steps that are
labelled. If nothing can be said yet, rollouts are listed whose labels would decide it.

With --follow the record is read again whenever it has grown, until Ctrl-C.

[bold]Examples[/bold]

  probescore audit runs/sort-7

  probescore audit runs/sort-7 --report audit.html --json > audit.json

  probescore audit runs/sort-7 --follow --metrics-port 9465

[bold]Exit codes[/bold]: 0 if the run was audited, whatever the verdict, 2 for wrong input, 130 after Ctrl-C.
"""

_Stamps = tuple[tuple[str, int, int], ...]

Run = Annotated[Path, typer.Argument(help="The folder of a run's record.", show_default=False, metavar="RUN")]
ProbeKeys = Annotated[list[str] | None, typer.Option("--probe", "-p", help="A probe, as name@version; repeat for several. All by default.")]
Readings = Annotated[list[str] | None, typer.Option("--reading", help="A reading; repeat for several. All by default.")]


def register(app: typer.Typer) -> None:
    """Adds the command ``audit`` to the command line."""
    app.command("audit", help=HELP)(_audit)


def _audit(
    run: Run,
    probe: ProbeKeys = None,
    reading: Readings = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every number as one line of JSON, and nothing else.")] = False,
    report: Annotated[
        Path | None, typer.Option("--report", help="A file for a self-contained HTML page.", show_default=False, metavar="FILE")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on as the record grows.")] = False,
    interval: Annotated[float, typer.Option("--interval", help="Seconds between two looks at the record.", min=0.1)] = 30,
    metrics_port: Annotated[
        int | None,
        typer.Option("--metrics-port", help="With --follow: a port for Prometheus.", min=0, max=65535, show_default=False, metavar="PORT"),
    ] = None,
    metrics_host: Annotated[str, typer.Option("--metrics-host", help="The address of that port.")] = "127.0.0.1",
) -> None:
    with one_line_failures("audit"):
        if metrics_port is not None and not follow:
            raise ValueError("--metrics-port: there is nothing to scrape of an audit that has ended; add --follow")

        def audited() -> RecordAudit:
            from probescore_audit import audit_record
            from probescore_audit.record import read_record

            return audit_record(read_record(run), probes=probe or (), readings=reading or ())

        def show(found: RecordAudit) -> None:
            from probescore_audit.report import numbers_of, report_page

            if report is not None:
                write_atomically(report, report_page(found).encode())
            if as_json:
                typer.echo(visible_json(json.dumps(numbers_of(found), ensure_ascii=False)))
            else:
                print_audit(new_console(), found)

        if not follow:
            show(audited())
            return
        with interruptible():
            _follow(run, audited, show, interval, _metrics(metrics_port, metrics_host))


def _metrics(port: int | None, host: str) -> Callable[[RecordAudit | None], None]:
    """Serves metrics of audits on a port, and returns what updates them; without a port nothing is updated."""
    if port is None:
        return lambda _: None
    with one_line_failures("http"):
        from probescore_server.cli.audit_metrics import serve_metrics

        metrics, address = serve_metrics(port, host)
    say(f"metrics are at http://{address}/metrics")
    return metrics.update


def _follow(
    run: Path,
    audited: Callable[[], RecordAudit],
    show: Callable[[RecordAudit], None],
    interval: float,
    measured: Callable[[RecordAudit | None], None],
) -> None:
    """Audits a run again whenever its record has grown. What cannot be audited yet is said once for each reason, since the trainer may be
    about to write what is missing.
    """
    before: _Stamps | None = None
    told = ""
    while True:
        now = _stamps(run)
        if now != before:
            before = now
            try:
                found = audited()
            except (ValueError, FileNotFoundError) as error:
                measured(None)
                if str(error) != told:
                    told = str(error)
                    say(f"not yet: {error}")
            else:
                told = ""
                measured(found)
                show(found)
        time.sleep(interval)


def _stamps(run: Path) -> _Stamps:
    """Returns name, size and time of change of each file of a record."""
    stamps = []
    for path in [*run.glob("*.jsonl"), *run.glob("*.jsonl.gz")]:
        try:
            status = path.stat()
        except FileNotFoundError:  # it has just been packed
            continue
        stamps.append((path.name, status.st_size, status.st_mtime_ns))
    return tuple(sorted(stamps))
