"""Defines ``ProbeScorer``, on which every adapter is built: it scores rollouts on a server, applies signals (rules from probe scores to
rewards) to the scores, and handles failures.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Union

import numpy as np
from numpy.typing import ArrayLike

from probescore import (
    AsyncProbeClient,
    InvalidRequestError,
    MismatchError,
    ProbeClient,
    ProbescoreError,
    RolloutGroup,
    ScoreOptions,
    ServerError,
    StreamedCompletion,
    StreamWindow,
    TransientError,
)
from probescore.errors import DeadlineExceededError
from probescore_adapters.arrays import as_list, as_rewards
from probescore_adapters.errors import ProbeReplaced, SignalError
from probescore_adapters.guard_rails import GuardRails
from probescore_adapters.job import job_from_environment
from probescore_adapters.outcome import PREFIX, OnUnscorable, Outcome, combine, substitute
from probescore_adapters.probe_changes import describe_replacement
from probescore_adapters.rollouts import Prompt, Rollout
from probescore_adapters.signal_values import BatchSignals, ServerFacts, StreamRequest, score_batch
from probescore_adapters.signals import BoundSignal, Mode, ProbeSignal
from probescore_adapters.texts import is_text_of

# the standard library's: a trainer's process has its own way of showing logs
logger = logging.getLogger("probescore_adapters")

OnFailure = Union[Literal["raise", "wait"], float]
OnReplaced = Literal["raise", "follow"]

_MAX_COMPARED_TEXTS = 8
"""Maximum number of completions whose texts are compared to find out whether server and trainer use the same tokenizer."""
_MAX_REPLACEMENTS = 2
"""Maximum number of times that a run accepts a replaced probe within one batch, so that two server replicas with different probes do not
make the run alternate between them for ever."""

_TRANSPORT = (TransientError, DeadlineExceededError, ServerError)


class ServerFactsRequest:
    """Request for the description of the server that signals (rules from probe scores to rewards) need; the reply is a ``ServerFacts``."""


Answer = Union[ServerFacts, list[StreamedCompletion]]
Steps = Generator[Union[StreamRequest, ServerFactsRequest], Any, Outcome]


@dataclass(frozen=True)
class Policy:
    """Value object with the actions of a scorer when something fails.

    Attributes:
        on_failure: action when the RPC fails because the server cannot be reached, is overloaded or misses the deadline. ``"raise"`` raises
            the error; ``"wait"`` retries for up to ``wait_seconds`` and then raises the error; a number replaces the sum that the signals
            would add to each rollout's reward. There is no default number, since 0 would mean "did not cheat".
        on_unscorable: action for a rollout that cannot be scored, because the rollout is too long or its scores are NaN. ``"worst"`` gives
            the rollout the lowest reward that the signals can give, ``"raise"`` raises ``Unscorable``, and a number replaces the sum that
            the signals would add to the rollout's reward.
        timeout: seconds for an RPC, including the client's own retries while a server is overloaded or restarts.
        wait_seconds: seconds for which ``on_failure="wait"`` retries.
        on_replaced: action when a probe's graph, calibration or version differs from the one with which the run began. ``"raise"`` raises
            ``ProbeReplaced``; ``"follow"`` continues with the probe that is loaded now and its threshold, and logs a warning.

    Raises:
        ValueError: a field has none of the values above.
    """

    on_failure: OnFailure = "raise"
    on_unscorable: OnUnscorable = "worst"
    timeout: float = 300.0
    wait_seconds: float = 3600.0
    on_replaced: OnReplaced = "raise"

    def __post_init__(self) -> None:
        for field, words in (("on_failure", ("raise", "wait")), ("on_unscorable", ("worst", "raise"))):
            value = getattr(self, field)
            if value not in words and not _is_number(value):
                raise ValueError(f"{field}: expected {', '.join(map(repr, words))} or a finite number, got {value!r}")
        if self.on_replaced not in ("raise", "follow"):
            raise ValueError(f"on_replaced: expected 'raise' or 'follow', got {self.on_replaced!r}")
        for field in ("timeout", "wait_seconds"):
            if not _is_number(getattr(self, field)) or getattr(self, field) <= 0:
                raise ValueError(f"{field}: expected seconds above 0, got {getattr(self, field)!r}")

    @property
    def patience(self) -> float:
        """Returns the seconds after which an RPC that keeps failing counts as failed."""
        return self.wait_seconds if self.on_failure == "wait" else self.timeout


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class ProbeScorer:
    """Scores batches of rollouts on a server, and applies signals (rules from probe scores to rewards). All signals share the same requests
    to the server.

    A scorer can be made before a server runs. It can be pickled, and used after a fork, in Ray's workers, and from several threads and
    event loops, since connections are made when they are first needed. The scorer asks for the server's model and probes once, at the first
    batch. If the model changes later, scoring raises an error. If the version, graph or calibration of a probe changes later, the policy's
    ``on_replaced`` determines the action, so that no change goes unnoticed.

    Args:
        signals: the signals, at least one, with unique names.
        address: address of the server, in the form that ``ProbeClient`` takes.
        policy: the actions when something fails.
        rails: the guard rails, which limit the effect of signals.
        job: name of the training run, so that all ranks of the run share one turn at the server; by default the launcher's name for the
            run.
        run_id: name of the run in the server's logs.
        tokenizer_fingerprint: ``probescore.tokenizer_fingerprint(tokenizer)`` of the policy's tokenizer; the server refuses requests if its
            own tokenizer has another fingerprint.
        metadata: gRPC metadata sent with every RPC.

    Raises:
        SignalError: there is no signal, or two signals have the same name.
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
        self._server: ServerFacts | None = None
        self._tokenizers_compared = False

    @property
    def tokenizer_fingerprint(self) -> str:
        """Returns the fingerprint of the tokenizer that the server must have; "" if any tokenizer is accepted."""
        return self._options["expected_tokenizer_fingerprint"]

    def require_tokenizer(self, tokenizer_fingerprint: str) -> None:
        """Requires from now on that the server has the tokenizer with this fingerprint; "" means that any tokenizer is accepted."""
        self._options = {**self._options, "expected_tokenizer_fingerprint": tokenizer_fingerprint}

    def refuse_modes(self, *modes: Mode, because: str) -> None:
        """Refuses signals (rules from probe scores to rewards) with modes that a trainer does not support.

        Raises:
            SignalError: a signal has one of these modes.
        """
        for signal in self.signals:
            if signal.mode in modes:
                raise SignalError("mode", f"{Mode(signal.mode).value} cannot be done here: {because}", signal.name)

    def score(
        self,
        rollouts: Iterable[Rollout],
        task_rewards: ArrayLike | None = None,
        *,
        step: int | None = None,
        texts: Sequence[str | None] | None = None,
    ) -> Outcome:
        """Scores a batch of rollouts and applies the signals to the scores.

        Args:
            rollouts: the ``n`` rollouts; the server computes a prompt once for all rollouts with the same prompt.
            task_rewards: ``(n,)``, the rewards without probes; ``None`` if the trainer itself adds them.
            step: number of the training step, for the server's logs.
            texts: the ``n`` texts that the trainer's tokenizer decoded from each completion's ids, without special tokens, for trainers
                that have no tokenizer to compare; ``None`` = unknown. If no tokenizer fingerprint is required, the first texts are compared
                with the texts that the server decodes from the same ids. Otherwise ids of another vocabulary would be scored unnoticed.

        Raises:
            ProbescoreError: the RPC failed, and ``on_failure`` is not a number; or the server has another model or tokenizer than required.
            SignalError: a signal does not fit the loaded probes.
            ProbeReplaced: a probe differs from the one with which the run began, and ``on_replaced`` is ``"raise"``.
            Unscorable: a rollout is unscorable, and ``on_unscorable`` is ``"raise"``.
            InvalidRequestError: token ids are not integers, a mask is not 0 and 1, a group key cannot be compared by value, or task rewards
                are not finite numbers; the error names the field (also a ``ValueError``).
        """
        steps = self._steps(rollouts, task_rewards, step, texts)
        try:
            request = next(steps)
            while True:
                try:
                    answer = self._answer(request)
                except ProbescoreError as error:
                    request = steps.throw(error)
                else:
                    request = steps.send(answer)
        except StopIteration as done:
            return _outcome(done)

    async def score_async(
        self,
        rollouts: Iterable[Rollout],
        task_rewards: ArrayLike | None = None,
        *,
        step: int | None = None,
        texts: Sequence[str | None] | None = None,
    ) -> Outcome:
        """Scores a batch of rollouts from an event loop; arguments, result and errors are the same as for ``score``."""
        steps = self._steps(rollouts, task_rewards, step, texts)
        try:
            request = next(steps)
            while True:
                try:
                    answer = await self._answer_async(request)
                except ProbescoreError as error:
                    request = steps.throw(error)
                else:
                    request = steps.send(answer)
        except StopIteration as done:
            return _outcome(done)

    def close(self) -> None:
        """Closes the synchronous client's connections of this process; connections of event loops stay open."""
        self._client.close()

    async def close_async(self) -> None:
        """Closes the connections of this process and of this event loop."""
        self._client.close()
        await self._async_client.close()

    def _answer(self, request: StreamRequest | ServerFactsRequest) -> Answer:
        if isinstance(request, ServerFactsRequest):
            return ServerFacts(self._client.get_server_info(), self._client.list_probes())
        return list(self._client.score_stream(request.groups, window=request.window, **request.options))

    async def _answer_async(self, request: StreamRequest | ServerFactsRequest) -> Answer:
        if isinstance(request, ServerFactsRequest):
            return ServerFacts(await self._async_client.get_server_info(), await self._async_client.list_probes())
        return [answer async for answer in self._async_client.score_stream(request.groups, window=request.window, **request.options)]

    def _steps(
        self, given: Iterable[Rollout], task_rewards: ArrayLike | None, step: int | None, texts: Sequence[str | None] | None
    ) -> Steps:
        """Generator that scores one batch without input or output of its own: yields each request, is sent the reply, and returns the
        outcome.
        """
        started = time.perf_counter()
        rollouts = [rollout.checked(f"rollouts[{index}].{{}}") for index, rollout in enumerate(given)]
        tasks = None if task_rewards is None else as_rewards(task_rewards, len(rollouts), "task_rewards")
        lengths = [None if isinstance(rollout.completion, str) else len(rollout.completion) for rollout in rollouts]
        try:
            batch = yield from self._batch(rollouts, step, texts)
        except _TRANSPORT as error:
            if isinstance(self.policy.on_failure, str):
                raise
            logger.warning("no scores: %d rollouts get %g instead: %s", len(rollouts), self.policy.on_failure, error)
            outcome = substitute(self.signals, self.policy.on_failure, lengths, tasks)
        else:
            outcome = combine(
                batch,
                groups=[rollout.group_key for rollout in rollouts],
                lengths=lengths,
                task_rewards=tasks,
                rails=self.rails,
                on_unscorable=self.policy.on_unscorable,
            )
            _log(outcome, batch)
        return replace(outcome, metrics={**outcome.metrics, f"{PREFIX}/seconds": time.perf_counter() - started})

    def _batch(
        self, rollouts: Sequence[Rollout], step: int | None, texts: Sequence[str | None] | None
    ) -> Generator[Union[StreamRequest, ServerFactsRequest], Any, BatchSignals]:
        for following in range(_MAX_REPLACEMENTS, -1, -1):
            if self._server is None:
                self._server = yield ServerFactsRequest()
            server = self._server
            bound = [BoundSignal.bind(signal, server.probes) for signal in self.signals]
            try:
                batch = yield from score_batch(rollouts, bound, server, {**self._options, "step": step})
            except (ProbeReplaced, InvalidRequestError) as error:
                if not isinstance(error, ProbeReplaced) and not error.field.startswith("probes["):
                    raise
                replaced = describe_replacement(bound, (yield ServerFactsRequest()), error)
                if self.policy.on_replaced == "raise" or not following:
                    raise replaced from error
                logger.warning("%s; the run follows, from step %s on", replaced, step)
                self._server = None
            else:
                yield from self._compare_tokenizers(rollouts, bound, server, batch, texts)
                return batch
        raise AssertionError("unreachable")

    def _compare_tokenizers(
        self,
        rollouts: Sequence[Rollout],
        signals: Sequence[BoundSignal],
        server: ServerFacts,
        batch: BatchSignals,
        texts: Sequence[str | None] | None,
    ) -> Generator[StreamRequest, list[StreamedCompletion], None]:
        """Checks, once, whether server and trainer decode the same token ids to the same text; raises ``MismatchError`` if not."""
        if self._tokenizers_compared or self.tokenizer_fingerprint or texts is None:
            return
        compared = [
            (rollout, text)
            for index, (rollout, text) in enumerate(zip(rollouts, texts))  # noqa: B905 - Python 3.10
            if text and not isinstance(rollout.completion, str) and index not in batch.problems
        ][:_MAX_COMPARED_TEXTS]
        if not compared:
            return
        groups = [RolloutGroup(rollout.prompt, [rollout.completion]) for rollout, _ in compared]
        options: ScoreOptions = {
            "probes": [signals[0].probe],
            "return_token_texts": True,
            "expected_model_fingerprint": server.info.model.fingerprint,
        }
        try:
            answers = yield StreamRequest(groups, StreamWindow(len(groups), server.info.limits.max_request_tokens), options)
        except _TRANSPORT as error:
            logger.warning("the server's tokenizer could not be compared, and will be with the next batch: %s", error)
            return
        for answer in answers:
            text = compared[answer.group_index][1]
            pieces = answer.scores.completion_texts
            if pieces is not None and not is_text_of(text, pieces):
                raise MismatchError(
                    f"the server's tokenizer reads a completion as {''.join(pieces)!r:.80}, and the trainer's as {text!r:.80}: "
                    "the ids are of another vocabulary. Serve the policy's tokenizer with the model; or, if it is the same one and only "
                    "writes texts otherwise, give the scorer tokenizer_fingerprint=probescore.tokenizer_fingerprint(tokenizer)",
                    code="FAILED_PRECONDITION",
                    reason="TOKENIZER",
                )
        self._tokenizers_compared = True


