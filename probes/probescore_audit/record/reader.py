"""Reads the record of a training run: which of its rows count, and how many lines of its files could not be read."""

from __future__ import annotations

import contextlib
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from probescore.types.shown import shown_table
from probescore_audit.record.attempts import FileSteps, valid_before
from probescore_audit.record.details import details_files
from probescore_audit.record.rows import (
    DETAILS,
    SCHEMA_VERSION,
    WITHDRAWN,
    ActivationRow,
    AnchorRow,
    DetailsRow,
    LabellerRow,
    LabelRow,
    PlanRow,
    ReferenceRow,
    RolloutRow,
    Row,
    RunHeader,
    from_object,
)
from probescore_audit.record.table import RolloutTable


@dataclass(frozen=True, eq=False)
class Record:
    """Record of a training run as it was read, with only those rows that count.

    Attributes:
        header: the header of the process that started last.
        rollouts: the rollouts in the order of their steps; if a rollout is there twice, its last row.
        labels: the labels of these rollouts that were not retracted.
        references: the labelled rollouts of the model before training.
        anchors: the scores of the anchors (texts with a known label that are scored again and again).
        activations: pooled activations of labelled rollouts or of anchors.
        labellers: how labellers judged rollouts whose label was known.
        torn_lines: number of lines that could not be read, such as the last one of a process that was killed while it wrote.
        void_rows: number of rows that do not count, since training went on from an earlier step, or since a label is not of any rollout
            that counts.
        planned: the rollouts that a trainer chose to be labelled as it recorded them, and of which it recorded more.
    """

    header: RunHeader
    rollouts: tuple[RolloutRow, ...]
    labels: tuple[LabelRow, ...]
    references: tuple[ReferenceRow, ...]
    anchors: tuple[AnchorRow, ...]
    activations: tuple[ActivationRow, ...]
    labellers: tuple[LabellerRow, ...]
    torn_lines: int
    void_rows: int
    planned: tuple[PlanRow, ...] = ()

    def table(self) -> RolloutTable:
        """Returns the recorded rollouts of a training run as a table of columns."""
        return RolloutTable.of(self.rollouts)

    def _repr_html_(self) -> str:
        """Returns what a notebook shows: what the record has."""
        steps = f"{self.rollouts[0].step} to {self.rollouts[-1].step}" if self.rollouts else "none"
        facts = [
            ("run", self.header.run_id),
            ("steps", f"{steps}, of {self.header.planned_steps} planned"),
            ("rollouts", f"{len(self.rollouts):,}"),
            ("labels", f"{len(self.labels):,}"),
            ("references", f"{len(self.references):,}"),
            ("probes", ", ".join(f"{probe.key} ({probe.role})" for probe in self.header.probes) or "none"),
        ]
        return shown_table(["record", ""], facts, f"{self.torn_lines:,} lines could not be read" if self.torn_lines else "")


@dataclass(eq=False)
class _File:
    """Value object with the content of one file of a training run's record: its name without extension, the headers, the rows and the
    number of unreadable lines.
    """

    name: str
    headers: list[RunHeader]
    rows: list[Row]
    torn: int

    @property
    def header(self) -> RunHeader:
        """Returns the first header, which says when the process began."""
        return self.headers[0]


def read_record(directory: Path | str, *, texts: bool = True) -> Record:
    """Reads the record of a training run from its files, also while the run is still writing them. A file that is not written any more may
    be compressed with gzip, as ``*.jsonl.gz``.

    Args:
        directory: the record's folder.
        texts: whether texts, token ids and scores of tokens are read, too, where they are there; without them reading is faster.

    Raises:
        FileNotFoundError: there is no such folder, or no file of a record in it.
        ValueError: the files are of several runs, or of a newer version of the format.
    """
    folder = Path(directory)
    files = [file for path in _files(folder) if (file := _read_file(path)) is not None]
    if not files:
        raise FileNotFoundError(f"{folder.name}: no record; give the folder that was named as `record`")
    if len(runs := {file.header.run_id for file in files}) > 1:
        raise ValueError(f"{folder.name}: files of several runs ({', '.join(sorted(runs))}); give each run a folder of its own")
    limits = valid_before([FileSteps(file.header, _first_step(file)) for file in files])
    rollouts: dict[tuple[int, str], RolloutRow] = {}
    labels: list[LabelRow] = []
    references: dict[str, ReferenceRow] = {}
    anchors: dict[tuple[int, str], AnchorRow] = {}
    activations: dict[tuple[int, str | None, str | None, str, str, str], ActivationRow] = {}
    planned: dict[tuple[int, str], PlanRow] = {}
    labellers: list[LabellerRow] = []
    details = details_files(folder) if texts else {}
    void = 0
    for file, limit in sorted(zip(files, limits, strict=True), key=lambda pair: pair[0].header.started):
        long_parts = _long_parts(details.get(file.name, []))
        for row in file.rows:
            if isinstance(row, LabellerRow):
                labellers.append(row)
            elif isinstance(row, ReferenceRow):
                references[row.rollout] = row
            elif isinstance(row, (RunHeader, DetailsRow)):
                continue
            elif row.step >= limit and not _names_its_text(row):
                void += 1
            elif isinstance(row, RolloutRow):
                parts = long_parts.get((row.step, row.rollout))
                rollouts[row.step, row.rollout] = row if parts is None else replace(row, **parts)
            elif isinstance(row, LabelRow):
                labels.append(row)
            elif isinstance(row, ActivationRow):
                activations[row.step, row.rollout, row.anchor, row.reading, row.tap, row.pool] = row
            elif isinstance(row, PlanRow):
                planned[row.step, row.rollout] = row
            else:
                anchors[row.step, row.anchor] = row
    retracted = {label.retracts for label in labels}
    known = [label for label in labels if _is_of(label, rollouts.get((label.step, label.rollout)))]
    void += len(labels) - len(known)
    return Record(
        header=max((header for file in files for header in file.headers), key=lambda header: header.started),
        rollouts=tuple(sorted(rollouts.values(), key=lambda row: row.step)),
        labels=tuple(label for label in known if label.row not in retracted and label.label != WITHDRAWN),
        references=tuple(references.values()),
        anchors=tuple(sorted(anchors.values(), key=lambda row: row.step)),
        activations=tuple(activations.values()),
        labellers=tuple(labellers),
        torn_lines=sum(file.torn for file in files),
        void_rows=void,
        planned=tuple(row for key, row in planned.items() if key in rollouts),
    )


