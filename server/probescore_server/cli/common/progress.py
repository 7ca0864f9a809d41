"""How far a long command is, on stderr: a bar on a terminal, else a line now and then."""

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
"""Between two lines of progress; what ends sooner says nothing."""


class ScoringProgress:
    """Progress in rollouts; a context manager, at whose end the bar is gone.

    Args:
        total: rollouts there are.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._told = time.monotonic()
        console = new_console(stderr=True)
        columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), bars.MofNCompleteColumn(), bars.TimeRemainingColumn())
        # what is printed meanwhile is a result: it belongs on stdout, not above the bar
        self._bar = bars.Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal, redirect_stdout=False, redirect_stderr=False
        )
        self._task = self._bar.add_task("scoring", total=total)

    def advance(self) -> None:
        """One more is done."""
        self._done += 1
        self._bar.advance(self._task)
        if self._bar.disable and time.monotonic() >= self._told + LINE_SECONDS:
            self._told = time.monotonic()
            say(f"scored {self._done} of {self._total} rollouts")

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Results are printed here, on the terminal that has the bar."""
        if self._bar.disable or not sys.stdout.isatty():
            yield
            return
        self._bar.stop()
        try:
            yield
        finally:
            self._bar.start()

    def __enter__(self) -> ScoringProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()
