"""Defines ``ChatJudge``, which asks a language model for verdicts on rollouts: several at a time, at a limited rate, again where a failure
may pass, and within a budget.
"""

from __future__ import annotations

import copy
import json
import math
import random
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Union

from probescore_adapters.judges.endpoint import API_KEY_VARIABLE, ChatEndpoint, EndpointError, Remedy
from probescore_adapters.judges.pacing import RequestPace
from probescore_adapters.judges.questions import JudgeAnswer, JudgeError, JudgeFailure, JudgePrompt, JudgeQuestion, verdict_in

_FIRST_BACKOFF, _LONGEST_BACKOFF = 0.5, 30.0
"""Seconds before the second attempt, and before any."""
_FAILURES_IN_A_ROW = 8
"""Number of questions, one after the other, without a verdict, after which the judge is no longer asked; more if more are asked at once."""
_OURS = {"model", "messages", "stream", "n"}
_LONGEST_PAUSE = 600.0
"""Seconds that an endpoint may ask to wait, at most; one that asks for more is not asked any more."""

Judged = Union[JudgeAnswer, JudgeFailure]


class ChatJudge:
    """Judge of rollouts: a language model behind an endpoint that speaks OpenAI's chat protocol, with a prompt.

    It can be pickled, and used from several threads, which then share its rate. The key is read from the environment when a request is
    sent; it is neither kept, nor logged, nor pickled.

    Args:
        endpoint: address up to the version, such as ``http://localhost:8000/v1``.
        model: name of the model.
        prompt: what the judge is told.
        api_key_variable: environment variable with the endpoint's key; without it no key is sent.
        concurrency: most requests under way at once.
        requests_per_minute: most requests a minute; ``None`` = no limit.
        timeout: seconds after which a request has failed.
        attempts: most requests for one verdict.
        parameters: further fields of the requests, such as ``{"temperature": 0}``.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        endpoint: str,
        model: str,
        prompt: JudgePrompt,
        *,
        api_key_variable: str = API_KEY_VARIABLE,
        concurrency: int = 8,
        requests_per_minute: float | None = None,
        timeout: float = 60.0,
        attempts: int = 5,
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(model, str) or not model:
            raise ValueError(f"model: {model!r}; give the name of a model that the endpoint has")
        for name, number, most in (("concurrency", concurrency, 256), ("attempts", attempts, 100)):
            if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= most:
                raise ValueError(f"{name}: {number!r}; give a whole number from 1 to {most}")
        for name, value in (("timeout", timeout), ("requests_per_minute", requests_per_minute)):
            if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: {value!r}; give a number above 0")
        self.endpoint = ChatEndpoint(endpoint, api_key_variable)
        self.model = model
        self.prompt = prompt
        self.concurrency = concurrency
        self.timeout = timeout
        self.attempts = attempts
        self.parameters = _checked_parameters(parameters or {})
        self._pace = RequestPace(requests_per_minute)

    def with_other(self, *, model: str = "", prompt: JudgePrompt | None = None) -> ChatJudge:
        """Returns a judge with another model or prompt behind the same endpoint, which shares this judge's rate of requests."""
        other = copy.copy(self)
        other.model, other.prompt = model or self.model, prompt or self.prompt
        return other

    def version_of(self, answer: JudgeAnswer) -> str:
        """Returns the version that is recorded with a verdict: that of the prompt, and the model that answered if the endpoint names
        another than was asked for.
        """
        return self.prompt.version if answer.model in ("", self.model) else f"{self.prompt.version} as {answer.model}"

    @property
    def requests_sent(self) -> int:
        """Returns the number of requests that this judge, and those that share its rate, have sent so far."""
        return self._pace.taken

    def __repr__(self) -> str:
        return f"ChatJudge({self.model!r}, prompt {self.prompt.version})"

    def ask(self, waiting: deque[JudgeQuestion], *, requests: int | None = None, seconds: float | None = None) -> Iterator[Judged]:
        """Asks for a verdict on each of some rollouts, and yields answers as they come, in no order.

        Args:
            waiting: the questions, taken from the left; questions may be added, or all be removed, between two answers. Those that were
                not asked to the end, since the budget is spent, the time is over, or the judge cannot be asked, are there afterwards.
            requests: most requests to send, those that fail included; ``None`` = no limit.
            seconds: time after which no answer is waited for; ``None`` = no limit.

        Raises:
            JudgeError: the judge cannot be asked, or has given no verdict on many rollouts in a row. What had been answered was yielded.
        """
        asking = _Asking(requests, seconds)
        failed_in_a_row = 0
        with ThreadPoolExecutor(self.concurrency, "judge") as pool:
            running: dict[Future[Judged | None], JudgeQuestion] = {}
            try:
                while True:
                    while waiting and len(running) < self.concurrency and not asking.is_over:
                        question = waiting.popleft()
                        running[pool.submit(self._judged, question, asking)] = question
                    if not running:
                        break
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        question, judged = running.pop(future), future.result()
                        if judged is None:
                            waiting.appendleft(question)
                            continue
                        failed_in_a_row = 0 if isinstance(judged, JudgeAnswer) else failed_in_a_row + 1
                        if isinstance(judged, JudgeFailure) and failed_in_a_row >= max(_FAILURES_IN_A_ROW, self.concurrency):
                            asking.end(f"{failed_in_a_row} rollouts in a row had no verdict; the last: {judged.reason}")
                        yield judged
            finally:
                asking.end("")
        if asking.problem:
            raise JudgeError(asking.problem)

    def _judged(self, question: JudgeQuestion, asking: _Asking) -> Judged | None:
        """Asks for one verdict, again where a failure may pass; returns ``None`` if no more requests may be sent before there is one."""
        body = {
            **self.parameters,
            "model": self.model,
            "messages": [{"role": "user", "content": self.prompt.about(question.prompt, question.completion)}],
        }
        reason = ""
        for attempt in range(self.attempts):
            if not self._may_send(asking):
                return None
            try:
                reply = self.endpoint.complete(body, asking.within(self.timeout))
            except EndpointError as error:
                reason = str(error)
                if error.remedy is Remedy.STOP:
                    asking.end(reason)
                    return None
                if error.remedy is Remedy.SKIP:
                    return JudgeFailure(question, reason)
                if error.wait_seconds > _LONGEST_PAUSE:
                    asking.end(f"the endpoint asks to wait {error.wait_seconds:.0f} seconds ({reason})")
                self._pace.pause(min(error.wait_seconds, _LONGEST_PAUSE))
            else:
                verdict = verdict_in(reply.text) if reply.finished else None
                if verdict is not None:
                    return JudgeAnswer(question, verdict, reply.text, reply.model)
                reason = "the judge's answer ends with no verdict" if reply.finished else "the judge's answer was cut off"
            if attempt + 1 < self.attempts:
                asking.rest(min(_LONGEST_BACKOFF, _FIRST_BACKOFF * 2**attempt) * random.uniform(0.5, 1))  # noqa: S311 - spreads requests
        return JudgeFailure(question, f"{reason}, after {self.attempts} attempts")

    def _may_send(self, asking: _Asking) -> bool:
        """Waits until a request may be sent; returns false if none may be sent any more."""
        while True:
            at = self._pace.turn()
            if not asking.lasts_until(at) or not asking.rest(at - time.monotonic()):
                return False
            if self._pace.paused_until <= time.monotonic():  # else the endpoint has asked for a pause meanwhile
                return asking.take() and self._pace.count()


