"""Renders the HTML page of the report on a fitted probe: the verdict and its warnings first, then the evidence."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from probescore_audit import Estimate
from probescore_probes.fitting.judgement import shown
from probescore_probes.fitting.report import figures
from probescore_probes.fitting.results import FitResult
from probescore_probes.fitting.wrong_rollouts import WrongRollout

_PROMPT_SHOWN = 160
"""Limits how many tokens of a prompt the page shows: the last ones."""
_COMPLETION_SHOWN = 600


def page(result: FitResult) -> str:
    """Returns the HTML of the report's page. Text that comes from rollouts is escaped, so that it is never markup."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(estimate=_estimate, percent=_percent, number=_number)
    template = environment.from_string(files(__package__).joinpath("report.html").read_text(encoding="utf-8"))
    return template.render(result=result, evidence=result.evidence, figures=_figures(result), wrong=_wrong(result))


def _figures(result: FitResult) -> dict[str, Markup]:
    """Returns the figures of the report as SVG by name; each figure escapes its own text."""
    evidence = result.evidence
    chosen = next(
        point for point in result.selection.curve if (point.tap, point.pool) == (result.selection.chosen.tap, result.selection.chosen.pool)
    )
    threshold = result.thresholds[""].threshold if "" in result.thresholds else None
    probe = "the probe, as served"
    drawn = {
        "layers": figures.layers(result.curves, chosen),
        "kinds": figures.estimates(result.kinds, "kinds", [result.options.kind]),
        "baselines": figures.estimates(
            {probe: evidence.test, **evidence.rivals, **evidence.text, "shuffled labels": evidence.shuffled}, "baselines", [probe]
        ),
        "roc": figures.roc(result.roc, result.options.false_positive_rate, int((~result.test_positive).sum())),
        "histogram": figures.histogram(result.test_scores, result.test_positive, threshold),
        "learning": figures.learning(result.learning) if result.learning else "",
        "calibration": figures.calibration(result.calibration[1]) if result.calibration else "",
        "slices": figures.estimates({name: found.auroc for name, found in evidence.slices.items()}, "slices") if evidence.slices else "",
    }
    return {name: Markup(svg) for name, svg in drawn.items()}  # noqa: S704 - drawn here, texts escaped


def _wrong(result: FitResult) -> list[dict[str, Any]]:
    threshold = result.thresholds[""].threshold if "" in result.thresholds else float(np.median(result.test_scores))
    scores = np.abs([score - threshold for rollout in result.wrong for score in rollout.token_scores or ()])
    reach = float(np.quantile(scores, 0.95)) if len(scores) else 1.0
    return [_coloured(rollout, threshold, reach or 1.0) for rollout in result.wrong]


def _coloured(rollout: WrongRollout, centre: float, reach: float) -> dict[str, Any]:
    tokens = []
    for index, text in enumerate(rollout.tokens[:_COMPLETION_SHOWN]):
        score = rollout.token_scores[index] if rollout.token_scores is not None else None
        strength = 0.0 if score is None else float(np.clip((score - centre) / reach, -1, 1))
        tokens.append({"text": text, "score": score, "side": "above" if strength >= 0 else "below", "strength": f"{abs(strength):.2f}"})
    prompt = "".join(rollout.prompt[-_PROMPT_SHOWN:])
    return {
        "where": rollout.where,
        "label": "positive" if rollout.positive else "negative",
        "score": rollout.score,
        "prompt": ("… " if len(rollout.prompt) > _PROMPT_SHOWN else "") + prompt,
        "tokens": tokens,
        "cut": len(rollout.tokens) > _COMPLETION_SHOWN,
    }


def _estimate(estimate: Estimate) -> str:
    return shown(estimate)


def _percent(estimate: Estimate) -> str:
    if np.isnan(estimate.value):
        return "–"
    return f"{estimate.value:.1%} [{estimate.low:.1%}, {estimate.high:.1%}]"


def _number(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.4g}"
