"""Prepares scored rollouts to be shown to people: the tokens as visible text, their scores, and the scale of the colours.

What is prepared here is shown on a terminal or on an HTML page.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from probescore import (
    Calibration,
    Completion,
    CompletionScores,
    CompletionStatus,
    ProbeInfo,
    ProbeScores,
    Reading,
    ReadingScores,
    Reduction,
    ScoredProbe,
    ScoreUnit,
    Span,
)
from probescore.types import FROZEN, score_keys
from probescore_server.cli.common.visible import visible

_NOTHING_TO_SEE = "·"


@dataclass(frozen=True)
class Series:
    """Value object with one label of one probe on one reading (whose activations the probe read), or on the difference between two
    readings, by whose scores the tokens of rollouts can be coloured.

    Attributes:
        name: the name of probe and label, followed by that of the reading if others than the frozen one are shown.
        probe: the probe's name (or ``name@version``), followed by the label if the probe has several labels.
        key: the probe's key in ``CompletionScores.scores``: its name, or ``name@version``.
        label: index of the label in the probe's labels.
        unit: unit of the scores: logit, probability or value.
        reductions: names of the reductions of token scores (such as ``mean``), in the order of the scores; empty for a probe that scores
            rollouts as a whole.
        calibration: the calibrated threshold for the first reduction, if the probe has one; it holds for the frozen reading alone.
        centre: the score at which the colour scale changes colour: the probe's threshold if it has one, else 0.5 for probabilities and 0
            otherwise; of a difference 0.
        reading: the reading's name.
        base: the name of the reading whose scores are subtracted; empty unless this is a difference.
    """

    name: str
    probe: str
    key: str
    label: int
    unit: ScoreUnit
    reductions: tuple[str, ...]
    calibration: Calibration | None
    centre: float = 0.0
    reading: str = FROZEN
    base: str = ""

    @property
    def read(self) -> str:
        """Returns what is shown for the reading, or the difference between two."""
        return f"{self.reading} − {self.base}" if self.base else self.reading


@dataclass(frozen=True)
class ShownToken:
    """Value object with a token to show: its id, its text, and whether the rollout's mask lets the token count in scores."""

    id: int
    text: str
    counts: bool = True


@dataclass(frozen=True, eq=False)
class SeriesScores:
    """Value object with the scores of one rollout for one series (label of a probe).

    Attributes:
        reduced: a dictionary keyed by the name of a span (range of tokens; ``""`` = all scored tokens), with one number per reduction of
            token scores; ``None`` = the span has no token that counts.
        tokens: one score for each token of the completion, ``(T,)`` float32; ``None`` if the probe scores none of these tokens.
        flagged: whether the first reduced score of all scored tokens reaches the probe's threshold; ``None`` if there is no score or no
            threshold.
        outside: in words, how the rollout is unlike those on which that threshold was found; empty if it is like them, or nobody knows.
    """

    reduced: Mapping[str, tuple[float | None, ...]]
    tokens: NDArray[np.float32] | None
    flagged: bool | None
    outside: tuple[str, ...] = ()

    @property
    def value(self) -> float | None:
        """Returns a rollout's score for one label of a probe: the first of the requested reductions, such as the mean, over all tokens that
        were scored; ``None`` if there is no score.
        """
        return self.reduced[""][0]


@dataclass(frozen=True, eq=False)
class RolloutView:
    """Value object with a scored rollout, or a scored follow-up (token ids appended to a completion), ready to be shown.

    Attributes:
        title: the rollout's place in the input, and the completion's id.
        context: the tokens before the completion or follow-up: the prompt, and for a follow-up also the completion that it is appended to.
        tokens: the tokens of the completion or follow-up.
        problem: reason why the rollout has no scores on any reading; empty if there are scores.
        inexact: whether some token ids come from text, and so may differ from the ids that were generated.
        spans: named half-open ranges of ``tokens`` that were scored separately.
        scores: a dictionary of scores keyed by the name of the series (label of a probe on a reading); without those on readings that have
            none.
        label: the label that the input gives to the completion, as text; empty if there is none.
        unscored: a dictionary from the names of readings that have no scores to the reasons.
    """

    title: str
    context: tuple[ShownToken, ...]
    tokens: tuple[ShownToken, ...]
    problem: str
    inexact: bool
    spans: tuple[Span, ...] = ()
    scores: Mapping[str, SeriesScores] = field(default_factory=dict)
    label: str = ""
    unscored: Mapping[str, str] = field(default_factory=dict)


