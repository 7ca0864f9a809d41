"""Shows the steps of loading a model and its probes on the console."""

from __future__ import annotations

from rich.console import Console

from probescore_server.cli.tables import safe


class CheckSteps:
    """Console output that prints each step of loading a model and its probes once it has passed or failed, with a spinner meanwhile."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status = console.status("")
        self._step = ""

    def begin(self, step: str) -> None:
        """Marks the previous step of loading a model and its probes as passed on the console, and starts to show the next step."""
        self._end("[green]✓[/green]")
        self._step = step
        self._status.update(safe(step))

    def _end(self, mark: str) -> None:
        if self._step:
            self._console.print(f"{mark} {safe(self._step)}")

    def __enter__(self) -> CheckSteps:
        self._status.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._status.stop()
        self._end("[green]✓[/green]" if kind is None else "[red]✗[/red]")
