"""Ctrl-C that ends the wait for more, and never the writing of what is there."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer

_EXIT_CODE_OF_A_SIGNAL = 128


class Interrupted(BaseException):
    """A signal asked for an end; ``number`` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Interruption:
    """Raises ``Interrupted`` when a signal comes, or after the piece of work that must not be cut in two."""

    def __init__(self) -> None:
        self._held_back = False
        self._asked = 0

    def ask(self, number: int, frame: FrameType | None = None) -> None:
        """What a signal does."""
        del frame
        if self._asked:
            # asked twice: at once, whatever is being written
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._asked = number
        if not self._held_back:
            raise Interrupted(number)

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """A piece of work that a first signal does not end."""
        before = self._asked
        self._held_back = True
        try:
            yield
        finally:
            self._held_back = False
        if self._asked and not before:
            raise Interrupted(self._asked)


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Takes SIGINT and SIGTERM; a command that they end exits with 128 and their number, as those do that know nothing of signals."""
    interruption = Interruption()
    before = {number: signal.signal(number, interruption.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interruption
    except Interrupted as asked:
        raise typer.Exit(_EXIT_CODE_OF_A_SIGNAL + asked.number) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