def series_of(probes: Sequence[ScoredProbe], loaded: Iterable[ProbeInfo], readings: Sequence[Reading] = ()) -> tuple[Series, ...]:
    """Returns every series (label of a probe on a reading, by whose scores tokens are coloured) of a response, probe after probe: on each
    reading, then the differences between the first reading and the others.

    Args:
        probes: descriptions of the probes that have scored the rollouts.
        loaded: descriptions of the server's loaded probes, with their calibrations.
        readings: descriptions of the readings that the request named; empty = the frozen one.
    """
    calibrations = {(each.name, each.version): each.calibrations for each in loaded}
    first, *others = names = [each.name for each in readings] or [FROZEN]
    if FROZEN in others:
        first, others = FROZEN, [name for name in names if name != FROZEN]
    pairs = [*((name, "") for name in names), *((name, first) for name in others)]
    every = []
    for key, probe in zip(score_keys(probes), probes, strict=True):
        for index, label in enumerate(probe.labels):
            named = key if len(probe.labels) == 1 else f"{key} · {visible(label)}"
            calibration = _calibration(calibrations.get((probe.name, probe.version), ()), probe, label)
            usual = 0.5 if probe.unit is ScoreUnit.PROBABILITY else 0.0
            centre = usual if calibration is None else calibration.threshold
            of_probe = Series(named, named, key, index, probe.unit, tuple(map(str, probe.reductions)), calibration, centre)
            every += [of_probe] if names == [FROZEN] else [_on(of_probe, reading, base) for reading, base in pairs]
    return tuple(every)


def _on(series: Series, reading: str, base: str) -> Series:
    """Returns the series of the same label of a probe on another reading, or of a difference between two readings."""
    moved = replace(series, reading=reading, base=base, centre=0.0 if base else series.centre)
    return replace(moved, name=f"{series.probe} · {moved.read}", calibration=series.calibration if moved.read == FROZEN else None)


def _calibration(calibrations: Sequence[Calibration], probe: ScoredProbe, label: str) -> Calibration | None:
    first: Reduction | None = probe.reductions[0] if probe.reductions else None
    return next((found for found in calibrations if found.reduction == first and found.label in ("", label)), None)


def rollout_views(
    title: str, completion: Completion, scored: CompletionScores, series: Sequence[Series], label: str = ""
) -> list[RolloutView]:
    """Returns the view (what is shown to people) of a scored completion, and then of its follow-ups (token ids appended to the completion).

    Args:
        title: the completion's place in the input.
        completion: the completion as it was sent.
        scored: the completion's scores, with token ids; the tokens' texts are shown if there are any.
        series: the series (labels of probes) to show.
        label: label that the input gives to the completion.
    """
    prompt = _tokens(scored.prompt_ids, scored.prompt_texts, None)
    return _views(title, prompt, completion, scored, series, visible(label))


def _views(
    title: str, context: tuple[ShownToken, ...], completion: Completion, scored: CompletionScores, series: Sequence[Series], label: str = ""
) -> list[RolloutView]:
    tokens = _tokens(scored.completion_ids, scored.completion_texts, completion.mask)
    named = f"{title} · {visible(scored.id)}" if scored.id else title
    answers = {entry.reading: scored.on(entry.reading) for entry in series}
    unscored = {
        name: visible(own.status_message) or own.status.value for name, own in answers.items() if own.status is not CompletionStatus.OK
    }
    problem = "; ".join(dict.fromkeys(unscored.values())) if len(unscored) == len(answers) else ""
    scores = {
        entry.name: _series_scores(entry, completion, answers, len(tokens))
        for entry in series
        if entry.reading not in unscored and entry.base not in unscored
    }
    spans = tuple(Span(visible(span.name), span.start, span.end) for span in completion.spans)
    views = [RolloutView(named, context, tokens, problem, scored.inexact_ids, spans, scores, label, unscored)]
    for index, (follow_up, answer) in enumerate(zip(completion.follow_ups, scored.follow_ups, strict=True), 1):
        views += _views(f"{title} · follow-up {index}", context + tokens, follow_up, answer, series)
    return views


