"""Shows the progress of a long command on standard error: as a bar on a terminal, and otherwise as a line from time to time."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich import progress as bars

from probescore_server.cli.common.console import new_console
from probescore_server.cli.common.failures import say

LINE_SECONDS = 5.0
"""Seconds between two lines of progress; a command that ends sooner prints no line."""


class RolloutProgress:
    """Context manager that shows how many rollouts a command has processed; the bar is removed at its end.

    Args:
        total: number of rollouts.
        doing: word for what is done, shown beside the bar.
        done: word for what has been done, in the lines that stand in for a bar.
    """

    def __init__(self, total: int, doing: str = "scoring", done: str = "scored") -> None:
        self._total = total
        self._what = done
        self._done = 0
        self._told = time.monotonic()
        console = new_console(stderr=True)
        columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), bars.MofNCompleteColumn(), bars.TimeRemainingColumn())
        # output during progress is a result: it belongs on stdout, not above the bar
        self._bar = bars.Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal, redirect_stdout=False, redirect_stderr=False
        )
        self._task = self._bar.add_task(doing, total=total)

    def advance(self, count: int = 1) -> None:
        """Counts further rollouts as done and updates the progress bar; without a bar, prints a line if some seconds have passed since the
        last line.
        """
        self._done += count
        self._bar.advance(self._task, count)
        if self._bar.disable and time.monotonic() >= self._told + LINE_SECONDS:
            self._told = time.monotonic()
            say(f"{self._what} {self._done} of {self._total} rollouts")

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Context manager that hides the progress bar while results are printed, if the results go to the same terminal."""
        if self._bar.disable or not sys.stdout.isatty():
            yield
            return
        self._bar.stop()
        try:
            yield
        finally:
            self._bar.start()

    def __enter__(self) -> RolloutProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()
