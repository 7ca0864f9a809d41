"""Reads the lines of a record's files from where reading stopped before, with the place of each, so that long parts can be read later."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probescore_audit.record.details import details_files


@dataclass(frozen=True)
class RunFile:
    """Value object with a file of a record as it is on the disk now.

    Attributes:
        path: where it is.
        stem: name of the process's file to which it belongs, without extension: its own, or for long parts that of the rollouts.
        details: whether it has long parts of rollouts (texts, token ids, scores of tokens).
        size: its size in bytes.
        changed: time of its last change, in nanoseconds since 1970.
    """

    path: Path
    stem: str
    details: bool
    size: int
    changed: int

    @property
    def packed(self) -> bool:
        """Returns whether the file is compressed; it is then read as a whole, and not written any more."""
        return self.path.suffix == ".gz"


@dataclass(frozen=True)
class Line:
    """Value object with a line of a record's file: its values (``None`` if it could not be read), and its place in bytes."""

    values: dict[str, Any] | None
    offset: int
    length: int


def run_files(folder: Path) -> list[RunFile]:
    """Returns the files of the record in a folder, those with rollouts and labels before those with long parts."""
    details = {path: stem for stem, paths in details_files(folder).items() for path in paths}
    found: list[RunFile] = []
    for path in sorted({*folder.glob("*.jsonl"), *folder.glob("*.jsonl.gz")}, key=lambda path: (path in details, path.name)):
        try:
            status = path.stat()
        except FileNotFoundError:  # it has just been packed, or its texts deleted
            continue
        stem = details.get(path, path.name.partition(".")[0])
        found.append(RunFile(path, stem, path in details, status.st_size, status.st_mtime_ns))
    return found


def new_lines(file: RunFile, start: int) -> Iterator[Line]:
    """Yields the whole lines of a file from a place on; a last line without an end is left for later, since it is being written."""
    if file.packed:
        yield from _packed_lines(file)
        return
    with file.path.open("rb") as lines:
        lines.seek(start)
        offset = start
        for line in lines:
            if not line.endswith(b"\n"):
                return
            if line.strip():
                yield Line(_values(line), offset, len(line))
            offset += len(line)


def _packed_lines(file: RunFile) -> Iterator[Line]:
    with gzip.open(file.path) as lines:
        try:
            for line in lines:
                if line.strip():
                    yield Line(_values(line), 0, 0)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            yield Line(None, 0, 0)


def _values(line: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) and isinstance(values.get("kind"), str) else None
