"""Makes a record of a file of scored rollouts, as ``probescore score --json`` prints them, so that these can be reviewed as a run is.

The record is a folder beside the file, which keeps the labels. A file that has grown since is read on from there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from probescore_audit.record import LabelRow, RecordedProbe, RecordWriter, RolloutRow, RunHeader
from probescore_audit.record.scored_lines import whole_scores
from probescore_review.files import write_json

SOURCE_FILE = "review-source.json"
_ANSWERS = {True: "yes", False: "no", "yes": "yes", "no": "no", "unsure": "unsure"}
_AT_ONCE = 500


def record_of(path: Path, thresholds: Mapping[str, float] | None = None) -> Path:
    """Returns the folder of the record of a file of scored rollouts, which is made beside it, or brought up to date.

    Args:
        path: the file.
        thresholds: for each probe, ``name@version``, the score from which on a rollout is flagged.

    Raises:
        ValueError: a line is no scored rollout, or the file has another beginning than the one that the folder was made from.
        OSError: the file cannot be read, or the folder cannot be written.
    """
    folder = path.with_name(f"{path.name.removesuffix('.jsonl')}.review")
    content = path.read_bytes()
    content = content[: len(content) - _unfinished(content)]
    taken = _taken(folder / SOURCE_FILE)
    if taken and (len(content) < taken["bytes"] or _digest(content[: taken["bytes"]]) != taken["sha256"]):
        raise ValueError(f"{path.name}: {folder.name} was made from another file of this name; move that folder away, with its labels")
    start = taken["bytes"] if taken else 0
    before = taken["lines"] if taken else 0
    lines = content[start:].decode("utf-8-sig", "replace").split("\n")
    rows = [row for number, line in enumerate(lines, before + 1) if line.strip() for row in _rows(line, number)]
    keys = list(dict.fromkeys(key for row in rows if isinstance(row, RolloutRow) for key in row.scores))
    if not rows and not taken:
        raise ValueError(f"{path.name}: no scored rollouts; give what `probescore score --json` printed")
    if not rows and not thresholds:
        return folder
    known = [*taken.get("probes", []), *(key for key in keys if key not in taken.get("probes", []))]
    limits = taken.get("thresholds", {}) | dict(thresholds or {})
    for key in limits:
        if key not in known:
            raise ValueError(f"threshold: {key}; the file has scores of {', '.join(known)}")
    probes = [_probe(key, limits.get(key), rows, taken.get("reductions", {})) for key in known]
    header = RunHeader(run_id=path.name, planned_steps=1, probes=probes, launch="review")  # one launch, however often the file has grown
    with RecordWriter(folder, header, on_error="raise", keep_texts=True) as writer:
        for first in range(0, len(rows), _AT_ONCE):
            writer.append(rows[first : first + _AT_ONCE])
    reductions = taken.get("reductions", {}) | {each.key: next(iter(each.thresholds), "") for each in probes if each.thresholds}
    write_json(
        folder / SOURCE_FILE,
        {
            "bytes": len(content),
            "sha256": _digest(content),
            "lines": before + len(lines) - (not lines[-1]),
            "probes": known,
            "thresholds": limits,
            "reductions": reductions,
        },
    )
    return folder


def _taken(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    return found


def _unfinished(content: bytes) -> int:
    """Returns the length of a last line that is being written: it has no end yet, and is no JSON."""
    last = content[content.rfind(b"\n") + 1 :]
    try:
        json.loads(last or b"null")
    except ValueError:
        return len(last)
    return 0


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _probe(key: str, threshold: float | None, rows: list[RolloutRow | LabelRow], known: Mapping[str, str]) -> RecordedProbe:
    """Returns the description of a probe; its threshold is that of its first reduction."""
    if threshold is None:
        return RecordedProbe(key=key, role="monitor")
    first = next(
        (next(iter(reductions)) for row in rows if isinstance(row, RolloutRow) for reductions in row.scores.get(key, {}).values()), ""
    )
    return RecordedProbe(key=key, role="reward", thresholds={known.get(key) or first: threshold})


def _rows(line: str, number: int) -> Iterator[RolloutRow | LabelRow]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError(f"line {number} is no JSON; give what `probescore score --json` printed") from None
    if not isinstance(values, dict) or not isinstance(values.get("group"), int) or not isinstance(values.get("completion"), int):
        raise ValueError(f"line {number}: no group and completion; give what `probescore score --json` printed")
    scores, tokens = _by_reading(values, number)
    pieces = values.get("completion_texts")
    name = f"{values['group']}.{values['completion']}"
    text = json.dumps([values.get("prompt_ids"), values.get("completion_ids"), pieces])
    row = RolloutRow(
        step=0,
        rollout=name,
        prompt=str(values["group"]),
        scores=scores,
        tokens=next((len(each) for each in (values.get("completion_ids"), pieces) if each is not None), None),
        text_sha256=hashlib.sha256(text.encode()).hexdigest(),
        prompt_ids=values.get("prompt_ids"),
        completion_ids=values.get("completion_ids"),
        completion_text="".join(pieces) if pieces else None,
        completion_pieces=pieces,
        token_scores=tokens or None,
        follow_ups=[_follow_up(each, number) for each in values.get("follow_ups") or ()] or None,
    )
    yield row
    label = values.get("label")
    if isinstance(label, (str, bool)) and label in _ANSWERS:
        digest = row.text_sha256
        yield LabelRow(step=0, rollout=name, label=_ANSWERS[label], source="file", text_sha256=digest, row=f"file-{name}")


def _follow_up(values: Mapping[str, Any], number: int) -> dict[str, Any]:
    scores, tokens = _by_reading(values, number)
    pieces = values.get("completion_texts") or []
    return {"text": "".join(pieces), "pieces": pieces, "scores": scores, "token_scores": tokens}


def _by_reading(values: Mapping[str, Any], number: int) -> tuple[dict[str, dict[str, dict[str, float]]], dict[str, dict[str, list[float]]]]:
    """Returns the scores by probe, reading and reduction, and those of tokens by probe and reading. A rollout that could not be scored has
    none.
    """
    scores: dict[str, dict[str, dict[str, float]]] = {}
    tokens: dict[str, dict[str, list[float]]] = {}
    readings = {"frozen": values} | {name: each for name, each in (values.get("readings") or {}).items() if name != "frozen"}
    for reading, of in readings.items():
        if not of.get("scores"):
            continue
        for key, reduced in whole_scores(of, number):
            scores.setdefault(key, {})[reading] = reduced
        for name, each in of["scores"].items():
            for place, label in enumerate(each["labels"] if each.get("tokens") else ()):
                key = f"{name.partition('@')[0]}@{each['version']}" + (f"/{label}" if place else "")
                tokens.setdefault(key, {})[reading] = [row[place] for row in each["tokens"]]
    return scores, tokens
