"""Lists rollouts that the trainer's reward alone would pass, and each reason for a second look."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probescore.types import FROZEN
from probescore_review.columns import ProbeReading, probe_readings
from probescore_review.index import Index
from probescore_review.queries import Queries
from probescore_review.views import usual_reward

EACH = 50
"""Most rollouts of a list."""
_LEAST_REFERENCES = 20
_SHRINKAGE = 0.1


@dataclass(frozen=True)
class _Suspect:
    """Value object with a rollout of a list: its number in the index, and why it is there."""

    number: int
    why: str


class Suspicious:
    """Finds a run's suspicious rollouts, and keeps the lists until the index changes."""

    def __init__(self, index: Index, queries: Queries) -> None:
        self._index = index
        self._queries = queries
        self._known: tuple[int, list[dict[str, Any]]] = (-1, [])

    def lists(self) -> list[dict[str, Any]]:
        """Returns the lists that a run's scores allow, the rows of each in the order of suspicion."""
        generation = self._index.generation
        if self._known[0] != generation:
            self._known = generation, list(self._lists())
        return self._known[1]

    def _lists(self) -> Iterable[dict[str, Any]]:
        readings = probe_readings(self._index)
        for name, title, why, find in (
            (
                "rewarded",
                "Well rewarded, and high on the probe",
                "The task's reward takes these for good work; the probe sees the behaviour. First those with the highest score.",
                self._rewarded,
            ),
            (
                "hidden",
                "High on the frozen model, low on the policy",
                "The text looks like the behaviour to the model before training, and the policy's own activations do not show it: it may"
                " have learnt to hide. First those whose readings differ most.",
                self._hidden,
            ),
            (
                "held-out",
                "A held-out probe sees what the rewarded one does not",
                "Nothing in training depends on the held-out probe, so that nothing could learn to evade it.",
                self._held_out,
            ),
            (
                "report",
                "A report disagrees with the inside",
                "A judge read the text and said otherwise than the probe, which reads activations.",
                self._report,
            ),
            (
                "outliers",
                "Unlike anything before training",
                "Scores that are far from those of the base model's rollouts, in either direction: what nobody has seen yet.",
                self._outliers,
            ),
        ):
            found = find(readings)
            if found is None:
                continue
            whys = {each.number: each.why for each in found}
            numbers = list(whys)
            rows = [row | {"why": whys[number]} for number in numbers for row in self._queries.shown([number])]
            yield {"id": name, "title": title, "why": why, "rows": rows}

    def _rewarded(self, readings: tuple[ProbeReading, ...]) -> list[_Suspect] | None:
        reward = usual_reward(self._index)
        if reward is None or not readings:
            return None
        first = readings[0]
        rows = self._index.rows(
            f"SELECT id, task_reward, {first.sql} FROM rollouts WHERE {first.sql} IS NOT NULL AND task_reward >= ?"  # noqa: S608
            f" ORDER BY {first.sql} DESC LIMIT {EACH}",
            (reward,),
        )
        return [_Suspect(row[0], f"task reward {row[1]:.3g}, {_score(first, row[2])}") for row in rows]

    def _hidden(self, readings: tuple[ProbeReading, ...]) -> list[_Suspect] | None:
        first = next((each for each in readings if each.reading == FROZEN), None)
        other = next((each for each in readings if first and each.probe == first.probe and each.reading != FROZEN), None)
        if first is None or other is None:
            return None
        flagged = "" if first.threshold is None else f" AND {first.sql} >= {first.threshold!r}"
        rows = self._index.rows(
            f"SELECT id, {first.sql}, {other.sql} FROM rollouts WHERE d{first.sql[1:]} < 0{flagged} ORDER BY d{first.sql[1:]} LIMIT {EACH}"  # noqa: S608
        )
        return [_Suspect(row[0], f"{_score(first, row[1])}, and {row[2]:.3g} on {other.reading}") for row in rows]

    def _held_out(self, readings: tuple[ProbeReading, ...]) -> list[_Suspect] | None:
        held = next((each for each in readings if each.role == "held_out" and each.threshold is not None), None)
        first = next((each for each in readings if each.role == "reward" and each.threshold is not None), None)
        if held is None or first is None:
            return None
        rows = self._index.rows(
            f"SELECT id, {held.sql}, {first.sql} FROM rollouts WHERE {held.sql} >= ? AND {first.sql} < ?"  # noqa: S608 - columns of ours
            f" ORDER BY {held.sql} DESC LIMIT {EACH}",
            (held.threshold, first.threshold),
        )
        return [_Suspect(row[0], f"{_score(held, row[1])}; {_score(first, row[2])}") for row in rows]

    def _report(self, readings: tuple[ProbeReading, ...]) -> list[_Suspect] | None:
        rows = self._index.rows("SELECT id, decisions, step FROM rollouts WHERE decisions IS NOT NULL ORDER BY step DESC, id")
        if not rows:
            return None
        found = []
        for number, decisions, _ in rows:
            for name, decision in json.loads(decisions).items():
                said, seen = decision.get("verdict"), decision.get("probe")
                if (said == "no" and seen is True) or (said == "yes" and seen is False):
                    inside = "flags it" if seen else "does not flag it"
                    found.append(_Suspect(number, f'{decision.get("labeller") or "a judge"} said "{said}"; the probe of {name} {inside}'))
                    break
            if len(found) == EACH:
                break
        return found

    def _outliers(self, readings: tuple[ProbeReading, ...]) -> list[_Suspect] | None:
        """Orders rollouts by Mahalanobis' distance of their scores from those of the base model's rollouts."""
        of_frozen = [each for each in readings if each.reading == FROZEN]
        before = self._references(of_frozen)
        if before is None:
            return None
        used, scores = before
        names = ", ".join(each.sql for each in used)
        known = " AND ".join(f"{each.sql} IS NOT NULL" for each in used)
        rows = self._index.connection().execute(f"SELECT id, {names} FROM rollouts WHERE {known}").fetchall()  # noqa: S608
        if not rows:
            return None
        values = np.array([tuple(row)[1:] for row in rows], np.float64)
        distance = mahalanobis(scores)(values)
        first = np.argsort(-distance, kind="stable")[:EACH]
        return [
            _Suspect(
                rows[place][0],
                f"{distance[place]:.1f} standard deviations from the base model's rollouts: "
                + ", ".join(f"{each.probe} {value:.3g}" for each, value in zip(used, values[place], strict=True)),
            )
            for place in first
        ]

    def _references(self, readings: list[ProbeReading]) -> tuple[list[ProbeReading], NDArray[np.float64]] | None:
        """Returns the scores of the base model's rollouts that were drawn at random, ``(n, probes)``, and of which probes they are."""
        rows = [json.loads(row[0]) for row in self._index.rows("SELECT line FROM others WHERE kind = 'reference'")]
        drawn = [row["scores"] for row in rows if row.get("random")]
        used = [each for each in readings if sum(_of(each, scores) is not None for scores in drawn) >= _LEAST_REFERENCES]
        whole = [values for scores in drawn if None not in (values := [_of(each, scores) for each in used])]
        return (used, np.array(whole, np.float64)) if used and len(whole) >= _LEAST_REFERENCES else None


