"""Defines the content of a server's response: the scores of rollouts, the probes that gave them, and the work done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from probescore.types.calibrations import UnmetCondition
from probescore.types.probes import ScoredProbe, score_keys


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
class CompletionScores:
    """Scores of one completion by all probes.

    Attributes:
        id: the completion's id, as it was sent.
        status: whether the completion could be scored.
        scores: a dictionary of scores keyed by the probe's name, or by ``name@version`` if several versions of one probe were applied;
            empty when ``status`` is not ``OK``.
        status_message: reason why the completion could not be scored; empty otherwise.
        prompt_ids: ``(P,)`` int32, only if requested (never on a follow-up).
        completion_ids: ``(T,)`` int32, only if requested.
        inexact_ids: whether some token ids were made from text by the server; such ids may differ from the ids that the policy sampled.
        follow_ups: scores of each follow-up (token ids appended to the completion), in the request's order.
        prompt_texts: the prompt's ``P`` tokens as text, for people, only if requested (never on a follow-up).
        completion_texts: the completion's ``T`` tokens as text, for people, only if requested.
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

    def __getitem__(self, probe: str) -> ProbeScores:
        if self.status is not CompletionStatus.OK:
            raise KeyError(f"no scores: {self.status_message or self.status.value}")
        if probe not in self.scores:
            raise KeyError(f"no probe {probe!r} in this answer; it has {', '.join(map(repr, self.scores)) or 'none'}")
        return self.scores[probe]


@dataclass(frozen=True)
class Usage:
    """Counts of the work that the server did for a response.

    The three token counts add up to the tokens of every prompt (once per completion), completion and follow-up (token ids appended to a
    completion).

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
    """

    model_fingerprint: str
    tokenizer_fingerprint: str
    probes: tuple[ScoredProbe, ...]
    usage: Usage = field(default_factory=Usage)


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

    def values(self, probe: str, *, reduction: int = 0, label: int = 0) -> NDArray[np.float32]:
        """Returns one probe's score of each completion, group after group, as ``(completions,)`` float32 in the probe's unit.

        The number is NaN, never 0, where no token was selected or the completion could not be scored (see ``CompletionScores.status``).
        """
        numbers = (
            scored[probe].at(0, reduction, label) if scored.status is CompletionStatus.OK else None
            for group in self.groups
            for scored in group
        )
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
