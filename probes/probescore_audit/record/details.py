"""Keeps the long parts of a training run's rollouts (texts, token ids, scores of tokens) in files of their own, one for each few steps, so
that old ones can be deleted while the run goes on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

_STEPS = 32  # of a file
_NAME = re.compile(r"(?P<file>.+)-details-(?P<first>\d+)-(?P<last>\d+)\.jsonl")


def details_path(path: Path, step: int, kept_steps: int | None) -> Path:
    """Returns the path of the file for the long parts of a step's rollouts, which belongs to a process's file in the record of a training
    run.

    Args:
        path: the process's file.
        step: the training step.
        kept_steps: number of the latest training steps whose long parts are kept; ``None`` = all.
    """
    steps = _STEPS if kept_steps is None else max(1, min(_STEPS, kept_steps // 4))
    first = step // steps * steps
    return path.with_name(f"{path.stem}-details-{first:08d}-{first + steps - 1:08d}.jsonl")


def details_files(folder: Path) -> Mapping[str, list[Path]]:
    """Returns the files of long parts of rollouts in the folder of a training run's record, by the name of the process's file that they
    belong to.
    """
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*-details-*.jsonl")):
        if match := _NAME.fullmatch(path.name):
            found.setdefault(match["file"], []).append(path)
    return found


def first_step_of(path: Path) -> int:
    """Returns the first of the training steps to whose rollouts a file of their long parts belongs."""
    return _steps_of(path)[0]


def delete_details(directory: Path | str, before: int | None = None) -> int:
    """Deletes the texts, token ids and scores of tokens of rollouts from the record of a training run, also while the run goes on. Scores,
    rewards and labels stay.

    Args:
        directory: the record's folder.
        before: only files all of whose training steps are before this one are deleted; ``None`` = all.

    Returns:
        The number of files that were deleted.

    Raises:
        OSError: a file cannot be deleted.
    """
    chosen = [path for paths in details_files(Path(directory)).values() for path in paths if before is None or _steps_of(path)[1] < before]
    for path in chosen:
        path.unlink(missing_ok=True)
    return len(chosen)


def _steps_of(path: Path) -> tuple[int, int]:
    match = _NAME.fullmatch(path.name)
    assert match is not None  # noqa: S101 - as details_path names it
    return int(match["first"]), int(match["last"])
