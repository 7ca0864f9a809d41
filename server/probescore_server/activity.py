"""Records which step of work a worker process computes now, so that a watcher can tell a slow worker from a stuck one.

There is one record for the whole process, as there is one device: threads that compute take turns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class ActivityStep:
    """Describes one step of a worker process's work, such as one call of a probe's graph, which reports no progress while it runs.

    Attributes:
        number: a number that differs for each step.
        order: the number of the batch or other order of the front process that the step belongs to; 0 before the first order.
        name: the step's name for people, such as ``probe loop@1``.
        tokens: the number of tokens, or of rows, of the step, with which the time that it may take grows.
    """

    number: int = 0
    order: int = 0
    name: str = ""
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class TextBeingTokenised:
    """Describes the text that one tokenising thread of a worker process works on now, which reports no progress until it is done.

    Attributes:
        number: a number that differs for each text.
        order: the number of the front process's request that the text belongs to; 0 = the thread has no text now.
        bytes: the size in UTF-8 bytes of the text, or of a chat's roles and contents.
        is_chat: whether the text is a chat, which a template renders before it is tokenised.
    """

    number: int = 0
    order: int = 0
    bytes: int = 0
    is_chat: bool = False


class Activity:
    """Holds the current step of a process's work, and numbers the steps as they begin.

    Attributes:
        step: the step that computes now, or that computed last.
    """

    def __init__(self) -> None:
        self.step = ActivityStep()

    def begin_order(self, order: int, tokens: int) -> None:
        """Records that the process starts on the order of this number, a batch for example, of so many tokens."""
        self.step = ActivityStep(self.step.number + 1, order, "", tokens)

    def begin(self, name: str, tokens: int) -> None:
        """Records that a step of this name and of so many tokens begins, and that the step before it is done."""
        self.step = replace(self.step, number=self.step.number + 1, name=name, tokens=tokens)


ACTIVITY = Activity()
