"""Finds the probe files that the server's setting ``probes`` names at the moment, and reads them into the spool, a store of file contents
that the worker processes read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from probescore_server.errors import ProbeRefused, StartupError
from probescore_server.files import MAX_PROBE_FILE_BYTES, UnreadableFile, adapter_path, read_adapter_beside, read_regular_file
from probescore_server.spool import Spool, SpooledFile

_FileStamp = tuple[int, int, int, int] | None
Stamp = tuple[_FileStamp, _FileStamp]
"""Type of the state of a probe file, and of the adapter beside it: device number, inode, size in bytes and time of last change in
nanoseconds; ``None`` if it cannot be looked at.
"""


@dataclass(frozen=True, eq=False)
class FolderContents:
    """Value object with the probe files of a server as they were read at one moment.

    Attributes:
        files: the content of each file, a dictionary keyed by path.
        refused: the exception that refuses each file that cannot be read, keyed by path.
        stamps: the state of the file at each path, and of the adapter beside it (inode, size and time of last change), before it was read.
    """

    files: Mapping[str, SpooledFile]
    refused: Mapping[str, ProbeRefused] = field(default_factory=dict)
    stamps: Mapping[str, Stamp] = field(default_factory=dict)


class ProbeFolder:
    """Finder of the probe files that the operator has named: single files, and every ``*.onnx`` file in directories.

    Files in directories are left out if their names begin with a dot, so that a file can be written under such a name and then be renamed.

    Args:
        paths: the paths of files and directories.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = [Path(path) for path in paths]
        self._directories = {path for path in self._paths if path.is_dir()}

    def stamps(self) -> dict[str, Stamp]:
        """Returns the state (inode, size and time of last change) of every probe file without reading it: a dictionary keyed by path,
        sorted by path within each directory.

        Raises:
            StartupError: a directory cannot be read, or is not there any more.
        """
        found: dict[str, Stamp] = {}
        for path in self._paths:
            if path.is_dir():
                self._directories.add(path)
                try:
                    names = sorted(name for name in os.listdir(path) if name.endswith(".onnx") and not name.startswith("."))  # noqa: PTH208
                except OSError as error:
                    raise StartupError(f"probes: the directory {path} cannot be read: {error.strerror}") from None
                found |= {str(path / name): _stamp(path / name) for name in names}
            elif path in self._directories:
                raise StartupError(f"probes: the directory {path} is not there any more")
            else:
                found[str(path)] = _stamp(path)
        return found

    def read(self, spool: Spool, *, missing_is_refused: bool = False) -> FolderContents:
        """Reads each probe file that the operator has named, one time each, and returns their contents.

        Args:
            spool: store that receives the files' contents.
            missing_is_refused: whether a named file that does not exist is refused instead of being left out.

        Raises:
            StartupError: a directory cannot be read, or is not there any more.
        """
        stamps = self.stamps()
        files: dict[str, SpooledFile] = {}
        refused: dict[str, ProbeRefused] = {}
        with spool.keeping() as writer:
            for path in stamps:
                if not missing_is_refused and not os.path.lexists(path):
                    continue
                try:
                    files[path] = writer.keep(path, read_regular_file(path, MAX_PROBE_FILE_BYTES), read_adapter_beside(path))
                except UnreadableFile as error:
                    refused[path] = ProbeRefused(path, error.field, error.found, error.expected)
        return FolderContents(files, refused, stamps)


def _stamp(path: Path) -> Stamp:
    return _file_stamp(path), _file_stamp(adapter_path(path))


def _file_stamp(path: Path) -> _FileStamp:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
