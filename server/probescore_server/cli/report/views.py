"""What people are shown of scored rollouts: the tokens as visible text, their scores, and the scale they are coloured by.

The terminal and the page draw the same views.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from probescore import Calibration, Completion, CompletionScores, CompletionStatus, ProbeInfo, Reduction, ScoredProbe, ScoreUnit, Span
from probescore.types import score_keys
from probescore_server.cli.common.visible import visible

_NOTHING_TO_SEE = "·"


@dataclass(frozen=True)
class Series:
    """What rollouts can be coloured by: one label of one probe.

    Attributes:
        name: the probe's key in the answer; with the label where it has several.
        key: the probe's key in the answer.
        label: index of the label.
        reductions: as written, in the order of the answer; empty for a probe that pools by itself.
        calibration: the threshold that holds for the first of them, if the probe has one.
    """

    name: str
    key: str
    label: int
    unit: ScoreUnit
    reductions: tuple[str, ...]
    calibration: Calibration | None

    @property
    def centre(self) -> float:
        """Where the scale changes colour: the threshold, else 0.5 for probabilities, else 0."""
        if self.calibration is not None:
            return self.calibration.threshold
        return 0.5 if self.unit is ScoreUnit.PROBABILITY else 0.0


@dataclass(frozen=True)
class ShownToken:
    """A token as it is shown: ``text`` is visible, ``counts`` says whether the mask lets it count."""

    id: int
    text: str
    counts: bool = True


@dataclass(frozen=True, eq=False)
class SeriesScores:
    """The scores of one rollout by one series.

    Attributes:
        reduced: by span (``""`` = the whole scope), one number per reduction; ``None`` = nothing was selected.
        tokens: ``(tokens in scope,)``; ``None`` where the probe scores no token of this rollout.
        flagged: whether the first number reaches the threshold; ``None`` without a number or a threshold.
    """

    reduced: Mapping[str, tuple[float | None, ...]]
    tokens: NDArray[np.float32] | None
    flagged: bool | None

    @property
    def value(self) -> float | None:
        """The whole scope, first reduction."""
        return self.reduced[""][0]


@dataclass(frozen=True, eq=False)
class RolloutView:
    """A rollout, or a follow-up to one, ready to be shown.

    Attributes:
        title: where it stood in the input, and its id.
        context: what the model had read before: the prompt, and for a follow-up what it follows.
        problem: why there are no scores; empty if there are.
        inexact: some ids came from text.
        spans: relative to ``tokens``.
        scores: by ``Series.name``.
        label: what the input says that the completion is, in words; empty if it says nothing.
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
    """All that can be shown of an answer, probe after probe.

    Args:
        probes: as the answer names them.
        loaded: what the server has, with the calibrations.
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
    """The view of one completion, followed by those of its follow-ups.

    Args:
        title: where the completion stood in the input.
        completion: as it was sent.
        scored: what came back; it must carry ids, and texts are shown if they are there.
        series: what is shown of it.
        label: what the input says that it is.
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
    # A probe that appends a follow-up of its own scores that one's tokens, which are not these.
    per_token = of_probe.tokens[:, series.label] if of_probe.tokens is not None and len(of_probe.tokens) == tokens else None
    value = reduced[""][0]
    flagged = None if value is None or series.calibration is None else value >= series.calibration.threshold
    return SeriesScores(reduced, per_token, flagged)


@dataclass(frozen=True)
class ColourScale:
    """A diverging scale: 0 at ``centre``, ±1 from ``reach`` away from it."""

    centre: float
    reach: float

    @classmethod
    def of(cls, series: Series, views: Iterable[RolloutView]) -> ColourScale:
        """Reaches as far as all but the outermost 2% of the scores shown, so that one outlier does not pale all others."""
        shown = [scores for view in views if (scores := view.scores.get(series.name)) is not None]
        values = np.array([scores.value for scores in shown if scores.value is not None], np.float32)
        distances = np.abs(np.concatenate([values, *(scores.tokens for scores in shown if scores.tokens is not None)]) - series.centre)
        distances = distances[np.isfinite(distances)]
        reach = float(np.quantile(distances, 0.98)) if len(distances) else 0.0
        return cls(series.centre, reach if reach > 0 else 1.0)

    def position(self, score: float) -> float:
        """Where a score lies, in [-1, 1]; 0 for NaN."""
        return 0.0 if np.isnan(score) else float(np.clip((score - self.centre) / self.reach, -1, 1))
