"""Implements ``probescore probes diff``, which shows the fields in which two probe files differ, and whether their graphs are equal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.table import Table

from probescore_server.cli.common.console import new_console
from probescore_server.cli.common.failures import one_line_failures
from probescore_server.cli.tables import safe

HELP = """
Show what differs between two probe files, after every check that needs no model.

First whether they compute the same: graphs are compared byte for byte. Then each field of the manifests that differs.

[bold]Exit codes[/bold]: 0 if the files could be read, whether they differ or not; 1 if one is refused.
"""

_LONGEST = 60
_MISSING = object()


def register(probes: typer.Typer) -> None:
    """Adds the command ``probes diff`` to the commands under ``probes``."""
    probes.command("diff", help=HELP)(_diff)


def _diff(
    first: Annotated[str, typer.Argument(help="A probe file.", show_default=False)],
    second: Annotated[str, typer.Argument(help="Another probe file.", show_default=False)],
) -> None:
    with one_line_failures():
        from probescore_server.probes.format.probe_file import read_probe_file

        one, other = read_probe_file(first), read_probe_file(second)
        console = new_console()
        if one.graph == other.graph:
            console.print("[green]=[/green] the graphs are equal, byte for byte")
        else:
            console.print(f"[yellow]≠[/yellow] the graphs differ: {len(one.graph):,} and {len(other.graph):,} bytes")
        left, right = (probe.manifest.model_dump(mode="json", exclude={"graph_sha256", "manifest_sha256"}) for probe in (one, other))
        differing = list(field_differences(left, right))
        if not differing:
            console.print("[green]=[/green] the manifests are equal")
            return
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for column in ("field", safe(first), safe(second)):
            table.add_column(column, overflow="fold")
        for field, before, after in differing:
            table.add_row(safe(field), safe(_shown(before)), safe(_shown(after)))
        console.print(table)


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
