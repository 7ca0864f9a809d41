"""Defines ``ProbeScorer``, on which the adapter of every trainer is built: it scores rollouts on a server, applies signals (rules from
probe scores to rewards) to the scores, and handles failures.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, Union

import numpy as np
from numpy.typing import ArrayLike

from probescore import (
    AsyncProbeClient,
    CompletionActivations,
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
from probescore.types import FROZEN, LoadedReading
from probescore_adapters.arrays import as_list, as_rewards
from probescore_adapters.cascade_decisions import JudgeRequest, StepBudgets, decided
from probescore_adapters.errors import ProbeReplaced, ReadingGone, SignalError
from probescore_adapters.guard_rails import GuardRails
from probescore_adapters.job import job_from_environment
from probescore_adapters.judges import JudgeAnswer
from probescore_adapters.outcome import PREFIX, OnUnscorable, Outcome, combine, substitute
from probescore_adapters.pins import bound_to, changes_between, pins_from, pins_of, replacement, state_of, threshold_change
from probescore_adapters.record_options import RecordOptions
from probescore_adapters.recorded_activations import ActivationsRequest
from probescore_adapters.recording import RunRecorder
from probescore_adapters.rollouts import Prompt, Rollout
from probescore_adapters.signal_values import BatchSignals, ServerFacts, StreamRequest, score_batch
from probescore_adapters.signals import BoundSignal, Mode, PinnedProbe, ProbeSignal
from probescore_adapters.texts import is_text_of

# the standard library's: a trainer's process has its own way of showing logs
logger = logging.getLogger("probescore_adapters")

OnFailure = Union[Literal["raise", "wait"], float]
RecordTo = Union[str, "os.PathLike[str]", RecordOptions]

_MAX_COMPARED_TEXTS = 8
"""Maximum number of completions whose texts are compared to find out whether server and trainer use the same tokenizer."""
_MAX_ATTEMPTS = 4
"""Maximum number of times that a batch is sent, because a probe that the scorer follows, or a reading, was replaced meanwhile. Two server
replicas with different probes or readings must not make the run alternate between them for ever."""

_TRANSPORT = (TransientError, DeadlineExceededError, ServerError)

_READING_REASONS = {"UNKNOWN_READING", "READING_LOST", "READING_CHANGED", "READING_DIFFERS", "READINGS_IGNORED"}
"""Reasons of errors that say that the servers have not the reading, or not one version of it, that a request names."""


class ServerFactsRequest:
    """Request for a description of the server's model, limits and probes, on which signals (rules from probe scores to rewards) depend; the
    reply is a ``ServerFacts``.
    """


Answer = Union[ServerFacts, list[StreamedCompletion], list[CompletionActivations], dict[Any, Union[JudgeAnswer, str]]]
Request = Union[StreamRequest, ServerFactsRequest, ActivationsRequest, JudgeRequest]
Result = TypeVar("Result")
Steps = Generator[Request, Any, Outcome]


@dataclass(frozen=True)
class Policy:
    """Value object that says what a ``ProbeScorer`` does when a request to the server or the scoring of a rollout fails.

    Attributes:
        on_failure: action when the RPC fails because the server cannot be reached, is overloaded or misses the deadline. ``"raise"`` raises
            the error; ``"wait"`` retries for up to ``wait_seconds`` and then raises the error; a number replaces the sum that the signals
            would add to each rollout's reward. There is no default number, since 0 would mean "did not cheat". The same holds if the server
            has not the reading (whose activations the probe reads) of a signal that changes rewards, except that ``"wait"`` does not wait:
            training itself loads the readings, and would wait for itself.
        on_unscorable: action for a rollout that cannot be scored, because the rollout is too long or its scores are NaN. ``"worst"`` gives
            the rollout the lowest reward that the signals can give, ``"raise"`` raises ``Unscorable``, and a number replaces the sum that
            the signals would add to the rollout's reward.
        timeout: seconds for an RPC, including the client's own retries while a server is overloaded or restarts.
        wait_seconds: seconds for which ``on_failure="wait"`` retries.

    Raises:
        ValueError: a field has none of the values above.
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
        """Returns the seconds after which an RPC that keeps failing counts as failed."""
        return self.wait_seconds if self.on_failure == "wait" else self.timeout


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class ProbeScorer:
    """Scores batches of rollouts on a server, and applies signals (rules from probe scores to rewards). All signals share the same requests
    to the server.

    A scorer can be made before a server runs. It can be pickled, and used after a fork, in Ray's workers, and from several threads and
    event loops, since connections are made when they are first needed. If the server's model changes after the first batch, scoring raises
    an error.

    A scorer is pinned: a probe's name means its highest version at the first use, and the scorer reads that version ever after, even if the
    server gets higher ones. A server keeps a version whose file is gone for a while. Once the server has dropped it, or has other bytes
    under its name and version, scoring raises ``ProbeReplaced``. A scorer with ``follow=True`` reads the version that the name means when a
    batch is scored, with that version's threshold, and logs a warning once for each change; a batch is never scored by two versions. A
    signal that names a version, ``cheating@1``, never follows to another.

    One request asks for the readings (whose activations the probes read) of all signals. A reading's name means the version that the server
    has when a batch is scored; a batch is never scored by two versions. If the server has no such reading, its ``monitor`` signals have no
    scores for the batch, which a warning says once, and the other signals have theirs; a signal on it that changes rewards fails as
    ``Policy.on_failure`` says. Scores on one reading never take the place of those on another.

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
        follow: whether a name means the highest version of a probe at each batch, instead of at the first use.
        record: folder of the run's record, into which every scored rollout is written, or the ``RecordOptions``; ``None`` = no record.

    Raises:
        SignalError: there is no signal, two signals have the same name, or the record's ``held_out`` does not fit them.
        TypeError: ``follow`` is not a boolean.
        OSError: the folder of the record cannot be made.
        ValueError: a folder that is to be the record has that of another run, or an option is wrong.
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
        follow: bool = False,
        record: RecordTo | None = None,
    ) -> None:
        if not isinstance(follow, bool):
            raise TypeError(f"follow: expected True or False, got {follow!r}")
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
        self.follow = follow
        self._server: ServerFacts | None = None
        self._pins: dict[str, PinnedProbe] = {}
        self._bound: list[BoundSignal] = []
        self._doubted: set[tuple[str, str]] = set()
        self._read: dict[str, tuple[str, int | None]] = {}
        self._gone: set[str] = set()
        self._tokenizers_compared = False
        self._budgets = StepBudgets()
        self.recorder = None if record is None else RunRecorder(RecordOptions.of(record), self.signals, run_id)

    @property
    def tokenizer_fingerprint(self) -> str:
        """Returns the fingerprint of the tokenizer that the server must have; "" if any tokenizer is accepted."""
        return self._options["expected_tokenizer_fingerprint"]

    def require_tokenizer(self, tokenizer_fingerprint: str) -> None:
        """Requires from now on that the server has the tokenizer with this fingerprint; "" means that any tokenizer is accepted."""
        self._options = {**self._options, "expected_tokenizer_fingerprint": tokenizer_fingerprint}

    def pin(self) -> dict[str, Any]:
        """Asks the server which versions the names of this scorer's probes mean, unless the scorer knows them already, and returns the
        versions in the form of ``state_dict()``.

        For a run of several processes in which each scores its own rollouts: one of them calls this method before the first batch, and the
        others load the returned versions, so that all read the same versions even if a probe is replaced as the run begins.

        Raises:
            ProbescoreError: the RPC failed.
            SignalError: a signal does not fit the loaded probes.
        """
        if not self._pins:
            self._server = ServerFacts(self._client.get_server_info(), self._client.list_probes())
            self._bind(self._server, None)
        return self.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Returns, as plain values for a checkpoint, the versions of probes that this scorer reads and their digests; before the first use
        there are none.
        """
        return state_of(self._pins)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over the versions of probes that another scorer has read, such as the one of a run that is resumed.

        A pinned scorer reads these versions, or raises ``ProbeReplaced`` if the server no longer has them. A scorer with ``follow=True``
        logs how its probes differ from these versions.

        Args:
            state: what ``state_dict`` returned.

        Raises:
            ValueError: ``state`` has another form, or lacks the probe of a signal.
        """
        pins = pins_from(state)
        missing = [signal.probe for signal in self.signals if pins and signal.probe not in pins]
        if missing:
            raise ValueError(
                f"state: it has {', '.join(pins)}, and a signal reads {missing[0]!r}; give what a scorer of these signals gave"
            )
        self._pins, self._bound, self._server = pins, [], None

    def record_into(self, record: RecordTo) -> None:
        """Makes the scorer write every rollout that it scores from now on into the record of the run; does nothing if it does already.

        Args:
            record: folder of the record, or its ``RecordOptions``.

        Raises:
            ValueError: the scorer writes into another record, or with other options; or the folder has the record of another run.
            SignalError: the options do not fit the signals (rules from probe scores to rewards).
            OSError: the folder cannot be made.
        """
        options = RecordOptions.of(record)
        if self.recorder is None:
            self.recorder = RunRecorder(options, self.signals, self._options["run_id"])
        elif options != self.recorder.options:
            raise ValueError(f"record: {options.directory}; the scorer writes into {self.recorder.options.directory}, with its own options")

    def refuse_modes(self, *modes: Mode, because: str) -> None:
        """Refuses signals (rules from probe scores to rewards) whose modes (ways to act on the reward) a trainer does not support.

        Raises:
            SignalError: a signal has such a mode.
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
        record: bool = True,
    ) -> Outcome:
        """Scores a batch of rollouts with probes and applies the signals (rules from probe scores to rewards) to the scores.

        Args:
            rollouts: the ``n`` rollouts; the server computes a prompt once for all rollouts with the same prompt.
            task_rewards: ``(n,)``, the rewards without probes; ``None`` if the trainer itself adds them.
            step: number of the training step, for the server's logs and the record.
            texts: the ``n`` texts that the trainer's tokenizer decoded from each completion's ids, without special tokens, for trainers
                that have no tokenizer to compare; ``None`` = unknown. If no tokenizer fingerprint is required, the first texts are compared
                with the texts that the server decodes from the same ids. Otherwise ids of another vocabulary would be scored unnoticed.
            record: whether the batch belongs into the record, if the scorer has one; false for rollouts that are not trained on.

        Raises:
            ProbescoreError: the RPC failed, and ``on_failure`` is not a number; or the server has another model or tokenizer than required.
            SignalError: a signal does not fit the loaded probes.
            ProbeReplaced: a probe that the scorer is pinned to is gone, or has other bytes.
            ReadingGone: the server has not the reading of a signal that changes rewards, and ``on_failure`` is not a number.
            Unscorable: a rollout is unscorable, and ``on_unscorable`` is ``"raise"``.
            JudgeError: a cascade's judge gave no verdict on a rollout, and its ``on_failure`` is ``"raise"``.
            InvalidRequestError: token ids are not integers, a mask is not 0 and 1, a group key cannot be compared by value, or task rewards
                are not finite numbers; the error names the field (also a ``ValueError``).
            ValueError: the record needs a step, and none is given.
            OSError: the record cannot be written, and ``RecordOptions.on_error`` is ``"raise"``.
        """
        return self._run(self._steps(rollouts, task_rewards, step, texts, record))

    async def score_async(
        self,
        rollouts: Iterable[Rollout],
        task_rewards: ArrayLike | None = None,
        *,
        step: int | None = None,
        texts: Sequence[str | None] | None = None,
        record: bool = True,
    ) -> Outcome:
        """Scores a batch of rollouts with probes from an event loop; arguments, result and errors are the same as for ``score``."""
        steps = self._steps(rollouts, task_rewards, step, texts, record)
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

    def record_reference(self, rollouts: Iterable[Rollout], positive: Sequence[bool], *, random: bool) -> None:
        """Scores labelled rollouts of the model before training and writes them into the record, with which the audit compares the run. At
        least 300 of each class are needed, and at least 512 that were drawn at random, better 2,048. One process of the run calls this,
        once.

        Args:
            rollouts: the ``n`` rollouts.
            positive: whether each of them has the behaviour, ``n`` booleans.
            random: whether they were drawn at random, so that they say how frequent the behaviour was; false if they were chosen for their
                label or score.

        Raises:
            ValueError: the scorer has no record, or the numbers of rollouts and labels differ.
            ProbescoreError, SignalError, InvalidRequestError: the errors of ``score``.
            OSError: the record cannot be written.
        """
        given = [rollout.checked(f"rollouts[{index}].{{}}") for index, rollout in enumerate(rollouts)]
        if self.recorder is None:
            raise ValueError("record: the scorer has none; give ProbeScorer(record=…)")
        if len(given) != len(positive):
            raise ValueError(f"positive: {len(positive)} for {len(given)} rollouts; give a label for each")
        batch = self._run(self._batch(given, None, None))
        assert self._server is not None  # noqa: S101 - asked for before anything is scored
        self.recorder.record_reference(given, batch, positive, server=self._server, random=random)

    def load_reading(self, name: str, path: str | os.PathLike[str], step: int | None = None) -> LoadedReading:
        """Makes the servers load a LoRA adapter, or a checkpoint of the whole model, so that signals (rules from probe scores to rewards)
        can read it.

        For a run of several processes: one of them saves the weights and calls this method while the others wait, and then all score. So
        all read one version in a step.

        Args:
            name: name of the reading, as in the field ``reading`` of the signals; a reading of this name is replaced.
            path: directory that the adapter or checkpoint was saved to, on storage that the servers see: absolute, or relative to their
                ``readings_root``.
            step: the training step, which metrics and answers state.

        Raises:
            ProbescoreError: the errors of ``ProbeClient.load_reading``.
        """
        return self._client.load_reading(name, path, step)

    def close(self) -> None:
        """Closes the record, and the connections to the server that this process uses for synchronous calls; the connections of event loops
        stay open.
        """
        self._client.close()
        if self.recorder is not None:
            self.recorder.close()

    async def close_async(self) -> None:
        """Closes the record, and the connections to the server that this process uses for synchronous calls, and those of this event
        loop.
        """
        self.close()
        await self._async_client.close()

    def _run(self, steps: Generator[Request, Any, Result]) -> Result:
        """Runs a generator of requests to the server and to judges, and returns what it returns."""
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
            result: Result = done.value
            return result

    def _answer(self, request: Request) -> Answer:
        if isinstance(request, JudgeRequest):
            return request.answers()
        if isinstance(request, ActivationsRequest):
            return request.answers(self._client)
        if isinstance(request, ServerFactsRequest):
            return ServerFacts(self._client.get_server_info(), self._client.list_probes())
        return list(self._client.score_stream(request.groups, window=request.window, **request.options))

    async def _answer_async(self, request: Request) -> Answer:
        if isinstance(request, JudgeRequest):
            return await asyncio.to_thread(request.answers)
        if isinstance(request, ActivationsRequest):
            return await request.answers_async(self._async_client)
        if isinstance(request, ServerFactsRequest):
            return ServerFacts(await self._async_client.get_server_info(), await self._async_client.list_probes())
        return [answer async for answer in self._async_client.score_stream(request.groups, window=request.window, **request.options)]

    def _steps(
        self,
        given: Iterable[Rollout],
        task_rewards: ArrayLike | None,
        step: int | None,
        texts: Sequence[str | None] | None,
        is_recorded: bool = True,
    ) -> Steps:
        """Generator that scores one batch of rollouts without input or output of its own: yields each request to the server, is sent the
        reply, and returns the rewards and metrics.
        """
        started = time.perf_counter()
        rollouts = [rollout.checked(f"rollouts[{index}].{{}}") for index, rollout in enumerate(given)]
        tasks = None if task_rewards is None else as_rewards(task_rewards, len(rollouts), "task_rewards")
        lengths = [None if isinstance(rollout.completion, str) else len(rollout.completion) for rollout in rollouts]
        recorder = self.recorder if is_recorded and rollouts else None
        batch = None
        try:
            batch = yield from self._batch(rollouts, step, texts)
            if self._server is not None and any(signal.cascade for signal in self.signals):
                batch = yield from decided(batch, rollouts, texts, server=self._server, budgets=self._budgets, step=step)
        except (*_TRANSPORT, ReadingGone) as error:
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
        if recorder is not None:
            at = recorder.record(rollouts, batch, outcome, server=self._server, task_rewards=tasks, step=step)
            if recorder.anchors_are_due(at):
                yield from self._score_anchors(recorder, at)
            yield from recorder.read_activations(at, self._server)
        return replace(outcome, metrics={**outcome.metrics, f"{PREFIX}/seconds": time.perf_counter() - started})

    def _score_anchors(self, recorder: RunRecorder, step: int) -> Generator[Union[StreamRequest, ServerFactsRequest], Any, None]:
        """Scores the anchors (texts with a known label) for the record; if that fails, training goes on unless the record's options say
        otherwise.
        """
        try:
            batch = yield from self._batch([anchor.rollout for anchor in recorder.anchors], step, None)
            recorder.record_anchors(batch, step)
        except Exception as error:  # whatever it is: no reward depends on it
            if recorder.options.on_error == "raise":
                raise
            logger.error("step %d: the anchors are not in the record: %s", step, error)

    def _batch(
        self, rollouts: Sequence[Rollout], step: int | None, texts: Sequence[str | None] | None
    ) -> Generator[Union[StreamRequest, ServerFactsRequest], Any, BatchSignals]:
        missing: dict[str, str] = {}
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            try:
                batch = yield from self._batch_without(missing, rollouts, step, texts)
            except ProbescoreError as error:
                if error.reason not in _READING_REASONS and not error.field.startswith("readings"):
                    raise
                now: ServerFacts = yield ServerFactsRequest()
                # where servers differ the client has waited already, and one of them cannot tell what the others have
                is_over = attempt == _MAX_ATTEMPTS - 1 or error.reason == "READING_DIFFERS"
                there = set() if is_over else {reading.name for reading in now.info.readings}
                missing |= self._missing_readings(there, error)
            else:
                self._note_readings(batch, step)
                return batch
        raise AssertionError("unreachable")

    def _batch_without(
        self, missing: Mapping[str, str], rollouts: Sequence[Rollout], step: int | None, texts: Sequence[str | None] | None
    ) -> Generator[Union[StreamRequest, ServerFactsRequest], Any, BatchSignals]:
        """Scores a batch with probes on all readings that its signals need, but for some that are missing, keyed to the reason."""
        further = None if self.recorder is None else self.recorder.further
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            if self._server is None:
                self._server = yield ServerFactsRequest()
            server, bound = self._server, self._bind(self._server, step)
            # by exact versions once a name has changed its meaning, so that one version scores the whole batch
            by_name = self.follow and attempt == 1
            try:
                batch = yield from score_batch(
                    rollouts, bound, server, {**self._options, "step": step}, by_name=by_name, missing=missing, further=further
                )
            except (ProbeReplaced, InvalidRequestError) as error:
                if not isinstance(error, ProbeReplaced) and not error.field.startswith("probes["):
                    raise
                now: ServerFacts = yield ServerFactsRequest()
                if not self.follow:
                    raise replacement(bound, now.probes, error) from error
                if attempt == _MAX_ATTEMPTS:
                    problem = f"probes were replaced {attempt} times while a batch was scored; wait until the server's probes rest: {error}"
                    raise ProbeReplaced("probe", problem) from error
                self._server = now
            else:
                yield from self._compare_tokenizers(rollouts, bound, server, batch, texts)
                self._doubt_thresholds(batch)
                return batch
        raise AssertionError("unreachable")

    def _missing_readings(self, there: Collection[str], error: ProbescoreError) -> dict[str, str]:
        """Returns the names of the readings (whose activations the probes read) that signals need and the server does not have, each with
        the reason.

        Raises:
            ReadingGone: a signal that changes rewards reads one of them.
        """
        missing = {}
        for signal in self.signals:
            if signal.reads_other_weights and signal.reading not in there:
                missing[signal.reading] = str(error)
                if signal.mode is not Mode.MONITOR:
                    problem = f"{signal.reading!r} gave no scores: {error}: load it (ProbeClient.load_reading) before rollouts are scored"
                    raise ReadingGone("reading", problem, signal.name) from error
        return missing

    def _note_readings(self, batch: BatchSignals, step: int | None) -> None:
        """Logs what has changed of the readings (whose activations the probes read) since the batch before: a warning, once, of one that
        is gone, and the version of one that is new.
        """
        for name, reason in batch.missing.items():
            if name not in self._gone:
                logger.warning(
                    "step %s: the reading %r is gone, and its monitors have no scores until it is loaded: %s", step, name, reason
                )
        for name, reading in batch.readings.items():
            if name != FROZEN and self._read.get(name) != (reading.id, reading.step):
                logger.info("step %s: the reading %r is %s, of step %s", step, name, reading.id, reading.step)
                self._read[name] = (reading.id, reading.step)
        self._gone = set(batch.missing)

    def _bind(self, server: ServerFacts, step: int | None) -> list[BoundSignal]:
        """Returns the signals (rules from probe scores to rewards) with the probes that they read: the versions that the scorer has read
        since its first use, or those that the names mean at the server now.

        Raises:
            ProbeReplaced: a version of a probe that the scorer has read is gone, or has other bytes.
            SignalError: a signal does not fit its probe.
        """
        if not self.follow:
            for name, pin in pins_of([signal for signal in self.signals if signal.probe not in self._pins], server.probes).items():
                self._pins.setdefault(name, pin)  # another thread may have been first
            try:
                return bound_to(self.signals, self._pins, server.probes)
            except ProbeReplaced:
                self._server = None  # the next batch asks anew
                raise
        bound = [BoundSignal.bind(signal, server.probes) for signal in self.signals]
        pins = {one.signal.probe: one.pin for one in bound}
        for name, pin in pins.items():
            before = self._pins.get(name, pin)
            if before != pin:
                changes = changes_between(before, pin)
                for earlier, now in zip(self._bound, bound):  # noqa: B905 - Python 3.10
                    changes += threshold_change(earlier, now) if now.signal.probe == name else []
                said = "; ".join(dict.fromkeys(changes))
                logger.warning("%s was replaced by %s: %s; the run follows, from step %s on", before.probe, pin.probe, said, step)
        self._pins, self._bound = pins, bound
        return bound

    def _doubt_thresholds(self, batch: BatchSignals) -> None:
        """Logs a warning about rollouts that are unlike those on which a probe's threshold was found, once for each signal (rule from probe
        scores to rewards) and each condition that the rollouts do not meet.
        """
        for values in batch.signals:
            name = values.bound.signal.name
            for condition in sorted({condition for unmet in values.unmet or () for condition in unmet}):
                if (name, condition) not in self._doubted:
                    self._doubted.add((name, condition))
                    count = sum(condition in unmet for unmet in values.unmet or ())
                    logger.warning(
                        "signal %r: %d of %d rollouts are unlike those that the threshold of %s was found on (%s), so that its rate of "
                        "false positives is not known for them; said once, and counted in %s/%s/outside_calibration",
                        *(name, count, len(values.values), values.bound.probe, condition, PREFIX, name),
                    )

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
    names: Iterable[str] | None = None,
    logprobs: ArrayLike | None = None,
    record: RecordTo | bool = True,
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
        step: number of the training step, for the server's logs and the record.
        texts: ``n`` texts decoded from the completions' ids, as for ``ProbeScorer.score``.
        names: ``n`` names of the rollouts in the record, unique within the step; ``None`` = the record names them.
        logprobs: ``(n,)``, log-probability of each completion under the policy, for the record; ``None`` = unknown.
        record: folder of the run's record or its ``RecordOptions``, the same at each call; ``True`` = the one that the scorer has, if any;
            ``False`` = the batch is not recorded, such as an evaluation.

    Raises:
        ValueError: the numbers of prompts, completions, masks or groups differ, or one of these arguments is invalid; the error names the
            argument.
    """
    rows = {"prompts": as_list(prompts, "prompts"), "completions": as_list(completions, "completions")}
    count = len(rows["prompts"])
    for name, given in (("masks", masks), ("groups", groups)):
        rows[name] = [None] * count if given is None else as_list(given, name)
    names = [""] * count if names is None else as_list(names, "names")
    likely = [None] * count if logprobs is None else as_rewards(logprobs, count, "logprobs").tolist()
    if not isinstance(record, bool):
        scorer.record_into(record)
    for name, entries in [*rows.items(), ("names", names)]:
        if len(entries) != count:
            raise ValueError(f"{name}: {len(entries)} for {count} prompts")
    rollouts = [
        # "masks[3]": as the caller named them
        Rollout(prompt, completion, mask, group, name=name, logprob=logprob).checked(f"{{}}s[{index}]")
        for index, (prompt, completion, mask, group, name, logprob) in enumerate(zip(*rows.values(), names, likely))  # noqa: B905 - Python 3.10
    ]
    return scorer.score(rollouts, task_rewards, step=step, texts=texts, record=record is not False)


def _outcome(done: StopIteration) -> Outcome:
    outcome: Outcome = done.value
    return outcome


def _log(outcome: Outcome, batch: BatchSignals) -> None:
    """Logs a warning, once for each batch, about the guard rails (limits on the effect of probe scores) that acted and about rollouts
    without scores.
    """
    acted = {key: int(times) for key, times in outcome.metrics.items() if key.startswith(f"{PREFIX}/guard/") and times > 0}
    if acted:
        logger.warning("guard rails acted: %s", ", ".join(f"{key.rpartition('/')[2]} {times}" for key, times in acted.items()))
    if outcome.unscorable.any():
        index = int(np.flatnonzero(outcome.unscorable)[0])
        problem = batch.problems.get(index, "no token of it counts, or a transform gave no number")
        logger.warning("%d of %d rollouts are unscorable; number %d: %s", outcome.unscorable.sum(), len(outcome.unscorable), index, problem)
