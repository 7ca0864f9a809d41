"""Interrupts Python code that takes too long.

This is needed for chat templates: such a template is a program by the model's author that runs on a client's messages.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class TimeLimitExceeded(BaseException):
    """Exception raised inside a block bounded by ``time_limit``, at any instruction, once the time is over. ``except Exception`` in the
    block does not catch it.
    """


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Context manager that ends a block of pure Python code by raising ``TimeLimitExceeded`` in the block once ``seconds`` have passed.

    Only the calling thread is interrupted, between two instructions of Python. A single long call of a C function is not interrupted.
    """
    over = threading.Lock()  # taken once the block has ended: then it is too late to raise
    raised = threading.Event()
    thread = ctypes.c_ulong(threading.get_ident())

    def end() -> None:
        if over.acquire(blocking=False):
            _raise_in(thread)
            raised.set()

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    arrived = False
    try:
        yield
    except TimeLimitExceeded:
        arrived = True
        raise
    finally:
        timer.cancel()
        if not arrived and not over.acquire(blocking=False):
            _await_interruption(thread, raised)


def _raise_in(thread: ctypes.c_ulong) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(TimeLimitExceeded))


def _await_interruption(thread: ctypes.c_ulong, raised: threading.Event) -> None:
    """Waits for the exception with which ``time_limit`` interrupts a block. It is for a block that has ended while the exception is still
    pending, or that has caught the exception.

    Python could otherwise raise a pending exception later, in unrelated code. A pending exception cannot be withdrawn: Python 3.11 would
    then look for the exception for ever, in the next function that a debugger or a coverage tool traces. So the exception is requested
    again, which replaces a pending one, and awaited.
    """
    try:
        raised.wait()
        _raise_in(thread)
        while True:
            pass
    except TimeLimitExceeded:
        pass
