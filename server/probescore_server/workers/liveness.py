"""Detects worker processes that are stuck, from the work that each was given, the messages that it sends and its time limits.

A worker process sends a heartbeat at intervals, from a separate thread. The heartbeat names the step that the worker computes and the texts
that the worker tokenises. The worker counts as stuck if it sends nothing for too long, if its first unfinished batch takes too long without
a new step, or if one text takes too long. The texts are taken from the heartbeats, not from the requests: a request may have any number of
texts, which are tokenised in turn with those of other requests, and a request may be given up while one of its texts is still being
tokenised. Every method receives the time as an argument: the caller has the clock, and reports periods in which the caller itself was not
running.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from probescore_server.activity import ActivityStep, TextBeingTokenised

REASONS_LOST = ("silent", "overdue", "device", "memory", "crash", "start", "died")
"""Reasons for the death of a worker process: ``silent``, it sent nothing and was killed; ``overdue``, its work made no progress and it was
killed; ``device``, its device failed; ``memory``, the system killed it for lack of memory; ``crash``, it crashed; ``start``, it did not
start; ``died``, somebody ended it.
"""


BOOT_SECONDS = 60.0
"""Number of seconds that a new process may take at least until its first message, since Python starts and imports slowly on a busy
machine.
"""


TEXT_BYTES_PER_SECOND = 10_000
"""Assumed minimum speed of a tokenizer in UTF-8 bytes per second, which even a slow tokenizer far exceeds."""


@dataclass(frozen=True)
class WorkerTimeLimits:
    """Value object with the time limits of a worker process.

    Attributes:
        silent_seconds: the largest number of seconds between two messages.
        start_seconds: the largest number of seconds from the process's start until it is ready.
        step_seconds: the largest number of seconds of one step of a batch (such as one run of a graph), not counting the seconds for its
            tokens.
        step_seconds_per_1000_tokens: the additional seconds that a step may take for every 1000 of its tokens.
        chat_seconds: the largest number of seconds that a chat template may take to render one chat.
    """

    silent_seconds: float
    start_seconds: float
    step_seconds: float
    step_seconds_per_1000_tokens: float
    chat_seconds: float

    def for_tokens(self, tokens: int) -> float:
        """Returns the largest number of seconds that one step of a worker process's work (such as one run of a graph) on ``tokens`` tokens
        may take.
        """
        return self.step_seconds + self.step_seconds_per_1000_tokens * tokens / 1000

    def for_texts(self, texts: Iterable[TextBeingTokenised]) -> float:
        """Returns the largest number of seconds that any one of several texts may take which are tokenised at the same time.

        This is the sum of the times for all of these texts, since threads run a tokenizer that is written in Python one after the other.
        """
        return self.step_seconds + sum(text.bytes / TEXT_BYTES_PER_SECOND + self.chat_seconds * text.is_chat for text in texts)


@dataclass(frozen=True)
class LossReason:
    """Value object that says why a worker process died.

    Attributes:
        reason: one of the words in ``REASONS_LOST``; for a process that was stuck: ``silent``, ``overdue`` or ``start``.
        problem: a text for people that says what the process failed to do and for how long, or how the process ended.
        order: number of the batch, or of the texts of one request, that took too long or was the process's only work; 0 = any of the
            process's work may be the cause.
        doing: name of the step that the process was computing; empty if the step is not known.
    """

    reason: str
    problem: str
    order: int = 0
    doing: str = ""


class LivenessWatch:
    """Detector that decides whether one worker process is stuck, from the events that the caller reports from the process's start on.

    All times are in seconds on one monotonic clock.

    Args:
        limits: the time limits of the process.
        now: the time at which the process was started.

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
        """Records that the worker process has started and is ready for work."""
        self._starting = False

    def heard(self, now: float) -> None:
        """Records that the worker process sent a message at the time ``now``; ``-inf`` means that the process has sent nothing yet."""
        if math.isfinite(now):
            self._said_something = True
            self._heard = max(self._heard, now)

    def asked(self, number: int, seconds: float, now: float) -> None:
        """Records that the worker process was given an order for its device, such as a batch, which may take ``seconds`` seconds once the
        process begins it.
        """
        if not self._seconds:
            self._since = now
        self._seconds[number] = seconds

    def answered(self, number: int, now: float) -> None:
        """Records that the worker process has responded to the order, such as a batch, with the given number."""
        if self._seconds.pop(number, None) is not None:
            self._since = now

    def at(self, step: ActivityStep, now: float) -> None:
        """Records the step (such as one run of a graph) that the worker process has reported as the one that it computes."""
        if step.number != self.step.number:
            self.step = step
            if step.order in self._seconds:
                self._since = now

    def tokenises(self, texts: Sequence[TextBeingTokenised], now: float) -> None:
        """Records which text each thread of the worker process is tokenising, so that a text which takes longer than its limit is noticed.

        Args:
            texts: the text of each thread, by thread; a thread has the same index in every call.
            now: monotonic time in seconds.
        """
        known = [*zip(self._texts, self._texts_since, strict=True)] or [(TextBeingTokenised(), now)] * len(texts)
        self._texts_since = [since if text == before else now for text, (before, since) in zip(texts, known, strict=True)]
        self._texts = list(texts)

    def excuse(self, seconds: float) -> None:
        """Extends every running time limit of the worker process by ``seconds`` seconds, during which the caller itself did not run and
        could not observe the process.
        """
        self._heard += seconds
        self._began += seconds
        self._since += seconds
        self._texts_since = [since + seconds for since in self._texts_since]

    def loss(self, now: float) -> LossReason | None:
        """Returns the reason why the worker process counts as stuck at the time ``now`` and must be killed; ``None`` if it is not stuck."""
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
        """Returns the largest number of seconds that may pass until the worker process's next response or step, if the given number is that
        of its first unfinished order (such as a batch).
        """
        return self._limits.for_tokens(self.step.tokens) if self.step.order == number else self._seconds[number]
