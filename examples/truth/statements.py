"""True and false statements as lines of labelled rollouts: whoever tells them apart must know what is so."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from topics import CITY, NO_CITY, Pair, pairs_by_topic

FACTUAL = ("capitals", "continents", "currencies", "languages", "cities", "elements")
"""Topics that the model knows something of."""
OTHER = ("antonyms", "arithmetic", "comparison")
NEGATED = "negated cities"
CALIBRATION_SHARE = 5
FILLER = " People often ask about this in school."
LOOK = [
    {"prompt": "The capital of France is", "completions": [" Paris.", " Berlin."], "label": ["true", "false"]},
    {"prompt": "The chemical symbol of gold is", "completions": [" Au.", " Fe."], "label": ["true", "false"]},
    {"prompt": "Paris is not a city in", "completions": [" Germany.", " France."], "label": ["true", "false"]},
    {"prompt": "17 + 25 =", "completions": [" 42.", " 43."], "label": ["true", "false"]},
    {"prompt": "The capital of France is", "completions": [f" Paris.{FILLER}", f" Berlin.{FILLER}"], "label": ["true", "false"]},
]
"""Statements to look at: what the probe does well, and where it fails."""

Line = dict[str, Any]


def lines_of(pairs: Iterable[Pair], topic: str, *, negated: bool = False) -> list[Line]:
    """Four lines a pair: each fact with its own value and with the other's. ``label`` is true where the statement is false.

    So every value stands once on either side, and no text tells the label. The pair is the group: were a value fitted on with one label and
    tested with the other, text would tell the label again, inverted.
    """
    lines = []
    for number, pair in enumerate(pairs):
        for fact, other in (pair, pair[::-1]):
            for value, is_false in ((fact.value, negated), (other.value, not negated)):
                stem = fact.stem.replace(CITY, NO_CITY) if negated else fact.stem
                lines.append({"prompt": stem, "completion": f" {value}.", "label": is_false, "group": f"{topic} {number}", "slice": topic})
    return lines


def lines_by_topic(seed: int = 0) -> dict[str, list[Line]]:
    """The lines of every topic, negated statements among them."""
    pairs = pairs_by_topic(seed)
    lines = {topic: lines_of(facts, topic) for topic, facts in pairs.items()}
    lines[NEGATED] = lines_of(pairs["cities"], NEGATED, negated=True)
    return lines


def write_files(folder: Path) -> None:
    """Writes what the demo takes: ``fit.jsonl``, ``calibration.jsonl``, ``elsewhere.jsonl`` and ``look.jsonl``.

    One pair in ``CALIBRATION_SHARE`` is kept for the calibration, where each true statement stands twice: alone, and with a sentence after
    it that says nothing of the matter.
    """
    topics = lines_by_topic()
    known = [line for topic in FACTUAL for line in topics[topic]]
    held_back = [line for line in known if int(line["group"].split()[-1]) % CALIBRATION_SHARE == 0]
    _write(folder / "fit.jsonl", [line for line in known if line not in held_back])
    _write(folder / "calibration.jsonl", [*held_back, *({**line, "completion": line["completion"] + FILLER} for line in held_back)])
    _write(folder / "elsewhere.jsonl", [line for topic in (*OTHER, NEGATED) for line in topics[topic]])
    _write(folder / "look.jsonl", LOOK)


def _write(path: Path, lines: Sequence[Line]) -> None:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    write_files(parser.parse_args().folder)
