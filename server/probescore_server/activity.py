"""Records the step of work that a worker process computes now, so that the front process (which starts the workers and gives them orders,
such as batches) can tell a slow worker from a stuck one.

There is one record for the whole worker process, since it computes on one device and its computing threads take turns. Once a thread
executes orders, only that thread's steps are recorded: a probe that another thread tries meanwhile must not pass for progress of a batch.
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
        order: the number of the order (a batch, for example) that the step belongs to, sent by the front process, which starts the workers;
            0 before the first order.
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
        order: the number of the request that the text belongs to, sent by the front process, which starts the workers; 0 = the thread has
            no text now.
        bytes: the size in UTF-8 bytes of the text or, for a chat, of all its messages' roles and contents.
        is_chat: whether the text is a chat, which a template renders before it is tokenised.
    """

    number: int = 0
    order: int = 0
    bytes: int = 0
    is_chat: bool = False


class Activity:
    """Record of the step of work (such as one run of a probe's graph) that a worker process computes now; steps are numbered as they begin.

    Attributes:
        step: the step that is being computed now or, if none is, the last one.
    """

    def __init__(self) -> None:
        self.step = ActivityStep()
        self._executing: int | None = None  # the thread that executes orders

    def begin_order(self, order: int, tokens: int) -> None:
        """Records that this worker process starts on an order, such as a batch, with the given number and number of tokens. Orders come
        from the front process, which starts the workers.
        """
        self._executing = threading.get_ident()
        self.step = ActivityStep(self.step.number + 1, order, "", tokens)

    def begin(self, name: str, tokens: int) -> None:
        """Records that a step of a worker process's work, with the given name and number of tokens, begins, and that the previous step is
        done. The call has no effect in another thread than the one that executes orders (batches, for example), if there is one.
        """
        if self._executing in (None, threading.get_ident()):
            self.step = replace(self.step, number=self.step.number + 1, name=name, tokens=tokens)


ACTIVITY = Activity()
