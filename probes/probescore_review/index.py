"""Keeps an index of a record's rollouts in a SQLite file, so that no page has to read the record. The index holds nothing that the record
does not: it may be deleted at any time, and is made anew.

Lines that the record has gained are added to it. Texts stay in the record: the index has the place of each, the first words, and which
words occur. It begins anew if a file of the record has gone or shrunk, as after texts were deleted, so that it keeps none of these.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from probescore.types import FROZEN
from probescore_audit.record.attempts import FileSteps, valid_before
from probescore_audit.record.rows import DETAILS, SCHEMA_VERSION, RunHeader, from_object
from probescore_review.run_files import Line, RunFile, new_lines, run_files

_FORM = 1  # of the tables; another begins the index anew
_SNIPPET = 240
_LOOK_SECONDS = 1.0

_TABLES = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE files (id INTEGER PRIMARY KEY, name TEXT UNIQUE, stem TEXT, details INTEGER, size INTEGER, changed INTEGER, consumed INTEGER,
  torn INTEGER, headers TEXT, first_step INTEGER);
CREATE TABLE score_columns (place INTEGER PRIMARY KEY, probe TEXT, reading TEXT, reduction TEXT, UNIQUE (probe, reading));
CREATE TABLE rollouts (id INTEGER PRIMARY KEY AUTOINCREMENT, step INTEGER, name TEXT, prompt_id TEXT, grp TEXT, tokens INTEGER,
  task_reward REAL, total_reward REAL, logprob REAL, text_sha256 TEXT, snippet TEXT, scores TEXT, decisions TEXT, label TEXT,
  labelled_by TEXT, file INTEGER, started REAL,
  long_file INTEGER, long_offset INTEGER, long_length INTEGER, long_here TEXT, UNIQUE (step, name));
CREATE TABLE unmatched (stem TEXT, step INTEGER, name TEXT, file INTEGER, offset INTEGER, length INTEGER);
CREATE TABLE labels (seq INTEGER PRIMARY KEY, row TEXT, step INTEGER, name TEXT, label TEXT, labeller TEXT, retracts TEXT, text_sha256 TEXT,
  file INTEGER, given REAL, second INTEGER, line TEXT);
CREATE INDEX labels_of ON labels (step, name);
CREATE TABLE others (kind TEXT, file INTEGER, step INTEGER, name TEXT, line TEXT);
CREATE INDEX others_of ON others (kind, step, name);
CREATE TABLE claims (step INTEGER, name TEXT, labeller TEXT, until REAL, PRIMARY KEY (step, name));
CREATE VIRTUAL TABLE words USING fts5 (prompt, completion, content='');
"""
_INDEXED = ("step", "prompt_id", "grp", "tokens", "task_reward", "total_reward", "logprob", "label")
_KEPT_KINDS = ("reference", "anchor", "activation", "labeller")


