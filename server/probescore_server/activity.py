"""What this process computes now, step by step, for whoever watches that it gets on.

There is one for the whole process, as there is one device: threads that compute take turns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class ActivityStep:
    """A piece of work that cannot be looked into while it lasts.

    Attributes:
        number: another one for each step.
        order: number of what the front process asked for; 0 = nothing yet.
        name: for people: ``probe loop@1``.
        tokens: or rows, for which its time may grow.
    """

    number: int = 0
    order: int = 0
    name: str = ""
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class TextBeingTokenised:
    """The text that a lane of texts tokenises now; it cannot be looked into either.

    Attributes:
        number: another one for each text.
        order: number of the front process's request that it is of; 0 = there is no text now.
        bytes: of the text, or of a chat's roles and contents.
        is_chat: a template renders it first.
    """

    number: int = 0
    order: int = 0
    bytes: int = 0
    is_chat: bool = False


class Activity:
    """The steps of a process, one after the other.

    Attributes:
        step: the one that computes, or computed last.
    """

    def __init__(self) -> None:
        self.step = ActivityStep()

    def begin_order(self, order: int, tokens: int) -> None:
        """What follows belongs to this order."""
        self.step = ActivityStep(self.step.number + 1, order, "", tokens)

    def begin(self, name: str, tokens: int) -> None:
        """A step begins; the one before is done."""
        self.step = replace(self.step, number=self.step.number + 1, name=name, tokens=tokens)


ACTIVITY = Activity()
