"""``ProbeScorer``: signals, a server, and what happens when it fails. What every adapter is made of."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Union

import numpy as np
from numpy.typing import ArrayLike

from probescore import AsyncProbeClient, ProbeClient, ProbescoreError, ScoreOptions, ServerError, StreamedCompletion, TransientError
from probescore.errors import DeadlineExceededError
from probescore_adapters.errors import SignalError
from probescore_adapters.guard_rails import GuardRails
from probescore_adapters.job import job_from_environment
from probescore_adapters.logs import logger
from probescore_adapters.outcome import PREFIX, OnUnscorable, Outcome, combine, substitute
from probescore_adapters.readings import Ask, Readings, Server, read
from probescore_adapters.rollouts import Prompt, Rollout
from probescore_adapters.signals import BoundSignal, Mode, ProbeSignal

OnFailure = Union[Literal["raise", "wait"], float]

_TRANSPORT = (TransientError, DeadlineExceededError, ServerError)


class AskServer:
    """What runs there? Answered with ``Server``."""


Answer = Union[Server, list[StreamedCompletion]]
Steps = Generator[Union[Ask, AskServer], Any, Outcome]


@dataclass(frozen=True)
class Policy:
    """What happens when something fails.

    Attributes:
        on_failure: of transport: no server, an overloaded one, a deadline. ``"raise"``; ``"wait"``, for up to ``wait_seconds``, and then
            raise; or the term that each rollout gets instead. There is no default number: 0 would mean "did not cheat".
        on_unscorable: of content: a rollout that is too long, or whose scores are NaN. ``"worst"``, ``"raise"``, or the term that it gets.
        timeout: seconds for a call, the client's own retries of a server that is overloaded or restarts included.
        wait_seconds: how long ``"wait"`` waits.

    Raises:
        ValueError: a field is none of these.
    """

    on_failure: OnFailure = "raise"
    on_unscorable: OnUnscorable = "worst"
    timeout: float = 300.0
    wait_seconds: float = 3600.0

    def __post_init__(self) -> None:
        for field, words in (("on_failure", ("raise", "wait")), ("on_unscorable", ("worst", "raise"))):
            value = getattr(self, field)
            if value not in words and not _is_number(value):
                raise ValueError(f"{field}: expected {', '.join(map(repr, words))} or a finite number, got {value!r}")
        for field in ("timeout", "wait_seconds"):
            if not _is_number(getattr(self, field)) or getattr(self, field) <= 0:
                raise ValueError(f"{field}: expected seconds above 0, got {getattr(self, field)!r}")

    @property
    def patience(self) -> float:
        """Seconds after which a call has failed."""
        return self.wait_seconds if self.on_failure == "wait" else self.timeout


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class ProbeScorer:
    """Scores batches of rollouts with signals that share one call.

    It can be made before a server runs, pickled, used after a fork, in Ray's workers, and from several threads and event loops:
    connections are made when they are first needed. What runs at the address is asked once; another model or another version of a probe is
    an error from then on, never another reading.

    Args:
        signals: at least one; names differ.
        address: of the server, as for ``ProbeClient``.
        policy: what happens when something fails.
        rails: the guard rails.
        job: names the run, so that its ranks count as one at the server; by default what the launcher calls it.
        run_id: names the run in the server's logs.
        tokenizer_fingerprint: ``probescore.tokenizer_fingerprint(tokenizer)`` of the policy's: the server refuses if its own is another.
        metadata: sent with every call.

    Raises:
        SignalError: there is no signal, or two have one name.
    """

    def __init__(
        self,
        signals: ProbeSignal | Sequence[ProbeSignal],
        address: str | Sequence[str] = "localhost:50051",
        *,
        policy: Policy | None = None,
        rails: GuardRails | None = None,
        job: str = "",
        run_id: str = "",
        tokenizer_fingerprint: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.signals = (signals,) if isinstance(signals, ProbeSignal) else tuple(signals)
        names = [signal.name for signal in self.signals]
        if not names:
            raise SignalError("signals", "at least one is needed")
        if len(set(names)) != len(names):
            raise SignalError("name", f"two signals are called {next(name for name in names if names.count(name) > 1)!r}: give them names")
        self.policy = policy or Policy()
        self.rails = rails or GuardRails()
        options: Any = {"timeout": self.policy.patience, "job": job or job_from_environment(), "metadata": metadata}
        if self.policy.on_failure == "wait":
            options["restart_budget"] = self.policy.patience
        self._client = ProbeClient(address, **options)
        self._async_client = AsyncProbeClient(address, **options)
        self._options: ScoreOptions = {"run_id": run_id, "expected_tokenizer_fingerprint": tokenizer_fingerprint}
        self._server: Server | None = None

    def expecting_tokenizer(self, tokenizer_fingerprint: str) -> ProbeScorer:
        """The same scorer, whose server must have this tokenizer."""
        self._options = {**self._options, "expected_tokenizer_fingerprint": tokenizer_fingerprint}
        return self

    def without(self, *modes: Mode, because: str) -> ProbeScorer:
        """The same scorer, for a trainer that cannot do what some modes ask for.

        Raises:
            SignalError: a signal has one of these modes.
        """
        for signal in self.signals:
            if signal.mode in modes:
                raise SignalError("mode", f"{Mode(signal.mode).value} cannot be done here: {because}", signal.name)
        return self

    def score(self, rollouts: Sequence[Rollout], task_rewards: ArrayLike | None = None, *, step: int | None = None) -> Outcome:
        """Scores a batch and applies the signals.

        Args:
            rollouts: ``n`` of them; those with one prompt share its computation.
            task_rewards: ``(n,)``, what they are worth without probes; ``None`` where the trainer adds them itself.
            step: of the training, for the server's logs.

        Raises:
            ProbescoreError: the call failed, and ``on_failure`` is not a number; or another model or tokenizer runs there.
            SignalError: a signal does not go with the loaded probes.
            Unscorable: a rollout is, and ``on_unscorable`` is ``"raise"``.
            ValueError: ids are not integers, or task rewards not finite.
        """
        steps = self._steps(rollouts, task_rewards, step)
        try:
            asked = next(steps)
            while True:
                try:
                    answer = self._answer(asked)
                except ProbescoreError as error:
                    asked = steps.throw(error)
                else:
                    asked = steps.send(answer)
        except StopIteration as done:
            return _outcome(done)

    async def score_async(self, rollouts: Sequence[Rollout], task_rewards: ArrayLike | None = None, *, step: int | None = None) -> Outcome:
        """Does the same in an event loop."""
        steps = self._steps(rollouts, task_rewards, step)
        try:
            asked = next(steps)
            while True:
                try:
                    answer = await self._answer_async(asked)
                except ProbescoreError as error:
                    asked = steps.throw(error)
                else:
                    asked = steps.send(answer)
        except StopIteration as done:
            return _outcome(done)

    def close(self) -> None:
        """Ends the connections of this process that are not an event loop's."""
        self._client.close()

    async def close_async(self) -> None:
        """Ends the connections of this process and of this event loop."""
        self._client.close()
        await self._async_client.close()

    def _answer(self, asked: Ask | AskServer) -> Answer:
        if isinstance(asked, AskServer):
            return Server(self._client.get_server_info(), self._client.list_probes())
        return list(self._client.score_stream(asked.groups, window=asked.window, **asked.options))

    async def _answer_async(self, asked: Ask | AskServer) -> Answer:
        if isinstance(asked, AskServer):
            return Server(await self._async_client.get_server_info(), await self._async_client.list_probes())
        return [answer async for answer in self._async_client.score_stream(asked.groups, window=asked.window, **asked.options)]

    def _steps(self, rollouts: Sequence[Rollout], task_rewards: ArrayLike | None, step: int | None) -> Steps:
        """What to ask, and what comes of the answers."""
        started = time.perf_counter()
        tasks = None if task_rewards is None else np.asarray(task_rewards, np.float64)
        lengths = [None if isinstance(rollout.completion, str) else len(rollout.completion) for rollout in rollouts]
        try:
            readings = yield from self._readings(rollouts, step)
        except _TRANSPORT as error:
            if isinstance(self.policy.on_failure, str):
                raise
            logger.warning("no scores: %d rollouts get %g instead: %s", len(rollouts), self.policy.on_failure, error)
            outcome = substitute(self.signals, self.policy.on_failure, lengths, tasks)
        else:
            outcome = combine(
                readings,
                groups=[rollout.group_key for rollout in rollouts],
                lengths=lengths,
                task_rewards=tasks,
                rails=self.rails,
                on_unscorable=self.policy.on_unscorable,
            )
            _log(outcome, readings)
        return replace(outcome, metrics={**outcome.metrics, f"{PREFIX}/seconds": time.perf_counter() - started})

    def _readings(self, rollouts: Sequence[Rollout], step: int | None) -> Generator[Union[Ask, AskServer], Any, Readings]:
        if self._server is None:
            self._server = yield AskServer()
        server = self._server
        bound = [BoundSignal.bind(signal, server.probes) for signal in self.signals]
        return (yield from read(rollouts, bound, server, {**self._options, "step": step}))


