"""Asks judges (language models) about those rollouts of a batch on which probes are unsure, without any input or output of its own.

``decided`` is a generator like ``score_batch``: it yields each request, and is sent the answer.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Union

import numpy as np

from probescore import CompletionStatus, ProbescoreError, RolloutGroup, ScoreOptions, StreamWindow
from probescore_adapters.cascade import Cascade, CascadeDecision
from probescore_adapters.judges import JudgeAnswer, JudgeError, JudgeQuestion
from probescore_adapters.rollouts import Rollout
from probescore_adapters.signal_values import BatchSignals, ServerFacts, SignalValues, StreamRequest
from probescore_adapters.texts import text_of

# the standard library's: a trainer's process has its own way of showing logs
logger = logging.getLogger("probescore_adapters")

OVER_BUDGET = "the step's budget is spent"
_REMEMBERED_STEPS = 16
_NO_TEXT = "the server gives no text of it"


@dataclass(frozen=True)
class JudgeRequest:
    """Request to ask a judge about rollouts; the reply is what ``answers`` returns.

    Attributes:
        cascade: the cascade whose judge is asked, for as long as it says.
        questions: the questions, each with a key of its own.
    """

    cascade: Cascade
    questions: Sequence[JudgeQuestion]

    def answers(self) -> dict[Any, JudgeAnswer | str]:
        """Asks the judge, and returns for each question's key the answer, or why there is none."""
        late = f"no verdict within {self.cascade.seconds:g} seconds"
        found: dict[Any, JudgeAnswer | str] = {question.key: late for question in self.questions}
        waiting = deque(self.questions)
        try:
            for judged in self.cascade.judge.ask(waiting, seconds=self.cascade.seconds):
                found[judged.question.key] = judged if isinstance(judged, JudgeAnswer) else judged.reason
        except JudgeError as error:
            found.update({question.key: str(error) for question in waiting})
        return found


