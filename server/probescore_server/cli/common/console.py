"""The consoles of all commands: whatever is printed on them, no escape sequence of somebody else's reaches the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from probescore_server.cli.common.visible import spelt_out


class _SpellingConsole(Console):
    """Spells out control characters in texts, wherever in a table or a line these stand; what rich itself sends is left as it is."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Segments of a renderable, with visible texts."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=spelt_out(segment.text))


def new_console(*, stderr: bool = False) -> Console:
    """A console on standard output, or on standard error."""
    return _SpellingConsole(stderr=stderr, highlight=False)
