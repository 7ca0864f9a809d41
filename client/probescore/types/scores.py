"""Defines the content of a server's response: the scores of rollouts, the probes that gave them, and the work done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from probescore.types.calibrations import UnmetCondition
from probescore.types.probes import ScoredProbe, score_keys
from probescore.types.readings import FROZEN, Reading
from probescore.types.shown import shown_table, shown_text, shown_tokens


class CompletionStatus(str, Enum):
    """Enumeration of the outcomes of scoring a completion, or of reading its activations.

    ``NON_FINITE`` means that the model or a probe computed a number that is not finite. ``OVERFLOW``, of activations only, means that a
    number is too large for the format in which the activations were to be sent.
    """

    OK = "ok"
    NON_FINITE = "non_finite"
    OVERFLOW = "overflow"


@dataclass(frozen=True, eq=False)
class ProbeScores:
    """Scores that one probe has given to one completion.

    Attributes:
        reduced: ``(1 + spans, reductions, labels)`` float32 in the probe's unit. Row 0 is the whole scope (the scored part of the rollout)
            under the mask; the following rows are the spans in the request's order. NaN = the selection was empty. For a probe that scores
            rollouts the middle axis has length 1.
        tokens: ``(tokens in scope, labels)`` float32; row *i* is the score at the position whose input is token *i*. ``None`` unless token
            scores were requested.
        unmet: conditions of the probe's calibrations (thresholds with the data on which they were found) that the completion does not meet,
            so that the thresholds are not known to hold for it; always empty for a follow-up (token ids appended to a completion).
    """

    reduced: NDArray[np.float32]
    tokens: NDArray[np.float32] | None = None
    unmet: tuple[UnmetCondition, ...] = ()

    @property
    def value(self) -> float | None:
        """Returns a probe's score of the whole scope (the scored part of the rollout), for the first reduction and the first label;
        ``None`` if no token was selected.
        """
        return self.at()

    def at(self, span: int = 0, reduction: int = 0, label: int = 0) -> float | None:
        """Returns a probe's score of one span of a completion (or of the whole scored part), reduced to one number by one reduction, for
        one label. Span, reduction and label are given by their indices. Returns ``None`` if the span selects no token.
        """
        number = float(self.reduced[span, reduction, label])
        return None if np.isnan(number) else number


@dataclass(frozen=True, eq=False)
class ReadingScores:
    """Scores of one completion by all probes on another reading than the frozen one, such as the policy's own weights.

    Attributes:
        status: whether the completion could be scored on this reading.
        scores: a dictionary as ``CompletionScores.scores``; empty when ``status`` is not ``OK``.
        status_message: reason why the completion could not be scored; empty otherwise.
    """

    status: CompletionStatus
    scores: Mapping[str, ProbeScores]
    status_message: str = ""

    def __getitem__(self, probe: str) -> ProbeScores:
        return _scores_of(probe, self.status, self.scores, self.status_message)


@dataclass(frozen=True, eq=False)
class CompletionScores:
    """Scores of one completion by all probes.

    Attributes:
        id: the completion's id, as it was sent.
        status: whether the completion could be scored on the frozen model.
        scores: a dictionary of scores of the frozen model's activations, never of another reading's, keyed by the probe's name, or by
            ``name@version`` if several versions of one probe were applied; empty when ``status`` is not ``OK``, and when the request named
            readings without ``frozen``.
        status_message: reason why the completion could not be scored; empty otherwise.
        prompt_ids: ``(P,)`` int32, only if requested (never on a follow-up).
        completion_ids: ``(T,)`` int32, only if requested.
        inexact_ids: whether some token ids were made from text by the server; such ids may differ from the ids that the policy sampled.
        follow_ups: scores of each follow-up (token ids appended to the completion), in the request's order.
        prompt_texts: the prompt's ``P`` tokens as text, for people, only if requested (never on a follow-up).
        completion_texts: the completion's ``T`` tokens as text, for people, only if requested.
        readings: a dictionary, keyed by the reading's name, of the scores on each other reading that the request named.
    """

    id: str
    status: CompletionStatus
    scores: Mapping[str, ProbeScores]
    status_message: str = ""
    prompt_ids: NDArray[np.int32] | None = None
    completion_ids: NDArray[np.int32] | None = None
    inexact_ids: bool = False
    follow_ups: tuple[CompletionScores, ...] = ()
    prompt_texts: tuple[str, ...] | None = None
    completion_texts: tuple[str, ...] | None = None
    readings: Mapping[str, ReadingScores] = field(default_factory=dict)

    def __getitem__(self, probe: str) -> ProbeScores:
        return _scores_of(probe, self.status, self.scores, self.status_message)

    def _repr_html_(self) -> str:
        """Returns what a notebook shows: the scores of the whole completion on each reading, and its tokens coloured by each probe that
        gave scores of tokens, where the request asked for texts.
        """
        readings = {FROZEN: self.scores} | {name: each.scores for name, each in self.readings.items()}
        rows = [(probe, reading, each.value) for reading, scores in readings.items() for probe, each in scores.items()]
        note = "" if self.status is CompletionStatus.OK else self.status_message or self.status.value
        parts = [shown_table(["probe", "reading", "score"], rows, note)]
        pieces = self.completion_texts
        for reading, scores in readings.items():
            for probe, each in scores.items():
                if pieces is not None and each.tokens is not None and len(each.tokens) == len(pieces):
                    parts.append(f"<p>{shown_text(f'{probe} on {reading}')}</p>{shown_tokens(pieces, each.tokens[:, 0].tolist())}")
        return "".join(parts)

    def on(self, reading: str) -> CompletionScores | ReadingScores:
        """Returns the completion's scores on a reading: this object itself for ``frozen``, and an entry of ``readings`` otherwise.

        Raises:
            KeyError: the request did not name the reading.
        """
        if reading == FROZEN:
            return self
        if reading not in self.readings:
            raise KeyError(f"no reading {reading!r} in this answer; it has {', '.join(map(repr, self.readings)) or 'none but frozen'}")
        return self.readings[reading]


def _scores_of(probe: str, status: CompletionStatus, scores: Mapping[str, ProbeScores], message: str) -> ProbeScores:
    if status is not CompletionStatus.OK:
        raise KeyError(f"no scores: {message or status.value}")
    if probe not in scores:
        raise KeyError(f"no probe {probe!r} in this answer; it has {', '.join(map(repr, scores)) or 'none'}")
    return scores[probe]


@dataclass(frozen=True)
class Usage:
    """Counts of the work that the server did for a response.

    The three token counts add up to the tokens of every prompt (once per completion), completion and follow-up (token ids appended to a
    completion), once for each reading that was computed.

    Attributes:
        tokens_computed: tokens that ran through the model.
        tokens_shared: tokens computed once for several completions, which count once for each completion after the first.
        tokens_cached: tokens taken from the key-value cache of earlier work.
        queue_seconds: seconds from the admission of the request until computation of its first completion began on the device (such as
            ``cuda:0``).
        compute_seconds: seconds of computation of the device batches that contained completions of the request.
    """

    tokens_computed: int = 0
    tokens_shared: int = 0
    tokens_cached: int = 0
    queue_seconds: float = 0.0
    compute_seconds: float = 0.0

    @property
    def tokens(self) -> int:
        """Returns the number of tokens that would be computed if the model read each rollout separately: the sum of computed, shared and
        cached tokens.
        """
        return self.tokens_computed + self.tokens_shared + self.tokens_cached

    @classmethod
    def total(cls, usages: Iterable[Usage]) -> Usage:
        """Returns the sum of several counts of work, number by number."""
        usages = list(usages)
        return cls(**{each.name: sum(getattr(usage, each.name) for usage in usages) for each in fields(cls)})


@dataclass(frozen=True)
class ScoringInfo:
    """Description of the model, tokenizer and probes that produced the scores of a response, and of the work done.

    Attributes:
        model_fingerprint: fingerprint of the model that was run, ``"sha256:…"``.
        tokenizer_fingerprint: fingerprint of the server's tokenizer, ``"sha256:…"``; empty if the server has no tokenizer.
        probes: the probes that were applied.
        usage: the work done.
        readings: the readings that the request named, in its order; empty = it named none, and the scores are the frozen model's.
    """

    model_fingerprint: str
    tokenizer_fingerprint: str
    probes: tuple[ScoredProbe, ...]
    usage: Usage = field(default_factory=Usage)
    readings: tuple[Reading, ...] = ()


@dataclass(frozen=True, eq=False)
class GroupScores:
    """Scores of one rollout group, in the order of the group's completions."""

    completions: tuple[CompletionScores, ...]

    def __getitem__(self, index: int) -> CompletionScores:
        return self.completions[index]

    def __iter__(self) -> Iterator[CompletionScores]:
        return iter(self.completions)

    def __len__(self) -> int:
        return len(self.completions)


