"""Provides the consoles on which all commands print; no escape sequence in a token, an id or a probe file reaches the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from probescore_server.cli.common.visible import spelt_out


class _SpellingConsole(Console):
    """Console that replaces control characters in the text of a table or a line by their code points, such as ``⟨1B⟩``; rich's own control
    sequences are left as they are.
    """

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yields the text segments of a renderable object of rich, with control characters replaced by their code points."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=spelt_out(segment.text))


def new_console(*, stderr: bool = False) -> Console:
    """Returns a rich console on standard output, or on standard error if ``stderr`` is true."""
    return _SpellingConsole(stderr=stderr, highlight=False)
