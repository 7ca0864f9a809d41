"""Names the views of a run's rollouts: those that every run has, and those that people saved beside the record."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from probescore.types import FROZEN
from probescore_review.columns import ProbeReading, columns, probe_readings
from probescore_review.files import write_json
from probescore_review.index import Index
from probescore_review.queries import Query, statements

FILE = "review-views.json"
_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
Where = list[list[Any]]
_LONGEST_TITLE, _MOST_VIEWS = 200, 500


def _built_in(index: Index) -> list[dict[str, Any]]:
    """Returns the views that every run has, as far as its scores and rewards allow."""
    readings = probe_readings(index)
    found = [_view("newest", "Newest", [], "step", True)]
    if not readings:
        return found
    first = readings[0]
    found.insert(0, _view("high-score", "High score", [], first.name, True))
    if any(each.probe == first.probe and each.reading != FROZEN for each in readings) and first.reading == FROZEN:
        found.append(_view("readings-disagree", "Readings disagree", [], f"difference:{first.probe}", False))
    for each in (reading for reading in readings if reading.threshold is not None):
        own = "" if each == first else f"-{_slug(each.probe)}-{_slug(each.reading)}"
        of = "" if each == first else f" ({each.probe} on {each.reading})"
        found += _of_threshold(each, own, of, usual_reward(index) if each == first else None)
    return found


def _of_threshold(each: ProbeReading, own: str, of: str, reward: float | None) -> list[dict[str, Any]]:
    limit = each.threshold
    found = []
    if reward is not None:
        paid: Where = [["task_reward", ">=", reward], [each.name, ">=", limit]]
        found.append(_view(f"reward-disagrees{own}", f"Flagged, and well rewarded{of}", paid, each.name, True))
    label: Where = [[f"wrong:{each.probe}:{each.reading}", "=", 1]]
    found.append(_view(f"label-disagrees{own}", f"Probe and label disagree{of}", label, each.name, True))
    alarms: Where = [["label", "=", "no"], [each.name, ">=", limit]]
    found.append(_view(f"false-alarms{own}", f"False alarms{of}", alarms, each.name, True))
    missed: Where = [["label", "=", "yes"], [each.name, "<", limit]]
    found.append(_view(f"misses{own}", f"Misses{of}", missed, each.name, False))
    return found


def usual_reward(index: Index) -> float | None:
    """Returns the median of the task's reward, or the lowest reward above it where half of the rollouts have the lowest there is."""
    count = index.row("SELECT COUNT(task_reward), MIN(task_reward), MAX(task_reward) FROM rollouts")
    if count is None or not count[0] or count[1] == count[2]:
        return None
    middle = index.row(
        "SELECT task_reward FROM rollouts WHERE task_reward IS NOT NULL ORDER BY task_reward LIMIT 1 OFFSET ?", (count[0] // 2,)
    )
    if middle is not None and middle[0] > count[1]:
        return float(middle[0])
    above = index.row("SELECT MIN(task_reward) FROM rollouts WHERE task_reward > ?", (count[1],))
    return None if above is None else float(above[0])


def _view(name: str, title: str, where: Where, sort: str, descending: bool) -> dict[str, Any]:
    return {"id": name, "title": title, "where": where, "q": "", "sort": sort, "descending": descending, "built_in": True}


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "x"


class SavedViews:
    """The views that people saved for a run, in a file beside the record."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._known: tuple[int, list[dict[str, Any]]] = (-1, [])
        self._path = index.folder / FILE

    def all(self) -> list[dict[str, Any]]:
        """Returns the views of a run: its own, then those that were saved."""
        return [*self._built_in(), *self._saved().values()]

    def _built_in(self) -> list[dict[str, Any]]:
        generation = self._index.generation
        if self._known[0] != generation:
            self._known = generation, _built_in(self._index)
        return self._known[1]

    def query_of(self, name: str) -> Query:
        """Returns the query of a view.

        Raises:
            KeyError: there is no such view.
        """
        view = next((each for each in self.all() if each["id"] == name), None)
        if view is None:
            raise KeyError(f"view: {name[:80]!r}; the run has no such view")
        return Query.of(view["where"], view["q"], view["sort"], view["descending"])

    def save(self, name: str, view: Mapping[str, Any]) -> dict[str, Any]:
        """Saves a view under a name, and returns it.

        Raises:
            ValueError: the name is taken by a view that every run has, or is no name, or the view cannot be asked for.
            OSError: it cannot be written.
        """
        if not _ID.fullmatch(name):
            raise ValueError("view: give an id of small letters, digits and hyphens, 64 at most")
        if any(each["id"] == name for each in self._built_in()):
            raise ValueError(f"view: {name} is a view that every run has; give another id")
        title = view.get("title") or name
        if not isinstance(title, str) or len(title) > _LONGEST_TITLE:
            raise ValueError(f"title: give a text of at most {_LONGEST_TITLE} characters")
        search, sort, descending = view.get("q") or "", view.get("sort") or "", bool(view.get("descending"))
        if not isinstance(search, str) or not isinstance(sort, str):
            raise ValueError("q, sort: give texts")
        query = Query.of(view.get("where") or [], search, sort, descending)
        statements(query, columns(self._index))
        saved = self._saved()
        if name not in saved and len(saved) >= _MOST_VIEWS:
            raise ValueError(f"view: the run has {_MOST_VIEWS} saved views; delete some")
        where = [[column, comparison, list(value) if isinstance(value, tuple) else value] for column, comparison, value in query.where]
        saved[name] = {"id": name, "title": title, "where": where, "q": search, "sort": sort, "descending": descending, "built_in": False}
        write_json(self._path, saved)
        return saved[name]

    def delete(self, name: str) -> None:
        """Deletes a saved view.

        Raises:
            KeyError: there is no such view.
            OSError: it cannot be written.
        """
        saved = self._saved()
        if saved.pop(name, None) is None:
            raise KeyError(f"view: {name[:80]!r}; no such view was saved")
        write_json(self._path, saved)

    def _saved(self) -> dict[str, dict[str, Any]]:
        try:
            values = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return values if isinstance(values, dict) else {}
