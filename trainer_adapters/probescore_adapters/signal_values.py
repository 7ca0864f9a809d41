"""Obtains the probes' scores of rollouts for all signals (rules from probe scores to rewards), without any input or output.

``score_batch`` is a generator: the generator yields each request to the server, and the caller sends the scores, or throws the error, into
the generator. For this reason the same code serves synchronous trainers and event loops.
"""

from __future__ import annotations

import math
import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from probescore import (
    CompletionScores,
    CompletionStatus,
    InvalidRequestError,
    MismatchError,
    OutOfMemoryError,
    ProbeInfo,
    ProbeScores,
    RolloutGroup,
    ScoreOptions,
    ServerError,
    ServerInfo,
    StreamedCompletion,
    StreamWindow,
    Usage,
    check_groups,
)
from probescore.reductions import Reduction
from probescore.types import FROZEN, Reading
from probescore_adapters.errors import ProbeReplaced
from probescore_adapters.rollouts import GroupedRollouts, Mask, Rollout, distinct_masks
from probescore_adapters.signals import BoundSignal, Floats, Mode, PinnedProbe, ProbeSignal

# The server lost a worker twice with a rollout: it can be scored no more than one that is too long.
_LOST_TWICE = "WORKER_LOST_TWICE"
# No rollout can be blamed for these: it would be the same for each.
_SETUP_REASONS = {"BOS", "NO_TOKENIZER", "NO_CHAT_TEMPLATE"}
_PLACE = re.compile(r"groups\[(?P<group>\d+)\]\.(?:prompt|completions\[(?P<completion>\d+)\])(?:\.(?:ids|text|chat)\b.*)?")


@dataclass(frozen=True)
class ServerFacts:
    """The part of a server's description that signals (rules from probe scores to rewards) depend on: the model, the limits, and the loaded
    probes.
    """

    info: ServerInfo
    probes: tuple[ProbeInfo, ...]


@dataclass(frozen=True)
class StreamRequest:
    """Request to score groups of rollouts, with the arguments of the client's method ``score_stream``; the reply is a list of all scored
    completions.
    """

    groups: list[RolloutGroup]
    window: StreamWindow
    options: ScoreOptions


@dataclass(frozen=True, eq=False)
class MaskedTokens:
    """Per-token scores of a completion, ``(T,)`` float64, and a mask ``(T,)`` of the tokens that count. Both arrays are empty if the
    completion could not be scored.
    """

    scores: Floats
    mask: NDArray[np.bool_]

    @classmethod
    def empty(cls) -> MaskedTokens:
        """Returns the token scores and the mask of a rollout that could not be scored, both empty."""
        return cls(np.zeros(0), np.zeros(0, np.bool_))

    @property
    def mean(self) -> float:
        """Returns the mean of a probe's scores of those tokens of a completion that count; NaN if no token counts."""
        return float(self.scores[self.mask].mean()) if self.mask.any() else math.nan


@dataclass(frozen=True)
class SignalValues:
    """Scores that the probe of one signal (a rule from a probe's scores to rewards) gave to a batch of ``n`` rollouts.

    Attributes:
        bound: the signal and its probe.
        values: ``(n,)`` float64, one reduced score for each rollout; NaN where a rollout is unscorable.
        tokens: per-token scores of each rollout, only for signals of mode ``dense``.
        unmet: for each rollout, the conditions of the signal's calibration that it does not meet, so that the threshold is not known to
            hold for it; ``None`` if nobody wrote down what the threshold was found on, or it is the signal's own.
        on_frozen: ``(n,)`` float64, the scores of the same rollouts on the frozen model; ``None`` unless the signal logs drift.
    """

    bound: BoundSignal
    values: Floats
    tokens: tuple[MaskedTokens, ...] | None = None
    unmet: tuple[tuple[str, ...], ...] | None = None
    on_frozen: Floats | None = None


@dataclass(frozen=True)
class FurtherScores:
    """What the server is asked for beyond what signals (rules from probe scores to rewards) need, for the record of the training run.

    Attributes:
        reductions: reductions (from per-token scores to one number per rollout) that are computed beside those of the signals.
        tokens: whether the per-token scores of every probe are sent back.
        texts: whether the tokens are sent back as text.
    """

    reductions: tuple[Reduction, ...] = ()
    tokens: bool = False
    texts: bool = False