class _Asking:
    """State of one call of ``ChatJudge.ask`` that its threads share: the budget, the time that is left, and whether it is over."""

    def __init__(self, requests: int | None, seconds: float | None) -> None:
        self._left = requests
        self._until = math.inf if seconds is None else time.monotonic() + seconds
        self._lock = threading.Lock()
        self._over = threading.Event()
        self.problem = ""

    @property
    def is_over(self) -> bool:
        """Returns whether no further question is asked."""
        return self._over.is_set()

    def end(self, problem: str) -> None:
        """Lets no further request be sent; the first problem is kept."""
        with self._lock:
            self.problem = self.problem or problem
            self._over.set()

    def take(self) -> bool:
        """Takes one request from the budget; returns false if there is none left, or no more may be sent."""
        with self._lock:
            if self._over.is_set():
                return False
            if self._left is None:
                return True
            self._left -= 1
            if self._left < 0:
                self._over.set()
            return self._left >= 0

    def lasts_until(self, at: float) -> bool:
        """Returns whether there is time until a given moment; if not, no further question is asked."""
        if at >= self._until:
            self._over.set()
        return at < self._until

    def within(self, seconds: float) -> float:
        """Returns the seconds that a request may take."""
        return max(0.01, min(seconds, self._until - time.monotonic()))

    def rest(self, seconds: float) -> bool:
        """Waits for some seconds, or until no further request may be sent; returns whether one may be."""
        return not self._over.wait(max(0.0, min(seconds, self._until - time.monotonic())))


def _checked_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(parameters, Mapping) or not all(isinstance(name, str) for name in parameters):
        raise ValueError(f"parameters: {parameters!r:.80}; give fields of a request by name")
    for name in sorted(_OURS & set(parameters)):
        raise ValueError(f"parameters: {name} cannot be set here")
    try:
        json.dumps(dict(parameters), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"parameters: {error}; give what JSON can write") from None
    return dict(parameters)