class StepBudgets:
    """Numbers of rollouts that judges were asked about in each of the last training steps, for all cascades of a scorer.

    It is safe to use from several threads, and can be pickled; the copy begins anew.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken: dict[tuple[int, str], int] = {}

    def take(self, signal: str, step: int | None, wanted: int, budget: int) -> int:
        """Takes as many rollouts as there are left of a signal's budget for a training step, at most ``wanted``, and returns how many. A
        batch of no known step (``None``) has a budget of its own.
        """
        if step is None:
            return min(wanted, budget)
        with self._lock:
            taken = self._taken.pop((step, signal), 0)
            granted = min(wanted, max(0, budget - taken))
            self._taken[step, signal] = taken + granted
            while len({each for each, _ in self._taken}) > _REMEMBERED_STEPS:
                self._taken.pop(next(iter(self._taken)))
            return granted

    def __reduce__(self) -> tuple[type[StepBudgets], tuple[()]]:
        return type(self), ()


Request = Union[StreamRequest, JudgeRequest]


def decided(
    batch: BatchSignals,
    rollouts: Sequence[Rollout],
    texts: Sequence[str | None] | None,
    *,
    server: ServerFacts,
    budgets: StepBudgets,
    step: int | None,
) -> Generator[Request, Any, BatchSignals]:
    """Lets the judge of each signal that has a cascade decide on the rollouts where its probe is unsure: a generator that yields each
    request, is sent the answer, and returns the batch with the decisions.

    Args:
        batch: the scores of the ``n`` rollouts.
        rollouts: the rollouts.
        texts: the ``n`` texts of the completions, where a trainer has them; ``None`` = the server is asked.
        server: description of the server.
        budgets: how many rollouts were asked about before.
        step: the training step.

    Raises:
        JudgeError: there is no verdict on a rollout, and the cascade's ``on_failure`` is ``"raise"``.
    """
    signals = []
    for values in batch.signals:
        if values.bound.signal.cascade is not None:
            values = yield from _decided_signal(values, values.bound.signal.cascade, batch, rollouts, texts, server, budgets, step)
        signals.append(values)
    return replace(batch, signals=tuple(signals))


def _decided_signal(
    values: SignalValues,
    cascade: Cascade,
    batch: BatchSignals,
    rollouts: Sequence[Rollout],
    texts: Sequence[str | None] | None,
    server: ServerFacts,
    budgets: StepBudgets,
    step: int | None,
) -> Generator[Request, Any, SignalValues]:
    bound, judge = values.bound, cascade.judge
    distance = np.abs(values.values - bound.threshold)
    unsure = [index for index, value in enumerate(values.values) if cascade.is_unsure(float(value), bound.threshold)]
    unsure.sort(key=lambda index: float(distance[index]))
    asked = unsure[: budgets.take(bound.signal.name, step, len(unsure), cascade.budget)]
    shown = yield from _texts(asked, values, batch, rollouts, texts, server, judge.prompt.shows_prompt)
    by_text: dict[tuple[str, str], list[int]] = {}  # what was sampled twice is asked about once
    for index, found in shown.items():
        if not isinstance(found, str):
            by_text.setdefault(found, []).append(index)
    questions = [JudgeQuestion(places[0], *found) for found, places in by_text.items()]
    answers: Mapping[int, JudgeAnswer | str] = (yield JudgeRequest(cascade, questions)) if questions else {}
    said: dict[int, JudgeAnswer | str] = {index: found for index, found in shown.items() if isinstance(found, str)}
    said |= {index: answers[places[0]] for places in by_text.values() for index in places}
    _report_failures([answer for answer in said.values() if isinstance(answer, str)], len(asked), bound.signal.name, cascade)
    flags = bound.flags(values.values)
    decisions: list[CascadeDecision | None] = [None] * len(rollouts)
    for index in unsure:
        decisions[index] = _decision(bool(flags[index]), said.get(index, OVER_BUDGET), index in said, cascade)
    return replace(values, decisions=tuple(decisions))


def _decision(probe: bool, answer: JudgeAnswer | str, was_asked: bool, cascade: Cascade) -> CascadeDecision:
    judge = cascade.judge
    if isinstance(answer, JudgeAnswer):
        flagged = probe if answer.verdict == "unsure" else answer.verdict == "yes"
        return CascadeDecision(probe, answer.verdict, flagged, "", judge.model, judge.version_of(answer))
    flagged = probe or (was_asked and cascade.on_failure == "flag")
    return CascadeDecision(probe, "", flagged, answer, judge.model, judge.prompt.version)


def _report_failures(reasons: Sequence[str], asked: int, signal: str, cascade: Cascade) -> None:
    if not reasons:
        return
    problem = f"signal {signal!r}: the judge gave no verdict on {len(reasons)} of {asked} rollouts: {reasons[0]}"
    if cascade.on_failure == "raise":
        raise JudgeError(problem)
    instead = "they count as flagged" if cascade.on_failure == "flag" else "the probe decides"
    logger.warning("%s; %s", problem, instead)


def _texts(
    indices: Sequence[int],
    values: SignalValues,
    batch: BatchSignals,
    rollouts: Sequence[Rollout],
    texts: Sequence[str | None] | None,
    server: ServerFacts,
    with_prompt: bool,
) -> Generator[StreamRequest, Any, dict[int, tuple[str, str] | str]]:
    """Returns the texts of prompt and completion of some rollouts, or why there are none; what a trainer has as token ids alone the server
    decodes.
    """
    found: dict[int, tuple[str, str] | str] = {}
    unknown = []
    for index in indices:
        prompt = text_of(rollouts[index].prompt) if with_prompt else ""
        completion = text_of(rollouts[index].completion)
        if completion is None and texts is not None:
            completion = texts[index]
        known = batch.answers.of_rollout(index, values.bound.signal.mask)  # type: ignore[arg-type] # parsed when the signal was made
        if known is not None and known.completion_texts is not None and known.prompt_texts is not None:  # as the record asks for them
            prompt = "".join(known.prompt_texts) if prompt is None else prompt
            completion = "".join(known.completion_texts) if completion is None else completion
        if prompt is None or completion is None:
            unknown.append((index, prompt, completion))
        else:
            found[index] = prompt, completion
    if not unknown:
        return found
    options: ScoreOptions = {
        "probes": [values.bound.probe],
        "return_token_texts": True,
        "expected_model_fingerprint": server.info.model.fingerprint,
    }
    groups = [RolloutGroup(rollouts[index].prompt, [rollouts[index].completion]) for index, _, _ in unknown]
    try:
        answers = yield StreamRequest(groups, StreamWindow(len(groups), server.info.limits.max_request_tokens), options)
    except ProbescoreError as error:
        return found | {index: f"the server gives no text of it: {error}" for index, _, _ in unknown}
    found |= {index: _NO_TEXT for index, _, _ in unknown}
    for answer in answers:
        index, prompt, completion = unknown[answer.group_index]
        scores = answer.scores
        if scores.status is CompletionStatus.OK and scores.completion_texts is not None and scores.prompt_texts is not None:
            found[index] = (
                "".join(scores.prompt_texts) if prompt is None else prompt,
                "".join(scores.completion_texts) if completion is None else completion,
            )
    return found
