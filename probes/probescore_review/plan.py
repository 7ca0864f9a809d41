"""Keeps the plan of which rollouts of a run are to be labelled, in a file beside the record.

A plan must be labelled as a whole, and each label needs the probability with which its rollout was drawn. So the plan is kept until then,
whatever becomes of the process, and whoever labels.
"""

from __future__ import annotations

import json
import multiprocessing
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from probescore_audit.recorded_labels import PlannedLabel
from probescore_review.files import write_json
from probescore_review.index import Index

FILE = "review-plan.json"


@dataclass(frozen=True)
class PlanEntry:
    """Value object with a rollout of the plan.

    Attributes:
        planned: the rollout, and with which probability it was drawn.
        text_sha256: digest of the text that it had then; a rollout with another is another rollout.
    """

    planned: PlannedLabel
    text_sha256: str | None

    @property
    def key(self) -> tuple[int, str]:
        """Returns step and name of the rollout."""
        return self.planned.step, self.planned.rollout


class KeptPlan:
    """The plan of one run.

    Args:
        index: the index of the record.
    """

    def __init__(self, index: Index) -> None:
        self._index = index
        self._path = index.folder / FILE
        self._known: tuple[tuple[int, int], dict[tuple[int, str], PlanEntry]] = ((0, 0), {})

    def entries(self) -> dict[tuple[int, str], PlanEntry]:
        """Returns the rollouts of the plan by step and name, in the order in which they are to be labelled: those of the latest step first,
        and in no order within a step, so that nobody can tell why a rollout was drawn.

        Raises:
            ValueError: the file is no plan.
        """
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return {}
        stamp = status.st_mtime_ns, status.st_ino
        if self._known[0] != stamp:
            entries = list(_read(self._path))
            random.Random(len(entries)).shuffle(entries)  # noqa: S311 - an order, no secret
            entries.sort(key=lambda entry: -entry.planned.step)
            self._known = stamp, {entry.key: entry for entry in entries}
        return self._known[1]

    def add(
        self, *, per_step: int | None = None, more: int | None = None, first_step: int = 0, last_step: int | None = None, left: int = 0
    ) -> int:
        """Plans further rollouts, and returns how many were added.

        Args:
            per_step: number of labels of each step that has no plan yet.
            more: number of further labels of the last steps; give one of the two.
            first_step: first step to plan for.
            last_step: last step to plan for; the last of the record by default.
            left: number of rollouts of the plan that are not labelled yet.

        Raises:
            ValueError: neither or both are given, there is nothing to plan by, or ``more`` is asked for before the plan is labelled.
            OSError: the plan cannot be written.
        """
        if (per_step is None) == (more is None):
            raise ValueError("plan: give per_step, the labels of each step, or more, the further labels of the last steps")
        if more is not None and left:
            raise ValueError(f"more: {left} rollouts of the plan are not labelled yet; label these first")
        asked = (self._index.folder, per_step, more, first_step, last_step)
        # in a process of its own: the record's rows fill the memory for a moment
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            planned = process.submit(_planned, *asked).result()
        known = self.entries()
        steps = {entry.planned.step for entry in known.values()}
        new = [each for each in planned if (more is not None or each.step not in steps) and (each.step, each.rollout) not in known]
        digests = {
            (row["step"], row["name"]): row["text_sha256"]
            for each in new
            for row in self._index.rows(
                "SELECT step, name, text_sha256 FROM rollouts WHERE step = ? AND name = ?", (each.step, each.rollout)
            )
        }
        added = [PlanEntry(each, digests[each.step, each.rollout]) for each in new if (each.step, each.rollout) in digests]
        if added:
            write_json(self._path, [asdict(entry.planned) | {"text_sha256": entry.text_sha256} for entry in [*known.values(), *added]])
        return len(added)


def _planned(folder: Path, per_step: int | None, more: int | None, first_step: int, last_step: int | None) -> tuple[PlannedLabel, ...]:
    from probescore_audit.record import read_record
    from probescore_audit.recorded_labels import label_design, plan_further, plan_recorded

    record = read_record(folder, texts=False)
    if per_step is not None:
        return plan_recorded(record, per_step, first_step=first_step, last_step=last_step, complete=True)
    design = label_design(record, record.table())
    if design is None or more is None:
        raise ValueError("more: no labels of the record were drawn by a plan; plan labels of each step first")
    return plan_further(design, more)


def _read(path: Path) -> list[PlanEntry]:
    try:
        values: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return [
            PlanEntry(PlannedLabel(**{name: each[name] for name in each if name != "text_sha256"}), each["text_sha256"]) for each in values
        ]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path.name}: no plan of this version; move it away, and plan anew") from None
