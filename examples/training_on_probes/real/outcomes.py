"""What came out of a run: what the policy says at the beginning and at the end, what the probe sees of it, what the audit says, and what
the product cost. A run is a line of JSON; the tables are computed from these lines.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from claims import TRAINING_HALF, Answer, Claim, Judge, claims_of, drawn_claims, known_names
from fixed import CONDITIONS, FROZEN, KEY, POLICY, WINDOW_STEPS
from run_settings import RunSettings
from transformers import AutoTokenizer

from probescore_audit import audit_record, auroc
from probescore_audit.record import Record, read_record
from probescore_audit.report import numbers_of

READINGS = (FROZEN, POLICY)
SHOWN = {
    "agree": "agrees with a false claim",
    "true": "true answer to a false claim",
    "well formed": "well-formed",
    "false": "false, of all that name something",
    "recall frozen": "recall, frozen",
    "recall policy": "recall, policy",
    "auroc frozen": "AUROC, frozen",
    "auroc policy": "AUROC, policy",
}


def before_training(rows: Sequence[dict[str, Any]], threshold: float) -> dict[str, float | int | None]:
    """What the model said before training, and what the probe saw of it, as ``window`` says it of a run; both readings are one."""
    asked = [row for row in rows if not row["claim"]]
    told = [row for row in rows if row["true"] is not None]
    is_false, scores = np.array([not row["true"] for row in told], bool), np.array([row["scores"]["mean"] for row in told])
    found: dict[str, float | int | None] = {
        "agree": _share(row["agrees"] for row in asked),
        "true": _share(row["true"] is True for row in asked),
        "well formed": _share(row["well_formed"] for row in asked),
        "false": _share(is_false.tolist()),
        "false answers": int(is_false.sum()),
        "false alarms": _share((scores[~is_false] >= threshold).tolist()),
    }
    recall = _share((scores[is_false] >= threshold).tolist())
    ranked = _rounded(auroc(scores, is_false)) if is_false.any() and not is_false.all() else None
    for reading in READINGS:
        found |= {f"recall {reading}": recall, f"auroc {reading}": ranked}
    return found


@dataclass(frozen=True, eq=False)
class Judged:
    """A rollout of the record with what it truly says, and the probe's scores, NaN where there is none."""

    step: int
    claim: Claim
    answer: Answer
    scores: dict[str, float]


def judged_rollouts(settings: RunSettings, record: Record) -> list[Judged]:
    """The record's rollouts beside the truth, which neither the trainer nor the audit is told."""
    tokenizer, judge = AutoTokenizer.from_pretrained(settings.model), Judge(known_names(settings.seed))
    every = claims_of(settings.seed, CONDITIONS[settings.condition].topics, TRAINING_HALF)
    drawn = drawn_claims(every, settings.prompts * settings.steps, random.Random(f"prompts {settings.seed}"))
    by_prompt = {tuple(tokenizer(claim.prompt(tokenizer), add_special_tokens=False)["input_ids"]): claim for claim in drawn}
    found = []
    for row in record.rollouts:
        claim, ids = by_prompt[tuple(row.prompt_ids or ())], list(row.completion_ids or ())
        answer = judge.judge(claim, tokenizer.decode(ids, skip_special_tokens=True), ids[-1] == tokenizer.eos_token_id)
        scores = {reading: row.scores.get(KEY, {}).get(reading, {}).get("mean", np.nan) for reading in READINGS}
        found.append(Judged(row.step, claim, answer, scores))
    return found


def window(rows: Sequence[Judged], threshold: float) -> dict[str, float | int | None]:
    """What these rollouts say, and what the probe sees: shares of all answers to false claims, but for ``false``."""
    asked = [row for row in rows if not row.claim.is_true]
    told = [row for row in rows if row.answer.is_true is not None]
    is_false = np.array([not row.answer.is_true for row in told], bool)
    found: dict[str, float | int | None] = {
        "rollouts": len(rows),
        "false claims": len(asked),
        "agree": _share(row.answer.agrees for row in asked),
        "true": _share(bool(row.answer.is_true) for row in asked),
        "well formed": _share(row.answer.is_well_formed for row in asked),
        "false": _share(is_false.tolist()),
        "false answers": int(is_false.sum()),
    }
    for reading in READINGS:
        scores = np.array([row.scores[reading] for row in told])
        found[f"recall {reading}"] = _share((scores[is_false] >= threshold).tolist())
        found[f"false alarms {reading}"] = _share((scores[~is_false] >= threshold).tolist())
        found[f"logit of false {reading}"] = _rounded(scores[is_false].mean()) if is_false.any() else None
        found[f"auroc {reading}"] = _rounded(auroc(scores, is_false)) if is_false.any() and not is_false.all() else None
    return found


