"""Whether a worker gets on: what it was asked, what it says, and how long it may take for either.

A worker says every now and then that it is there, from a thread of its own, at which step it is and which texts it tokenises. It is stuck
if it says nothing for too long, if the batch that it has first takes too long without a step, or if one text does. Texts count by what the
worker says of them, not by what was asked: a request may have any number of them, takes turns with others, and may be given up while one of
its texts is still tokenised. Every time is handed in: whoever watches has the clock, and says so when it was not there itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from probescore_server.activity import ActivityStep, TextBeingTokenised

REASONS_LOST = ("silent", "overdue", "device", "memory", "crash", "start", "died")
"""Why workers are lost: they said nothing, or did not get on; their device failed, the system's memory was short, they crashed; they did
not start; or somebody ended them.
"""


BOOT_SECONDS = 60.0
"""Until a process says something for the first time, at least: Python starts and reads its modules before, on a busy machine for long."""


TEXT_BYTES_PER_SECOND = 10_000
"""Far below what a slow tokenizer does."""


@dataclass(frozen=True)
class WorkerTimeLimits:
    """How long a worker may take, in seconds.

    Attributes:
        silent_seconds: between two signs of life.
        start_seconds: from its start until it is ready.
        step_seconds, step_seconds_per_1000_tokens: for one step of a batch.
        chat_seconds: for a template to render one chat.
    """

    silent_seconds: float
    start_seconds: float
    step_seconds: float
    step_seconds_per_1000_tokens: float
    chat_seconds: float

    def for_tokens(self, tokens: int) -> float:
        """For a step of so many tokens."""
        return self.step_seconds + self.step_seconds_per_1000_tokens * tokens / 1000

    def for_texts(self, texts: Iterable[TextBeingTokenised]) -> float:
        """For any one of the texts that the lanes have: a tokenizer that is written in Python takes them one after the other."""
        return self.step_seconds + sum(text.bytes / TEXT_BYTES_PER_SECOND + self.chat_seconds * text.is_chat for text in texts)


@dataclass(frozen=True)
class LossReason:
    """Why a worker is lost.

    Attributes:
        reason: one word; of a worker that is stuck: ``silent``, ``overdue`` or ``start``.
        problem: what it did not do, for how long, or what became of it.
        order: number of what it was asked for that takes too long, or was all that it had; 0 = it could be any.
        doing: the step that it was at; empty if that is not known.
    """

    reason: str
    problem: str
    order: int = 0
    doing: str = ""


class LivenessWatch:
    """Watches one worker process from its start on.

    Args:
        limits: what it may take.
        now: when it was started.

    Attributes:
        step: the one that it told last.
    """

    def __init__(self, limits: WorkerTimeLimits, now: float) -> None:
        self.step = ActivityStep()
        self._limits = limits
        self._heard = self._began = now
        self._silent_at_first = max(limits.silent_seconds, BOOT_SECONDS)
        self._said_something = False
        self._starting = True
        self._seconds: dict[int, float] = {}  # of what was asked of its device and has no answer, in that order
        self._since = now  # when something of it got on for the last time
        self._texts: list[TextBeingTokenised] = []  # by lane
        self._texts_since: list[float] = []

    def ready(self) -> None:
        """It has started."""
        self._starting = False

    def heard(self, now: float) -> None:
        """It has said something; ``-inf`` = not yet."""
        if math.isfinite(now):
            self._said_something = True
            self._heard = max(self._heard, now)

    def asked(self, number: int, seconds: float, now: float) -> None:
        """It was asked for something on its device that may take so long, once it comes to it."""
        if not self._seconds:
            self._since = now
        self._seconds[number] = seconds

    def answered(self, number: int, now: float) -> None:
        """It has answered."""
        if self._seconds.pop(number, None) is not None:
            self._since = now

    def at(self, step: ActivityStep, now: float) -> None:
        """It is at this step."""
        if step.number != self.step.number:
            self.step = step
            if step.order in self._seconds:
                self._since = now

    def tokenises(self, texts: Sequence[TextBeingTokenised], now: float) -> None:
        """Its lanes have these texts; always in the same order."""
        known = [*zip(self._texts, self._texts_since, strict=True)] or [(TextBeingTokenised(), now)] * len(texts)
        self._texts_since = [since if text == before else now for text, (before, since) in zip(texts, known, strict=True)]
        self._texts = list(texts)

    def excuse(self, seconds: float) -> None:
        """For so long whoever watches was not there, and cannot say what the worker did."""
        self._heard += seconds
        self._began += seconds
        self._since += seconds
        self._texts_since = [since + seconds for since in self._texts_since]

    def loss(self, now: float) -> LossReason | None:
        """What is wrong with it, if anything is."""
        silent_seconds = self._limits.silent_seconds if self._said_something else self._silent_at_first
        if now - self._heard > silent_seconds:
            return LossReason("silent", f"it said nothing for {silent_seconds:g} s")
        # From here on only time counts of which it is known that it was there: one that is silent is no more than that.
        if self._starting and self._heard - self._began > self._limits.start_seconds:
            return LossReason("start", f"it was not ready within {self._limits.start_seconds:g} s (worker_start_seconds)")
        first = next(iter(self._seconds), 0)
        if first and self._heard - self._since > (seconds := self._seconds_of(first)):
            return LossReason("overdue", f"it did not get on for {seconds:g} s", first)
        for text, since in zip(self._texts, self._texts_since, strict=True):
            if text.order and self._heard - since > (seconds := self._limits.for_texts(self._texts)):
                return LossReason("overdue", f"it did not get on with a text for {seconds:g} s", text.order)
        return None

    def _seconds_of(self, number: int) -> float:
        """What it may take until the next answer, or step, if the first that it has on its device has this number."""
        return self._limits.for_tokens(self.step.tokens) if self.step.order == number else self._seconds[number]