def recorded_run_ids(directory: Path | str) -> set[str]:
    """Returns the names of the training runs that the files in the folder of a record are of, without reading more than their first lines;
    empty if there is none yet.
    """
    firsts = (next(_objects(path), None) for path in _files(Path(directory)))
    return {str(values["run_id"]) for values in firsts if values is not None and "run_id" in values}


def _files(folder: Path) -> list[Path]:
    details = {path for paths in details_files(folder).values() for path in paths}
    return sorted({*folder.glob("*.jsonl"), *folder.glob("*.jsonl.gz")} - details)


def _long_parts(paths: Sequence[Path]) -> dict[tuple[int, str], dict[str, Any]]:
    """Reads the long parts of rollouts (texts, token ids, scores of tokens) by step and name of the rollout; a torn line is as if it were
    not there, and so is a file that is deleted meanwhile.
    """
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            for values in _objects(path):
                if values is not None and isinstance(row := from_object(values), DetailsRow):
                    found[row.step, row.rollout] = {name: value for name in DETAILS if (value := getattr(row, name)) is not None}
    return found


def _read_file(path: Path) -> _File | None:
    """Reads one file of a training run's record; returns ``None`` if even the first line is not whole, as in the moment in which a process
    begins to write.
    """
    torn, rows = 0, []
    for values in _objects(path):
        if values is None:
            torn += 1
            continue
        version = values.get("schema_version", 0)
        if values["kind"] == RunHeader.kind and isinstance(version, int) and version > SCHEMA_VERSION:
            raise ValueError(f"{path.name}: schema version {version}; this reader knows up to {SCHEMA_VERSION}: install a newer probescore")
        try:
            row = from_object(values)
        except (TypeError, KeyError):
            torn += 1
            continue
        if row is not None:
            rows.append(row)
    headers = [row for row in rows if isinstance(row, RunHeader)]
    return _File(path.name.partition(".")[0], headers, rows, torn) if headers else None


def _objects(path: Path) -> Iterator[dict[str, object] | None]:
    """Parses the lines of one file of a training run's record; yields ``None`` for a line that is not a JSON object with the field
    ``kind``.
    """
    for line in _lines(path):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError:
            yield None
            continue
        yield values if isinstance(values, dict) and "kind" in values else None


def _lines(path: Path) -> Iterator[bytes]:
    """Yields the lines of one file of a training run's record, decompressed; where a compressed file is torn, the last line cannot be
    parsed.
    """
    if path.suffix != ".gz":
        with path.open("rb") as plain:
            yield from plain
        return
    with gzip.open(path) as packed:
        try:
            yield from packed
        except (EOFError, zlib.error, gzip.BadGzipFile):
            yield b"torn"


def _names_its_text(row: Row) -> bool:
    """Returns whether a row is a label that says by itself of which text it is: then it counts wherever that text is, since one who labels
    may go on while the training starts again.
    """
    return isinstance(row, LabelRow) and row.text_sha256 is not None


def _is_of(label: LabelRow, rollout: RolloutRow | None) -> bool:
    return rollout is not None and label.text_sha256 in (None, rollout.text_sha256)


def _first_step(file: _File) -> int | None:
    return min((row.step for row in file.rows if isinstance(row, RolloutRow)), default=None)
