"""Reads the files of an adapter or a checkpoint, each once from beginning to end, and digests every byte.

Training may overwrite the files at any time. So nothing is mapped into memory, where it would change under the server's hands, and what is
parsed is what was digested.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from probescore_server.errors import ReadingIncomplete, ReadingRefused
from probescore_server.files import kind_of

MAX_SETTINGS_BYTES = 1 << 26

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_LENGTH_BYTES = 8
_PIECE_BYTES = 1 << 24

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Dictionary from the dtypes of a safetensors file that weights may have to torch's."""

_Stamp = tuple[int, int, int, int]


@dataclass(frozen=True)
class _Entry:
    """Value object with one tensor of a safetensors file, as the file's header describes it; ``start`` and ``end`` count bytes after the
    header.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class FilesRead:
    """Reader of the files of one directory, each at most once.

    Args:
        directory: the directory.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stamps: dict[str, _Stamp] = {}
        self._digests: dict[str, str] = {}

    @property
    def digests(self) -> tuple[tuple[str, str], ...]:
        """Returns the names of the files read, sorted, each with the SHA-256 of its bytes."""
        return tuple(sorted(self._digests.items()))

    def has(self, name: str) -> bool:
        """Returns whether there is a file of a name."""
        return (self._directory / name).is_file()

    def content(self, name: str) -> bytes:
        """Returns the bytes of a small file.

        Raises:
            ReadingIncomplete: the file is missing.
            ReadingRefused: it is no regular file, or too large.
        """
        with self._opened(name) as (descriptor, size):
            if size > MAX_SETTINGS_BYTES:
                raise ReadingRefused(name, f"{size} bytes; at most {MAX_SETTINGS_BYTES} are read")
            content = bytes(_read(descriptor, size, name))
            self._digests[name] = hashlib.sha256(content).hexdigest()
        return content

    def tensors(self, name: str, wanted: Callable[[str], bool]) -> dict[str, torch.Tensor]:
        """Reads a safetensors file from beginning to end, and returns those tensors whose names are wanted.

        Raises:
            ReadingIncomplete: the file is missing, or shorter than its header says.
            ReadingRefused: it is no safetensors file, or a wanted tensor is of a dtype that weights do not have.
        """
        digest = hashlib.sha256()
        found: dict[str, torch.Tensor] = {}
        with self._opened(name) as (descriptor, size):
            if size < _LENGTH_BYTES:
                raise ReadingIncomplete(f"{name} has {size} bytes: it is being written")
            length = _read(descriptor, _LENGTH_BYTES, name)
            header_bytes = int.from_bytes(length, "little")
            if header_bytes > _MAX_HEADER_BYTES:
                raise ReadingRefused(name, "not a safetensors file")
            if size < _LENGTH_BYTES + header_bytes:
                raise ReadingIncomplete(f"{name} ends within its header: it is being written")
            header = _read(descriptor, header_bytes, name)
            digest.update(length)
            digest.update(header)
            entries = _entries(bytes(header), name)
            due = _LENGTH_BYTES + header_bytes + max((entry.end for entry in entries), default=0)
            if size < due:
                raise ReadingIncomplete(f"{name} has {size} of {due} bytes: it is being written")
            if size > due:
                raise ReadingRefused(name, f"{size - due} bytes beyond its last tensor")
            for entry in entries:
                if wanted(entry.name):
                    content = _read(descriptor, entry.end - entry.start, name)
                    digest.update(content)
                    found[entry.name] = _tensor(content, entry, name)
                else:
                    for piece in _pieces(descriptor, entry.end - entry.start, name):
                        digest.update(piece)
            self._digests[name] = digest.hexdigest()
        return found

    def check_unchanged(self) -> None:
        """Checks that no file that was read has been written or replaced since.

        Raises:
            ReadingIncomplete: one has; it is named.
        """
        for name, stamp in self._stamps.items():
            try:
                now = _stamp((self._directory / name).stat())
            except OSError:
                now = None
            if now != stamp:
                raise ReadingIncomplete(f"{name} changed while it was read: it is being written")

    @contextmanager
    def _opened(self, name: str) -> Iterator[tuple[int, int]]:
        """Yields a file's descriptor and size, and checks afterwards that the file has not changed meanwhile."""
        path = self._directory / name
        try:
            # without O_NONBLOCK, opening a pipe would wait until somebody writes to it
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            raise ReadingIncomplete(f"{name} is missing: the files are being written, or are not all there") from None
        except OSError as error:
            raise ReadingRefused(name, kind_of(path) or error.strerror or type(error).__name__) from None
        try:
            if kind := kind_of(path):
                raise ReadingRefused(name, f"{kind}, not a regular file")
            before = os.fstat(descriptor)
            yield descriptor, before.st_size
            if _stamp(os.fstat(descriptor)) != _stamp(before):
                raise ReadingIncomplete(f"{name} changed while it was read: it is being written")
            self._stamps[name] = _stamp(before)
        finally:
            os.close(descriptor)


