"""Provides the consoles on which all commands print; no escape sequence in text from outside reaches the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from probescore_server.cli.common.visible import spelt_out


class _SpellingConsole(Console):
    """Spells out control characters wherever text in a table or a line contains them; rich's own control sequences are left as they are."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yields the segments of a renderable, with the control characters in their texts spelt out."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=spelt_out(segment.text))


def new_console(*, stderr: bool = False) -> Console:
    """Returns a console on standard output, or on standard error if ``stderr`` is true."""
    return _SpellingConsole(stderr=stderr, highlight=False)
