"""Lets Ctrl-C end a command's wait for more results, but never the writing of a result that has arrived."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer

_EXIT_CODE_OF_A_SIGNAL = 128


class Interrupted(BaseException):
    """Exception raised when a signal such as Ctrl-C asks the command to end; ``number`` is the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Interruption:
    """Signal handler that raises ``Interrupted`` when a signal arrives, or, if the signal arrives during work that must not be interrupted,
    after that work.
    """

    def __init__(self) -> None:
        self._held_back = False
        self._asked = 0

    @property
    def is_asked(self) -> bool:
        """Returns whether a signal has asked the command to end."""
        return bool(self._asked)

    def ask(self, number: int, frame: FrameType | None = None) -> None:
        """Handles a signal: raises ``Interrupted`` now or after the current work. A second signal ends the process at once."""
        del frame
        if self._asked:
            # at the second signal the process ends at once, even during a write
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._asked = number
        if not self._held_back:
            raise Interrupted(number)

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Context manager around work that a first signal does not interrupt; ``Interrupted`` is raised after the work instead."""
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
    """Context manager that handles SIGINT and SIGTERM. A command that is ended by one of these signals exits with 128 plus the signal's
    number.

    A shell reports the same exit code for a program that does not handle the signal.
    """
    interruption = Interruption()
    before = {number: signal.signal(number, interruption.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interruption
    except Interrupted as asked:
        raise typer.Exit(_EXIT_CODE_OF_A_SIGNAL + asked.number) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