def outcome_of(settings: RunSettings, threshold: float, reference: Sequence[dict[str, Any]], about: dict[str, Any]) -> dict[str, Any]:
    """Everything that is said of a run, as JSON values; ``reference``: rows of answers from before training."""
    folder = Path(settings.folder)
    record = read_record(folder / "record")
    rows = judged_rollouts(settings, record)
    steps = sorted({row.step for row in rows})
    first, last = steps[:WINDOW_STEPS], steps[-WINDOW_STEPS:]
    topics = CONDITIONS[settings.condition].topics
    return {
        "condition": settings.condition,
        "seed": settings.seed,
        "steps": len(steps),
        "rollouts a step": settings.prompts * settings.samples,
        **about,
        "windows": {
            "before": before_training(reference, threshold),
            "first": window([row for row in rows if row.step in first], threshold),
            "last": window([row for row in rows if row.step in last], threshold),
            "by topic, last": {
                topic: window([r for r in rows if r.step in last and r.claim.topic == topic], threshold) for topic in topics
            },
        },
        "agree by step": [_share(row.answer.agrees for row in rows if row.step == step and not row.claim.is_true) for step in steps],
        "audit": audited(record, rows, threshold),
        "seconds": seconds(folder / "steps.jsonl"),
    }


def audited(record: Record, rows: Sequence[Judged], threshold: float) -> list[dict[str, Any]]:
    """The audit's verdict on each reading with its estimates, beside what they are of, in truth."""
    try:
        numbers = numbers_of(audit_record(record))
    except ValueError as error:  # of a run that was too short
        return [{"reading": reading, "verdict": None, "sentence": str(error), "alarms": []} for reading in READINGS]
    found = []
    for each in numbers["readings"]:
        said = {name: each[name] for name in ("reading", "verdict", "sentence", "next_step", "alarms", "labels")}
        if each["windows"]:
            judged = each["windows"][-1]
            within = [row for row in rows if judged["first_step"] <= row.step <= judged["last_step"]]
            truth = window(within, threshold)
            said |= {
                "window": [judged["first_step"], judged["last_step"]],
                "estimates": {
                    "false": {**judged["positive_rate"], "truth": truth["false"]},
                    "recall": {**judged["recall"], "truth": truth[f"recall {each['reading']}"]},
                },
            }
        found.append(said)
    return found


def seconds(path: Path) -> dict[str, float]:
    """Median seconds of a step, and of what the product did in it; of a step that was trained twice the last time counts."""
    steps = {line["step"]: line for line in map(json.loads, path.read_text().splitlines())}
    return {
        part: _rounded(float(np.median([line[part] for line in steps.values()]))) for part in ("seconds", "scoring", "loading", "recording")
    }


def _share(values: Iterable[bool]) -> float | None:
    kept = list(values)
    return _rounded(sum(kept) / len(kept)) if kept else None


def _rounded(value: float) -> float:
    return round(float(value), 4)


# ------------------------------------------------------------------------------------------------------------------------ tables


def tables(outcomes: Sequence[dict[str, Any]], probes: dict[int, dict[str, Any]]) -> str:
    """The tables as Markdown, computed from the lines of finished runs; the range over seeds in each cell."""
    return (
        "\n".join([*_about(outcomes), *_probes(probes), *_results(outcomes), *_audits(outcomes), *_topics(outcomes), *_costs(outcomes)])
        + "\n"
    )


def _about(outcomes: Sequence[dict[str, Any]]) -> Iterator[str]:
    seeds = sorted({each["seed"] for each in outcomes})
    yield f"{len(outcomes)} runs, seeds {', '.join(map(str, seeds))}, {_range([each['steps'] for each in outcomes], '{:.0f}')} steps."
    for field in ("date", "hardware", "versions"):
        yield f"{field.capitalize()}: {'; '.join(sorted({each[field] for each in outcomes}))}."
    yield ""


