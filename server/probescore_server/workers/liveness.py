"""Detects worker processes that are stuck, from the work that each was given, the messages that it sends and its time limits.

A worker process sends a heartbeat at intervals, from a thread of its own, which says at which step it is and which texts it tokenises. It
is stuck if it sends nothing for too long, if its first unanswered batch takes too long without a new step, or if one text takes too long.
Texts count by what the heartbeats say, not by what was requested: a request may have any number of texts, which take turns with those of
others, and may be given up while one of its texts is still tokenised. Every method is given the time: the caller has the clock, and reports
when it was not running itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from probescore_server.activity import ActivityStep, TextBeingTokenised

REASONS_LOST = ("silent", "overdue", "device", "memory", "crash", "start", "died")
"""Names the reasons for which worker processes are lost: ``silent``, it sent nothing; ``overdue``, its work made no progress; ``device``,
its device failed; ``memory``, the system killed it for lack of memory; ``crash``, it crashed; ``start``, it did not start; ``died``,
somebody ended it.
"""


BOOT_SECONDS = 60.0
"""A new process may take at least so many seconds until its first message, since Python starts and imports slowly on a busy machine."""


TEXT_BYTES_PER_SECOND = 10_000
"""A tokenizer is assumed to be at least this fast, in UTF-8 bytes per second, which even a slow tokenizer far exceeds."""


@dataclass(frozen=True)
class WorkerTimeLimits:
    """Holds how many seconds a worker process may take for what it does.

    Attributes:
        silent_seconds: the most seconds between two messages.
        start_seconds: the most seconds from its start until it is ready.
        step_seconds: the most seconds of one step of a batch, beside those for its tokens.
        step_seconds_per_1000_tokens: the seconds that a step may take for every 1000 of its tokens.
        chat_seconds: the most seconds of a chat template to render one chat.
    """

    silent_seconds: float
    start_seconds: float
    step_seconds: float
    step_seconds_per_1000_tokens: float
    chat_seconds: float

    def for_tokens(self, tokens: int) -> float:
        """Returns the most seconds that a step of so many tokens may take."""
        return self.step_seconds + self.step_seconds_per_1000_tokens * tokens / 1000

    def for_texts(self, texts: Iterable[TextBeingTokenised]) -> float:
        """Returns the most seconds that any one of the texts which are tokenised at the same time may take.

        It is the time for all of them: threads run a tokenizer that is written in Python one after the other.
        """
        return self.step_seconds + sum(text.bytes / TEXT_BYTES_PER_SECOND + self.chat_seconds * text.is_chat for text in texts)


@dataclass(frozen=True)
class LossReason:
    """Says why a worker process is lost.

    Attributes:
        reason: one word, of ``REASONS_LOST``; for a process that is stuck: ``silent``, ``overdue`` or ``start``.
        problem: what the process did not do and for how long, or how it ended, as a text for people.
        order: number of the batch or of the request's texts that took too long or was the only work; 0 = any of its work may be the cause.
        doing: name of the step that the process was at; empty if that is not known.
    """

    reason: str
    problem: str
    order: int = 0
    doing: str = ""


class LivenessWatch:
    """Decides whether one worker process is stuck, from what its caller reports of it from its start on.

    All times are in seconds on one monotonic clock.

    Args:
        limits: how long the process may take for what it does.
        now: when the process was started.

    Attributes:
        step: the step that the process reported last.
    """

    def __init__(self, limits: WorkerTimeLimits, now: float) -> None:
        self.step = ActivityStep()
        self._limits = limits
        self._heard = self._began = now
        self._silent_at_first = max(limits.silent_seconds, BOOT_SECONDS)
        self._said_something = False
        self._starting = True
        self._seconds: dict[int, float] = {}  # It holds the limit of each unanswered order, in order.
        self._since = now  # This is when any of these orders last made progress.
        self._texts: list[TextBeingTokenised] = []  # There is one for each tokenising thread.
        self._texts_since: list[float] = []

    def ready(self) -> None:
        """Notes that the worker process has started and is ready for work."""
        self._starting = False

    def heard(self, now: float) -> None:
        """Notes that the worker process sent something at the time ``now``; ``-inf`` means that it has sent nothing yet."""
        if math.isfinite(now):
            self._said_something = True
            self._heard = max(self._heard, now)

    def asked(self, number: int, seconds: float, now: float) -> None:
        """Notes that the worker process was given an order for its device, such as a batch, which may take ``seconds`` once it begins."""
        if not self._seconds:
            self._since = now
        self._seconds[number] = seconds

    def answered(self, number: int, now: float) -> None:
        """Notes that the worker process has answered the order, such as a batch, of this number."""
        if self._seconds.pop(number, None) is not None:
            self._since = now

    def at(self, step: ActivityStep, now: float) -> None:
        """Notes that the worker process reported this step as the one that it computes."""
        if step.number != self.step.number:
            self.step = step
            if step.order in self._seconds:
                self._since = now

    def tokenises(self, texts: Sequence[TextBeingTokenised], now: float) -> None:
        """Notes the texts that the process's tokenising threads work on, one for each thread, always in the same order of threads."""
        known = [*zip(self._texts, self._texts_since, strict=True)] or [(TextBeingTokenised(), now)] * len(texts)
        self._texts_since = [since if text == before else now for text, (before, since) in zip(texts, known, strict=True)]
        self._texts = list(texts)

    def excuse(self, seconds: float) -> None:
        """Extends every running limit by so many seconds, in which the caller itself did not run and cannot say what the process did."""
        self._heard += seconds
        self._began += seconds
        self._since += seconds
        self._texts_since = [since + seconds for since in self._texts_since]

    def loss(self, now: float) -> LossReason | None:
        """Returns the reason if the worker process is stuck at the time ``now`` and must be given up; else ``None``."""
        silent_seconds = self._limits.silent_seconds if self._said_something else self._silent_at_first
        if now - self._heard > silent_seconds:
            return LossReason("silent", f"it sent nothing for {silent_seconds:g} s")
        # From here on only time until its last message counts: a process that is silent is not known to be stuck in any work.
        if self._starting and self._heard - self._began > self._limits.start_seconds:
            return LossReason("start", f"it was not ready within {self._limits.start_seconds:g} s (worker_start_seconds)")
        first = next(iter(self._seconds), 0)
        if first and self._heard - self._since > (seconds := self._seconds_of(first)):
            return LossReason("overdue", f"it made no progress for {seconds:g} s", first)
        for text, since in zip(self._texts, self._texts_since, strict=True):
            if text.order and self._heard - since > (seconds := self._limits.for_texts(self._texts)):
                return LossReason("overdue", f"it made no progress with a text for {seconds:g} s", text.order)
        return None

    def _seconds_of(self, number: int) -> float:
        """Returns the most seconds until the worker process's next answer or step, if its first unanswered order has this number."""
        return self._limits.for_tokens(self.step.tokens) if self.step.order == number else self._seconds[number]
