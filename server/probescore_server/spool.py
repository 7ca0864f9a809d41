"""Keeps the content of probe files in memory as it was first read, so that every worker process, including one that starts later, gets the
same bytes.

The front process, which owns the server's port and starts the worker processes, reads each file once, into memory that belongs to no
folder. The file may be replaced or removed afterwards: its content stays in memory until the front process forgets it. A process that reads
the content from memory refuses it if it has changed.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import FileIO
from typing import IO

from probescore_server.errors import StartupError


@dataclass(frozen=True)
class SpooledFile:
    """Value object that says where the content of a probe file is kept in memory, for processes of the same user on the same machine.

    Attributes:
        file: the file's path as it was read, for messages.
        sha256: digest of the content, and of the adapter beside it if there is one, in hexadecimal digits.
        volume: path of the anonymous file that holds the content, as long as the content is kept.
        start: index of the content's first byte in the anonymous file.
        size: number of bytes of the content.
        adapter: where the content of the adapter beside the file is kept; ``None`` = there is none.
    """

    file: str
    sha256: str
    volume: str
    start: int
    size: int
    adapter: SpooledFile | None = None

    def read(self) -> bytes:
        """Returns the content of a probe file from the memory in which it is kept.

        Raises:
            StartupError: the content is not there any more, or is not the content that was kept.
        """
        try:
            with open(self.volume, "rb", buffering=0) as volume:  # noqa: PTH123 - of a descriptor, which is no path on a disk
                volume.seek(self.start)
                content = _read(volume, self.size)
        except OSError as error:
            raise StartupError(f"{self.file}: what was read of it cannot be read again: {error.strerror}") from None
        if _digest(content, self.adapter) != self.sha256:
            raise StartupError(f"{self.file}: what was read of it has changed in memory")
        return content


@dataclass(eq=False)
class _Volume:
    """Anonymous file in memory that holds the content of several probe files, which were kept together."""

    file: IO[bytes]
    held: set[str] = field(default_factory=set)


class Spool:
    """Store, in memory, of the content of probe files, with equal content kept once. It belongs to one process, and its methods run one at
    a time.

    The files of one ``keeping`` block share one open file, however many they are.
    """

    def __init__(self) -> None:
        self._volumes: list[_Volume] = []
        self._kept: dict[str, SpooledFile] = {}

    @contextmanager
    def keeping(self) -> Iterator[SpoolWriter]:
        """Context manager that yields a writer, which keeps the content of probe files together in one new anonymous file in memory."""
        volume = _Volume(_anonymous_file())
        self._volumes.append(volume)
        try:
            yield SpoolWriter(volume, self._kept)
        finally:
            self._close_empty()

    def keep_only(self, digests: Iterable[str]) -> None:
        """Forgets the content of all probe files except content that has one of the given SHA-256 digests. The memory of files that were
        kept together is freed once the content of all of them is forgotten.
        """
        wanted = set(digests)
        wanted |= {kept.adapter.sha256 for sha256, kept in self._kept.items() if sha256 in wanted and kept.adapter is not None}
        self._kept = {sha256: kept for sha256, kept in self._kept.items() if sha256 in wanted}
        for volume in self._volumes:
            volume.held &= wanted
        self._close_empty()

    def close(self) -> None:
        """Forgets the content of all probe files that are kept in memory."""
        self.keep_only(())

    def _close_empty(self) -> None:
        for volume in [volume for volume in self._volumes if not volume.held]:
            volume.file.close()
            self._volumes.remove(volume)


class SpoolWriter:
    """Writer that adds the content of probe files to one anonymous file in memory, from which worker processes can read it."""

    def __init__(self, volume: _Volume, kept: dict[str, SpooledFile]) -> None:
        self._volume = volume
        self._kept = kept

    def keep(self, file: str, content: bytes, adapter: bytes | None = None) -> SpooledFile:
        """Keeps the content of a probe file in memory, and of the adapter beside it if there is one, unless equal content is kept already,
        and returns where it is kept.
        """
        beside = None if adapter is None else self.keep(f"{file}: its adapter", adapter)
        sha256 = _digest(content, beside)
        known = self._kept.get(sha256)
        if known is not None:
            return replace(known, file=file)
        target = self._volume.file
        start, left = target.seek(0, os.SEEK_END), memoryview(content)
        while left:
            left = left[target.write(left) :]
        path = f"/proc/{os.getpid()}/fd/{target.fileno()}" if isinstance(target.name, int) else str(target.name)
        kept = self._kept[sha256] = SpooledFile(file, sha256, path, start, len(content), beside)
        self._volume.held.add(sha256)
        return kept


def _digest(content: bytes, adapter: SpooledFile | None) -> str:
    digest = hashlib.sha256(content)
    if adapter is not None:
        digest.update(bytes.fromhex(adapter.sha256))
    return digest.hexdigest()


def _read(volume: IO[bytes], size: int) -> bytes:
    content = bytearray()
    while len(content) < size and (piece := volume.read(size - len(content))):
        content += piece
    return bytes(content)


def _anonymous_file() -> IO[bytes]:
    if hasattr(os, "memfd_create"):  # Linux: it needs no folder, and nothing is left of it when the process is killed
        return FileIO(os.memfd_create("probes"), "r+b")
    return tempfile.NamedTemporaryFile(prefix="probescore-probes-", buffering=0)
