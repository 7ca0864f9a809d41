"""Makes rows of a training run's record from labelled rollouts of the model before training, as ``probescore score --json`` prints them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from probescore_audit.record.rows import ReferenceRow

_OF_ROLLOUT = "rollout"  # in place of a reduction, for a probe that scores rollouts


def reference_rows(lines: Iterable[str], *, random: bool, positive: str | None = None) -> tuple[ReferenceRow, ...]:
    """Makes rows for the record of a training run from scored rollouts with labels; those without a label are left out.

    The same lines give rows of the same names, so that rows that are added twice count once.

    Args:
        lines: lines of JSON, one for each completion, as ``probescore score --json`` prints them: with ``label`` and ``scores``.
        random: whether the rollouts were drawn at random.
        positive: the label that stands for the behaviour, as text; ``None`` = labels are true and false, or 1 and 0.

    Raises:
        ValueError: a line has another form, or its rollout could not be scored; the message names the line and the field.
    """
    rows: list[ReferenceRow] = []
    given = [line for line in lines if line.strip()]
    source = hashlib.sha256("\n".join(line.strip() for line in given).encode()).hexdigest()[:12]
    for number, line in enumerate(given, 1):
        try:
            values = json.loads(line)
        except ValueError:
            raise ValueError(f"line {number} is no JSON; give what `probescore score --json` printed") from None
        if not isinstance(values, dict):
            raise ValueError(f"line {number} is no JSON object; give what `probescore score --json` printed")
        if values.get("label") is None:
            continue
        label = _is_positive(values["label"], number, positive)
        scores = whole_scores(values, number)
        rows.append(
            ReferenceRow(rollout=f"{source}.{number}", positive=label, random=random, scores={key: {"frozen": of} for key, of in scores})
        )
    return tuple(rows)


def whole_scores(values: Mapping[str, Any], number: int) -> list[tuple[str, dict[str, float]]]:
    """Returns the scores of a whole completion by each reduction, under the key that the record has for a probe and label.

    Args:
        values: the parsed line, or the part of it for one reading, with ``scores``.
        number: number of the line, for messages.

    Raises:
        ValueError: the line has another form, or its rollout could not be scored.
    """
    scored = values.get("scores")
    if not isinstance(scored, dict) or not scored:
        said = values.get("status_message") or values.get("status") or "it has no scores"
        raise ValueError(f"line {number}: scores: {said}; give what `probescore score --json` printed, and leave out what has no scores")
    found: list[tuple[str, dict[str, float]]] = []
    for name, of in scored.items():
        try:
            whole = np.array(of["reduced"][0], np.float32)  # (reductions, labels)
            labels, reductions = of["labels"], of["reductions"] or [_OF_ROLLOUT]
            key = f"{name.partition('@')[0]}@{of['version']}"
            for place, label in enumerate(labels):
                by_reduction = {
                    reduction: float(score) for reduction, score in zip(reductions, whole[:, place], strict=True) if np.isfinite(score)
                }
                found.append((f"{key}/{label}" if place else key, by_reduction))
        except (KeyError, TypeError, IndexError, ValueError):
            raise ValueError(f"line {number}: scores.{name}: expected what `probescore score --json` prints") from None
    return found


def _is_positive(label: object, number: int, positive: str | None) -> bool:
    if positive is not None:
        return (str(label).lower() if isinstance(label, bool) else str(label)) == positive
    if label in (True, False):
        return bool(label)
    raise ValueError(f"line {number}: label: expected true or false, or 1 or 0, got {label!r:.60}; or say which label is the behaviour")
