"""Answers which rollouts a view has, in which order, and reads those that a page shows.

A view is answered in two steps. Its list is the numbers of its rollouts in its order, which comes from the database's indices; it is kept
until the index changes. A page reads the rows of its part of the list by their numbers, and no others, wherever in the list it is.
"""

from __future__ import annotations

import json
import math
import sqlite3
import threading
from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from probescore_review.columns import Column, columns
from probescore_review.index import Index

MOST_ROWS = 1000
"""Most rows of a page."""
_KEPT_LISTS = 24
_MOST_CONDITIONS, _MOST_VALUES = 40, 500
_COMPARED = {"=": "=", "!=": "IS NOT", "<": "<", "<=": "<=", ">": ">", ">=": ">="}


@dataclass(frozen=True)
class Query:
    """Value object that says which rollouts are wanted, and in which order.

    Attributes:
        where: conditions, all of which hold: name of a column, comparison, value.
        search: words that the prompt or the completion has; words in quotes stand together.
        sort: name of the column to sort by; empty = by step.
        descending: whether the largest come first.
    """

    where: tuple[tuple[str, str, Any], ...] = ()
    search: str = ""
    sort: str = ""
    descending: bool = False

    @classmethod
    def of(cls, where: object, search: str, sort: str, descending: bool) -> Query:
        """Makes a query from what a request says; ``where`` is a list of [column, comparison, value], as JSON text or parsed.

        Raises:
            ValueError: it is of another form.
        """
        if isinstance(where, str):
            try:
                where = json.loads(where or "[]")
            except (ValueError, RecursionError):
                raise ValueError("where: no JSON; give a list of [column, comparison, value]") from None
        if not isinstance(where, list) or len(where) > _MOST_CONDITIONS:
            raise ValueError(f"where: give a list of at most {_MOST_CONDITIONS} conditions [column, comparison, value]")
        conditions = []
        for condition in where:
            if not isinstance(condition, list) or len(condition) != 3 or not all(isinstance(part, str) for part in condition[:2]):
                raise ValueError(f"where: {json.dumps(condition)[:100]}; give [column, comparison, value]")
            value = condition[2]
            conditions.append((condition[0], condition[1], tuple(value) if isinstance(value, list) else value))
        return cls(tuple(conditions), search, sort, descending)


@dataclass(frozen=True)
class Statement:
    """Value object with an SQL statement and the values that are bound in it."""

    sql: str
    values: tuple[Any, ...]


class Queries:
    """Answers queries on the rollouts of a run, and keeps the lists of those that were asked last."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._lists: OrderedDict[tuple[int, Query], array[int]] = OrderedDict()
        self._lock = threading.Lock()

    def numbers(self, query: Query) -> array[int]:
        """Returns the numbers in the index of all rollouts that a query finds, in its order.

        Raises:
            ValueError: the query names a column or comparison that is not there.
        """
        key = (self._index.generation, query)
        with self._lock:
            if (known := self._lists.get(key)) is not None:
                self._lists.move_to_end(key)
                return known
        found: array[int] = array("q")
        for statement in statements(query, columns(self._index)):
            try:
                found.extend(row[0] for row in self._index.connection().execute(statement.sql, statement.values))
            except sqlite3.OperationalError as error:
                if "fts5" in str(error):
                    raise ValueError(f"search: {error}") from None
                raise
        with self._lock:
            self._lists[key] = found
            while len(self._lists) > _KEPT_LISTS:
                self._lists.popitem(last=False)
        return found

    def page(self, query: Query, offset: int, limit: int) -> tuple[int, list[dict[str, Any]]]:
        """Returns how many rollouts a query finds, and the rows of a part of them.

        Raises:
            ValueError: the query names a column or comparison that is not there, or the part is out of range.
        """
        if offset < 0 or not 0 < limit <= MOST_ROWS:
            raise ValueError(f"offset, limit: {offset}, {limit}; give an offset from 0 on and a limit of 1 to {MOST_ROWS}")
        numbers = self.numbers(query)
        return len(numbers), self.shown(numbers[offset : offset + limit])

    def shown(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Returns the rows of the table for rollouts that are given by their numbers in the index, in that order; those that have gone
        meanwhile are left out.
        """
        known = columns(self._index)
        named = {number: as_row(row, known) for number, row in self._rows(numbers, known)}
        return [named[number] for number in numbers if number in named]

    def _rows(self, numbers: Sequence[int], known: Mapping[str, Column]) -> list[tuple[int, sqlite3.Row]]:
        statement = page_statement(known, len(numbers))
        return [(row["id"], row) for row in self._index.rows(statement, numbers)] if numbers else []


def page_statement(known: Mapping[str, Column], rows: int) -> str:
    """Returns SQL that reads the rows of a page by their numbers."""
    shown = ", ".join(f"{column.sql} AS c{place}" for place, column in enumerate(_shown(known)))
    return f"SELECT id, {shown} FROM rollouts WHERE id IN ({', '.join('?' * rows)})"  # noqa: S608 - columns of ours


