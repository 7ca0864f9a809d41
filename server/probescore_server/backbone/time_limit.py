"""Ends Python code that takes too long: a chat template is a program of the model's author, run on a client's messages."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class TookTooLong(BaseException):
    """Raised inside the block that a ``time_limit`` bounds, wherever it is. No handler of ordinary errors there keeps it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Ends a block of pure Python by raising ``TookTooLong`` in it.

    Only this thread is interrupted, between two instructions of Python: a single long call of a C function is not.
    """
    over = threading.Lock()  # held once the block has ended: then it is too late to raise
    raised = threading.Event()
    thread = ctypes.c_ulong(threading.get_ident())

    def end() -> None:
        if over.acquire(blocking=False):
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(TookTooLong))
            raised.set()

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    arrived = False
    try:
        yield
    except TookTooLong:
        arrived = True
        raise
    finally:
        timer.cancel()
        if not arrived and not over.acquire(blocking=False):
            raised.wait()
            # where the block kept it, or it has not arrived yet: it must not arrive later, in what is none of its business
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, None)
