"""The steps of the demo on the screen: a bar while one runs, a line with its time once it is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn


@contextmanager
def step(console: Console, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Shows a step; what it gives is told how much of ``total`` has been done since the last time."""
    started = time.monotonic()
    columns = [SpinnerColumn(), TextColumn(name), *([BarColumn(), TaskProgressColumn()] if total else []), TimeElapsedColumn()]
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=total)
        yield lambda done: progress.advance(task, done)
    console.print(f"[green]✓[/green] {name} [dim]{time.monotonic() - started:.1f} s[/dim]")