class Index:
    """Index of the rollouts of one training run's record.

    Args:
        folder: the record's folder.
        cache: folder for the index's file.

    Raises:
        FileNotFoundError: there is no record in the folder.
        ValueError: the record is of several runs, or of a newer version of its form.
    """

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder = folder
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:24]
        self.path = cache / f"{name}.sqlite"
        self._local = threading.local()
        self._lock = threading.Lock()
        self._stamps: list[tuple[str, int, int]] | None = None
        self._looked = 0.0
        self._open()
        self.refresh(force=True)

    # reading

    def connection(self) -> sqlite3.Connection:
        """Returns this thread's connection for reading."""
        found: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if found is None:
            found = self._local.connection = self._connect()
        return found

    def rows(self, statement: str, values: Sequence[object] = ()) -> list[sqlite3.Row]:
        """Returns all rows that a statement finds."""
        return self.connection().execute(statement, values).fetchall()

    def row(self, statement: str, values: Sequence[object] = ()) -> sqlite3.Row | None:
        """Returns the first row that a statement finds; ``None`` if it finds none."""
        found: sqlite3.Row | None = self.connection().execute(statement, values).fetchone()
        return found

    @property
    def generation(self) -> int:
        """Returns a number that is another whenever the index has changed, by whichever process."""
        found = self.row("SELECT value FROM about WHERE name = 'generation'")
        return 0 if found is None else int(found[0])

    def header(self) -> RunHeader:
        """Returns the header of the process of the run that started last."""
        return max(_headers(self.connection()), key=lambda header: header.started)

    def newest_attempt(self) -> float:
        """Returns when the training process that wrote rollouts, and started last, did so, in seconds since 1970."""
        files = self.rows("SELECT headers FROM files WHERE details = 0 AND first_step IS NOT NULL")
        return max((_parsed_headers(text)[0].started for (text,) in files), default=0.0)

    def path_of(self, file: int) -> Path | None:
        """Returns where the file of the record is that has a number in the index."""
        found = self.row("SELECT name FROM files WHERE id = ?", (file,))
        return None if found is None else self.folder / found[0]

    # keeping up with the record

    def refresh(self, *, force: bool = False) -> None:
        """Adds to the index what the record has gained. Looks at the record's files once a second at most, unless forced."""
        with self._lock:
            if not force and time.monotonic() - self._looked < _LOOK_SECONDS:
                return
            stamps = _stamps(run_files(self.folder))
            self._looked = time.monotonic()
            if stamps == self._stamps:
                return
            with self.writing() as connection:
                # looked at again now that no other process writes the index: one may have read more than was there before
                files = run_files(self.folder)
                if _has_lost(connection, files):
                    _empty(connection)
                _Update(connection, self.folder, files).run()
            self._stamps = _stamps(files)

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Context manager with this thread's connection within a transaction; no other process writes the index meanwhile."""
        connection = self.connection()
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
        except BaseException:
            if connection.in_transaction:  # the database has taken back by itself what a full disk stopped
                connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=120, isolation_level=None)
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        return connection

    def _open(self) -> None:
        os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o600))
        try:
            self._prepare()
        except sqlite3.DatabaseError:  # no index, or a broken one: nothing is in it that the record has not
            self._local = threading.local()
            for suffix in ("", "-wal", "-shm"):
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
            os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o600))
            self._prepare()

    def _prepare(self) -> None:
        with self.writing() as connection:
            form = connection.execute("PRAGMA user_version").fetchone()[0]
            if form != _FORM:
                _empty(connection)
                connection.execute(f"PRAGMA user_version = {_FORM}")


def _stamps(files: Iterable[RunFile]) -> list[tuple[str, int, int]]:
    return [(file.path.name, file.size, file.changed) for file in files]


def _empty(connection: sqlite3.Connection) -> None:
    before = 0
    if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'about'").fetchone():
        before = int(connection.execute("SELECT value FROM about WHERE name = 'generation'").fetchone()[0])
    tables = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%' AND name NOT LIKE 'words_%'"
    for (name,) in connection.execute(tables).fetchall():
        connection.execute(f"DROP TABLE {name}")
    for statement in _TABLES.split(";"):
        if statement.strip():
            connection.execute(statement)
    connection.execute("INSERT INTO about VALUES ('generation', ?)", (before + 1,))


def _has_lost(connection: sqlite3.Connection, files: Iterable[RunFile]) -> bool:
    now = {file.path.name: file for file in files}
    return any(
        name not in now or now[name].size < size or (now[name].packed and now[name].changed != changed)
        for name, size, changed in connection.execute("SELECT name, consumed, changed FROM files")
    )


def _headers(connection: sqlite3.Connection) -> list[RunHeader]:
    return [header for (text,) in connection.execute("SELECT headers FROM files WHERE details = 0") for header in _parsed_headers(text)]


def _parsed_headers(text: str) -> list[RunHeader]:
    return [header for values in json.loads(text) if isinstance(header := from_object(values), RunHeader)]


