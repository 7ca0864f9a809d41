"""Whether a worker gets on: what it was asked, what it says, and how long it may take for either.

A worker says every now and then that it is there, from a thread of its own, and at which step it is. It is stuck if it says nothing for too
long, or if what it does first takes too long without a step. Every time is handed in: whoever watches has the clock, and says so when it
was not there itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

from probescore_server.activity import Step

REASONS_LOST = ("silent", "overdue", "device", "memory", "crash", "start", "died")
"""Why workers are lost: they said nothing, or did not get on; their device failed, the system's memory was short, they crashed; they did
not start; or somebody ended them.
"""


BOOT_SECONDS = 60.0
"""Until a process says something for the first time, at least: Python starts and reads its modules before, on a busy machine for long."""


class Line(Enum):
    """What a worker does one after the other; the two go on beside each other."""

    DEVICE = "batches, sleeping and waking"
    TEXTS = "texts"


@dataclass(frozen=True)
class Patience:
    """How long a worker may take, in seconds.

    Attributes:
        silent_seconds: between two signs of life.
        start_seconds: from its start until it is ready.
        step_seconds, step_seconds_per_1000_tokens: for one step of a batch.
    """

    silent_seconds: float
    start_seconds: float
    step_seconds: float
    step_seconds_per_1000_tokens: float

    def for_tokens(self, tokens: int) -> float:
        """For a step of so many tokens."""
        return self.step_seconds + self.step_seconds_per_1000_tokens * tokens / 1000


@dataclass(frozen=True)
class Loss:
    """Why a worker is lost.

    Attributes:
        reason: one word; of a worker that is stuck: ``silent``, ``overdue`` or ``start``.
        problem: what it did not do, for how long, or what became of it.
        order: number of the order that takes too long; 0 = it could be any.
        doing: the step that it was at; empty if that is not known.
    """

    reason: str
    problem: str
    order: int = 0
    doing: str = ""


@dataclass
class _Waiting:
    """Of one line, what was asked and has no answer, with the seconds it may take, and since when nothing of it has got on."""

    seconds: dict[int, float] = field(default_factory=dict)
    since: float = 0.0


class Watch:
    """Watches one worker process from its start on.

    Args:
        patience: what it may take.
        now: when it was started.

    Attributes:
        step: the one that it told last.
    """

    def __init__(self, patience: Patience, now: float) -> None:
        self.step = Step()
        self._patience = patience
        self._heard = self._began = now
        self._silent_at_first = max(patience.silent_seconds, BOOT_SECONDS)
        self._said_something = False
        self._starting = True
        self._lines = {line: _Waiting() for line in Line}

    def ready(self) -> None:
        """It has started."""
        self._starting = False

    def heard(self, now: float) -> None:
        """It has said something; ``-inf`` = not yet."""
        if math.isfinite(now):
            self._said_something = True
            self._heard = max(self._heard, now)

    def asked(self, line: Line, number: int, seconds: float, now: float) -> None:
        """It was asked for something that may take so long, once it comes to it."""
        waiting = self._lines[line]
        if not waiting.seconds:
            waiting.since = now
        waiting.seconds[number] = seconds

    def answered(self, number: int, now: float) -> None:
        """It has answered, or nobody waits for the answer any more and it has one to give."""
        for waiting in self._lines.values():
            if waiting.seconds.pop(number, None) is not None:
                waiting.since = now

    def at(self, step: Step, now: float) -> None:
        """It is at this step."""
        if step.number != self.step.number:
            self.step = step
            if step.order in (waiting := self._lines[Line.DEVICE]).seconds:
                waiting.since = now

    def excuse(self, seconds: float) -> None:
        """For so long whoever watches was not there, and cannot say what the worker did."""
        self._heard += seconds
        self._began += seconds
        for waiting in self._lines.values():
            waiting.since += seconds

    def loss(self, now: float) -> Loss | None:
        """What is wrong with it, if anything is."""
        silent_seconds = self._patience.silent_seconds if self._said_something else self._silent_at_first
        if now - self._heard > silent_seconds:
            return Loss("silent", f"it said nothing for {silent_seconds:g} s")
        # From here on only time counts of which it is known that it was there: one that is silent is no more than that.
        if self._starting and self._heard - self._began > self._patience.start_seconds:
            return Loss("start", f"it was not ready within {self._patience.start_seconds:g} s (worker_start_seconds)")
        for line, waiting in self._lines.items():
            number = next(iter(waiting.seconds), 0)
            if number and self._heard - waiting.since > (seconds := self._seconds_of(line, number)):
                return Loss("overdue", f"it did not get on for {seconds:g} s", number)
        return None

    def _seconds_of(self, line: Line, number: int) -> float:
        """What it may take until the next answer, or step, of a line whose first has this number."""
        seconds = self._lines[line].seconds
        if line is Line.TEXTS:
            return sum(seconds.values())  # they take turns: any may be answered next, when most of all is done
        return self._patience.for_tokens(self.step.tokens) if self.step.order == number else seconds[number]
