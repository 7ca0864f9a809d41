"""Made rollouts for the tiny model, whose labels are known to be readable, unreadable, or given away by something else."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from models import BOS, HIDDEN_SIZE, VOCAB_SIZE, tiny_model

from probescore.types import Completion
from probescore_probes import ReferenceModel
from probescore_probes.fitting.labelled_rollouts import LabelledRollout

Line = dict[str, Any]


@functools.cache
def reference() -> ReferenceModel:
    return ReferenceModel.load(tiny_model())


def random_ids(random: np.random.Generator, count: int) -> list[int]:
    return random.integers(4, VOCAB_SIZE, count).tolist()


def readable(count: int, seed: int = 0, *, tap: str = "resid_post.1") -> list[Line]:
    """The label is the side of a hyperplane through the mean activations at a tap; those near it are left out."""
    random = np.random.default_rng(seed)
    rollouts = [([BOS, *random_ids(random, 5)], random_ids(random, 6)) for _ in range(3 * count)]
    means = np.stack([rows.mean(axis=0) for rows in reference().completion_activations(rollouts, tap)])
    side = means @ np.random.default_rng(99).standard_normal(HIDDEN_SIZE)
    order = np.argsort(side)
    kept = [(index, False) for index in order[: count // 2]] + [(index, True) for index in order[-(count - count // 2) :]]
    return [
        {
            "prompt": rollouts[index][0],
            "completion": rollouts[index][1],
            "label": label,
            "group": f"problem {place}",
            "slice": "ab"[place % 2],
        }
        for place, (index, label) in enumerate(sorted(kept))
    ]


def meaningless(count: int, seed: int = 0) -> list[Line]:
    """Labels that nothing tells."""
    labels = np.random.default_rng(seed + 1).permutation(np.arange(count) % 2 == 0)
    return [{**line, "label": bool(label)} for line, label in zip(readable(count, seed), labels, strict=True)]


def told_by_length(count: int, seed: int = 0) -> list[Line]:
    """Positives are longer, and otherwise alike."""
    random = np.random.default_rng(seed)
    return [
        {
            "prompt": [BOS, *random_ids(random, 5)],
            "completion": random_ids(random, 12 if index % 2 else 5),
            "label": index % 2,
            "group": index,
        }
        for index in range(count)
    ]


def labelled(lines: Sequence[Line]) -> list[LabelledRollout]:
    """What fitting takes, of lines as they are here."""
    return [
        LabelledRollout(
            line["prompt"],
            Completion(line["completion"]),
            bool(line["label"]),
            f"line {number}",
            str(line["group"]),
            slice=line.get("slice", ""),
        )
        for number, line in enumerate(lines, 1)
    ]


def write_lines(path: Path, lines: Sequence[Line]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
