"""Ends Python code that takes too long. A chat template is a program by the model's author that runs on a client's messages."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class TimeLimitExceeded(BaseException):
    """Raised inside a block that ``time_limit`` bounds, wherever it is when the time is over. Handlers of ordinary errors there do not
    catch it.
    """


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Ends a block of pure Python code by raising ``TimeLimitExceeded`` in it once ``seconds`` have passed.

    Only the calling thread is interrupted, between two instructions of Python: a single long call of a C function is not interrupted.
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
    """Waits for the exception with which ``time_limit`` interrupts a block, if the block caught it or it has not arrived yet.

    Otherwise it could arrive later, in unrelated code. It cannot be withdrawn: Python 3.11 would go on looking for it, for ever in the next
    function where a debugger or a coverage tool traces the thread. So it is raised again, which replaces one that has not arrived, and is
    waited for.
    """
    try:
        raised.wait()
        _raise_in(thread)
        while True:
            pass
    except TimeLimitExceeded:
        pass
