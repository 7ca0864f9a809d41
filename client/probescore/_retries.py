"""How long a call goes on trying: its deadline, and the budget for waiting out a restart."""

from __future__ import annotations

import random
import time

from probescore.errors import DeadlineExceededError, ProbescoreError, TransientError

_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 5.0
_JITTER = 0.25


class Attempts:
    """The attempts of one call.

    Args:
        timeout: seconds for the call, all attempts and pauses included.
        restart_budget: seconds after the first of several transient failures in a row during which another attempt may start.
    """

    def __init__(self, timeout: float, restart_budget: float) -> None:
        self._deadline = time.monotonic() + timeout
        self._budget = restart_budget
        self._give_up = self._deadline
        self._failures = 0
        self._last: TransientError | None = None

    def seconds_left(self) -> float:
        """What the next attempt may take."""
        return max(0.0, self._deadline - time.monotonic())

    def progressed(self) -> None:
        """Ends a row of failures: the next one has the whole budget again."""
        self._failures = 0
        self._last = None

    def pause(self, error: ProbescoreError) -> float:
        """Seconds to wait before the next attempt: what the server asked for, or else a little more each time; with jitter, so that
        the ranks of a run do not come back all at once.

        Raises:
            ProbescoreError: ``error``, if it is not transient or no attempt could start in time.
            DeadlineExceededError: the other end cancelled the call as its deadline came.
        """
        if isinstance(error, DeadlineExceededError) and self._last is not None:
            raise DeadlineExceededError(f"{error}; the attempt before had failed: {self._last}", error.code, error.reason)
        if not isinstance(error, TransientError):
            raise error
        self._last = error
        now = time.monotonic()
        if self._failures == 0:
            self._give_up = min(now + self._budget, self._deadline)
        asked = error.retry_seconds
        seconds = min(_FIRST_PAUSE_SECONDS * 2**self._failures, _LONGEST_PAUSE_SECONDS) if asked is None else asked
        seconds *= 1 + _JITTER * random.random()  # noqa: S311 - jitter is no secret
        self._failures += 1
        if error.code == "CANCELLED" and self._deadline - now < _FIRST_PAUSE_SECONDS:
            # whoever is at the other end, a proxy for example, ends a call at its deadline too, and may be a moment earlier
            raise DeadlineExceededError(f"the call was ended at its deadline: {error}", "DEADLINE_EXCEEDED", error.reason) from error
        if now + seconds >= self._give_up:
            raise error
        return seconds