class _Update:
    """One pass over what the files of a record have gained, within a transaction of the index."""

    def __init__(self, connection: sqlite3.Connection, folder: Path, files: Sequence[RunFile]) -> None:
        self._connection = connection
        self._folder = folder
        self._files = files
        self._places = {(row[1], row[2]): (row[0], row[3]) for row in connection.execute("SELECT * FROM score_columns")}
        self._changed_rollouts = False
        self._thresholds: dict[str, Any] = {}
        self._has_tokens = False

    def run(self) -> None:
        """Adds the lines that are new, drops rollouts that training went back behind, and says which rollouts are labelled."""
        main = [(self._known(file), file) for file in self._files if not file.details]
        self._read_headers(main)
        headers = _headers(self._connection)
        if not headers:
            raise FileNotFoundError(f"{self._folder.name}: no record; give the folder that was named as `record`")
        if len(runs := {header.run_id for header in headers}) > 1:
            raise ValueError(f"{self._folder.name}: files of several runs ({', '.join(sorted(runs))}); give each run a folder of its own")
        self._thresholds = {probe.key: probe for header in sorted(headers, key=lambda each: each.started) for probe in header.probes}
        for number, file in main:
            self._add_lines(number, file)
        self._drop_void()
        for file in self._files:
            if file.details:
                self._add_long_parts(self._known(file), file)
        self._match_late()
        for name in (*_INDEXED, *(f"s{place}" for place, _ in self._places.values()), *self._differences()):
            self._connection.execute(f"CREATE INDEX IF NOT EXISTS by_{name} ON rollouts ({name})")
        self._mark_labels()
        if self._has_tokens:
            self._connection.execute("INSERT OR REPLACE INTO about VALUES ('has_tokens', '1')")
        self._connection.execute("UPDATE about SET value = CAST(value AS INTEGER) + 1 WHERE name = 'generation'")

    def _known(self, file: RunFile) -> int:
        row = self._connection.execute("SELECT id FROM files WHERE name = ?", (file.path.name,)).fetchone()
        if row is not None:
            return int(row[0])
        return _insert(
            self._connection,
            "files",
            {
                "name": file.path.name,
                "stem": file.stem,
                "details": file.details,
                "size": file.size,
                "changed": 0,
                "consumed": 0,
                "torn": 0,
                "headers": "[]",
            },
        )

    def _read_headers(self, main: Sequence[tuple[int, RunFile]]) -> None:
        """Notes the first line of each new file, which says when its process began: rows of later ones take the place of earlier ones."""
        for number, file in main:
            known = self._connection.execute("SELECT headers FROM files WHERE id = ?", (number,)).fetchone()[0]
            if known == "[]" and (first := next(new_lines(file, 0), None)) is not None and _is_header(first.values):
                _refuse_newer(file, first.values)
                self._connection.execute("UPDATE files SET headers = ? WHERE id = ?", (json.dumps([first.values]), number))

    def _add_lines(self, number: int, file: RunFile) -> None:
        consumed, changed, headers, first = self._connection.execute(
            "SELECT consumed, changed, headers, first_step FROM files WHERE id = ?", (number,)
        ).fetchone()
        known = json.loads(headers)
        if not known or (file.packed and changed == file.changed):
            return
        started = float(known[0].get("started") or 0.0)
        torn, end = 0, consumed
        for line in new_lines(file, consumed):
            end = line.offset + line.length
            values = line.values
            try:
                if values is None:
                    torn += 1
                elif values["kind"] == "rollout":
                    first = values["step"] if first is None else min(first, values["step"])
                    self._add_rollout(number, started, values, line, file)
                elif values["kind"] == "label":
                    self._add_label(number, values)
                elif values["kind"] in _KEPT_KINDS:
                    name = values.get("rollout") or values.get("anchor")
                    row = (values["kind"], number, values.get("step"), name, json.dumps(values))
                    self._connection.execute("INSERT INTO others VALUES (?, ?, ?, ?, ?)", row)
                elif _is_header(values):
                    _refuse_newer(file, values)
                    if values not in known:
                        known.append(values)
            except (KeyError, TypeError, ValueError, AttributeError, OverflowError, sqlite3.Error) as problem:
                if isinstance(problem, sqlite3.OperationalError):
                    raise
                torn += 1
        consumed = file.size if file.packed else end
        self._connection.execute(
            "UPDATE files SET consumed = ?, changed = ?, torn = torn + ?, headers = ?, first_step = ? WHERE id = ?",
            (consumed, file.changed, torn, json.dumps(known), first, number),
        )

    def _add_rollout(self, number: int, started: float, values: dict[str, Any], line: Line, file: RunFile) -> None:
        scores = values["scores"]
        columns = {
            "step": int(values["step"]),
            "name": str(values["rollout"]),
            "prompt_id": _searchable(values["prompt"]),
            "grp": _searchable(values.get("group") or values["prompt"]),
            "tokens": values.get("tokens"),
            "task_reward": _number(values.get("task_reward")),
            "total_reward": _number(values.get("total_reward")),
            "logprob": _number(values.get("policy_logprob")),
            "text_sha256": values.get("text_sha256"),
            "scores": json.dumps(scores),
            "decisions": json.dumps(values["decisions"]) if values.get("decisions") else None,
            "file": number,
            "started": started,
        }
        for probe, readings in scores.items():
            first_other = next((reading for reading in readings if reading != FROZEN), None)
            for reading, reductions in readings.items():
                place, reduction = self._place(probe, reading, reductions)
                score = columns[f"s{place}"] = _number(reductions.get(reduction))
                if reading == first_other and FROZEN in readings and score is not None:
                    frozen_place, frozen_reduction = self._place(probe, FROZEN, readings[FROZEN])
                    other = _number(readings[FROZEN].get(frozen_reduction))
                    columns[f"d{frozen_place}"] = None if other is None else score - other
        if any(values.get(name) is not None for name in DETAILS):
            columns["snippet"] = _snippet(values)
            self._has_tokens |= bool(values.get("token_scores"))
            if file.packed:
                columns["long_here"] = json.dumps({name: values[name] for name in DETAILS if values.get(name) is not None})
            else:
                columns |= {"long_file": number, "long_offset": line.offset, "long_length": line.length}
        key = (columns["step"], columns["name"])
        execute = self._connection.execute
        self._changed_rollouts = True
        execute("DELETE FROM rollouts WHERE step = ? AND name = ? AND started <= ?", (*key, started))
        added = _insert(self._connection, "rollouts", columns)
        if added and "snippet" in columns:
            self._add_words(added, values)

    def _place(self, probe: str, reading: str, reductions: dict[str, Any]) -> tuple[int, str]:
        """Returns the number of the column for the scores of a probe and reading, and the reduction that the column has: one that has a
        threshold, as the audit chooses it.
        """
        if (known := self._places.get((probe, reading))) is not None:
            return known
        described = self._thresholds.get(probe)
        usable = [name for name in reductions if described is not None and name in described.thresholds_on(reading)] or list(reductions)
        reduction = next((name for name in usable if name != "max"), usable[0] if usable else "")
        place = len(self._places)
        self._places[probe, reading] = place, reduction
        self._connection.execute("INSERT INTO score_columns VALUES (?, ?, ?, ?)", (place, probe, reading, reduction))
        self._connection.execute(f"ALTER TABLE rollouts ADD COLUMN s{place} REAL")
        self._connection.execute(f"ALTER TABLE rollouts ADD COLUMN d{place} REAL")
        return place, reduction

    def _differences(self) -> list[str]:
        several = {probe for probe, reading in self._places if reading != FROZEN}
        return [f"d{place}" for (probe, reading), (place, _) in self._places.items() if reading == FROZEN and probe in several]

    def _add_label(self, number: int, values: dict[str, Any]) -> None:
        row = {
            "row": str(values.get("row") or ""),
            "step": int(values["step"]),
            "name": str(values["rollout"]),
            "label": str(values["label"]),
            "labeller": str(values.get("labeller") or values.get("source") or ""),
            "retracts": values.get("retracts"),
            "text_sha256": values.get("text_sha256"),
            "file": number,
            "given": _number(values.get("given")),
            "second": bool(values.get("second")),
            "line": json.dumps(values),
        }
        _insert(self._connection, "labels", row)

    def _drop_void(self) -> None:
        files = self._connection.execute("SELECT id, headers, first_step FROM files WHERE details = 0 AND headers != '[]'").fetchall()
        limits = valid_before([FileSteps(_parsed_headers(headers)[0], first) for _, headers, first in files])
        for (number, _, _), limit in zip(files, limits, strict=True):
            if math.isinf(limit):
                continue
            gone = self._connection.execute("DELETE FROM rollouts WHERE file = ? AND step >= ?", (number, limit)).rowcount
            gone += self._connection.execute(
                "DELETE FROM others WHERE file = ? AND step >= ? AND kind != 'reference'", (number, limit)
            ).rowcount
            gone += self._connection.execute(
                "DELETE FROM labels WHERE file = ? AND step >= ? AND text_sha256 IS NULL", (number, limit)
            ).rowcount
            self._changed_rollouts |= gone > 0

    # texts, token ids and scores of tokens

    def _add_long_parts(self, number: int, file: RunFile) -> None:
        consumed, torn = self._connection.execute("SELECT consumed, 0 FROM files WHERE id = ?", (number,)).fetchone()
        end = consumed
        for line in new_lines(file, consumed):
            end = line.offset + line.length
            try:
                if line.values is None:
                    torn += 1
                elif not self._attach(file.stem, number, line):
                    row = (file.stem, int(line.values["step"]), str(line.values["rollout"]), number, line.offset, line.length)
                    self._connection.execute("INSERT INTO unmatched VALUES (?, ?, ?, ?, ?, ?)", row)
            except (KeyError, TypeError, ValueError):
                torn += 1
        values = (end, file.changed, torn, number)
        self._connection.execute("UPDATE files SET consumed = ?, changed = ?, torn = torn + ? WHERE id = ?", values)

    def _attach(self, stem: str, number: int, line: Line) -> bool:
        """Notes where the long parts of a rollout are; returns whether the rollout is there."""
        values = line.values or {}
        found = self._connection.execute(
            "SELECT rollouts.id, long_file FROM rollouts JOIN files ON files.id = rollouts.file"
            " WHERE step = ? AND rollouts.name = ? AND stem = ?",
            (int(values["step"]), str(values["rollout"]), stem),
        ).fetchone()
        if found is None:
            return False
        self._has_tokens |= bool(values.get("token_scores"))
        self._connection.execute(
            "UPDATE rollouts SET snippet = ?, long_file = ?, long_offset = ?, long_length = ? WHERE id = ?",
            (_snippet(values), number, line.offset, line.length, found[0]),
        )
        if found[1] is None:
            self._add_words(found[0], values)
        return True

    def _match_late(self) -> None:
        """Notes long parts whose rollouts had not been written yet when the index came upon them."""
        waiting = self._connection.execute(
            "SELECT unmatched.rowid, unmatched.stem, unmatched.file, offset, length, files.name FROM unmatched JOIN files"
            " ON files.id = unmatched.file WHERE EXISTS (SELECT 1 FROM rollouts WHERE rollouts.step = unmatched.step"
            " AND rollouts.name = unmatched.name)"
        ).fetchall()
        for rowid, stem, number, offset, length, name in waiting:
            line = read_line(self._folder / name, offset, length)
            if line is not None and self._attach(stem, number, Line(line, offset, length)):
                self._connection.execute("DELETE FROM unmatched WHERE rowid = ?", (rowid,))

    def _add_words(self, rollout: int, values: dict[str, Any]) -> None:
        prompt, completion = values.get("prompt_text"), _completion_text(values)
        if prompt or completion:
            row = (rollout, _searchable(prompt), _searchable(completion))
            self._connection.execute("INSERT INTO words (rowid, prompt, completion) VALUES (?, ?, ?)", row)

    # labels

    def _mark_labels(self) -> None:
        """Writes beside each rollout what its labels say together: those that are of its text and were not retracted. Several say yes if
        all do, as in the audit.
        """
        execute = self._connection.execute
        execute("UPDATE rollouts SET label = NULL, labelled_by = NULL WHERE label IS NOT NULL")
        execute(
            f"""
            UPDATE rollouts SET label = said.label, labelled_by = said.labellers FROM (
              SELECT step, name,
                CASE WHEN SUM(label NOT IN ('yes', 'no')) THEN 'unsure' WHEN SUM(label = 'no') THEN 'no' ELSE 'yes' END label,
                GROUP_CONCAT(DISTINCT labeller) labellers
              FROM ({VALID_LABELS}) GROUP BY step, name) said
            WHERE rollouts.step = said.step AND rollouts.name = said.name
            """  # noqa: S608 - a statement of ours
        )


