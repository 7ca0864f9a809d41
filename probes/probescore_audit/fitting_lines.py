"""Makes lines of labelled rollouts from the record of a training run, in the form in which probes are fitted, calibrated and compared."""

from __future__ import annotations

import zlib
from collections import defaultdict
from typing import Any

from probescore_audit.record import LabelRow, Record, RolloutRow

_TRAIN, _CALIBRATION = 0.5, 0.75  # of the prompts, up to which share each split goes; the rest is for tests
_SURE = {"yes": True, "no": False}


def lines_to_fit(record: Record) -> tuple[dict[str, Any], ...]:
    """Returns the labelled rollouts of a training run as objects of the format in which probes are fitted, with a split each.

    All rollouts of a prompt are of one split, which depends on the prompt's name alone: half of the prompts are to fit on, a quarter to
    calibrate on and a quarter to test on, and none changes its split as labels are added. For calibration only labels of rollouts that were
    drawn at random are taken, since a threshold found on rollouts that were chosen for their score would be too high. Labels of which the
    labeller was unsure are left out; a rollout that was judged several times is positive if every judgement says so.

    Args:
        record: the record of the run, read with its texts.

    Raises:
        ValueError: nothing is labelled, or the record has neither token ids nor texts of what is.
    """
    judged: dict[tuple[int, str], list[LabelRow]] = defaultdict(list)
    for label in record.labels:
        judged[label.step, label.rollout].append(label)
    if not judged:
        raise ValueError("nothing is labelled; label rollouts first")
    lines = []
    for row in record.rollouts:
        labels = judged.get((row.step, row.rollout), [])
        if not labels or any(label.label not in _SURE for label in labels):
            continue
        split = _split(row)
        if split == "calibration" and not any(label.floor for label in labels):
            continue
        texts = _texts(row)
        if texts is not None:
            prompt, completion = texts
            positive = all(_SURE[label.label] for label in labels)
            lines.append({"prompt": prompt, "completion": completion | {"label": positive}, "group": _group(row), "split": split})
    if not lines:
        raise ValueError("the record has neither token ids nor texts of what is labelled; keep them: RecordOptions(texts=True)")
    return tuple(lines)


def _group(row: RolloutRow) -> str:
    return f"prompt {row.prompt}"


def _split(row: RolloutRow) -> str:
    place = zlib.crc32(_group(row).encode("utf-8", "replace")) / 2**32
    return "train" if place < _TRAIN else "calibration" if place < _CALIBRATION else "test"


def _texts(row: RolloutRow) -> tuple[Any, dict[str, Any]] | None:
    """Returns prompt and completion: token ids where both are recorded, else texts; ``None`` if a part is not recorded."""
    prompt = row.prompt_ids if row.prompt_ids is not None and row.completion_ids is not None else row.prompt_text
    if prompt is None:
        return None
    if prompt is row.prompt_ids and row.completion_ids:
        return list(row.prompt_ids or ()), {"ids": list(row.completion_ids)}
    return (row.prompt_text, {"text": row.completion_text}) if row.prompt_text is not None and row.completion_text else None