def score_rollouts(
    scorer: ProbeScorer,
    prompts: Iterable[Prompt],
    completions: Iterable[ArrayLike | str],
    *,
    masks: Iterable[ArrayLike | None] | None = None,
    task_rewards: ArrayLike | None = None,
    groups: Iterable[Any] | None = None,
    step: int | None = None,
    texts: Sequence[str | None] | None = None,
) -> Outcome:
    """Scores ``n`` rollouts of a training loop that uses none of the supported trainers; takes and returns numpy arrays.

    Args:
        scorer: the scorer, with its signals (rules from probe scores to rewards) and the server's address.
        prompts: ``n`` prompts, token ids ``(P,)`` each; a prompt appears once for each of its completions.
        completions: ``n`` completions, token ids ``(T,)`` each, as sampled, with EOS and without padding.
        masks: ``n`` masks, ``(T,)`` of 0 and 1 each, 1 = the policy sampled the token; ``None`` = the policy sampled all tokens.
        task_rewards: ``(n,)``, the rewards without probes, or ``None``.
        groups: ``n`` keys of the rollouts' groups, compared by value, in a list, an array or a tensor; ``None`` = rollouts with the same
            prompt form a group.
        step: number of the training step, for the server's logs.
        texts: ``n`` texts decoded from the completions' ids, as for ``ProbeScorer.score``.

    Raises:
        ValueError: the numbers of prompts, completions, masks or groups differ, or one of these arguments is invalid; the error names the
            argument.
    """
    rows = {"prompts": as_list(prompts, "prompts"), "completions": as_list(completions, "completions")}
    count = len(rows["prompts"])
    for name, given in (("masks", masks), ("groups", groups)):
        rows[name] = [None] * count if given is None else as_list(given, name)
    for name, entries in rows.items():
        if len(entries) != count:
            raise ValueError(f"{name}: {len(entries)} for {count} prompts")
    rollouts = [
        Rollout(*parts).checked(f"{{}}s[{index}]")  # "masks[3]": as the caller named them
        for index, parts in enumerate(zip(*rows.values()))  # noqa: B905 - Python 3.10
    ]
    return scorer.score(rollouts, task_rewards, step=step, texts=texts)


def _outcome(done: StopIteration) -> Outcome:
    outcome: Outcome = done.value
    return outcome


def _log(outcome: Outcome, batch: BatchSignals) -> None:
    """Logs a warning, once for each batch, about the guard rails that acted and about unscorable rollouts."""
    acted = {key: int(times) for key, times in outcome.metrics.items() if key.startswith(f"{PREFIX}/guard/") and times > 0}
    if acted:
        logger.warning("guard rails acted: %s", ", ".join(f"{key.rpartition('/')[2]} {times}" for key, times in acted.items()))
    if outcome.unscorable.any():
        index = int(np.flatnonzero(outcome.unscorable)[0])
        problem = batch.problems.get(index, "no token of it counts, or a transform gave no number")
        logger.warning("%d of %d rollouts are unscorable; number %d: %s", outcome.unscorable.sum(), len(outcome.unscorable), index, problem)
