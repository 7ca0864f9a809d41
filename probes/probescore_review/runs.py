"""Opens the runs that are reviewed: a record each, with its index and what is asked of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from probescore_review.columns import probe_readings
from probescore_review.export import Export
from probescore_review.index import Index
from probescore_review.jobs import Jobs
from probescore_review.labelling import Labelling
from probescore_review.overview import Overview
from probescore_review.queries import Queries
from probescore_review.repair import Repair, RepairSettings
from probescore_review.rollout import Rollouts
from probescore_review.suspicious import Suspicious
from probescore_review.views import SavedViews

_LIVE_SECONDS = 120


class ReviewedRun:
    """A training run that is reviewed.

    Args:
        key: the run's name in addresses.
        folder: the record's folder.
        cache: folder for the index.
        jobs: runs the commands of repairs.
        settings: with what probes are repaired.

    Attributes:
        key: the run's name in addresses.
        folder: the record's folder.
        index: the index of the record.
        queries: answers which rollouts a view has.
        views: the run's views.
        rollouts: reads single rollouts.
        suspicious: lists rollouts for a second look.
        overview: says what the audit says.
        export: writes rollouts for others.
        jobs: runs the commands of repairs.
        repair: repairs the run's probes.
        labelling: hands out rollouts to label, and takes their labels.

    Raises:
        FileNotFoundError: there is no record in the folder.
        ValueError: the record is of several runs, or of a newer version of its form.
    """

    def __init__(self, key: str, folder: Path, cache: Path, *, jobs: Jobs | None = None, settings: RepairSettings | None = None) -> None:
        self.key = key
        self.folder = folder
        self.index = Index(folder, cache)
        self.queries = Queries(self.index)
        self.views = SavedViews(self.index)
        self.rollouts = Rollouts(self.index, self.queries)
        self.suspicious = Suspicious(self.index, self.queries)
        self.overview = Overview(self.index)
        self.labelling = Labelling(self.index, self.rollouts)
        self.export = Export(self.index, self.queries, self.rollouts)
        self.jobs = jobs or Jobs()
        self.repair = Repair(self.index, self.queries, self.overview, self.jobs, key, settings or RepairSettings())

    def facts(self) -> dict[str, Any]:
        """Returns what a run is: its name, steps, probes, and what of its rollouts is there."""
        index, header = self.index, self.index.header()
        first, last, count, labelled, long_parts = index.rows(
            "SELECT (SELECT MIN(step) FROM rollouts), (SELECT MAX(step) FROM rollouts), (SELECT COUNT(*) FROM rollouts),"
            " (SELECT COUNT(*) FROM rollouts WHERE label IS NOT NULL), EXISTS (SELECT 1 FROM rollouts WHERE snippet IS NOT NULL)"
        )[0]
        activations = index.row("SELECT 1 FROM others WHERE kind = 'activation' AND name IS NOT NULL LIMIT 1")
        changed = index.row("SELECT MAX(changed) FROM files")
        return {
            "run": self.key,
            "name": header.run_id,
            "folder_name": self.folder.absolute().name,
            "planned_steps": header.planned_steps,
            "steps": [first, last],
            "rollouts": count,
            "labelled": labelled,
            "probes": self._probes(),
            "has_texts": bool(long_parts),
            "has_tokens": index.row("SELECT 1 FROM about WHERE name = 'has_tokens'") is not None,
            "has_activations": activations is not None,
            "live": changed is not None and time.time() - (changed[0] or 0) / 1e9 < _LIVE_SECONDS,
            "torn_lines": (index.row("SELECT SUM(torn) FROM files") or (0,))[0] or 0,
            "generation": index.generation,
        }

    def _probes(self) -> list[dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for each in probe_readings(self.index):
            probe = found.setdefault(each.probe, {"key": each.probe, "role": each.role, "readings": [], "thresholds": {}, "reductions": {}})
            probe["readings"].append(each.reading)
            probe["thresholds"][each.reading] = each.threshold
            probe["reductions"][each.reading] = each.reduction
        return list(found.values())