@dataclass(frozen=True, eq=False)
class BatchAnswers:
    """The server's answers for a batch of rollouts, from which the scores for signals (rules from probe scores to rewards) are taken.

    Attributes:
        found: a dictionary of the scores of each rollout, keyed by the index of the rollout and that of the mask.
        masks: the distinct masks (the tokens that count) under which rollouts were scored.
        reductions: the reductions of the scores, in the order of the answers.
        readings: names of the readings (whose activations the probes read) that were asked for.
    """

    found: Mapping[tuple[int, int], CompletionScores] = field(default_factory=dict)
    masks: tuple[Mask, ...] = ()
    reductions: tuple[Reduction, ...] = ()
    readings: tuple[str, ...] = ()

    def of_rollout(self, index: int, mask: Mask) -> CompletionScores | None:
        """Returns the scores of a rollout under a mask (the tokens that count); ``None`` if it could not be scored at all."""
        return self.found.get((index, self.masks.index(mask)))

    def of_probe(self, index: int, bound: BoundSignal, reading: str) -> ProbeScores | None:
        """Returns the scores of a rollout by a signal's probe on a reading (whose activations it reads); ``None`` if it has none there."""
        found = self.of_rollout(index, bound.signal.mask)  # type: ignore[arg-type] # parsed when the signal was made
        if found is None or reading not in self.readings:
            return None
        on = found.on(reading)
        if on.status is not CompletionStatus.OK:
            return None
        name = bound.probe.rpartition("@")[0]
        return on.scores[name] if name in on.scores else on.scores[bound.probe]


@dataclass(frozen=True)
class BatchSignals:
    """Scores that the probes of all signals (rules from probe scores to rewards) gave to a batch of ``n`` rollouts.

    Attributes:
        signals: the scores for each signal, in the order of the signals.
        problems: a dictionary keyed by the index of a rollout that could not be scored, with the reason.
        usage: counts of the server's work, in tokens and seconds.
        inexact_ids: ``(n,)`` booleans, true = the server made some token ids from text.
        readings: a dictionary, keyed by name, of the readings (whose activations the probes read) that gave the scores; empty if only the
            frozen model did.
        missing: a dictionary, keyed by the name of a reading that could not be asked for, of the reason; the scores of its signals are NaN.
        answers: the server's answers.
    """

    signals: tuple[SignalValues, ...]
    problems: dict[int, str] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)
    inexact_ids: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    readings: Mapping[str, Reading] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    answers: BatchAnswers = field(default_factory=BatchAnswers)


def score_batch(
    rollouts: Sequence[Rollout],
    signals: Sequence[BoundSignal],
    server: ServerFacts,
    options: ScoreOptions,
    *,
    by_name: bool = False,
    missing: Mapping[str, str] | None = None,
    further: FurtherScores | None = None,
) -> Generator[StreamRequest, list[StreamedCompletion], BatchSignals]:
    """Scores rollouts for every signal (rule from probe scores to rewards): a generator that yields each request to the server, is sent the
    scored completions, and returns the scores for each signal.

    One request asks for the readings (whose activations the probes read) of all signals. A rollout that the server or its limits refuse is
    left out and named in ``problems``; the other rollouts are sent again.

    Args:
        rollouts: rollouts, in any number, that ``Rollout.checked`` has checked.
        signals: the signals, bound to the server's probes.
        server: description of the server's model, limits and probes.
        options: options of ``score_stream`` in addition to the options that follow from the signals.
        by_name: whether the server is asked for the probes as the signals name them; else for the versions that they are bound to.
        missing: names of readings that are not asked for, with reasons; their signals have no scores. ``None`` = none.
        further: what is asked for beyond what the signals need; ``None`` = nothing.

    Raises:
        ProbeReplaced: a probe that has scored the rollouts is not the one that its signal is bound to.
        MismatchError: two versions of one reading have scored the rollouts; the reason is ``READING_CHANGED``.
    """
    pending = _PendingBatch(rollouts, signals, server, options, by_name, missing or {}, further or FurtherScores())
    yield from pending.request_all()
    return pending.values()


