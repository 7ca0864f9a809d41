"""Lets a process fork though it uses gRPC, of which only what is at rest survives a fork.

A fork copies the locks that other threads hold at that moment, and nobody lets go of them in the child: its next call into gRPC would wait
for ever, or crash, whatever its deadline. gRPC lets its own threads rest before a fork, except while somebody else's thread is inside a
call, and except while what is left of its last channel is being put away, which it does in threads of its own after the channel is closed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

REST_SECONDS = 0.5
"""Is how long at most a fork waits, after a channel has ended, for gRPC's threads to end. They take milliseconds, unless another of the
process's channels keeps them."""

_STEP_SECONDS = 0.001
_QUIET_STEPS = 5
"""Is how often in a row no thread of gRPC must be seen before it counts as at rest: one that ends may have started another, still without
its name."""
_THREADS = Path("/proc/self/task")
_NAMES = ("event_engine", "lifeguard", "grpc_", "timer_manager", "default-executo", "resolver-execut")  # cut at 15 characters

_under_way: set[object] = set()
_ended_at = float("-inf")
_forked_under_way = False
_before_fork: list[Callable[[], None]] = []


@contextmanager
def call_under_way() -> Iterator[None]:
    """Marks a thread as inside gRPC, from making the channel to the end of the call: a fork meanwhile makes the child unusable."""
    call = object()
    _under_way.add(call)
    try:
        yield
    finally:
        _under_way.discard(call)


def channel_ended() -> None:
    """Tells this module that a channel was just closed or let go of, so that the next fork waits for gRPC's threads to end."""
    global _ended_at
    _ended_at = time.monotonic()


def before_fork(do: Callable[[], None]) -> None:
    """Has ``do`` called before each fork, and makes the forking thread wait afterwards for the end of what that closed."""
    _before_fork.append(do)


def check_usable() -> None:
    """Refuses to use gRPC in a process in which it would hang.

    Raises:
        RuntimeError: this process was forked while another thread of its parent was in a call.
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
    """Returns whether gRPC has threads. Where they cannot be seen, it is taken to have some."""
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