def tensors_in(content: bytes, name: str) -> dict[str, torch.Tensor]:
    """Returns the tensors of the content of a whole safetensors file.

    Raises:
        ReadingRefused: it is none, or a tensor is of a dtype that weights do not have.
    """
    start = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")
    if len(content) < min(start, _LENGTH_BYTES + _MAX_HEADER_BYTES) or start > _LENGTH_BYTES + _MAX_HEADER_BYTES:
        raise ReadingRefused(name, "not a safetensors file")
    entries = _entries(content[_LENGTH_BYTES:start], name)
    due = start + max((entry.end for entry in entries), default=0)
    if len(content) != due:
        raise ReadingRefused(name, f"{len(content)} of {due} bytes: it is not whole")
    return {entry.name: _tensor(bytearray(content[start + entry.start : start + entry.end]), entry, name) for entry in entries}


def _stamp(found: os.stat_result) -> _Stamp:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _pieces(descriptor: int, size: int, name: str) -> Iterator[bytes]:
    while size:
        piece = os.read(descriptor, min(size, _PIECE_BYTES))
        if not piece:
            raise ReadingIncomplete(f"{name} became shorter while it was read: it is being written")
        size -= len(piece)
        yield piece


def _read(descriptor: int, size: int, name: str) -> bytearray:
    content = bytearray(size)
    end = 0
    for piece in _pieces(descriptor, size, name):
        content[end : end + len(piece)] = piece
        end += len(piece)
    return content


def _entries(header: bytes, name: str) -> list[_Entry]:
    """Returns the tensors of a safetensors file in the order of their bytes.

    The format is described at https://huggingface.co/docs/safetensors/index#format
    """
    try:
        written: dict[str, dict[str, Any]] = json.loads(header)
        written.pop("__metadata__", None)
        entries = [
            _Entry(tensor, str(entry["dtype"]), tuple(map(int, entry["shape"])), *map(int, entry["data_offsets"]))
            for tensor, entry in written.items()
        ]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ReadingRefused(name, "its header is not one of a safetensors file") from None
    entries.sort(key=lambda entry: (entry.start, entry.end))
    end = 0
    for entry in entries:
        if entry.start != end or entry.end < entry.start:
            raise ReadingRefused(
                name, f"its header is not one of a safetensors file: {entry.name[:200]} does not begin where the last ended"
            )
        end = entry.end
    return entries


def _tensor(content: bytearray, entry: _Entry, name: str) -> torch.Tensor:
    dtype = DTYPES.get(entry.dtype)
    if dtype is None:
        raise ReadingRefused(f"{name}: {entry.name[:200]}", f"found dtype {entry.dtype[:20]}, expected one of {', '.join(DTYPES)}")
    if math.prod(entry.shape) * dtype.itemsize != len(content) or any(size < 0 for size in entry.shape):
        raise ReadingRefused(f"{name}: {entry.name[:200]}", f"{len(content)} bytes are not {entry.dtype} {list(entry.shape)}")
    if not content:
        return torch.empty(entry.shape, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype).view(entry.shape)
