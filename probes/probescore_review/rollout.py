"""Collects everything that the record has of one rollout."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

from probescore_review.index import VALID_LABELS, Index, read_line
from probescore_review.neighbours import Neighbours
from probescore_review.queries import Queries

PART_TOKENS, PART_LETTERS = 20_000, 400_000
"""Most tokens, and most characters of a text, of one answer; what is longer comes in parts."""
_RELATED = 64
_BLIND = ("scores", "thresholds", "task_reward", "total_reward", "logprob", "labels", "group", "same_prompt", "neighbours", "decisions")


class Rollouts:
    """Reads single rollouts of a run.

    Args:
        index: the index of the record.
        queries: reads rows of the table.
    """

    def __init__(self, index: Index, queries: Queries) -> None:
        self._index = index
        self._queries = queries
        self._neighbours = Neighbours(index)

    def row(self, rollout: str) -> sqlite3.Row:
        """Returns the row of the index of a rollout, which is given by its id.

        Raises:
            KeyError: there is no such rollout.
        """
        step, name = parsed_id(rollout)
        found = self._index.row("SELECT * FROM rollouts WHERE step = ? AND name = ?", (step, name))
        if found is None:
            raise KeyError(f"rollout: {rollout[:100]!r}; the record has none of that name, or none any more")
        return found

    def found(self, rollout: str, *, blind: bool = False, part: int = 0) -> dict[str, Any]:
        """Returns everything of one rollout.

        Args:
            rollout: the rollout's id, step and name.
            blind: leaves out scores, rewards, labels and other rollouts, by which one must not label.
            part: which part of a long completion.

        Raises:
            KeyError: there is no such rollout.
        """
        row = self.row(rollout)
        long_parts = self._long_parts(row)
        described = {probe.key: probe for probe in self._index.header().probes}
        scores = json.loads(row["scores"])
        found = {
            "rollout": f"{row['step']}:{row['name']}",
            "step": row["step"],
            "name": row["name"],
            "prompt_id": row["prompt_id"],
            **_texts(long_parts, part, blind=blind),
            "spans": [],
            "follow_ups": [] if blind else long_parts.get("follow_ups") or [],
            "said": _missing(long_parts, row),
        }
        if blind:
            return found | dict.fromkeys(_BLIND)
        labels = self.labels(row["step"], row["name"])
        return found | {
            "scores": scores,
            "thresholds": {
                probe: {reading: described[probe].thresholds_on(reading) for reading in readings}
                for probe, readings in scores.items()
                if probe in described
            },
            "task_reward": row["task_reward"],
            "total_reward": row["total_reward"],
            "logprob": row["logprob"],
            "label": row["label"],
            "labels": labels,
            "spans": [span for label in labels for span in label["spans"]],
            "decisions": json.loads(row["decisions"]) if row["decisions"] else None,
            "group": self._related("step = ? AND grp = ?", (row["step"], row["grp"]), "total_reward DESC, id"),
            "same_prompt": self._related("prompt_id = ? AND step != ?", (row["prompt_id"], row["step"]), "step, id"),
            "neighbours": self._near(row),
        }

    def texts(self, rollout: str) -> dict[str, Any]:
        """Returns a rollout's whole prompt and completion, and its scores by every reduction.

        Raises:
            KeyError: there is no such rollout.
        """
        row = self.row(rollout)
        long_parts = self._long_parts(row)
        pieces = long_parts.get("completion_pieces")
        completion = long_parts.get("completion_text") or ("".join(map(str, pieces)) if pieces else None)
        return {"prompt": long_parts.get("prompt_text"), "completion": completion, "scores": json.loads(row["scores"])}

    def labels(self, step: int, name: str) -> list[dict[str, Any]]:
        """Returns the labels of a rollout that count, in the order in which they were given."""
        statement = f"SELECT seq, line FROM ({VALID_LABELS} AND labels.step = ? AND labels.name = ?) ORDER BY seq"  # noqa: S608
        rows = self._index.rows(statement, (step, name))
        return [shown_label(json.loads(row["line"])) for row in rows]

    def _long_parts(self, row: sqlite3.Row) -> Mapping[str, Any]:
        if row["long_here"]:
            return json.loads(row["long_here"]) or {}
        path = self._index.path_of(row["long_file"]) if row["long_file"] is not None else None
        values = None if path is None else read_line(path, row["long_offset"], row["long_length"])
        return values if values is not None and values.get("rollout") == row["name"] and values.get("step") == row["step"] else {}

    def _related(self, condition: str, values: Sequence[object], order: str) -> list[dict[str, Any]]:
        statement = f"SELECT id FROM rollouts WHERE {condition} ORDER BY {order} LIMIT {_RELATED}"  # noqa: S608 - statements of ours
        return self._queries.shown([row[0] for row in self._index.rows(statement, values)])

    def _near(self, row: sqlite3.Row) -> list[dict[str, Any]] | None:
        near = self._neighbours.of(row["step"], row["name"])
        if near is None:
            return None
        return [each | {"similarity": similarity} for number, similarity in near for each in self._queries.shown([number])]


def parsed_id(rollout: str) -> tuple[int, str]:
    """Returns step and name of a rollout from its id.

    Raises:
        KeyError: it is no id.
    """
    step, colon, name = rollout.partition(":")
    if not colon or not step.isdecimal() or len(step) > 15:
        raise KeyError(f"rollout: {rollout[:100]!r}; an id is step:name")
    return int(step), name


def shown_label(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a label as the pages show it."""
    spans = values.get("spans") or ([values["span"]] if values.get("span") else [])
    return {
        "label_id": values.get("row") or "",
        "label": values["label"],
        "labeller": values.get("labeller") or values.get("source") or "",
        "source": values.get("source") or "",
        "when": values.get("given"),
        "note": values.get("note"),
        "second": bool(values.get("second")),
        "spans": spans,
        "inclusion": values.get("inclusion"),
    }


