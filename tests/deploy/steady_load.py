"""Calls that never pause, through one client, while a test does something to the servers."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from types import TracebackType

import numpy as np

from probescore import ProbeClient, ProbescoreError, RolloutGroup

CALLERS = 4
# Batches differ in what they compute together, and so in rounding.
TOLERANCE = 1e-4
STOP_SECONDS = 300.0


class SteadyLoad:
    """Callers that score the same groups again and again from the start of a ``with`` block to its end.

    Args:
        client: shared by all callers.
        groups: what each call asks for.
        probe: the probe whose values are compared with those of the first answer.

    Attributes:
        answered: calls that were answered.
        failures: what went wrong with calls, each in words: that they failed, or that their values differ from the first answer's.
    """

    def __init__(self, client: ProbeClient, groups: Sequence[RolloutGroup], probe: str) -> None:
        self._client = client
        self._groups = groups
        self._probe = probe
        self._expected = client.score(groups).values(probe)
        self._stopping = threading.Event()
        self._callers = [threading.Thread(target=self._call_until_stopped, daemon=True) for _ in range(CALLERS)]
        self._lock = threading.Lock()
        self.answered = 0
        self.failures: list[str] = []

    def __enter__(self) -> SteadyLoad:
        for caller in self._callers:
            caller.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopping.set()
        for caller in self._callers:
            caller.join(STOP_SECONDS)
        assert not any(caller.is_alive() for caller in self._callers), "a call never came back"

    def wait_for_answers(self, count: int, seconds: float = 60.0) -> None:
        """Waits until so many more calls have been answered."""
        wanted, end = self.answered + count, time.monotonic() + seconds
        while self.answered < wanted:
            assert time.monotonic() < end, f"fewer than {count} calls were answered in {seconds} s; failures: {self.failures[:3]}"
            time.sleep(0.02)

    def _call_until_stopped(self) -> None:
        while not self._stopping.is_set():
            try:
                values = self._client.score(self._groups).values(self._probe)
            except ProbescoreError as failed:
                problem = f"{type(failed).__name__}: {failed}"
            else:
                problem = "" if np.allclose(values, self._expected, rtol=0, atol=TOLERANCE) else f"{values} instead of {self._expected}"
            with self._lock:
                if problem:
                    self.failures.append(problem)
                else:
                    self.answered += 1