@dataclass(frozen=True, eq=False)
class ScoreResult:
    """Result of ``score``: the scores of each rollout group in the request's order, and a description of the model and probes that produced
    the scores.
    """

    groups: tuple[GroupScores, ...]
    info: ScoringInfo

    def values(self, probe: str, *, reading: str = FROZEN, reduction: int = 0, label: int = 0) -> NDArray[np.float32]:
        """Returns one probe's score of each completion, group after group, as ``(completions,)`` float32 in the probe's unit.

        The number is NaN, never 0, where no token was selected or the completion could not be scored (see ``CompletionScores.status``).

        Args:
            probe: the probe's name, or ``name@version`` if several versions of one probe were applied.
            reading: whose activations were read: ``frozen``, or another reading that the request named.
            reduction: index of the reduction.
            label: index of the probe's label.

        Raises:
            KeyError: the answer has no such probe, or the request did not name the reading.
        """
        named = [each.name for each in self.info.readings] or [FROZEN]
        if reading not in named:
            raise KeyError(f"no reading {reading!r} in this answer; it has {', '.join(map(repr, named))}")
        found = (scored.on(reading) for group in self.groups for scored in group)
        numbers = (scores[probe].at(0, reduction, label) if scores.status is CompletionStatus.OK else None for scores in found)
        return np.array([np.nan if number is None else number for number in numbers], np.float32)


