"""Implements ``probescore probes diff``, which shows the fields in which two probe files differ, and whether their graphs are equal."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from probescore_server.cli.common.console import new_console
from probescore_server.cli.common.failures import FAILED, one_line_failures, say
from probescore_server.cli.probe_sources import ProbeSource, read_probe_set
from probescore_server.cli.tables import safe

if TYPE_CHECKING:
    from probescore_server.probes.format.probe_file import ProbeFile

HELP = """
Show what differs between two probe files, or two folders of them, after every check that needs no model.

First whether they compute the same: graphs are compared byte for byte. Then each field of the manifests that differs. Of folders, which
versions only one or the other has; and, for each name that both have, what differs between its highest versions.

[bold]Exit codes[/bold]: 0 if the files could be read, whether they differ or not; 1 if one is refused.
"""

_LONGEST = 60
_MISSING = object()


def register(probes: typer.Typer) -> None:
    """Adds the command ``probes diff`` to the commands under ``probes``."""
    probes.command("diff", help=HELP)(_diff)


def _diff(one: ProbeSource, other: ProbeSource) -> None:
    with one_line_failures():
        sets = [read_probe_set(source) for source in (one, other)]
        for found in sets:
            if not found.probes:
                raise found.refused[0]
        console = new_console()
        if all(len(found.probes) == 1 and not found.refused for found in sets):
            _show_differences(console, *(found.probes[0] for found in sets))
            return
        highest = [{probe.manifest.name: probe for probe in found.probes} for found in sets]  # sorted: the last of a name is its highest
        versions = [{probe.manifest.key: probe for probe in found.probes} for found in sets]
        _show_versions(console, one, other, versions)
        for name in sorted(highest[0].keys() & highest[1].keys()):
            left, right = highest[0][name], highest[1][name]
            if left.manifest != right.manifest:
                console.print()
                console.print(Text(f"{left.manifest.key} and {right.manifest.key}", "bold"))
                _show_differences(console, left, right)
        refused = [refusal for found in sets for refusal in found.refused]
        for refusal in refused:
            say(refusal)
        if refused:
            raise typer.Exit(FAILED)


def _show_versions(console: Console, first: str, second: str, versions: Sequence[Mapping[str, ProbeFile]]) -> None:
    """Shows which versions of probes are in one of two sets alone, or differ though they have one name and version."""
    left, right = versions
    table = _table("probe", first, second)
    for key in [*left, *(key for key in right if key not in left)]:
        there = ["yes" if key in each else "no" for each in versions]
        if key in left and key in right and left[key].manifest != right[key].manifest:
            there = ["yes", "yes, with other content: a version stands for one file"]
        if there != ["yes", "yes"]:
            table.add_row(safe(key), *there)
    if table.row_count:
        console.print(table)
    else:
        console.print(f"[green]=[/green] the same {len(left)} versions of probes")


def _show_differences(console: Console, one: ProbeFile, other: ProbeFile) -> None:
    """Shows whether two probe files have equal graphs, and each field of the manifests that differs."""
    if one.graph == other.graph:
        console.print("[green]=[/green] the graphs are equal, byte for byte")
    else:
        console.print(f"[yellow]≠[/yellow] the graphs differ: {len(one.graph):,} and {len(other.graph):,} bytes")
    left, right = (probe.manifest.model_dump(mode="json", exclude={"graph_sha256", "manifest_sha256"}) for probe in (one, other))
    differing = list(field_differences(left, right))
    if not differing:
        console.print("[green]=[/green] the manifests are equal")
        return
    table = _table("field", one.file, other.file)
    for field, before, after in differing:
        table.add_row(safe(field), safe(_shown(before)), safe(_shown(after)))
    console.print(table)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        table.add_column(safe(column), overflow="fold")
    return table


def field_differences(left: Any, right: Any, field: str = "") -> Iterator[tuple[str, Any, Any]]:  # noqa: ANN401 - values of any JSON type
    """Yields the path and both values of each innermost field in which two JSON values differ; a list of numbers counts as one value."""
    if isinstance(left, dict) and isinstance(right, dict):
        for name in [*left, *(name for name in right if name not in left)]:
            yield from field_differences(left.get(name, _MISSING), right.get(name, _MISSING), f"{field}.{name}" if field else name)
    elif isinstance(left, list) and isinstance(right, list) and any(isinstance(entry, dict) for entry in (*left, *right)):
        for index in range(max(len(left), len(right))):
            before, after = (values[index] if index < len(values) else _MISSING for values in (left, right))
            yield from field_differences(before, after, f"{field}[{index}]")
    elif left != right:
        yield field, left, right


def _shown(value: object) -> str:
    if value is _MISSING:
        return "missing"
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= _LONGEST else shown[: _LONGEST - 1] + "…"
