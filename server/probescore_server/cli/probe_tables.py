"""Probes as tables for people: those of a server, and the manifest of one file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.markup import escape
from rich.table import Table

from probescore import Calibration, ProbeInfo
from probescore_server.cli.visible import visible


def safe(text: str) -> str:
    """Text that others wrote, ready to stand between rich's markup."""
    return escape(visible(text))


def facts_table(title: str) -> Table:
    """Names and values under a title, without lines."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def probes_table(probes: Sequence[ProbeInfo]) -> Table:
    """One row a probe."""
    table = Table(
        title="Probes", title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim"
    )
    for column in ("probe", "reads", "gives", "reduction", "threshold"):
        table.add_column(column, overflow="fold")
    if not probes:
        table.add_row("none: the server was started without --probes, and can score nothing")
    for probe in probes:
        table.add_row(
            "\n".join([safe(probe.key), *_notes(probe)]),
            safe(", ".join(map(str, probe.taps))),
            safe(f"{probe.unit.value} per {probe.output_per.value}" + (f": {', '.join(probe.labels)}" if len(probe.labels) > 1 else "")),
            str(probe.default_reduction or "pools by itself"),
            "\n".join(map(_threshold, probe.calibrations)) or "none",
        )
    return table


def _notes(probe: ProbeInfo) -> Iterator[str]:
    if probe.description:
        yield f"[dim]{safe(probe.description)}[/dim]"
    for name in probe.accepted_mismatches:
        yield f"[red]served though {safe(name)} does not match[/red]"


def _threshold(calibration: Calibration) -> str:
    label = f"{calibration.label}: " if calibration.label else ""
    return safe(f"{label}{calibration.threshold:.4g} at {calibration.false_positive_rate:.1%} false positives")
