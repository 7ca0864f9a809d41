"""Holds the one retry loop, for every kind of call and both clients, which decides when a call is tried again. The clock is anybody's to
give.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from probescore.errors import DeadlineExceededError, ProbescoreError, TransientError

Answer = TypeVar("Answer")

logger = logging.getLogger("probescore")
logger.addHandler(logging.NullHandler())  # a library does not write to the terminal of a program that has not asked for logs

_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 5.0
_SHORTEST_PAUSE_SECONDS = 0.001
_DOUBLINGS = 10
_JITTER = 0.25
_LAST_MOMENT_SECONDS = 0.01
"""Is how much must be left of a call's deadline for another attempt: no answer would be in time with less."""


def _now() -> float:
    return time.monotonic()


class Attempts:
    """Keeps account of the attempts of one call, and decides whether there is another.

    Args:
        timeout: seconds for the call, all attempts and pauses included.
        restart_budget: seconds after the first of several transient failures in a row during which another attempt may start. An attempt
            that the server has taken may last until the deadline: what computes is not what waits.
        clock: gives seconds; never goes back.
        uniform: gives numbers in [0, 1).
    """

    def __init__(
        self,
        timeout: float,
        restart_budget: float,
        *,
        clock: Callable[[], float] = _now,
        uniform: Callable[[], float] = random.random,
    ) -> None:
        self._clock = clock
        self._uniform = uniform
        self._timeout = timeout
        self._deadline = clock() + timeout
        self._budget = restart_budget
        self._began = 0.0
        self._failures = 0
        self._last: TransientError | None = None

    def seconds_left(self) -> float:
        """Returns how many seconds the next attempt may take."""
        return max(0.0, self._deadline - self._clock())

    def progressed(self) -> None:
        """Ends a row of failures, since the server has answered something: the next failure has the whole budget again."""
        self._failures = 0
        self._last = None

    def pause(self, error: ProbescoreError) -> float:
        """Returns the seconds to wait before the next attempt: what the server asked for, or else a little more each time; with jitter, so
        that the ranks of a run do not come back all at once. The last attempt starts when the budget ends.

        Raises:
            ProbescoreError: ``error`` if it is not transient; one of its kind that says why there is no further attempt, if the budget is
                spent or the server asks for a longer pause than the budget or the deadline leaves.
            DeadlineExceededError: the other end cancelled the call as its deadline came.
        """
        if isinstance(error, DeadlineExceededError) and self._last is not None:
            raise DeadlineExceededError(f"{error}; the attempt before had failed: {self._last}", error.code, error.reason)
        if not isinstance(error, TransientError):
            raise error
        now = self._clock()
        if self._failures == 0:
            self._began = now
        self._failures += 1
        self._last = error
        in_time, in_budget = self._deadline - now, self._began + self._budget - now
        if error.code == "CANCELLED" and in_time < _FIRST_PAUSE_SECONDS:
            # whoever is at the other end, a proxy for example, ends a call at its deadline too, and may be a moment earlier
            raise DeadlineExceededError(f"the call was ended at its deadline: {error}", "DEADLINE_EXCEEDED", error.reason) from error
        if self._budget == 0:
            raise error
        timeout, budget = f"the call's timeout of {self._timeout:g} s", f"the client's restart_budget of {self._budget:g} s"
        if in_time <= _LAST_MOMENT_SECONDS or in_budget <= 0:
            spent = timeout if in_time <= _LAST_MOMENT_SECONDS else budget
            raise _with_reason(error, f"{self._failures} attempts failed in {now - self._began:.3g} s, and {spent} is spent")
        asked = error.retry_seconds
        if asked is not None and (asked >= in_time or asked > in_budget):
            left, limit = min((in_time, timeout), (in_budget, budget))
            raise _with_reason(error, f"the server asks for a pause of {asked:g} s, and of {limit} {left:.3g} s are left")
        doubled = 1 << min(self._failures - 1, _DOUBLINGS)
        if asked is None:
            seconds = min(_FIRST_PAUSE_SECONDS * doubled, _LONGEST_PAUSE_SECONDS)
        else:  # a server that asks for no pause at all, again and again, is given a little air
            seconds = max(asked, min(_SHORTEST_PAUSE_SECONDS * doubled, _FIRST_PAUSE_SECONDS))
        seconds = min(seconds * (1 + _JITTER * self._uniform()), in_budget)
        if seconds >= in_time:  # the jitter, or a pause of our own choice: the attempt needs time too
            seconds = in_time / 2 if asked is None else (asked + in_time) / 2
        logger.log(
            logging.WARNING if self._failures == 1 else logging.INFO,
            "attempt %d in a row failed with %s: %r; the next one starts in %.3g s",
            self._failures,
            error.code,
            error.message,
            seconds,
        )
        return seconds


def retry(attempt: Callable[[float], Answer], attempts: Attempts, wait: Callable[[float], None]) -> Answer:
    """Calls ``attempt`` with the seconds it may take, until it answers or ``attempts`` says that it is over; ``wait`` is given each pause.

    Raises:
        ProbescoreError: what ``Attempts.pause`` raises.
    """
    while True:
        try:
            return attempt(attempts.seconds_left())
        except ProbescoreError as failed:
            error = failed
        wait(attempts.pause(error))


async def retry_async(
    attempt: Callable[[float], Awaitable[Answer]], attempts: Attempts, wait: Callable[[float], Awaitable[None]]
) -> Answer:
    """Does what ``retry`` does in an event loop: awaits each ``attempt`` and each ``wait``."""
    while True:
        try:
            return await attempt(attempts.seconds_left())
        except ProbescoreError as failed:
            error = failed
        await wait(attempts.pause(error))


def _with_reason(error: TransientError, reason: str) -> TransientError:
    return type(error)(f"{error}; {reason}", error.code, error.reason, error.violations, error.retry_seconds)
