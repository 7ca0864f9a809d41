"""Gives people rollouts to label, and appends their labels to the record.

A label counts as given once it is on the disk in the record, and is said to be given only then. What processes do with labels of one record
they do one after the other, by a lock beside the record, so that two people who label the same rollout find out. Nothing is overwritten:
a label is taken back by a row that says so.
"""

from __future__ import annotations

import contextlib
import fcntl
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from probescore_audit.record import LabelRow, RecordWriter
from probescore_audit.record.rows import WITHDRAWN
from probescore_review.columns import probe_readings
from probescore_review.index import VALID_LABELS, Index
from probescore_review.plan import KeptPlan, PlanEntry
from probescore_review.rollout import Rollouts, parsed_id

LOCK = "review.lock"
SOURCE = "person"
CLAIM_SECONDS = 600
_ANSWERS = ("yes", "no", "unsure")
_LONGEST_NAME, _LONGEST_NOTE, _MOST_SPANS = 100, 10_000, 200


class LabelConflict(Exception):
    """Exception raised when a label cannot be given or taken back since somebody has labelled the rollout, or has taken the label back."""


class Labelling:
    """Hands out the rollouts of a run that are to be labelled, and takes their labels.

    Args:
        index: the index of the record.
        rollouts: reads single rollouts.
    """

    def __init__(self, index: Index, rollouts: Rollouts) -> None:
        self._index = index
        self._rollouts = rollouts
        self._plan = KeptPlan(index)
        self._writer: RecordWriter | None = None
        self._began = 0.0
        self._thread_lock = threading.Lock()

    # what is to be labelled

    def plan(self, **asked: Any) -> dict[str, int]:  # noqa: ANN401 - as of KeptPlan.add
        """Plans further rollouts to label, as ``KeptPlan.add`` does, and returns how many the plan has."""
        with self._alone():
            self._index.refresh(force=True)
            done, of, _ = self._state()
            added = self._plan.add(**asked, left=of - done)
        return {"of": of + added, "added": added}

    def next(self, labeller: str, *, blind: bool = True) -> dict[str, Any]:
        """Returns the next rollout for a labeller, and claims it for some minutes, so that others get other ones: those of the plan first,
        then unflagged positives for a second judgement, as one that is wrong looks like behaviour that the probe misses.
        """
        name = _name(labeller)
        done, of, open_entries = self._state()
        with self._index.writing() as connection:
            claimed = _claims(connection)
            chosen = _first(((entry.key, False) for entry in open_entries), claimed, name)
            second = [] if chosen else self._to_judge_again(name)
            chosen = chosen or _first(((key, True) for key in second), claimed, name)
            if chosen is not None:
                (step, rollout), _ = chosen
                connection.execute("DELETE FROM claims WHERE labeller = ?", (name,))
                connection.execute("INSERT OR REPLACE INTO claims VALUES (?, ?, ?, ?)", (step, rollout, name, time.time() + CLAIM_SECONDS))
        if chosen is None:
            return {"rollout": None, "done": done, "of": of, "second": False}
        (step, rollout), is_second = chosen
        return {"rollout": self._rollouts.found(f"{step}:{rollout}", blind=blind), "done": done, "of": of, "second": is_second}

    def _state(self) -> tuple[int, int, list[PlanEntry]]:
        """Returns how many rollouts of the plan are labelled, how many it has, and those that are not labelled. Those that training has
        gone back behind are no part of it any more.
        """
        statement = f"SELECT step, name FROM ({VALID_LABELS} AND json_extract(labels.line, '$.inclusion') > 0)"  # noqa: S608 - of ours
        drawn = {(row["step"], row["name"]) for row in self._index.rows(statement)}
        entries = self._plan.entries()
        open_entries = []
        gone = 0
        for key, entry in entries.items():
            if key in drawn:
                continue
            row = self._index.row("SELECT text_sha256 FROM rollouts WHERE step = ? AND name = ?", key)
            if row is None or row[0] != entry.text_sha256:
                gone += 1
            else:
                open_entries.append(entry)
        of = len(entries) - gone
        return of - len(open_entries), of, open_entries

    def _to_judge_again(self, labeller: str) -> list[tuple[int, str]]:
        """Returns the positives with one judgement that some probe does not flag: those of other people, and one's own only where nobody
        else labels.
        """
        unflagged = [f"{each.sql} < {each.threshold!r}" for each in probe_readings(self._index) if each.threshold is not None]
        if not unflagged:
            return []
        judged_once = f"SELECT step, name FROM ({VALID_LABELS}) GROUP BY step, name HAVING COUNT(*) = 1"  # noqa: S608 - of ours
        rows = self._index.rows(
            f"SELECT step, name, labelled_by FROM rollouts WHERE label = 'yes' AND ({' OR '.join(unflagged)})"  # noqa: S608
            f" AND (step, name) IN ({judged_once}) ORDER BY step DESC, id"
        )
        people = {
            row[0] for row in self._index.rows("SELECT DISTINCT labeller FROM labels WHERE json_extract(line, '$.source') = 'person'")
        }
        alone = people <= {labeller}
        return [(row[0], row[1]) for row in rows if alone or row[2] != labeller]

    # what was labelled

    def give(
        self, rollout: str, label: str, labeller: str, *, note: str = "", spans: Sequence[Sequence[int]] = (), second: bool = False
    ) -> dict[str, Any]:
        """Appends a label to the record, and returns its name and the rollout with everything that was hidden before.

        Raises:
            KeyError: there is no such rollout.
            ValueError: the label is none.
            LabelConflict: the rollout has a label, or has none yet for a second judgement.
            OSError: the label could not be written; nothing of it is in the record.
        """
        name = _name(labeller)
        step, rollout_name = parsed_id(rollout)
        if label not in _ANSWERS:
            raise ValueError(f"label: {label[:40]!r}; give yes, no or unsure")
        if len(note) > _LONGEST_NOTE:
            raise ValueError(f"note: {len(note):,} characters; give at most {_LONGEST_NOTE:,}")
        with self._alone():
            self._index.refresh(force=True)
            row = self._rollouts.row(rollout)
            ranges = self._checked_spans(spans, rollout)
            before = self._rollouts.labels(step, rollout_name)
            if (again := _same(before, name, label, second)) is not None:
                return self._given(again, rollout)
            planned = None if second else self._drawn(step, rollout_name, row["text_sha256"], before)
            _refuse_conflict(before, second, planned is not None)
            written = LabelRow(
                step=step,
                rollout=rollout_name,
                label=label,
                source=SOURCE,
                text_sha256=row["text_sha256"],
                labeller=name,
                inclusion=None if planned is None else planned.planned.inclusion,
                stratum=None if planned is None else planned.planned.stratum,
                floor=planned is not None and planned.planned.floor,
                population=None if planned is None else planned.planned.population,
                second=second,
                span=ranges[0] if ranges else None,
                spans=ranges if len(ranges) > 1 else None,
                note=note.encode("utf-8", "replace").decode() or None,
                given=time.time(),
                row=uuid.uuid4().hex,
            )
            self._append(written)
            # it is given; what fails from here on is only shown later
            with contextlib.suppress(sqlite3.Error):
                self._index.refresh(force=True)
                with self._index.writing() as connection:
                    connection.execute("DELETE FROM claims WHERE step = ? AND name = ?", (step, rollout_name))
            return self._given(written.row, rollout)

    def undo(self, label_id: str, labeller: str) -> dict[str, Any]:
        """Takes a label back, by a row that says so.

        Raises:
            KeyError: there is no such label.
            LabelConflict: it is another person's, or was taken back.
            OSError: it could not be written.
        """
        name = _name(labeller)
        with self._alone():
            self._index.refresh(force=True)
            found = self._index.row("SELECT step, name, labeller, text_sha256 FROM labels WHERE row = ? AND row != ''", (label_id,))
            if found is None:
                raise KeyError(f"label: {label_id[:80]!r}; the record has no such label")
            step, rollout, by, digest = found
            if by != name:
                raise LabelConflict(f"label: it is {by}'s; who gave a label takes it back")
            if all(each["label_id"] != label_id for each in self._rollouts.labels(step, rollout)):
                raise LabelConflict("label: it was taken back before")
            row = LabelRow(
                step=step,
                rollout=rollout,
                label=WITHDRAWN,
                source=SOURCE,
                text_sha256=digest,
                labeller=name,
                given=time.time(),
                row=uuid.uuid4().hex,
                retracts=label_id,
            )
            self._append(row)
            with contextlib.suppress(sqlite3.Error):
                self._index.refresh(force=True)
            return {"undone": label_id, "rollout": f"{step}:{rollout}"}

    def close(self) -> None:
        """Closes the file of labels."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _given(self, label_id: str, rollout: str) -> dict[str, Any]:
        shown = self._rollouts.found(rollout)
        return {"label_id": label_id, "scores": shown["scores"], "rollout": shown}

    def _drawn(self, step: int, name: str, digest: str | None, before: Sequence[dict[str, Any]]) -> PlanEntry | None:
        """Returns the plan's entry of a rollout, if a label has to say yet with which probability it was drawn."""
        entry = self._plan.entries().get((step, name))
        if entry is None or entry.text_sha256 != digest or any(each["inclusion"] for each in before):
            return None
        return entry

    def _checked_spans(self, spans: Sequence[Sequence[int]], rollout: str) -> list[list[int]]:
        if len(spans) > _MOST_SPANS:
            raise ValueError(f"spans: {len(spans)}; give at most {_MOST_SPANS}")
        if not spans:
            return []
        tokens = self._rollouts.found(rollout, blind=True)["token_count"]
        for span in spans:
            if len(span) != 2 or not 0 <= span[0] < span[1] <= tokens:
                raise ValueError(f"spans: {list(span)[:4]}; give [start, end] in tokens, of which the completion has {tokens}")
        return sorted([int(span[0]), int(span[1])] for span in spans)

    def _append(self, row: LabelRow) -> None:
        """Appends a row to this process's file of labels, which begins anew where training did, since a file's rows belong to what was
        there when it was begun.
        """
        newest = self._index.newest_attempt()
        if self._writer is None or newest > self._began:
            self.close()
            header = self._index.header().anew()
            self._writer = RecordWriter(self._index.folder, header, on_error="raise", durable=True)
            self._began = header.started
        self._writer.append([row])

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Context manager within which nobody else labels rollouts of this record through a review."""
        with self._thread_lock, (self._index.folder / LOCK).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _claims(connection: sqlite3.Connection) -> dict[tuple[int, str], str]:
    connection.execute("DELETE FROM claims WHERE until < ?", (time.time(),))
    return {(step, name): labeller for step, name, labeller in connection.execute("SELECT step, name, labeller FROM claims")}


def _first(
    rollouts: Iterator[tuple[tuple[int, str], bool]], claimed: dict[tuple[int, str], str], labeller: str
) -> tuple[tuple[int, str], bool] | None:
    """Returns the first rollout that nobody else has claimed; the one that the labeller has claimed, if it is still open."""
    free = [each for each in rollouts if claimed.get(each[0], labeller) == labeller]
    return next((each for each in free if each[0] in claimed), free[0] if free else None)


def _same(before: Sequence[dict[str, Any]], labeller: str, label: str, second: bool) -> str | None:
    """Returns the name of the same label by the same labeller: it is sent again by one who did not get the answer."""
    return next(
        (
            str(each["label_id"])
            for each in before
            if (each["labeller"], each["label"], each["second"]) == (labeller, label, second)
            and each["source"] == SOURCE
            and each["label_id"]
        ),
        None,
    )


def _refuse_conflict(before: Sequence[dict[str, Any]], second: bool, drawn: bool) -> None:
    if second and not before:
        raise LabelConflict("second: the rollout has no first judgement, or none any more; give that")
    if not second and before and not drawn:
        by = before[-1]["labeller"] or before[-1]["source"]
        raise LabelConflict(f"label: {by} has labelled this rollout; give a second judgement, or take the next")


def _name(labeller: str) -> str:
    name = " ".join(str(labeller).split())
    if not name or len(name) > _LONGEST_NAME or not name.isprintable():
        raise ValueError(f"labeller: give who labels, by a name of 1 to {_LONGEST_NAME} characters")
    return name