def _texts(long_parts: Mapping[str, Any], part: int, *, blind: bool) -> dict[str, Any]:
    """Returns prompt, completion and tokens, or the asked part of them."""
    pieces = long_parts.get("completion_pieces")
    ids = long_parts.get("completion_ids")
    completion = long_parts.get("completion_text")
    if completion is None and pieces:
        completion = "".join(map(str, pieces))
    texts = list(map(str, pieces)) if pieces else [f"⟨{number}⟩" for number in ids] if ids and completion is None else []
    scores = {} if blind else _token_scores(long_parts)
    whole = completion or ""
    parts = max(1, math.ceil(len(texts) / PART_TOKENS), math.ceil(len(whole) / PART_LETTERS) if not texts else 1)
    place = min(max(part, 0), parts - 1)
    tokens = []
    first = place * PART_TOKENS
    start = sum(map(len, texts[:first]))
    begin = start
    for index, text in enumerate(texts[first : first + PART_TOKENS], first):
        of_token = {name: values[index] if index < len(values) else None for name, values in scores.items()}
        tokens.append({"text": text, "start": start, "end": start + len(text), "scores": of_token})
        start += len(text)
    if texts and pieces:
        shown = "".join(texts[first : first + PART_TOKENS]) if parts > 1 else whole
    else:
        begin = place * PART_LETTERS
        shown = whole[begin : begin + PART_LETTERS]
    prompt = long_parts.get("prompt_text")
    return {
        "prompt": None if prompt is None else prompt[:PART_LETTERS] if isinstance(prompt, str) else prompt,
        "completion": shown if completion is not None else None,
        "completion_letters": len(whole),
        "completion_from": begin,
        "tokens": tokens or None,
        "tokens_from": first if texts else 0,
        "token_count": len(texts),
        "part": place,
        "parts": parts,
    }


def _token_scores(long_parts: Mapping[str, Any]) -> dict[str, list[float | None]]:
    return {
        f"{probe}:{reading}": [value if isinstance(value, (int, float)) and math.isfinite(value) else None for value in values]
        for probe, readings in (long_parts.get("token_scores") or {}).items()
        for reading, values in readings.items()
    }


def _missing(long_parts: Mapping[str, Any], row: sqlite3.Row) -> str | None:
    if not long_parts and row["long_file"] is not None:
        return "The texts of this rollout were deleted from the record."
    if not any(long_parts.get(name) for name in ("completion_text", "completion_pieces", "completion_ids")):
        return "The record keeps no texts of this rollout: a trainer keeps them with RecordOptions(texts=True)."
    if not long_parts.get("token_scores"):
        return "The record keeps no scores of tokens of this rollout."
    return None
