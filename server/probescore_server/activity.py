"""Records the step of work that a worker process computes now, so that the front process can tell a slow worker from a stuck one.

There is one record for the whole process, since a process computes on one device and its computing threads take turns. Once a thread
executes orders, only its steps are recorded: a probe that another thread tries meanwhile must not pass for progress of a batch.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class ActivityStep:
    """Value object that identifies one step of a worker process's work, such as one run of a probe's ONNX graph. A step reports no progress
    while it runs.

    Attributes:
        number: a number that differs for each step.
        order: the number of the order from the front process (a batch, for example) that the step belongs to; 0 before the first order.
        name: the step's name for people, such as ``probe loop@1``.
        tokens: the number of tokens, or of rows of activations, of the step; the step's time limit grows with this number.
    """

    number: int = 0
    order: int = 0
    name: str = ""
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class TextBeingTokenised:
    """Value object that identifies the text that one thread of a worker process tokenises now. The thread reports no progress until the
    text is done.

    Attributes:
        number: a number that differs for each text.
        order: the number of the front process's request that the text belongs to; 0 = the thread has no text now.
        bytes: the size in UTF-8 bytes of the text or, for a chat, of all its messages' roles and contents.
        is_chat: whether the text is a chat, which a template renders before it is tokenised.
    """

    number: int = 0
    order: int = 0
    bytes: int = 0
    is_chat: bool = False


class Activity:
    """Record of the step that a worker process computes now. It numbers the steps as they begin.

    Attributes:
        step: the step that is being computed now or, if none is, the last one.
    """

    def __init__(self) -> None:
        self.step = ActivityStep()
        self._executing: int | None = None  # the thread that executes orders

    def begin_order(self, order: int, tokens: int) -> None:
        """Records that the process starts on an order from the front process, such as a batch, with the given number and number of
        tokens.
        """
        self._executing = threading.get_ident()
        self.step = ActivityStep(self.step.number + 1, order, "", tokens)

    def begin(self, name: str, tokens: int) -> None:
        """Records that a step with the given name and number of tokens begins, and that the previous step is done. The call has no effect
        in another thread than the one that executes orders.
        """
        if self._executing in (None, threading.get_ident()):
            self.step = replace(self.step, number=self.step.number + 1, name=name, tokens=tokens)


ACTIVITY = Activity()