def score_rollouts(
    scorer: ProbeScorer,
    prompts: Sequence[Prompt],
    completions: Sequence[ArrayLike | str],
    *,
    masks: Sequence[ArrayLike] | None = None,
    task_rewards: ArrayLike | None = None,
    groups: Sequence[Hashable] | None = None,
    step: int | None = None,
) -> Outcome:
    """Scores ``n`` rollouts of a loop of one's own, numpy in and out.

    Args:
        scorer: holds the signals and the address.
        prompts: ``n``, ids ``(P,)`` each; a prompt appears once for each of its completions.
        completions: ``n``, ids ``(T,)`` each, as sampled: EOS included, no padding.
        masks: ``n``, ``(T,)`` of 0 and 1 each: the tokens that the policy sampled; ``None`` = all.
        task_rewards: ``(n,)``, or ``None``.
        groups: ``n`` keys; ``None`` = by prompt.
        step: of the training.

    Raises:
        ValueError: numbers of prompts, completions, masks or groups differ.
    """
    for name, given in (("completions", completions), ("masks", masks), ("groups", groups)):
        if given is not None and len(given) != len(prompts):
            raise ValueError(f"{name}: {len(given)} for {len(prompts)} prompts")
    rollouts = [
        Rollout(
            prompt,
            completion if isinstance(completion, str) else np.asarray(completion),
            None if masks is None else masks[index],
            None if groups is None else groups[index],
        )
        for index, (prompt, completion) in enumerate(zip(prompts, completions))  # noqa: B905 - Python 3.10
    ]
    return scorer.score(rollouts, task_rewards, step=step)


def _outcome(done: StopIteration) -> Outcome:
    outcome: Outcome = done.value
    return outcome


def _log(outcome: Outcome, readings: Readings) -> None:
    """Warns of everything that acted, once for each batch."""
    acted = {key: int(times) for key, times in outcome.metrics.items() if key.startswith(f"{PREFIX}/guard/") and times > 0}
    if acted:
        logger.warning("guard rails acted: %s", ", ".join(f"{key.rpartition('/')[2]} {times}" for key, times in acted.items()))
    if outcome.unscorable.any():
        index = int(np.flatnonzero(outcome.unscorable)[0])
        problem = readings.problems.get(index, "no token of it counts, or a transform gave no number")
        logger.warning("%d of %d rollouts are unscorable; number %d: %s", outcome.unscorable.sum(), len(outcome.unscorable), index, problem)