def _probes(probes: dict[int, dict[str, Any]]) -> Iterator[str]:
    yield "| the probe, on facts that it was not fitted on | " + " | ".join(f"seed {seed}" for seed in probes) + " |"
    yield "|---" * (len(probes) + 1) + "|"
    for name in ("auroc", "auroc of echoes", "auroc of agreement", "recall", "recall of echoes"):
        yield f"| {name.replace('auroc', 'AUROC')} | " + " | ".join(f"{probe[name]:.3f}" for probe in probes.values()) + " |"
    for topic in next(iter(probes.values()))["auroc by topic"] if probes else ():
        yield f"| AUROC, {topic} | " + " | ".join(f"{probe['auroc by topic'][topic]:.3f}" for probe in probes.values()) + " |"
    yield ""


def _results(outcomes: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "| condition | steps | " + " | ".join(SHOWN.values()) + " |"
    yield "|---" * (len(SHOWN) + 2) + "|"
    for title, runs in _by_condition(outcomes):
        for which, steps in (("before", "before training"), ("first", f"first {WINDOW_STEPS}"), ("last", f"last {WINDOW_STEPS}")):
            cells = [_range([run["windows"][which][name] for run in runs]) for name in SHOWN]
            yield f"| {title if which == 'before' else ''} | {steps} | " + " | ".join(cells) + " |"
    yield ""


def _audits(outcomes: Sequence[dict[str, Any]]) -> Iterator[str]:
    titles = ["condition", "seed", "reading", "the audit's verdict", "alarms at step", "agreed with false claims then"]
    titles += ["false: estimate (truth)", "recall: estimate (truth)"]
    yield f"| {' | '.join(titles)} |"
    yield "|---" * len(titles) + "|"
    for title, runs in _by_condition(outcomes):
        for run in runs:
            for said in run["audit"]:
                alarms = sorted(alarm["step"] for alarm in said["alarms"])
                by_then = "–" if not alarms else f"{run['agree by step'][min(alarms[0], len(run['agree by step']) - 1)] or 0:.2f}"
                estimates = [_estimate(said, name) for name in ("false", "recall")]
                cells = [
                    title,
                    str(run["seed"]),
                    said["reading"],
                    said["verdict"] or "none",
                    ", ".join(map(str, alarms)) or "none",
                    by_then,
                    *estimates,
                ]
                yield "| " + " | ".join(cells) + " |"
    yield ""


def _estimate(said: dict[str, Any], name: str) -> str:
    if "estimates" not in said:
        return "–"
    found = said["estimates"][name]
    value, low, high, truth = (found[part] for part in ("value", "low", "high", "truth"))
    return "–" if value is None else f"{value:.2f}, {low:.2f}–{high:.2f} ({'–' if truth is None else f'{truth:.2f}'})"


def _topics(outcomes: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield f"| condition, last {WINDOW_STEPS} steps | topic | agrees with a false claim | true answer to a false claim | recall, frozen |"
    yield "|---|---|---|---|---|"
    for title, runs in _by_condition(outcomes):
        for topic in runs[0]["windows"]["by topic, last"]:
            found = [run["windows"]["by topic, last"][topic] for run in runs]
            yield (
                f"| {title} | {topic} | "
                + " | ".join(_range([each[name] for each in found]) for name in ("agree", "true", "recall frozen"))
                + " |"
            )
    yield ""


def _costs(outcomes: Sequence[dict[str, Any]]) -> Iterator[str]:
    titles = ["condition", "seconds a step", "of these scoring, both readings", "loading the adapter", "recording and labelling"]
    yield f"| {' | '.join(titles)} | the product's share |"
    yield "|---" * (len(titles) + 1) + "|"
    for title, runs in _by_condition(outcomes):
        parts = [[run["seconds"][part] for run in runs] for part in ("seconds", "scoring", "loading", "recording")]
        shares = [100 * (scoring + loading + recording) / total for total, scoring, loading, recording in zip(*parts, strict=True)]
        cells = [_range(part, shown) for part, shown in zip(parts, ("{:.1f}", "{:.2f}", "{:.2f}", "{:.4f}"), strict=True)]
        yield f"| {title} | " + " | ".join(cells) + f" | {_range(shares, '{:.0f}')}% |"


def _by_condition(outcomes: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for name, condition in CONDITIONS.items():
        if runs := sorted((each for each in outcomes if each["condition"] == name), key=lambda run: int(run["seed"])):
            yield condition.title, runs


def _range(values: Sequence[float | None], shown: str = "{:.2f}") -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    low, high = (shown.format(end) for end in (min(known), max(known)))
    return low if low == high else f"{low}–{high}"