class _PendingBatch:
    """State of one batch of rollouts while the generator ``score_batch`` obtains its probe scores."""

    def __init__(
        self,
        rollouts: Sequence[Rollout],
        signals: Sequence[BoundSignal],
        server: ServerFacts,
        options: ScoreOptions,
        by_name: bool,
        missing: Mapping[str, str],
        further: FurtherScores,
    ) -> None:
        asked = [bound.signal.probe if by_name else bound.probe for bound in signals]
        self._rollouts = rollouts
        self._signals = signals
        self._server = server
        self._masks = distinct_masks([bound.signal for bound in signals])
        reductions = [bound.reduction for bound in signals if bound.reduction is not None]
        self._reductions = list(dict.fromkeys([*reductions, *(further.reductions if reductions else ())]))
        by_token = {name: bound for name, bound in zip(asked, signals) if bound.signal.mode is Mode.DENSE or further.tokens}  # noqa: B905
        self._options: ScoreOptions = {
            **options,
            "probes": list(dict.fromkeys(asked)),
            "reductions": self._reductions,
            "token_scores": list(by_token),
            "expected_model_fingerprint": server.info.model.fingerprint,
        }
        if further.texts:
            self._options["return_token_texts"] = True
        self._missing = missing
        self._asked = readings_of([bound.signal for bound in signals if bound.signal.reading not in missing])
        if self._asked != [FROZEN]:  # what a server of any version reads
            self._options["readings"] = self._asked
        self._readings: dict[str, Reading] = {}
        labels = {probe.key: len(probe.labels) for probe in server.probes}
        self._dense_labels = sum(labels[probe] for probe in {bound.probe for bound in by_token.values()})
        self._problems: dict[int, str] = {}
        self._found: dict[tuple[int, int], CompletionScores] = {}
        self._usages: dict[int, Usage] = {}
        self._answers = BatchAnswers()

    def request_all(self) -> Generator[StreamRequest, list[StreamedCompletion], None]:
        if not self._asked:
            return
        self._problems = self._known_problems()
        waiting = [[index for index in range(len(self._rollouts)) if index not in self._problems]]
        while waiting:
            indices = waiting.pop()
            if not indices:
                continue
            request = GroupedRollouts.of(self._rollouts, indices, self._masks)
            try:
                answers = yield StreamRequest(request.groups, self._window(request), self._options)
            except (InvalidRequestError, ServerError) as error:
                blamed = _blamed(request.sent, error) if isinstance(error, InvalidRequestError) or error.reason == _LOST_TWICE else {}
                if not blamed:
                    raise
                self._problems.update(blamed)
                waiting.append([index for index in indices if index not in blamed])
            except OutOfMemoryError as error:
                # it names no rollout: halved until it is alone
                if len(indices) == 1:
                    self._problems[indices[0]] = str(error)
                else:
                    waiting += [indices[: len(indices) // 2], indices[len(indices) // 2 :]]
            else:
                self._check_pinned(answers)
                self._check_readings(answers)
                for answer in answers:
                    self._found[request.sent[answer.group_index][answer.completion_index]] = answer.scores
                    self._usages[id(answer.info)] = answer.info.usage

    def _check_pinned(self, answers: Sequence[StreamedCompletion]) -> None:
        """Checks whether the probes with which the server scored a batch are the versions that the scorer asked for; raises
        ``ProbeReplaced`` if not.
        """
        for info in {id(answer.info): answer.info for answer in answers}.values():
            answered = {probe.key: PinnedProbe(probe.key, probe.graph_sha256, probe.manifest_sha256) for probe in info.probes}
            for bound in self._signals:
                if answered.get(bound.probe) != bound.pin:
                    problem = f"{bound.probe} was replaced: other bytes answered, as {', '.join(answered)}"
                    raise ProbeReplaced("probe", problem, bound.signal.name)

    def _check_readings(self, answers: Sequence[StreamedCompletion]) -> None:
        """Checks whether one version of each reading has scored the whole batch; raises ``MismatchError`` if not."""
        for info in {id(answer.info): answer.info for answer in answers}.values():
            for reading in info.readings:
                first = self._readings.setdefault(reading.name, reading)
                if first.id != reading.id:
                    problem = f"the reading {reading.name} was {first.id} and became {reading.id} while a batch was scored"
                    raise MismatchError(problem, "FAILED_PRECONDITION", "READING_CHANGED")

    def values(self) -> BatchSignals:
        indices = range(len(self._rollouts))
        for (index, _), scores in self._found.items():
            for reading in self._asked:
                on = scores.on(reading)
                if on.status is not CompletionStatus.OK:
                    where = "" if reading == FROZEN else f"on the reading {reading}: "
                    self._problems.setdefault(index, where + (on.status_message or on.status.value))
        self._answers = BatchAnswers(self._found, tuple(self._masks), tuple(self._reductions), tuple(self._asked))
        signals = tuple(self._signal_values(bound) for bound in self._signals)
        return BatchSignals(
            signals,
            self._problems,
            replace(Usage.total(self._usages.values()), queue_seconds=0.0, compute_seconds=0.0),
            np.array([any(self._found[key].inexact_ids for key in [(index, 0)] if key in self._found) for index in indices], np.bool_),
            self._readings,
            self._missing,
            self._answers,
        )

    def _known_problems(self) -> dict[int, str]:
        """Returns the rollouts of a batch that need not be sent to the server, as a dictionary from index to reason: rollouts of which the
        trainer's side or the client already knows that they cannot be scored.
        """
        known = {index: rollout.problem for index, rollout in enumerate(self._rollouts) if rollout.problem}
        passes, most = len(self._asked), self._server.info.limits.max_request_tokens
        for index, rollout in enumerate(self._rollouts):
            # the server's limit on a rollout counts it once, and the one on a request once for each reading
            if passes > 1 and 0 < most < passes * rollout.known_tokens:
                problem = (
                    f"{rollout.known_tokens} tokens on each of {passes} readings; the limit is {most}, the server's max_request_tokens"
                )
                known.setdefault(index, problem)
        try:
            check_groups([RolloutGroup(rollout.prompt, [rollout.completion]) for rollout in self._rollouts], self._server.info)
        except InvalidRequestError as error:
            return {**_blamed([[(index, 0)] for index in range(len(self._rollouts))], error), **known}
        return known

    def _window(self, request: GroupedRollouts) -> StreamWindow:
        limits, labels = self._server.info.limits, self._dense_labels
        # every token's scores are in the answer, and the reduced ones beside them, far fewer
        most = limits.max_request_values // (2 * labels) if limits.max_request_values and labels else limits.max_request_tokens
        return StreamWindow(
            groups_per_call=len(request.groups),
            tokens_per_call=max(1, min(limits.max_request_tokens, most) // len(self._asked)),
            completions_per_call=limits.max_request_rollouts or StreamWindow.completions_per_call,
        )

    def _signal_values(self, bound: BoundSignal) -> SignalValues:
        scored = self._scores(bound, bound.signal.reading)
        if bound.signal.mode is Mode.DENSE:
            tokens = tuple(self._token_scores(index, scores, bound) for index, scores in enumerate(scored))
            return SignalValues(bound, np.array([one.mean for one in tokens], np.float64), tokens)
        on_frozen = None
        if bound.signal.logs_drift:
            on_frozen = self._reduced(self._scores(bound, FROZEN), bound)
        unmet = None
        if bound.calibration is not None and bound.calibration.conditions is not None:
            of_threshold = (bound.calibration.reduction, bound.calibration.label)
            unmet = tuple(
                () if scores is None else tuple(each.condition for each in scores.unmet if (each.reduction, each.label) == of_threshold)
                for scores in scored
            )
        return SignalValues(bound, self._reduced(scored, bound), unmet=unmet, on_frozen=on_frozen)

    def _reduced(self, scored: Sequence[ProbeScores | None], bound: BoundSignal) -> Floats:
        reduction = 0 if bound.reduction is None else self._reductions.index(bound.reduction)
        values = [None if scores is None else scores.at(0, reduction, bound.label) for scores in scored]
        return np.array([np.nan if value is None else value for value in values], np.float64)

    def _scores(self, bound: BoundSignal, reading: str) -> list[ProbeScores | None]:
        return [self._answers.of_probe(index, bound, reading) for index in range(len(self._rollouts))]

    def _token_scores(self, index: int, scores: ProbeScores | None, bound: BoundSignal) -> MaskedTokens:
        if scores is None or scores.tokens is None:
            return MaskedTokens.empty()
        tokens = scores.tokens[:, bound.label].astype(np.float64)
        mask = self._rollouts[index].masked(bound.signal.mask, bound.signal.name)  # type: ignore[arg-type] # parsed when the signal was made
        return MaskedTokens(tokens, np.ones(len(tokens), np.bool_) if mask is None else mask)


def readings_of(signals: Sequence[ProbeSignal]) -> list[str]:
    """Returns the names of the readings (whose activations the probes read) that signals (rules from probe scores to rewards) need, each
    once and ``frozen`` first. A signal that logs drift needs the frozen model's scores beside its own.
    """
    needed = {signal.reading: None for signal in signals}
    if FROZEN in needed or any(signal.logs_drift for signal in signals):
        return [FROZEN, *(name for name in needed if name != FROZEN)]
    return list(needed)


def _blamed(sent: Sequence[Sequence[tuple[int, int]]], error: InvalidRequestError | ServerError) -> dict[int, str]:
    """Returns the rollouts that made the server refuse a request, with reasons; empty if the fault is in the request as a whole or in the
    adapter's configuration.
    """
    blamed: dict[int, str] = {}
    for violation in error.violations:
        place = _PLACE.fullmatch(violation.field)
        if place is None or error.reason in _SETUP_REASONS:
            return {}
        group = sent[int(place["group"])]
        at_fault = group if place["completion"] is None else [group[int(place["completion"])]]
        for index, _ in at_fault:
            blamed.setdefault(index, violation.problem)
    return blamed
