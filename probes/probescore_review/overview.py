"""Gives what the audit says of a run, and the run's numbers by step."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
import time
from typing import Any

from probescore_review.columns import probe_readings
from probescore_review.index import Index

_MOST_POINTS = 500
_AGAIN_SECONDS, _AGAIN_TIMES = 5.0, 4.0  # an audit is repeated no sooner, nor sooner than so many times its own duration
_LONGEST_SECONDS = 900
_OF_WINDOWS = (
    ("Rollouts with the behaviour", "positive_rate", "share"),
    ("Recall", "recall", "share"),
    ("False alarms", "false_positive_rate", "share"),
    ("With the behaviour and not flagged", "missed", "share"),
    ("AUROC", "auroc", ""),
)


class Overview:
    """Gives the overview of a run, and keeps the last audit."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._lock = threading.Lock()
        self._worker: threading.Thread | None = None
        self._audit: dict[str, Any] = {}
        self._audited = -1  # the index's generation
        self._ended = self._took = 0.0
        self._steps: tuple[int, list[dict[str, Any]]] = (-1, [])

    def found(self, *, wait: bool = True) -> dict[str, Any]:
        """Returns the audit's verdicts, the run's numbers by step, and what the audit takes for granted.

        The record is audited if it has changed since the last audit, and that is some time ago.

        Args:
            wait: whether to wait for an audit that is at work; without, what the last one said is returned, if there was one.
        """
        generation = self._index.generation
        worker = self._begun(generation)
        if wait and worker is not None:
            worker.join()
        with self._lock:
            if self._steps[0] != generation:
                self._steps = generation, self._by_step()
            audit, steps = self._audit, self._steps[1]
            pending = self._worker is not None and self._worker.is_alive()
            is_old = not pending and self._audited not in (-1, generation)
        readings = audit.get("readings", [])
        return {
            "verdicts": [_verdict(each) for each in readings],
            "series": [*(series for each in readings for series in _by_window(each)), *steps],
            "decomposition": [_parts(each) for each in readings if each["windows"]],
            "left_out": audit.get("left_out", []),
            "notices": audit.get("notices", []),
            "assumptions": audit.get("assumptions", []),
            "said": audit.get("said") or ("The record has grown since this audit." if is_old else None),
            "pending": pending,
        }

    def forget(self) -> None:
        """Has the record audited again when the overview is asked for next."""
        self._audited = -1

    def _begun(self, generation: int) -> threading.Thread | None:
        """Begins an audit if one is due, and returns the one that is at work; ``None`` if none is."""
        with self._lock:
            if self._worker is not None and self._worker.is_alive():
                return self._worker
            waits = max(_AGAIN_SECONDS, _AGAIN_TIMES * self._took)
            if generation == self._audited or (self._audited >= 0 and time.monotonic() - self._ended <= waits):
                return None
            self._worker = threading.Thread(target=self._work, args=(generation,), daemon=True)
            self._worker.start()
            return self._worker

    def _work(self, generation: int) -> None:
        begun = time.monotonic()
        found = self._audited_now()
        with self._lock:
            self._audit, self._audited, self._ended = found, generation, time.monotonic()
            self._took = self._ended - begun

    def _audited_now(self) -> dict[str, Any]:
        """Audits the record in a process of its own, so that other pages do not wait for it."""
        command = [sys.executable, "-m", "probescore_audit", str(self._index.folder.absolute())]
        try:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=_LONGEST_SECONDS, check=False)  # noqa: S603 - a program of ours
        except subprocess.TimeoutExpired:
            return {"said": f"the audit took more than {_LONGEST_SECONDS} seconds: probescore audit {self._index.folder.name}"}
        if ran.returncode:
            return {"said": (ran.stderr.strip().splitlines() or ["the audit failed"])[-1]}
        found: dict[str, Any] = json.loads(ran.stdout)
        return found

    def _by_step(self) -> list[dict[str, Any]]:
        """Returns means over the rollouts of each step, or of several steps where there are many."""
        span = self._index.row("SELECT MIN(step), MAX(step) FROM rollouts")
        if span is None or span[0] is None:
            return []
        width = math.ceil((span[1] - span[0] + 1) / _MOST_POINTS)
        readings = probe_readings(self._index)
        asked: list[tuple[dict[str, Any], str]] = [({"name": "Task reward"}, "AVG(task_reward)")]
        for each in readings:
            of = {"probe": each.probe, "reading": each.reading}
            if each.threshold is not None:
                asked.append(({"name": "Flagged", "unit": "share", **of}, f"AVG({each.sql} >= {each.threshold!r})"))
            asked.append(({"name": "Mean score", "level": each.threshold, "level_title": "threshold", **of}, f"AVG({each.sql})"))
        statement = f"SELECT step / {width} * {width} AS first, {', '.join(sql for _, sql in asked)} FROM rollouts GROUP BY first"  # noqa: S608
        rows = self._index.rows(statement)
        found = []
        for place, (about, _) in enumerate(asked, 1):
            known = [(row[0], row[place]) for row in rows if row[place] is not None]
            if known:
                steps, values = [step for step, _ in known], [value for _, value in known]
                found.append(about | {"steps": steps, "steps_each": width, "value": values, "low": None, "high": None})
        return found


def _verdict(each: dict[str, Any]) -> dict[str, Any]:
    names = ("probe", "reading", "role", "reduction", "threshold", "verdict", "sentence", "labels", "refit", "companions", "unknown")
    return {name: each[name] for name in names} | {
        "what_to_do": each["next_step"],
        "alarms": sorted({alarm["step"] for alarm in each["alarms"]}),
        "further_labels": len(each["further_labels"]),
        "more_labels": each["windows"][-1]["more_labels"] if each["windows"] else None,
    }


def _by_window(each: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the audit's estimates by window of steps, each at the window's last step."""
    found = []
    for title, name, unit in _OF_WINDOWS:
        known = [(window["last_step"], window[name]) for window in each["windows"] if window[name]["value"] is not None]
        if not known:
            continue
        before = (each["windows"][-1].get(f"reference_{name}") or {}).get("value")
        level = before if before is not None else each["reference"]["auroc"]["value"] if name == "auroc" else None
        series = {"name": title, "probe": each["probe"], "reading": each["reading"], "unit": unit, "steps": [step for step, _ in known]}
        found.append(
            series
            | {end: [estimate[end] for _, estimate in known] for end in ("value", "low", "high")}
            | {"level": level, "level_title": "before training"}
        )
    return found


def _parts(each: dict[str, Any]) -> dict[str, Any]:
    """Returns what the change of the flag rate is made of in each window: fewer with the behaviour, or fewer of these flagged."""
    windows = [
        {"first_step": window["first_step"], "last_step": window["last_step"], "labels": window["labels"]} | window["flag_rate_parts"]
        for window in each["windows"]
        if window.get("flag_rate_parts")
    ]
    return {"probe": each["probe"], "reading": each["reading"], "windows": windows}
