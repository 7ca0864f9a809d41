"""Finds out which rows of a training run's record count, if training was stopped and went on from an earlier step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from probescore_audit.record.rows import RunHeader


@dataclass(frozen=True)
class FileSteps:
    """Value object that says from which training step on one file of a training run's record has rollouts.

    Attributes:
        header: the file's first line, which describes the process that wrote the file.
        first: first training step; ``None`` if the file has no rollouts.
    """

    header: RunHeader
    first: int | None


def valid_before(files: Sequence[FileSteps]) -> list[float]:
    """Returns, for each file of a training run's record, the training step from which on its rows do not count, because a later attempt has
    started from there; infinite if there is none.

    Files that the processes of one launch of the training wrote are one attempt. If processes do not say which launch they belong to, a
    file joins the attempt before it if that attempt has as many processes, and none with the file's rank. An attempt that begins at a step
    takes the place of all earlier ones from this step on, even if it has not come as far as the earlier ones had. A file without rollouts
    is no part of an attempt; its rows are void where an attempt that began after the file has started.
    """
    by_start = sorted(range(len(files)), key=lambda index: files[index].header.started)
    attempts: list[list[int]] = []
    for index in by_start:
        if files[index].first is None:
            continue  # labels, whose header is that of some rank
        header = files[index].header
        for attempt in reversed(attempts):
            begun = files[attempt[0]].header
            if header.launch or begun.launch:
                joins = header.launch == begun.launch
            else:
                joins = attempt is attempts[-1] and header.world_size == begun.world_size
                joins = joins and all(files[other].header.rank != header.rank for other in attempt)
            if joins:
                attempt.append(index)
                break
        else:
            attempts.append([index])
    limits = [float("inf")] * len(files)
    starts: float = float("inf")
    for attempt in reversed(attempts):
        for index in attempt:
            limits[index] = starts
        begun = files[attempt[0]].header
        starts = min([starts, *(first for index in attempt if (first := files[index].first) is not None)])
        for index in by_start:
            if files[index].first is None and files[index].header.started < begun.started:
                limits[index] = starts
    return limits
