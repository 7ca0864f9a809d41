"""Ends Python code that takes too long: a chat template is a program of the model's author, run on a client's messages."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class TookTooLong(Exception):
    """Raised inside the block that a ``time_limit`` bounds, wherever it is."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Ends a block of pure Python by raising ``TookTooLong`` in it.

    Only this thread is interrupted, between two instructions of Python: a single long call of a C function is not.
    """
    over = threading.Lock()  # held once the block has ended: then it is too late to raise
    thread = threading.get_ident()

    def end() -> None:
        if over.acquire(blocking=False):
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(TookTooLong))

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
            while True:  # it is on its way, and must not arrive later, in what is none of its business
                time.sleep(0)