@dataclass(frozen=True, eq=False)
class StreamedCompletion:
    """One result of ``score_stream``: the scores of completion ``completion_index`` of rollout group ``group_index``. Both indices start at
    0 and follow the order in which groups and completions were given.

    ``info.usage`` counts the work for all completions that came in the same response message.
    """

    group_index: int
    completion_index: int
    scores: CompletionScores
    info: ScoringInfo


def with_unmet_conditions(completions: Sequence[CompletionScores], probes: Sequence[ScoredProbe]) -> list[CompletionScores]:
    """Returns completions' scores, to which are added the conditions of calibrations (thresholds with the data on which they were found)
    that each completion does not meet. The conditions are taken from ``outside_calibration`` of the probes that scored the completions.

    Args:
        completions: the scores of every completion of the response, in the order of the response.
        probes: descriptions of the probes in that response.
    """
    unmet: dict[int, dict[str, tuple[UnmetCondition, ...]]] = {}
    for key, probe in zip(score_keys(probes), probes, strict=True):
        for outside in probe.outside_calibration:
            for place in outside.completions:
                of_place = unmet.setdefault(place, {})
                of_place[key] = (*of_place.get(key, ()), outside.unmet)
    return [_noted(scored, unmet[place]) if place in unmet else scored for place, scored in enumerate(completions)]


def _noted(scored: CompletionScores, unmet: Mapping[str, tuple[UnmetCondition, ...]]) -> CompletionScores:
    scores = {key: replace(scores, unmet=unmet[key]) if key in unmet else scores for key, scores in scored.scores.items()}
    return replace(scored, scores=scores)
