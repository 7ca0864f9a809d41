"""Writes one process's part of a training run's record, which is a folder of JSON Lines files."""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from probescore_audit.record.details import delete_details, details_path, first_step_of
from probescore_audit.record.rows import DETAILS, TEXTS, DetailsRow, LabelRow, RolloutRow, Row, RunHeader, to_line

logger = logging.getLogger(__name__)


class RecordWriter:
    """Writer of one process's file in the record of a training run.

    Args:
        directory: the record's folder; it is made if it does not exist.
        header: description of the run, written first.
        on_error: what happens if the disk is full, or fails: ``"log"`` = an error is logged and the rows are lost, since a record must not
            end a training run; ``"raise"`` = the ``OSError`` is raised.
        keep_texts: whether texts and token ids of rollouts are written; otherwise they are left out, whatever a row has.
        kept_steps: number of the latest training steps whose texts, token ids and scores of tokens are kept; those of earlier ones are
            deleted as the run goes on. ``None`` = all.
        durable: whether ``append`` returns only once the rows are on the disk, so that not even a power failure loses them, and leaves
            nothing of rows that it could not write.

    Attributes:
        path: path of the process's file.
        name: name of the file among those of the run.
        lost_rows: number of rows that could not be written.

    Raises:
        OSError: the folder or the file cannot be made.
    """

    def __init__(
        self,
        directory: Path | str,
        header: RunHeader,
        *,
        on_error: Literal["log", "raise"] = "log",
        keep_texts: bool = False,
        kept_steps: int | None = None,
        durable: bool = False,
    ) -> None:
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.name = uuid.uuid4().hex[:12]
        self.path = folder / f"rank{header.rank:05d}-{self.name}.jsonl"
        self.lost_rows = 0
        self._raises = on_error == "raise"
        self._keep_texts = keep_texts
        self._kept_steps = kept_steps
        self._durable = durable
        self._detailed: set[Path] = set()
        self._torn = False
        self._header: RunHeader | None = header
        self._file: int | None = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        self.append([])
        if durable:
            _sync_folder(folder)

    def append(self, rows: Iterable[Row]) -> None:
        """Appends rows to the process's file in a training run's record, all by one call of the operating system. Texts, token ids and
        scores of tokens are appended to another file before that.

        Raises:
            OSError: the rows cannot be written, and ``on_error`` is ``"raise"``.
            ValueError: a number of a row is not finite, or the writer is closed.
        """
        if self._file is None:
            raise ValueError(f"{self.path.name} is closed")
        details: dict[Path, list[str]] = {}
        # Rows without a header could not be read: it is written with them until it is there.
        headers = [] if self._header is None else [to_line(self._header)]
        lines = [*headers]
        for row in rows:
            if isinstance(row, LabelRow) and not row.row:
                row = replace(row, row=uuid.uuid4().hex)
            elif isinstance(row, RolloutRow) and (long := self._long_parts(row)):
                details.setdefault(details_path(self.path, row.step, self._kept_steps), []).append(to_line(long))
                row = _without(row, DETAILS)
            elif isinstance(row, RolloutRow) and not self._keep_texts:
                row = _without(row, TEXTS)
            lines.append(to_line(row))
        if not lines:
            return
        self._append_details(details)
        # After a line that was written in part a line's end comes first: the torn line is then the only one that cannot be read.
        data = _encoded(("\n" if self._torn else "") + "\n".join(lines) + "\n")
        written, size = 0, os.fstat(self._file).st_size
        try:
            while written < len(data):
                written += os.write(self._file, data[written:])
            if self._durable:
                os.fsync(self._file)
        except OSError as error:
            self._torn = self._torn or (written > 0 and not self._durable)
            if self._durable and not self._cut_to(size):
                self._torn = True
            self.lost_rows += len(lines) - len(headers)
            if self._raises:
                raise
            logger.error("the record lost %d rows: %s", len(lines) - len(headers), error.strerror)
            return
        self._torn, self._header = False, None

    def _cut_to(self, size: int) -> bool:
        """Cuts off what was written of rows that could not be written as a whole, so that none of these is there after all; returns whether
        this succeeded. No other process writes this file.
        """
        assert self._file is not None  # noqa: S101 - append was called
        try:
            os.ftruncate(self._file, size)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Closes the process's file in a training run's record. A second call does nothing."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _long_parts(self, row: RolloutRow) -> DetailsRow | None:
        """Returns the parts of a rollout's row that are written to another file; ``None`` if it has none, or none that are kept."""
        names = DETAILS if self._keep_texts else [name for name in DETAILS if name not in TEXTS]
        parts = {name: value for name in names if (value := getattr(row, name)) is not None}
        return DetailsRow(step=row.step, rollout=row.rollout, **parts) if parts else None

    def _append_details(self, details: Mapping[Path, list[str]]) -> None:
        """Appends the long parts of rollouts to their files, and deletes files that are older than is kept.

        Raises:
            OSError: they cannot be written, and ``on_error`` is ``"raise"``.
        """
        for path, lines in details.items():
            try:
                with path.open("ab", buffering=0) as file:
                    # a line's end first, whatever became of the lines before
                    data = _encoded("\n" + "\n".join(lines) + "\n")
                    while data:
                        data = data[file.write(data) :]
                if self._kept_steps is not None and path not in self._detailed:
                    delete_details(path.parent, first_step_of(path) - self._kept_steps + 1)
                    self._detailed.add(path)
            except OSError as error:
                if self._raises:
                    raise
                logger.error("the record lost the texts of %d rollouts: %s", len(lines), error.strerror)


def _encoded(lines: str) -> bytes:
    """Returns lines of JSON in UTF-8. Half of a surrogate pair, which a text may have and UTF-8 cannot, becomes its escape in JSON."""
    return lines.encode("utf-8", "backslashreplace")


def _sync_folder(folder: Path) -> None:
    """Waits until the name of a new file is on the disk, where the file system can say so."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _without(row: RolloutRow, names: Sequence[str]) -> RolloutRow:
    absent: dict[str, Any] = dict.fromkeys(names)
    return replace(row, **absent)