def _tokens(ids: NDArray[np.int32] | None, texts: Sequence[str] | None, mask: object) -> tuple[ShownToken, ...]:
    if ids is None:
        return ()
    counts = np.ones(len(ids), bool) if mask is None else np.asarray(mask, bool)
    pieces = [f"[{token_id}]" for token_id in ids] if texts is None else [visible(text) or _NOTHING_TO_SEE for text in texts]
    return tuple(ShownToken(int(token_id), piece, bool(count)) for token_id, piece, count in zip(ids, pieces, counts, strict=True))


def _series_scores(
    series: Series, completion: Completion, answers: Mapping[str, CompletionScores | ReadingScores], tokens: int
) -> SeriesScores:
    of_probe = answers[series.reading].scores[series.key]
    if series.base:
        of_probe = _difference(of_probe, answers[series.base].scores[series.key])
    names = ["", *(visible(span.name) for span in completion.spans)]
    reduced = {
        name: tuple(of_probe.at(row, reduction, series.label) for reduction in range(of_probe.reduced.shape[1]))
        for row, name in enumerate(names)
    }
    # A probe that appends a follow-up of its own scores the follow-up's tokens, not these.
    per_token = of_probe.tokens[:, series.label] if of_probe.tokens is not None and len(of_probe.tokens) == tokens else None
    value = reduced[""][0]
    flagged = None if value is None or series.calibration is None else value >= series.calibration.threshold
    return SeriesScores(reduced, per_token, flagged, () if flagged is None else _outside(series, of_probe))


def _difference(one: ProbeScores, other: ProbeScores) -> ProbeScores:
    tokens = None if one.tokens is None or other.tokens is None else one.tokens - other.tokens
    return ProbeScores(one.reduced - other.reduced, tokens)


def _outside(series: Series, of_probe: ProbeScores) -> tuple[str, ...]:
    threshold = series.calibration
    if threshold is None:
        return ()
    of_threshold = (each for each in of_probe.unmet if (each.reduction, each.label) == (threshold.reduction, threshold.label))
    return tuple(visible(each.condition).replace("_", " ") for each in of_threshold)


@dataclass(frozen=True)
class ColourScale:
    """Linear mapping from scores to a diverging colour scale: 0 at the score ``centre``, and ±1 at a distance of ``reach`` or more from
    ``centre``.
    """

    centre: float
    reach: float

    @classmethod
    def of(cls, series: Series, views: Iterable[RolloutView], alike: Iterable[Series] = ()) -> ColourScale:
        """Returns the colour scale for the scores of one label of a probe. The scale covers all but the outermost 2% of the scores shown.

        Without this rule one outlier would make the colours of all other scores pale.

        Args:
            series: the label of a probe.
            views: the rollouts that are shown.
            alike: other series for which the scale must hold, too.
        """
        names = {series.name, *(entry.name for entry in alike)}
        shown = [scores for view in views for name, scores in view.scores.items() if name in names]
        values = np.array([scores.value for scores in shown if scores.value is not None], np.float32)
        distances = np.abs(np.concatenate([values, *(scores.tokens for scores in shown if scores.tokens is not None)]) - series.centre)
        distances = distances[np.isfinite(distances)]
        reach = float(np.quantile(distances, 0.98)) if len(distances) else 0.0
        return cls(series.centre, reach if reach > 0 else 1.0)

    def position(self, score: float) -> float:
        """Returns a score's position on a diverging colour scale, from -1 to 1 with 0 at the scale's centre; 0 for NaN."""
        return 0.0 if np.isnan(score) else float(np.clip((score - self.centre) / self.reach, -1, 1))


def colour_scales(series: Sequence[Series], views: Sequence[RolloutView]) -> dict[str, ColourScale]:
    """Returns the colour scale of each series by its name. A probe's scores on all readings have the same scale, so that a colour means one
    score; differences have one of their own.
    """
    return {
        entry.name: ColourScale.of(
            entry, views, [other for other in series if (other.probe, bool(other.base)) == (entry.probe, bool(entry.base))]
        )
        for entry in series
    }
