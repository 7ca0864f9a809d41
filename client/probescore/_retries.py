"""Defines the retry loop that the synchronous and the asynchronous client use for every kind of RPC, and the rule that decides whether an
RPC is tried again. The caller passes in the clock, so that tests can use a clock of their own.
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
_UNTIL_DEADLINE = {"READING_INCOMPLETE"}
"""Reasons of failures after which an RPC is retried until its deadline, since a trainer that writes is waited for, and not a server."""
_LAST_MOMENT_SECONDS = 0.01
"""Seconds that must be left of an RPC's deadline for another attempt; with less time no response would arrive in time."""


def _now() -> float:
    return time.monotonic()


class Attempts:
    """Record of the attempts of one RPC, which decides whether another attempt is made.

    Args:
        timeout: seconds for the RPC, all attempts and pauses included.
        restart_budget: seconds after the first of several transient failures in a row during which another attempt may start. An attempt
            that the server has accepted may last until the deadline, since the budget limits waiting and not computing. For files that are
            being written an RPC waits until the deadline, whatever the budget.
        clock: function that returns seconds and never goes back.
        uniform: function that returns random numbers in [0, 1).
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
        """Returns how many seconds the next attempt of the RPC may take."""
        return max(0.0, self._deadline - self._clock())

    def progressed(self) -> None:
        """Resets an RPC's count of failures in a row, since the server has sent a response: after the next failure the RPC may be retried
        for the whole retry budget again.
        """
        self._failures = 0
        self._last = None

    def pause(self, error: ProbescoreError) -> float:
        """Returns the seconds to wait before the next attempt of an RPC that failed with ``error``: the pause that the server asked for, or
        else a pause that grows with each attempt. Random jitter keeps the ranks of a training run from retrying all at once. The last
        attempt starts when the retry budget ends.

        Raises:
            ProbescoreError: ``error`` itself if ``error`` is not transient. If the budget is spent, or the server asks for a longer pause
                than the budget or the deadline leaves, an error of the same class whose message says why there is no further attempt.
            DeadlineExceededError: the server cancelled the RPC because the RPC's deadline passed.
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
        limit_seconds = self._timeout if error.reason in _UNTIL_DEADLINE else self._budget
        in_time, in_budget = self._deadline - now, self._began + limit_seconds - now
        if error.code == "CANCELLED" and in_time < _FIRST_PAUSE_SECONDS:
            # whoever is at the other end, a proxy for example, ends a call at its deadline too, and may be a moment earlier
            raise DeadlineExceededError(f"the call was ended at its deadline: {error}", "DEADLINE_EXCEEDED", error.reason) from error
        if limit_seconds == 0:
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
    """Calls the function ``attempt``, which makes an RPC, with the seconds that the RPC may take, until ``attempt`` returns a result or the
    record ``attempts`` allows no further attempt. The function ``wait`` is called with the seconds of each pause.

    Raises:
        ProbescoreError: the errors that ``Attempts.pause`` raises.
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
    """Retries an RPC as ``retry`` does, but takes asynchronous functions for an attempt and for a pause, and awaits both."""
    while True:
        try:
            return await attempt(attempts.seconds_left())
        except ProbescoreError as failed:
            error = failed
        await wait(attempts.pause(error))


def _with_reason(error: TransientError, reason: str) -> TransientError:
    return type(error)(f"{error}; {reason}", error.code, error.reason, error.violations, error.retry_seconds)