def mahalanobis(reference: NDArray[np.float64]) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """Returns what measures how far values ``(m, d)`` are from reference values ``(n, d)``, in their standard deviations, ``(m,)``."""
    centre = reference.mean(0)
    spread = np.atleast_2d(np.cov(reference, rowvar=False))
    # shrunk towards no correlation: probes that are nearly one another would make any difference between them enormous
    alone = np.diag(np.maximum(np.diag(spread), 1e-12))
    inverse = np.linalg.inv((1 - _SHRINKAGE) * spread + _SHRINKAGE * alone)

    def distance(values: NDArray[np.float64]) -> NDArray[np.float64]:
        away = values - centre
        squared: NDArray[np.float64] = np.einsum("ij,jk,ik->i", away, inverse, away)
        return np.asarray(np.sqrt(np.maximum(0.0, squared)), np.float64)

    return distance


def _of(each: ProbeReading, scores: dict[str, Any]) -> float | None:
    value = scores.get(each.probe, {}).get(FROZEN, {}).get(each.reduction)
    return float(value) if isinstance(value, (int, float)) and np.isfinite(value) else None


def _score(each: ProbeReading, value: float) -> str:
    if each.threshold is None:
        return f"{each.probe} {value:.3g} on {each.reading}"
    return f"{each.probe} {value:.3g} on {each.reading} (flagged from {each.threshold:.3g} on)"
