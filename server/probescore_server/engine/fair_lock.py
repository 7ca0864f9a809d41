"""Defines a lock that threads get in the order in which they asked for it."""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType


class FairLock:
    """Lock, used in a ``with`` statement, that waiting threads get in the order in which they began to wait.

    With ``threading.Lock``, a thread that computes one batch after the other takes the lock again before a waiting thread has woken up, and
    another thread could wait for as long as there are batches.
    """

    def __init__(self) -> None:
        self._changing = threading.Lock()
        self._held = False
        self._waiting: deque[threading.Event] = deque()

    def __enter__(self) -> None:
        with self._changing:
            if not self._held:
                self._held = True
                return
            turn = threading.Event()
            self._waiting.append(turn)
        turn.wait()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._changing:
            if self._waiting:
                self._waiting.popleft().set()  # It stays held, by the thread that is woken.
            else:
                self._held = False