VALID_LABELS = """
SELECT labels.* FROM labels JOIN rollouts ON rollouts.step = labels.step AND rollouts.name = labels.name
WHERE (labels.text_sha256 IS NULL OR labels.text_sha256 = rollouts.text_sha256) AND labels.label != 'withdrawn'
  AND NOT EXISTS (SELECT 1 FROM labels later WHERE later.retracts = labels.row AND labels.row != ''
    AND later.step = labels.step AND later.name = labels.name)
"""
"""SQL that finds the labels that count: of the rollout's text as it is, and not retracted."""


def read_line(path: Path, offset: int, length: int) -> dict[str, Any] | None:
    """Returns the values of a line of a record's file; ``None`` if the file has gone, or has another line there."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            values = json.loads(file.read(length))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def _insert(connection: sqlite3.Connection, table: str, values: Mapping[str, object]) -> int:
    """Inserts a row and returns its number; 0 if another row is in its place."""
    marks = ", ".join("?" * len(values))
    added = connection.execute(f"INSERT OR IGNORE INTO {table} ({', '.join(values)}) VALUES ({marks})", tuple(values.values()))  # noqa: S608
    return int(added.lastrowid or 0) if added.rowcount else 0


def _is_header(values: dict[str, Any] | None) -> bool:
    return values is not None and values["kind"] == RunHeader.kind and "run_id" in values and "planned_steps" in values


def _refuse_newer(file: RunFile, values: dict[str, Any] | None) -> None:
    version = (values or {}).get("schema_version", 0)
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise ValueError(f"{file.path.name}: schema version {version}; known up to {SCHEMA_VERSION}: install a newer probescore")


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _completion_text(values: dict[str, Any]) -> str | None:
    text, pieces = values.get("completion_text"), values.get("completion_pieces")
    return text if text is not None else "".join(map(str, pieces)) if pieces else None


def _snippet(values: dict[str, Any]) -> str | None:
    text = _completion_text(values)
    return None if text is None else _searchable(" ".join(text[: 4 * _SNIPPET].split())[:_SNIPPET])


def _searchable(text: object) -> str:
    """Returns a text without what SQLite cannot hold: half of a surrogate pair."""
    return str(text or "").encode("utf-8", "replace").decode()
