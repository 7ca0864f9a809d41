"""Lets a process that uses gRPC fork safely: before a fork gRPC's threads must be idle.

A fork copies the locks that other threads hold at that moment, and no thread releases these locks in the child process. The child's next
function call into gRPC would wait for ever, or crash, whatever its deadline. gRPC stops its own threads before a fork, with two exceptions:
while another thread is inside a function call of gRPC, and while gRPC cleans up after its last channel, which happens in gRPC's threads
after the channel is closed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

REST_SECONDS = 0.5
"""Longest time in seconds that a fork waits for gRPC's threads to end after a channel was closed. The threads take milliseconds, unless
another channel of the process keeps them running."""

_STEP_SECONDS = 0.001
_QUIET_STEPS = 5
"""Number of checks in a row that must find no thread of gRPC before gRPC counts as idle: a thread that ends may have started another
thread, which has no name yet."""
_THREADS = Path("/proc/self/task")
_NAMES = ("event_engine", "lifeguard", "grpc_", "timer_manager", "default-executo", "resolver-execut")  # cut at 15 characters

_under_way: set[object] = set()
_ended_at = float("-inf")
_forked_under_way = False
_before_fork: list[Callable[[], None]] = []


@contextmanager
def call_under_way() -> Iterator[None]:
    """Context manager that marks the current thread as inside gRPC, from the creation of the channel to the end of the RPC. If the process
    forks meanwhile, gRPC cannot be used in the child process.
    """
    call = object()
    _under_way.add(call)
    try:
        yield
    finally:
        _under_way.discard(call)


def channel_ended() -> None:
    """Tells this module that a gRPC channel was just closed or dropped, so that the next fork waits for gRPC's threads to end."""
    global _ended_at
    _ended_at = time.monotonic()


def before_fork(do: Callable[[], None]) -> None:
    """Registers ``do`` to be called before each fork of the process; the forking thread then waits briefly for gRPC to clean up after the
    channels that ``do`` closed.
    """
    _before_fork.append(do)


def check_usable() -> None:
    """Checks that gRPC can be used in this process without hanging, which a fork at a bad moment prevents.

    Raises:
        RuntimeError: this process was forked while another thread of its parent process was in an RPC.
    """
    if _forked_under_way:
        raise RuntimeError(
            "this process was forked while another thread was in a call to the scoring server, which gRPC does not survive: "
            "start the process by spawn, or fork between calls"
        )


def _prepare() -> None:
    for do in _before_fork:
        do()
    quiet = 0
    while not _under_way and quiet < _QUIET_STEPS and time.monotonic() < _ended_at + REST_SECONDS:
        quiet = 0 if _at_work() else quiet + 1
        time.sleep(_STEP_SECONDS)


def _at_work() -> bool:
    """Returns whether gRPC has running threads; true if the threads of the process cannot be listed."""
    try:
        names = [_name(thread) for thread in _THREADS.iterdir()]
    except OSError:
        return True
    return any(name.startswith(_NAMES) for name in names)


def _name(thread: Path) -> str:
    try:
        return (thread / "comm").read_text()
    except OSError:  # it has ended meanwhile
        return ""


def _in_child() -> None:
    global _forked_under_way
    _forked_under_way = _forked_under_way or bool(_under_way)
    _under_way.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_prepare, after_in_child=_in_child)
