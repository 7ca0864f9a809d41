"""Writes scored rollouts as one self-contained HTML page, which uses no network, no fonts and no scripts but its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from probescore import ScoringInfo
from probescore_server.cli.report.views import ColourScale, RolloutView, Series, SeriesScores, ShownToken, colour_scales
from probescore_server.files import write_atomically

_PLACE = "<!--probescore-data-->"
# Within a script element these could end it, open a comment, or end a line of JavaScript; in JSON they can always be written so.
_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"})
_DIGITS = 5


def write_page(path: Path, views: Sequence[RolloutView], series: Sequence[Series], info: ScoringInfo, *, title: str) -> None:
    """Writes scored rollouts as an HTML page.

    Args:
        path: file to write; an existing file is replaced as a whole.
        views: the rollouts, which become one card each, in this order.
        series: the labels of probes, on each reading, by which the reader can colour the tokens; the first is selected.
        info: the model, the probes and the readings that produced the scores.
        title: heading of the page.

    Raises:
        OSError: the file cannot be written.
    """
    write_atomically(path, page(views, series, info, title=title).encode())


def page(views: Sequence[RolloutView], series: Sequence[Series], info: ScoringInfo, *, title: str) -> str:
    """Returns the HTML of a page with scored rollouts. All text from rollouts is embedded as data, never as markup."""
    template = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    return template.replace(_PLACE, _embedded(_data(views, series, info, title)))


def _embedded(data: dict[str, Any]) -> str:
    written = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return written.translate(_ESCAPES)


def _data(views: Sequence[RolloutView], series: Sequence[Series], info: ScoringInfo, title: str) -> dict[str, Any]:
    pieces, contexts = _NumberedValues(), _NumberedValues()
    rollouts = [
        {
            "title": view.title,
            "label": view.label,
            "problem": view.problem,
            "inexact": view.inexact,
            "context": contexts.index(_indices(view.context, pieces)),
            "tokens": _indices(view.tokens, pieces),
            "masked": [index for index, token in enumerate(view.tokens) if not token.counts],
            "spans": [[span.name, span.start, span.end] for span in view.spans],
            "scores": [_scores(view.scores.get(entry.name)) for entry in series] if not view.problem else [],
            **({"unscored": view.unscored} if view.unscored and not view.problem else {}),
        }
        for view in views
    ]
    scales = colour_scales(series, views)
    return {
        "title": title,
        "model": info.model_fingerprint,
        "readings": [
            {"name": reading.name, "id": reading.id, "kind": reading.kind.value, "step": reading.step} for reading in info.readings
        ],
        "series": [_series(entry, scales[entry.name]) for entry in series],
        "pieces": pieces.entries,
        "contexts": contexts.entries,
        "rollouts": rollouts,
    }


class _NumberedValues:
    """Table of distinct values, each with a number, so that a page of scored rollouts contains each token's text and each prompt only once,
    and otherwise their numbers.
    """

    def __init__(self) -> None:
        self._places: dict[Any, int] = {}

    def index(self, value: tuple[Any, ...]) -> int:
        return self._places.setdefault(value, len(self._places))

    @property
    def entries(self) -> list[Any]:
        return list(self._places)


def _indices(tokens: Sequence[ShownToken], pieces: _NumberedValues) -> tuple[int, ...]:
    return tuple(pieces.index((token.id, token.text)) for token in tokens)


def _series(series: Series, scale: ColourScale) -> dict[str, Any]:
    calibration = series.calibration
    return {
        "name": series.probe,
        "reading": series.reading,
        "base": series.base,
        "unit": series.unit.value,
        "reductions": series.reductions,
        "centre": _rounded(scale.centre),
        "reach": _rounded(scale.reach),
        "threshold": None
        if calibration is None
        else {
            "value": calibration.threshold,
            "rate": calibration.false_positive_rate,
            "low": calibration.false_positive_rate_low,
            "high": calibration.false_positive_rate_high,
            "negatives": calibration.negatives,
        },
    }


def _scores(scores: SeriesScores | None) -> dict[str, Any] | None:
    return (
        None
        if scores is None
        else {
            "reduced": {
                name: [None if number is None else _rounded(number) for number in numbers] for name, numbers in scores.reduced.items()
            },
            "tokens": None if scores.tokens is None else [_rounded(score) for score in scores.tokens.tolist()],
            "flagged": scores.flagged,
            **({"outside": scores.outside} if scores.outside else {}),
        }
    )


def _rounded(number: float) -> float:
    """Rounds a score to as many digits as a reader can use, since digits make up most of the size of a page of scored rollouts."""
    return float(f"{number:.{_DIGITS}g}")
