"""Prepares scored rollouts for people: the tokens as visible text, their scores, and the scale of the colours.

The terminal and the HTML page show the same views.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from probescore import (
    Calibration,
    Completion,
    CompletionScores,
    CompletionStatus,
    ProbeInfo,
    ProbeScores,
    Reduction,
    ScoredProbe,
    ScoreUnit,
    Span,
)
from probescore.types import score_keys
from probescore_server.cli.common.visible import visible

_NOTHING_TO_SEE = "·"


@dataclass(frozen=True)
class Series:
    """One label of one probe, by whose scores the tokens of rollouts can be coloured.

    Attributes:
        name: the probe's name (or ``name@version``), followed by the label if the probe has several labels.
        key: the probe's key in ``CompletionScores.scores``: its name, or ``name@version``.
        label: index of the label in the probe's labels.
        unit: unit of the scores: logit, probability or value.
        reductions: names of the reductions, in the order of the scores; empty for a probe that scores rollouts as a whole.
        calibration: the calibrated threshold for the first reduction, if the probe has one.
    """

    name: str
    key: str
    label: int
    unit: ScoreUnit
    reductions: tuple[str, ...]
    calibration: Calibration | None

    @property
    def centre(self) -> float:
        """Returns the score at which the colour scale for a probe's scores changes colour: the probe's threshold if it has one, else 0.5
        for probabilities and 0 otherwise.
        """
        if self.calibration is not None:
            return self.calibration.threshold
        return 0.5 if self.unit is ScoreUnit.PROBABILITY else 0.0


@dataclass(frozen=True)
class ShownToken:
    """Value object with a token to show: its id, its visible text, and whether the rollout's mask lets the token count in scores."""

    id: int
    text: str
    counts: bool = True


@dataclass(frozen=True, eq=False)
class SeriesScores:
    """Scores of one rollout for one series (label of a probe).

    Attributes:
        reduced: a dictionary keyed by the span's name (``""`` = the whole scope), with one number per reduction; ``None`` = the span has no
            token that counts.
        tokens: one score for each token of the completion, ``(T,)`` float32; ``None`` if the probe scores none of these tokens.
        flagged: whether the first reduced score of the whole scope reaches the threshold; ``None`` if there is no score or no threshold.
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
    """A scored rollout, or a scored follow-up (token ids appended to a completion), ready to be shown.

    Attributes:
        title: the rollout's place in the input, and the completion's id.
        context: the tokens before the completion or follow-up: the prompt, and for a follow-up also the completion that it is appended to.
        tokens: the tokens of the completion or follow-up.
        problem: reason why the rollout has no scores; empty if there are scores.
        inexact: whether some token ids come from text.
        spans: named half-open ranges of ``tokens`` that were scored separately.
        scores: a dictionary of scores keyed by the name of the series.
        label: the label that the input gives to the completion, as text; empty if there is none.
    """

    title: str
    context: tuple[ShownToken, ...]
    tokens: tuple[ShownToken, ...]
    problem: str
    inexact: bool
    spans: tuple[Span, ...] = ()
    scores: Mapping[str, SeriesScores] = field(default_factory=dict)
    label: str = ""


def series_of(probes: Sequence[ScoredProbe], loaded: Iterable[ProbeInfo]) -> tuple[Series, ...]:
    """Returns every series (label of a probe) of a response that can be shown, probe after probe.

    Args:
        probes: descriptions of the probes that have scored the rollouts.
        loaded: descriptions of the server's loaded probes, with their calibrations.
    """
    calibrations = {(info.name, info.version): info.calibrations for info in loaded}
    return tuple(
        Series(
            name=key if len(probe.labels) == 1 else f"{key} · {visible(label)}",
            key=key,
            label=index,
            unit=probe.unit,
            reductions=tuple(map(str, probe.reductions)),
            calibration=_calibration(calibrations.get((probe.name, probe.version), ()), probe, label),
        )
        for key, probe in zip(score_keys(probes), probes, strict=True)
        for index, label in enumerate(probe.labels)
    )


def _calibration(calibrations: Sequence[Calibration], probe: ScoredProbe, label: str) -> Calibration | None:
    first: Reduction | None = probe.reductions[0] if probe.reductions else None
    return next((found for found in calibrations if found.reduction == first and found.label in ("", label)), None)


def rollout_views(
    title: str, completion: Completion, scored: CompletionScores, series: Sequence[Series], label: str = ""
) -> list[RolloutView]:
    """Returns the view of a completion, followed by the views of its follow-ups (token ids appended to the completion).

    Args:
        title: the completion's place in the input.
        completion: the completion as it was sent.
        scored: its scores, which must contain token ids; texts are shown if there are any.
        series: the series to show.
        label: label that the input gives to the completion.
    """
    prompt = _tokens(scored.prompt_ids, scored.prompt_texts, None)
    return _views(title, prompt, completion, scored, series, visible(label))


def _views(
    title: str, context: tuple[ShownToken, ...], completion: Completion, scored: CompletionScores, series: Sequence[Series], label: str = ""
) -> list[RolloutView]:
    tokens = _tokens(scored.completion_ids, scored.completion_texts, completion.mask)
    named = f"{title} · {visible(scored.id)}" if scored.id else title
    problem = "" if scored.status is CompletionStatus.OK else visible(scored.status_message) or scored.status.value
    scores = {} if problem else {entry.name: _series_scores(entry, completion, scored, len(tokens)) for entry in series}
    spans = tuple(Span(visible(span.name), span.start, span.end) for span in completion.spans)
    views = [RolloutView(named, context, tokens, problem, scored.inexact_ids, spans, scores, label)]
    for index, (follow_up, answer) in enumerate(zip(completion.follow_ups, scored.follow_ups, strict=True), 1):
        views += _views(f"{title} · follow-up {index}", context + tokens, follow_up, answer, series)
    return views


def _tokens(ids: NDArray[np.int32] | None, texts: Sequence[str] | None, mask: object) -> tuple[ShownToken, ...]:
    if ids is None:
        return ()
    counts = np.ones(len(ids), bool) if mask is None else np.asarray(mask, bool)
    pieces = [f"[{token_id}]" for token_id in ids] if texts is None else [visible(text) or _NOTHING_TO_SEE for text in texts]
    return tuple(ShownToken(int(token_id), piece, bool(count)) for token_id, piece, count in zip(ids, pieces, counts, strict=True))


def _series_scores(series: Series, completion: Completion, scored: CompletionScores, tokens: int) -> SeriesScores:
    of_probe = scored.scores[series.key]
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
    def of(cls, series: Series, views: Iterable[RolloutView]) -> ColourScale:
        """Returns the colour scale for the scores of one label of a probe. The scale covers all but the outermost 2% of the scores shown.

        Without this rule one outlier would make the colours of all other scores pale.
        """
        shown = [scores for view in views if (scores := view.scores.get(series.name)) is not None]
        values = np.array([scores.value for scores in shown if scores.value is not None], np.float32)
        distances = np.abs(np.concatenate([values, *(scores.tokens for scores in shown if scores.tokens is not None)]) - series.centre)
        distances = distances[np.isfinite(distances)]
        reach = float(np.quantile(distances, 0.98)) if len(distances) else 0.0
        return cls(series.centre, reach if reach > 0 else 1.0)

    def position(self, score: float) -> float:
        """Returns a score's position on a diverging colour scale, from -1 to 1 with 0 at the scale's centre; 0 for NaN."""
        return 0.0 if np.isnan(score) else float(np.clip((score - self.centre) / self.reach, -1, 1))