def as_row(row: sqlite3.Row, known: Mapping[str, Column]) -> dict[str, Any]:
    """Returns a row of the index as a page shows it, with the rollout's id, which is step and name."""
    values = {column.name: row[f"c{place}"] for place, column in enumerate(_shown(known))}
    return {"rollout": f"{values['step']}:{values['name']}", **values}


def comparisons(column: Column) -> list[str]:
    """Returns the comparisons that a column can be asked for."""
    if column.name.startswith("wrong:"):
        return ["="]
    return [*_COMPARED, *(["contains"] if column.kind != "number" else []), "in", "is known", "is unknown"]


def _shown(known: Mapping[str, Column]) -> list[Column]:
    return [column for column in known.values() if not column.name.startswith("wrong:")]


def statements(query: Query, known: Mapping[str, Column]) -> list[Statement]:
    """Returns the SQL that finds the numbers of a query's rollouts: first those with a value in the column of the order, then the rest.

    Raises:
        ValueError: the query names a column or comparison that is not there.
    """
    conditions: list[str] = []
    values: list[Any] = []
    for name, comparison, value in query.where:
        condition, bound = _condition(_column(name, known, "where"), comparison, value)
        conditions.append(condition)
        values += bound
    if words := _words(query.search):
        conditions.append("id IN (SELECT rowid FROM words WHERE words MATCH ?)")
        values.append(words)
    column = _column(query.sort or "step", known, "sort")
    if not column.sortable:
        sortable = ", ".join(name for name, each in known.items() if each.sortable)
        raise ValueError(f"sort: {query.sort}; give one of {sortable}")
    direction = " DESC" if query.descending else ""

    def statement(*more: str, order: str) -> Statement:
        where = " AND ".join([*conditions, *more])
        return Statement(f"SELECT id FROM rollouts WHERE {where} ORDER BY {order}", tuple(values))  # noqa: S608 - columns of ours

    # an order of its own for rollouts without a value, which would come first or last by the direction
    return [
        statement(f"{column.sql} IS NOT NULL", order=f"{column.sql}{direction}, id{direction}"),
        *([] if column.name == "step" else [statement(f"{column.sql} IS NULL", order="id")]),
    ]


def _condition(column: Column, comparison: str, value: Any) -> tuple[str, list[Any]]:  # noqa: ANN401 - whatever JSON has
    where = f"where: {column.name} {comparison}"
    if column.name.startswith("wrong:"):
        if comparison != "=" or value != 1:
            raise ValueError(f"{where}: give = 1")
        return column.sql, []
    if comparison in ("is known", "is unknown"):
        return f"{column.sql} IS {'NOT ' if comparison == 'is known' else ''}NULL", []
    if comparison == "in":
        if not isinstance(value, tuple) or not 0 < len(value) <= _MOST_VALUES:
            raise ValueError(f"{where}: give a list of 1 to {_MOST_VALUES} values")
        return f"{column.sql} IN ({', '.join('?' * len(value))})", [_bound(each, column, where) for each in value]
    if comparison == "contains":
        if column.kind == "number" or not isinstance(value, str):
            raise ValueError(f"{where}: give a text, for a column of texts")
        return f"instr({column.sql}, ?) > 0", [value]
    if comparison not in _COMPARED:
        raise ValueError(f"{where}: give {', '.join(_COMPARED)}, in, contains, is known or is unknown")
    return f"{column.sql} {_COMPARED[comparison]} ?", [_bound(value, column, where)]


def _bound(value: object, column: Column, where: str) -> object:
    if column.kind == "number":
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or abs(value) > 1e300:
            raise ValueError(f"{where}: {json.dumps(value)[:60]}; give a number")
        return float(value)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {json.dumps(value)[:60]}; give a text")
    return value.encode("utf-8", "replace").decode()


def _column(name: str, known: Mapping[str, Column], where: str) -> Column:
    if name not in known:
        raise ValueError(f"{where}: {name[:100]!r}; the table has {', '.join(known)}")
    return known[name]


def _words(search: str) -> str:
    """Returns a search as the database's full-text search takes it: every word or quoted phrase is taken as it stands, none as a command;
    the last may be the beginning of a word.
    """
    parts = search.replace("\0", " ").encode("utf-8", "replace").decode()[:1000].split('"')
    words = [phrase for place, part in enumerate(parts) for phrase in ([part] if place % 2 else part.split()) if phrase.strip()]
    quoted = [f'"{word}"' for word in words if any(letter.isalnum() for letter in word)]
    if not quoted:
        return ""
    return " ".join(quoted) + ("*" if len(parts) % 2 and not search.endswith((" ", '"')) else "")
